"""Masked patch prediction in job descriptions: what it fills in, what it refuses, what may follow it."""

from __future__ import annotations

from typing import Any

import pytest

from configs.cost import num_parameters
from configs.errors import SpecError
from configs.plan import plan
from configs.resolve import resolve, training_fingerprint
from configs.spec import PretrainJob
from tests.configs.specs import CARD, EVALUATE, FINETUNE, PRETRAIN, job, source

MASKED: dict[str, Any] = {**PRETRAIN, "train": {"global_batch_size": 64, "objective": "masked_patch"}}
LEFT = {"head": "masked_patch", "num_classes": 512}


def test_the_head_is_filled_in() -> None:
    resolved = resolve(job(MASKED), CARD, None)
    assert isinstance(resolved, PretrainJob)
    assert (resolved.model.head, resolved.model.num_classes) == ("masked_patch", 512)
    assert resolve(resolved, CARD, None) == resolved
    grey = resolve(job(MASKED, model__in_channels=1), CARD, None)
    assert isinstance(grey, PretrainJob)
    assert grey.model.num_classes == 8
    made = plan(job(MASKED), CARD)
    assert made.parameters == num_parameters(resolved.model.network())
    plain = resolve(job(PRETRAIN), CARD, None)
    assert training_fingerprint(resolved, "x") != training_fingerprint(plain, "x")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model__head": "mlp"}, "model.head mlp does not apply to train.objective masked_patch"),
        ({"model__pool": "map"}, "model.pool map does not apply"),
        ({"model__pool": "patch_mean"}, "model.pool patch_mean does not apply"),
        ({"train__loss": "sigmoid"}, "train.loss sigmoid does not apply"),
        ({"train__label_smoothing": 0.1}, "train.label_smoothing 0.1 does not apply"),
        ({"data__mix": {"mixup": 0.2}}, "data.mix"),
        ({"optim__train": "head"}, "optim.train head does not apply"),
        ({"model__image_size": 4}, "at least 2 patches, model.image_size 4 gives 1"),
        ({"model": {"variant": "R50x1", "image_size": 32}}, "does not apply to a ResNet"),
        ({"model__num_classes": 5}, "tells 512 colours of 3 channels apart"),
        ({"train__objective": "colours"}, "masked_patch"),
    ],
)
def test_what_does_not_apply_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(job(MASKED, **overrides), CARD, None)
    assert words in " ".join(fault.message for fault in caught.value.errors)


def test_the_head_alone_and_fine_tuning_by_it_are_refused() -> None:
    for base, overrides in (
        (PRETRAIN, {"model__head": "masked_patch"}),
        (FINETUNE, {"train__objective": "masked_patch"}),
    ):
        with pytest.raises(SpecError) as caught:
            job(base, **overrides)
        assert "masked_patch" in caught.value.errors[0].message


def test_a_fine_tune_gets_a_new_head() -> None:
    resolved = resolve(job(FINETUNE), CARD, source(**LEFT))
    assert not isinstance(resolved, PretrainJob)
    assert resolved.model.head == "linear"  # type: ignore[union-attr]
    assert resolved.model.num_classes == 5  # type: ignore[union-attr]
    with pytest.raises(SpecError, match="no classifier to keep"):
        resolve(job(FINETUNE, keep_head=True), CARD, source(**LEFT))


def test_what_needs_a_classifier_is_refused() -> None:
    with pytest.raises(SpecError, match="has no classifier; fine-tune it first"):
        resolve(job(EVALUATE, data=PRETRAIN["data"]), CARD, source(**LEFT))
    resolve(job(EVALUATE, data=PRETRAIN["data"], neighbours={}), CARD, source(**LEFT))
    export = {"kind": "export", "init_from": "ckpt_x", "format": "timm"}
    with pytest.raises(SpecError, match="has no classifier; fine-tune it first"):
        resolve(job(export), None, source(**LEFT))
    resolve(job(export, format="safetensors"), None, source(**LEFT))
