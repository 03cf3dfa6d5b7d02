from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.data import DataConfig
from configs.datasets import num_eval_examples
from configs.errors import FieldError, SpecError
from configs.load import parse_spec
from configs.resolve import (
    SourceCheckpoint,
    canonical_json,
    data_of,
    load_resolved,
    num_train_examples,
    resolve,
    spec_hash,
    steps,
    training_fingerprint,
)
from configs.spec import EvaluateJob, TrainingJob
from tests.configs.specs import CARD, EVALUATE, FINETUNE, PRETRAIN, job, source


def resolved(base: dict[str, Any], src: SourceCheckpoint | None = None, **overrides: Any) -> TrainingJob:
    spec = resolve(job(base, **overrides), CARD, src)
    assert isinstance(spec, TrainingJob)
    return spec


def faults(base: dict[str, Any], src: SourceCheckpoint | None = None, **overrides: Any) -> dict[str, FieldError]:
    with pytest.raises(SpecError) as caught:
        resolve(job(base, **overrides), CARD, src)
    return {error.pointer: error for error in caught.value.errors}


def test_everything_open_is_filled() -> None:
    spec = resolved(PRETRAIN, checkpoint__every_epochs=1, eval__every_examples=640)
    assert spec.model.num_classes == 5
    assert spec.model.vit().image_size == (16, 16)
    assert spec.schedule.total_steps == round(3 * 1000 / 64)
    assert spec.schedule.total_epochs is None
    assert spec.schedule.warmup_steps == 0
    assert (spec.checkpoint.every_steps, spec.checkpoint.every_epochs) == (16, None)
    assert (spec.eval.every_steps, spec.eval.every_examples) == (10, None)
    assert spec.train.micro_batch_size == 32


def test_a_resolved_job_round_trips_and_resolving_again_changes_nothing() -> None:
    spec = resolved(PRETRAIN, data__holdout="{fraction: 0.1}", data__eval="train", checkpoint__every_epochs=0.5)
    stored = canonical_json(spec)
    assert load_resolved(stored) == spec
    assert canonical_json(load_resolved(stored)) == stored
    assert spec_hash(stored) == spec_hash(canonical_json(load_resolved(stored)))
    assert resolve(spec, CARD, None) == spec


def test_the_hash_of_a_stored_job_stays() -> None:
    # Stored hashes are compared across versions: a change here breaks every stored job's identity.
    assert spec_hash(b'{"kind":"pretrain"}') == (
        "sha256:bebf82a16c02a4d1e448ae579dbdb5844fb742cdbfbce69ab78a014842fd7d0b"
    )


@pytest.mark.parametrize(
    ("given_as", "expected"),
    [
        ((7, None, None), 7),
        ((None, 3.0, None), 47),
        ((None, 0.001, None), 1),
        ((None, None, 6400), 100),
        ((None, None, 1), 1),
        ((None, 0.0, None), 0),
        ((None, None, None), None),
    ],
)
def test_steps(given_as: tuple[int | None, float | None, int | None], expected: int | None) -> None:
    assert steps(*given_as, num_examples=1000, global_batch_size=64) == expected


def test_epochs_are_counted_as_big_vision_counts_them() -> None:
    assert steps(None, 90.0, None, 1_281_167, 1024) == 112_603


@given(st.floats(0.01, 1000), st.integers(1, 10**7), st.integers(1, 4096))
def test_a_duration_is_at_least_one_step_and_within_half_a_step(epochs: float, examples: int, batch: int) -> None:
    found = steps(None, epochs, None, examples, batch)
    assert found is not None
    assert found >= 1
    assert found == 1 or math.isclose(found, epochs * examples / batch, abs_tol=0.5 + 1e-6)


def test_a_warm_up_longer_than_the_run_is_refused_as_it_was_given() -> None:
    error = faults(PRETRAIN, schedule__warmup_epochs=4)["/schedule/warmup_epochs"]
    assert "62 steps" in error.message
    assert "47 steps" in error.message


# -- data -----------------------------------------------------------------------------------------------------------
def test_classes_that_contradict_the_data_are_refused() -> None:
    error = faults(PRETRAIN, model__num_classes=7)["/model/num_classes"]
    assert (error.value, error.allowed) == (7, "5")
    assert "pictures" in error.message


def test_an_unknown_split_lists_those_there_are() -> None:
    found = faults(PRETRAIN, data__train="training", data__eval="test")
    assert set(found) == {"/data/train", "/data/eval"}
    assert found["/data/train"].allowed == "train, val"


def test_a_batch_larger_than_the_data_is_refused() -> None:
    error = faults(PRETRAIN, train__global_batch_size=1024)["/train/global_batch_size"]
    assert "1024" in error.message
    assert "1000" in error.message


def test_subsets_and_holdouts_change_the_counts() -> None:
    def counts(**overrides: Any) -> tuple[int, int]:
        spec = resolved(PRETRAIN, **overrides, **({"data__eval": "train"} if "data__holdout" in overrides else {}))
        return num_train_examples(spec.data, CARD), num_eval_examples(spec.data, CARD)

    assert counts() == (1000, 200)
    assert counts(data__subset="{fraction: 0.25}") == (250, 200)
    assert counts(data__subset="{per_class: 20}") == (100, 200)
    assert counts(data__subset="{examples: 300}") == (300, 200)
    assert counts(data__holdout="{fraction: 0.1}") == (900, 100)
    assert counts(data__holdout="{examples: 150}") == (850, 150)
    assert counts(data__holdout="{examples: 150}", data__subset="{examples: 300}") == (300, 150)
    assert counts(data__holdout="{examples: 150, of: subset}", data__subset="{examples: 300}") == (150, 150)
    assert counts(data__holdout="{fraction: 0.1, of: subset}", data__subset="{per_class: 40}") == (180, 20)
    assert counts(data__holdout="{fraction: 0.1}", data__subset="{fraction: 0.5}") == (450, 100)
    assert resolved(PRETRAIN, data__subset="{fraction: 0.5}").schedule.total_steps == round(3 * 500 / 64)


def test_a_holdout_is_evaluated_instead_of_the_eval_split() -> None:
    spec = resolved(PRETRAIN, data__holdout="{fraction: 0.1}", data__eval="train")
    assert spec.data.eval == "train"
    # What a preset says of the split gives way to the holdout.
    preset = {"preset": "demo/fashion-mnist-pretrain", "data": {"holdout": {"fraction": 0.1}}}
    assert job(preset).data.holdout is not None


def test_a_batch_must_fit_into_what_the_subset_leaves() -> None:
    assert (
        "50 training examples" in faults(PRETRAIN, data__subset="{fraction: 0.05}")["/train/global_batch_size"].message
    )


def test_too_large_a_subset_is_refused() -> None:
    assert "1250" in faults(PRETRAIN, data__subset="{per_class: 250}")["/data/subset/per_class"].message
    too_many = faults(PRETRAIN, data__subset="{examples: 1001}")["/data/subset/examples"]
    assert too_many.message == "data.subset.examples 1001, split 'train' has 1000"
    assert too_many.allowed == "at most 1000"
    both = faults(
        PRETRAIN, data__holdout="{examples: 300, of: subset}", data__eval="train", data__subset="{examples: 300}"
    )
    assert "leaves none to train on" in both["/data/holdout/examples"].message


def test_a_holdout_of_a_subset_needs_one_and_survives_into_evaluations() -> None:
    with pytest.raises(SpecError, match=r"holdout\.of subset needs a subset"):
        resolved(PRETRAIN, data__holdout="{examples: 150, of: subset}", data__eval="train")
    parts = {"data__holdout": "{examples: 150, of: subset}", "data__subset": "{examples: 300}", "data__eval": "train"}
    trained = resolved(PRETRAIN, **parts).data
    evaluation = resolve(job(EVALUATE), CARD, source(data=trained))
    assert isinstance(evaluation, EvaluateJob)
    assert evaluation.data is not None
    assert evaluation.data.subset == trained.subset
    assert num_eval_examples(evaluation.data, CARD) == 150


def test_a_holdout_that_takes_everything_is_refused() -> None:
    assert "/data/holdout/fraction" in faults(PRETRAIN, data__eval="train", data__holdout="{fraction: 0.9999}")


def test_all_faults_are_found_at_once() -> None:
    found = faults(FINETUNE, source(), model__depth="null", model__num_classes=9, data__eval="x", model__image_size=18)
    assert set(found) == {"/model/num_classes", "/data/eval", "/model/image_size"}


# -- micro-batches --------------------------------------------------------------------------------------------------
def test_a_micro_batch_divides_every_allowed_share() -> None:
    spec = resolved(PRETRAIN, resources__workers="{min: 1, max: 8}", train__global_batch_size=96)
    assert spec.allowed_world_sizes == (1, 2, 3, 4, 6, 8)
    assert spec.train.micro_batch_size == 4
    for world_size in spec.allowed_world_sizes:
        assert 96 // world_size % 4 == 0


def test_a_cpu_takes_at_most_128_images() -> None:
    assert resolved(PRETRAIN, train__global_batch_size=800, resources__workers=1).train.micro_batch_size == 100


def test_a_given_micro_batch_stays() -> None:
    assert resolved(PRETRAIN, train__micro_batch_size=8).train.micro_batch_size == 8


def test_a_smaller_gpu_gets_a_smaller_micro_batch() -> None:
    def chosen(accelerator: str) -> int:
        raw = {"preset": "paper/pretrain/imagenet-l16", "resources": {"accelerator": accelerator}}
        spec = parse_spec(raw)
        assert isinstance(spec, TrainingJob)
        micro = resolve(spec, IMAGENET, None).train.micro_batch_size
        assert micro != "auto"
        return micro

    assert 1 <= chosen("L4") < chosen("A100-40G") < chosen("H100") <= chosen("H200")


IMAGENET = CARD.model_copy(
    update={"splits": tuple(s.model_copy(update={"num_examples": 1_281_167}) for s in CARD.splits)}
)


# -- fine-tuning ----------------------------------------------------------------------------------------------------
def test_a_finetune_takes_its_sizes_from_the_checkpoint() -> None:
    spec = resolved(FINETUNE, source(num_classes=77, head="mlp", in_channels=1, gelu="exact", pool="gap"))
    model = spec.model.vit()
    assert (model.embed_dim, model.depth, model.num_heads, model.mlp_dim, model.patch_size) == (32, 2, 2, 64, 4)
    assert (model.in_channels, model.gelu, model.pool) == (1, "exact", "gap")
    assert (model.image_size, model.num_classes, model.head) == ((24, 24), 5, "linear")


def test_the_variant_is_named_where_the_sizes_have_one() -> None:
    sizes = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768, "image_size": (32, 32)}
    assert resolved(FINETUNE, source(**sizes), model__image_size=32).model.variant == "Ti/16"
    assert resolved(FINETUNE, source()).model.variant is None


def test_a_resolved_finetune_resolves_to_itself() -> None:
    src = source(in_channels=1, mean=(0.3,))
    spec = resolved(FINETUNE, src)
    assert resolve(spec, CARD, src) == spec


@pytest.mark.parametrize("field", ["embed_dim", "depth", "mlp_dim"])
def test_sizes_that_contradict_the_checkpoint_are_refused(field: str) -> None:
    sizes = {k: v for k, v in PRETRAIN["model"].items() if k != "image_size"}
    raw = FINETUNE | {"model": sizes | {"image_size": 24, field: 128}}
    error = faults(raw, source())[f"/model/{field}"]
    assert (error.value, error.allowed) == (128, str(sizes[field]))
    assert "ckpt_x" in error.message


def test_a_variant_that_contradicts_the_checkpoint_is_refused_as_it_was_given() -> None:
    found = faults(FINETUNE, source(), model={"variant": "B/16", "image_size": 224})
    assert found["/model/variant"].value == "B/16"


@pytest.mark.parametrize(("field", "value"), [("in_channels", 1), ("pool", "gap"), ("gelu", "exact")])
def test_what_must_match_the_checkpoint(field: str, value: object) -> None:
    assert set(faults(FINETUNE, source(), **{f"model__{field}": value})) == {f"/model/{field}"}


def test_an_image_size_that_the_checkpoints_patches_do_not_divide_is_refused() -> None:
    assert "patch_size 4" in faults(FINETUNE, source(), model__image_size=18)["/model/image_size"].message


def test_normalisation_is_the_checkpoints_unless_given() -> None:
    assert resolved(FINETUNE, source(mean=(0.1, 0.2, 0.3))).data.mean == (0.1, 0.2, 0.3)
    assert resolved(FINETUNE, source(mean=(0.1, 0.2, 0.3)), data__mean="[0.5]").data.mean == (0.5,)


def test_without_a_checkpoint_only_a_complete_model_resolves() -> None:
    assert "/model/variant" in faults(FINETUNE)
    assert resolved(FINETUNE, model={"variant": "Ti/16", "image_size": 32}).model.embed_dim == 192


# -- evaluation and export ------------------------------------------------------------------------------------------
def test_an_evaluation_takes_data_and_size_from_the_checkpoint() -> None:
    data = DataConfig.model_validate(PRETRAIN["data"])
    spec = job(EVALUATE)
    src = source(data=data)
    assert data_of(spec, src) == data
    found = resolve(spec, CARD, src)
    assert isinstance(found, EvaluateJob)
    assert found.data == data
    assert found.image_size == 16
    assert load_resolved(canonical_json(found)) == found
    assert resolve(found, CARD, src) == found


def test_an_evaluation_on_other_data_prepares_images_as_the_checkpoint_wants_them() -> None:
    src = source(mean=(0.1, 0.2, 0.3))
    found = resolve(job(EVALUATE, data=PRETRAIN["data"]), CARD, src)
    assert isinstance(found, EvaluateJob)
    assert found.data is not None
    assert found.data.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("overrides", "src", "pointer"),
    [
        ({}, source(), "/data"),
        ({"data": PRETRAIN["data"]}, source(num_classes=9), "/data/source"),
        ({"data": PRETRAIN["data"] | {"eval": "x"}}, source(), "/data/eval"),
        ({"data": PRETRAIN["data"], "image_size": 18}, source(), "/image_size"),
        ({"data": PRETRAIN["data"] | {"mean": [1, 2, 3]}}, source(in_channels=1), "/data/mean"),
        ({"data": PRETRAIN["data"]}, None, "/init_from"),
    ],
)
def test_evaluations_that_contradict_are_refused(
    overrides: dict[str, Any], src: SourceCheckpoint | None, pointer: str
) -> None:
    assert set(faults(EVALUATE, src, **overrides)) == {pointer}


def test_an_export_resolves_to_itself() -> None:
    spec = job({"kind": "export", "init_from": "ckpt_x"})
    assert resolve(spec, None, source()) == spec
    assert data_of(spec, source()) is None


# -- fingerprints ---------------------------------------------------------------------------------------------------
def fingerprint(data_fingerprint: str = "sha256:d", **overrides: Any) -> str:
    return training_fingerprint(resolved(PRETRAIN, **overrides), data_fingerprint)


@pytest.mark.parametrize(
    "overrides",
    [
        {"name": "other"},
        {"labels": {"a": "b"}},
        {"queue__priority": 90},
        {"retry__max_infra_failures": 1},
        {"zero__stage": 3},
        {"resources__cpus_per_worker": 2},
        {"resources__workers": 1, "train__micro_batch_size": 32},
        {"train__log_every_steps": 1},
        {"train__max_nonfinite_steps": 9},
        {"data__loader_workers": 4},
        {"data__max_corrupt": 0.5},
        {"checkpoint__every_steps": 3},
        {"eval__every_steps": 3},
        {"schedule": {"total_steps": 47}},
    ],
)
def test_the_training_fingerprint_ignores_what_does_not_change_the_training(overrides: dict[str, Any]) -> None:
    assert fingerprint(**overrides) == fingerprint()


@pytest.mark.parametrize(
    "overrides",
    [
        {"model__dropout": 0.1},
        {"data__train": "val"},
        {"data__augment": {"flip": False}},
        {"optim__lr": 1},
        {"schedule__warmup_steps": 1},
        {"train__seed": 1},
        {"train__global_batch_size": 32},
        {"train__micro_batch_size": 16},
        {"train__precision": "fp32"},
        {"data_fingerprint": "sha256:other"},
    ],
)
def test_the_training_fingerprint_covers_what_changes_the_training(overrides: dict[str, Any]) -> None:
    assert fingerprint(**overrides) != fingerprint()


def test_the_training_fingerprint_covers_where_a_finetune_starts() -> None:
    first = training_fingerprint(resolved(FINETUNE, source()), "x")
    assert first != training_fingerprint(resolved(FINETUNE, source(), init_from="ckpt_other"), "x")
