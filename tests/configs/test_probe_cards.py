"""Data sets to probe features on: named as data sets are, checked and pinned at submission."""

from __future__ import annotations

from typing import Any

import pytest

from configs.errors import SpecError
from configs.probe_cards import fill_probes
from configs.spec import EvaluateJob, PretrainJob
from tests.configs.specs import CARD, EVALUATE, PRETRAIN, job

PICTURES = {"source": {"type": "folder", "name": "pictures"}, "eval": "val"}
CIFAR = {"source": {"type": "torchvision", "name": "CIFAR10"}}
REGISTERED = {"pictures": CARD}


def test_a_folder_is_pinned_to_what_it_holds() -> None:
    spec = fill_probes(
        job(EVALUATE, few_shot={"datasets": [CIFAR, PICTURES]}, neighbours={"datasets": [PICTURES]}), REGISTERED
    )
    assert isinstance(spec, EvaluateJob)
    assert spec.few_shot is not None
    assert spec.neighbours is not None
    assert [d.fingerprint for d in spec.few_shot.datasets] == [None, "sha256:pictures"]
    assert [d.label for d in spec.few_shot.datasets] == ["CIFAR10", "pictures"]
    assert spec.neighbours.datasets[0] == spec.few_shot.datasets[1]
    assert fill_probes(spec, REGISTERED) == spec
    trained = fill_probes(job(PRETRAIN, eval__few_shot={"datasets": [PICTURES]}), REGISTERED)
    assert isinstance(trained, PretrainJob)
    assert trained.eval.few_shot is not None
    assert trained.eval.few_shot.datasets[0].fingerprint == "sha256:pictures"


def faults(probes: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        fill_probes(job(EVALUATE, **probes), REGISTERED)
    return {fault.pointer: fault.message for fault in caught.value.errors}


def test_every_fault_is_told_at_its_place() -> None:
    unknown = {"source": {"type": "folder", "name": "picture"}}
    found = faults(
        {
            "few_shot": {"datasets": [CIFAR | {"train": "val"}, unknown]},
            "neighbours": {"datasets": [PICTURES | {"eval": "x"}]},
        }
    )
    assert set(found) == {
        "/few_shot/datasets/0/train",
        "/few_shot/datasets/1/source/name",
        "/neighbours/datasets/0/eval",
    }
    assert found["/few_shot/datasets/0/train"] == "train 'val': data set CIFAR10 has no such split, it has train, test"
    assert "Did you mean pictures?" in found["/few_shot/datasets/1/source/name"]
    stale = faults({"few_shot": {"datasets": [PICTURES | {"fingerprint": "sha256:old"}]}})
    assert "holds other images now" in stale["/few_shot/datasets/0/fingerprint"]


def test_names_are_told_apart() -> None:
    with pytest.raises(SpecError, match="2 of them are called 'CIFAR10', give each a name of its own"):
        job(EVALUATE, few_shot={"datasets": [CIFAR, CIFAR | {"train": "test"}]})
    both = job(EVALUATE, few_shot={"datasets": [CIFAR, CIFAR | {"train": "test", "name": "reversed"}]})
    assert isinstance(both, EvaluateJob)
    with pytest.raises(SpecError) as caught:
        job(EVALUATE, few_shot={"datasets": [CIFAR | {"name": "a/b"}]})
    assert caught.value.errors[0].pointer == "/few_shot/datasets/0/name"
