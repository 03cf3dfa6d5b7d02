"""What would have no effect is refused by name, if it was the user who asked for it."""

from __future__ import annotations

from typing import Any

import pytest

from configs.data import Augment, Subset
from configs.errors import FieldError
from configs.load import SpecError, list_presets, parse_spec
from configs.resolve import resolve
from tests.configs.specs import CARD, EVALUATE, PRETRAIN, job, source

SOURCE = {"type": "folder", "name": "pictures"}
NEVER = {"eval.at_end": False}


def faults(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, FieldError]:
    with pytest.raises(SpecError) as caught:
        job(base, **overrides)
    return {error.pointer: error for error in caught.value.errors}


@pytest.mark.parametrize(
    ("base", "overrides", "pointer"),
    [
        (EVALUATE, {"data": {"source": SOURCE, "subset": {"fraction": 0.5}}}, "/data/subset"),
        (EVALUATE, {"data": {"source": SOURCE, "augment": {"flip": False}}}, "/data/augment"),
        (EVALUATE, {"data": {"source": SOURCE, "mix": {"mixup": 0.2}}}, "/data/mix"),
        (EVALUATE, {"data": {"source": SOURCE, "train": "trainval"}}, "/data/train"),
        (EVALUATE, {"data": {"source": SOURCE, "holdout": {"fraction": 0.1}, "eval": "val"}}, "/data/eval"),
        (PRETRAIN, {"data.holdout": {"fraction": 0.1}}, "/data/eval"),
        (PRETRAIN, NEVER | {"checkpoint.keep_best": 2}, "/checkpoint/keep_best"),
        (PRETRAIN, NEVER | {"checkpoint.keep_best": 1}, "/checkpoint/keep_best"),
        (PRETRAIN, NEVER | {"checkpoint.metric": "eval/loss"}, "/checkpoint/metric"),
    ],
)
def test_a_field_without_effect_is_refused_by_name(
    base: dict[str, Any], overrides: dict[str, Any], pointer: str
) -> None:
    found = faults(base, overrides)
    assert set(found) == {pointer}
    field = pointer[1:].replace("/", ".")
    assert found[pointer].message.startswith(f"{field} has no effect ")
    assert found[pointer].value is not None
    assert found[pointer].allowed


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        (EVALUATE, {"data": {"source": SOURCE, "subset": None, "augment": {"crop": "inception"}, "mix": None}}),
        (EVALUATE, {"data": {"source": SOURCE, "train": "train", "eval": "val"}}),
        (EVALUATE, {"data": {"source": SOURCE, "train": "trainval", "holdout": {"fraction": 0.1}}}),
        (PRETRAIN, {"data.holdout": {"fraction": 0.1}, "data.eval": "train"}),
        (PRETRAIN, NEVER),
        (PRETRAIN, NEVER | {"checkpoint.keep_best": 0}),
        (PRETRAIN, NEVER | {"eval.every_steps": 5, "checkpoint.keep_best": 3, "checkpoint.metric": "eval/loss"}),
        (PRETRAIN, {"checkpoint.keep_best": 3}),
    ],
)
def test_what_has_an_effect_or_asks_for_nothing_is_taken(base: dict[str, Any], overrides: dict[str, Any]) -> None:
    job(base, **overrides)


def test_what_a_preset_says_is_not_the_users_mistake() -> None:
    # It names the split to evaluate on, and evaluates at the end.
    (preset,) = [p for p in list_presets() if p.name == "paper/finetune/flowers-l16"]
    assert preset.spec["data"]["eval"] == "test"
    raw = {"preset": preset.name, "init_from": "ckpt_x", "data": {"holdout": {"fraction": 0.1}}}
    parse_spec(raw | {"eval": {"every_steps": None, "at_end": False}})


def test_a_resolved_description_can_be_submitted_again() -> None:
    trained_on = job(PRETRAIN).data.model_copy(
        update={"subset": Subset(fraction=0.5), "augment": Augment(flip=False), "holdout": None}
    )
    evaluation = resolve(job(EVALUATE), CARD, source(data=trained_on))
    assert evaluation.data is not None
    assert (evaluation.data.subset, evaluation.data.augment) == (None, Augment())
    training = resolve(job(PRETRAIN, **NEVER), CARD, None)
    held_out = resolve(job(PRETRAIN, **{"data.holdout": {"fraction": 0.1}, "data.eval": "train"}), CARD, None)
    for resolved in (evaluation, training, held_out):
        again = parse_spec(resolved.model_dump(mode="json"))
        assert again == resolved
