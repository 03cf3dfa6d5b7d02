from __future__ import annotations

import copy
from typing import Any

import pytest

from configs.errors import FieldError, SpecError
from configs.load import apply_overrides, merge, parse_spec
from configs.model import VitConfig
from configs.spec import FinetuneJob, PretrainJob
from tests.configs.specs import EVALUATE, FINETUNE, JOB_ID, PRETRAIN, job


def faults(raw: dict[str, Any]) -> dict[str, FieldError]:
    with pytest.raises(SpecError) as caught:
        parse_spec(raw)
    assert len({e.pointer for e in caught.value.errors}) == len(caught.value.errors)
    return {e.pointer: e for e in caught.value.errors}


def put(base: dict[str, Any], **values: Any) -> dict[str, Any]:
    """`base` with values at dotted paths, as they are (not read as YAML)."""
    raw = copy.deepcopy(base)
    for path, value in values.items():
        here = raw
        *parents, last = path.split("__")
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = value
    return raw


def test_a_valid_job_parses() -> None:
    spec = parse_spec(PRETRAIN)
    assert isinstance(spec, PretrainJob)
    assert spec.train.micro_batch_size == "auto"
    assert spec.allowed_world_sizes == (2,)


@pytest.mark.parametrize(
    ("path", "value", "pointer", "words"),
    [
        ("optim__lr", "abc", "/optim/lr", ["abc", "a number"]),
        ("optim__lr", 0, "/optim/lr", ["0", "above 0"]),
        ("optim__lr", float("nan"), "/optim/lr", ["nan", "finite"]),
        ("optim__lrr", 1, "/optim/lrr", ["unknown field 'lrr'", "Did you mean lr"]),
        ("optimm", {}, "/optimm", ["unknown field", "Did you mean optim"]),
        ("optim__momentum", 0.5, "/optim/momentum", ["does not apply to adamw"]),
        ("optim__name", "lion", "/optim/name", ["lion", "'sgd' or 'lamb'"]),
        ("train__global_batch_size", "64", "/train/global_batch_size", ['"64"', "whole number"]),
        ("train__global_batch_size", True, "/train/global_batch_size", ["true", "whole number"]),
        ("train__global_batch_size", 64.5, "/train/global_batch_size", ["64.5", "whole number"]),
        ("train__global_batch_size", 63, "/train/global_batch_size", ["63", "2 workers"]),
        ("train__micro_batch_size", 5, "/train/micro_batch_size", ["5", "32 images"]),
        ("train__micro_batch_size", "all", "/train/micro_batch_size", ["all", "whole number", "'auto'"]),
        ("train__compile", "fast", "/train/compile", ["fast", "true", "false"]),
        ("train__seed", -1, "/train/seed", ["-1", "at least 0"]),
        ("zero__stage", 4, "/zero/stage", ["4", "0, 1, 2 or 3"]),
        ("zero", 1, "/zero", ["1", "mapping"]),
        ("model__image_size", 18, "/model/image_size", ["18", "patch_size 4"]),
        ("model__image_size", [16, 18], "/model/image_size", ["18", "patch_size 4"]),
        ("model__image_size", [16, "x"], "/model/image_size/1", ["x", "whole number"]),
        ("model__num_heads", 3, "/model/embed_dim", ["32", "num_heads 3"]),
        ("model__variant", "X/16", "/model/variant", ["X/16", "So400m"]),
        ("model__variant", "B/16", "/model/patch_size", ["4", "contradicts variant"]),
        ("model__in_channels", 2, "/model/in_channels", ["2", "1 or 3"]),
        ("model__dropout", 1.0, "/model/dropout", ["1", "below 1"]),
        ("data__source__type", "shards", "/data/source/type", ["shards", "not available yet"]),
        ("data__source__type", "s3", "/data/source/type", ["s3", "'torchvision'"]),
        ("data__source", {"name": "x"}, "/data/source/type", ["missing", "'folder'"]),
        ("data__source", {"type": "torchvision", "name": "CIFAR"}, "/data/source/name", ["CIFAR", "'CIFAR10'"]),
        ("data__source", {"type": "folder", "name": "../etc"}, "/data/source/name", ["../etc"]),
        ("data__source", {"type": "synthetic", "num_train": 0}, "/data/source/num_train", ["0", "at least 1"]),
        ("data__mean", [0.1, 0.2], "/data/mean", ["one value or three", "2"]),
        ("data__std", [0.0], "/data/std/0", ["0", "above 0"]),
        ("data__subset", {}, "/data/subset", ["exactly one of fraction, examples and per_class"]),
        ("data__subset__fraction", 1.5, "/data/subset/fraction", ["1.5", "at most 1"]),
        ("data__augment__crop_area", [0.9, 0.1], "/data/augment/crop_area", ["0.9"]),
        ("schedule__total_steps", 5, "/schedule", ["exactly one of", "total_steps, total_epochs"]),
        ("schedule", {"total_steps": 5, "warmup_steps": 6}, "/schedule/warmup_steps", ["6", "5"]),
        ("schedule", {"total_steps": 5, "warmup_steps": 6, "warmup_epochs": 1}, "/schedule", ["at most one of"]),
        ("resources__workers", "many", "/resources/workers", ["many", "whole number", "mapping"]),
        ("resources__workers", {"min": 2}, "/resources/workers/max", ["max is missing"]),
        ("resources__workers", {"min": 4, "max": 2}, "/resources/workers/min", ["4", "2"]),
        ("resources__workers", 0, "/resources/workers", ["0", "at least 1"]),
        ("resources__accelerator", "H100", "/resources/accelerator", ["gpus_per_worker is 0"]),
        ("checkpoint", {"every_steps": 1, "every_epochs": 1}, "/checkpoint", ["at most one of every_steps"]),
        ("eval__few_shot", {"shots": [0]}, "/eval/few_shot/shots/0", ["0", "1"]),
        ("labels", {"a": 1}, "/labels/a", ["1", "text"]),
        ("name", "two\nlines", "/name", ["text matching"]),
        ("name", "", "/name", ["at least 1"]),
        ("queue__priority", 101, "/queue/priority", ["101", "at most 100"]),
        ("queue__depends_on", "job_x", "/queue/depends_on", ["a list"]),
        ("schema_version", 2, "/schema_version", ["2", "1"]),
        ("kind", "pretrian", "/kind", ["pretrian", "Did you mean pretrain"]),
        ("kind", ["pretrain"], "/kind", ["pretrain, finetune, evaluate, inspect, export"]),
        ("init_from", "ckpt_x", "/init_from", ["unknown field"]),
    ],
)
def test_a_fault_has_its_pointer_value_and_what_is_allowed(
    path: str, value: object, pointer: str, words: list[str]
) -> None:
    found = faults(put(PRETRAIN, **{path: value}))
    assert pointer in found
    assert all(word in found[pointer].message for word in words), found[pointer].message
    assert len(found) == 1, found


def test_every_fault_is_reported_at_once() -> None:
    found = faults(put(PRETRAIN, optim__lr=-1, train__seed="x", nonsense=1))
    assert set(found) == {"/optim/lr", "/train/seed", "/nonsense"}
    assert found["/optim/lr"].value == -1
    assert found["/optim/lr"].allowed == "a number above 0"


@pytest.mark.parametrize("field", ["model", "data", "schedule"])
def test_a_missing_part_is_named(field: str) -> None:
    raw = {key: value for key, value in PRETRAIN.items() if key != field}
    assert faults(raw)[f"/{field}"].message == f"{field} is missing"


def test_kind_is_needed() -> None:
    assert "kind is missing" in faults({"name": "x"})["/kind"].message


def test_pretraining_needs_sizes() -> None:
    assert "model.variant" in faults(put(PRETRAIN, model={}))["/model/variant"].message


def test_incomplete_sizes_are_named() -> None:
    assert (
        "depth, num_heads"
        in faults(put(PRETRAIN, model={"patch_size": 4, "embed_dim": 8, "mlp_dim": 8}))["/model"].message
    )


@pytest.mark.parametrize("ref", ["job_x/best", f"{JOB_ID}/worst", "../ckpt_x", JOB_ID, ""])
def test_checkpoint_references_are_checked(ref: str) -> None:
    assert "/init_from" in faults(FINETUNE | {"init_from": ref})


@pytest.mark.parametrize("base", [FINETUNE, EVALUATE])
def test_init_from_is_needed(base: dict[str, Any]) -> None:
    raw = {key: value for key, value in base.items() if key != "init_from"}
    assert faults(raw)["/init_from"].message == "init_from is missing"


@pytest.mark.parametrize("value", [-10, 0, -50.0, 50])
def test_the_heads_bias_may_start_elsewhere_with_the_sigmoid_loss(value: float) -> None:
    spec = job(PRETRAIN, train__loss="sigmoid", model__head_bias_init=value)
    assert isinstance(spec, PretrainJob)
    assert spec.model.head_bias_init == value


@pytest.mark.parametrize(
    ("base", "overrides", "says"),
    [
        (PRETRAIN, {}, "train.loss"),
        (FINETUNE, {"train__loss": "sigmoid"}, "fine-tun"),
        (PRETRAIN, {"train__loss": "sigmoid", "model__head_bias_init": -51}, "-50"),
        (PRETRAIN, {"train__loss": "sigmoid", "model__head_bias_init": 50.5}, "50"),
    ],
)
def test_a_start_of_the_heads_bias_that_does_not_apply_is_refused(
    base: dict[str, Any], overrides: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError) as caught:
        job(base, **({"model__head_bias_init": -10} | overrides))
    assert says in str(caught.value)


def test_models_stored_before_the_heads_bias_was_a_setting_start_at_zero() -> None:
    sizes = PRETRAIN["model"] | {"image_size": (16, 16), "num_classes": 5}
    assert VitConfig.model_validate(sizes).head_bias_init == 0.0


def test_an_export_runs_on_one_worker() -> None:
    found = faults({"kind": "export", "init_from": "ckpt_x", "resources": {"workers": 2}})
    assert "one worker" in found["/resources/workers"].message


def test_whole_floats_are_whole_numbers() -> None:
    spec = job(PRETRAIN, schedule={"total_steps": 1e3}, train__global_batch_size="6.4e1")
    assert isinstance(spec, PretrainJob)
    assert spec.schedule.total_steps == 1000
    assert spec.train.global_batch_size == 64


def test_numbers_that_yaml_1_1_leaves_as_text_are_read_where_a_number_belongs() -> None:
    spec = parse_spec(put(PRETRAIN, optim__lr="1e-3", name="1e-3", data__std=["5e-1"]))
    assert isinstance(spec, PretrainJob)
    assert spec.optim.lr == 1e-3
    assert spec.data.std == (0.5,)
    assert spec.name == "1e-3"
    assert "/optim/lr" in faults(put(PRETRAIN, optim__lr="fast"))


# -- overrides ------------------------------------------------------------------------------------------------------
def test_overrides_are_dotted_and_read_as_yaml() -> None:
    raw = {"optim": {"lr": 1, "name": "sgd"}}
    changed = apply_overrides(
        raw, {"optim.lr": "3e-4", "model.image_size": "[2, 3]", "train.micro_batch_size": "auto", "data.subset": "null"}
    )
    assert changed == {
        "optim": {"lr": 3e-4, "name": "sgd"},
        "model": {"image_size": [2, 3]},
        "train": {"micro_batch_size": "auto"},
        "data": {"subset": None},
    }
    assert raw == {"optim": {"lr": 1, "name": "sgd"}}


def test_values_that_are_not_text_are_taken_as_they_are() -> None:
    assert apply_overrides({}, {"a.b": 1, "a.c": None}) == {"a": {"b": 1, "c": None}}


def test_a_mapping_replaces_the_mapping() -> None:
    assert apply_overrides({"w": {"min": 1, "max": 2}}, {"w": "{min: 3}"}) == {"w": {"min": 3}}
    assert apply_overrides({"w": {"min": 1, "max": 2}}, {"w": "{}"}) == {"w": {}}


@pytest.mark.parametrize(
    ("key", "value", "pointer"),
    [("", 1, ""), ("a..b", 1, ""), ("optim.lr.x", 1, "/optim/lr"), ("optim.lr", "[1", "/optim/lr"), ("a", "*b", "/a")],
)
def test_bad_overrides_are_refused(key: str, value: object, pointer: str) -> None:
    with pytest.raises(SpecError) as caught:
        apply_overrides({"optim": {"lr": 1}}, {key: value})
    assert [e.pointer for e in caught.value.errors] == [pointer]
    assert "override" in str(caught.value)


def test_overrides_are_bounded() -> None:
    with pytest.raises(SpecError, match="at most 200"):
        apply_overrides({}, {f"a{i}": 1 for i in range(201)})
    with pytest.raises(SpecError, match="joined by dots"):
        apply_overrides({}, {".".join("a" * 100_000): 1})


# -- merging --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"total_epochs": 3, "warmup_steps": 9}, {"total_steps": 5}, {"warmup_steps": 9, "total_steps": 5}),
        ({"total_epochs": 3}, {"total_steps": None}, {"total_epochs": 3, "total_steps": None}),
        ({"every_steps": 3, "keep_last": 2}, {"every_epochs": 1}, {"keep_last": 2, "every_epochs": 1}),
        ({"fraction": 0.1, "seed": 3}, {"per_class": 5}, {"seed": 3, "per_class": 5}),
        ({"embed_dim": 8, "depth": 2, "pool": "gap"}, {"variant": "B/16"}, {"pool": "gap", "variant": "B/16"}),
        ({"type": "folder", "name": "x"}, {"type": "synthetic"}, {"type": "synthetic"}),
        ({"type": "folder", "name": "x"}, {"name": "y"}, {"type": "folder", "name": "y"}),
        ({"workers": {"min": 1, "max": 4}}, {"workers": 2}, {"workers": 2}),
    ],
)
def test_merge(base: dict[str, Any], over: dict[str, Any], merged: dict[str, Any]) -> None:
    before = copy.deepcopy(base)
    assert merge(base, over) == merged
    assert base == before


def test_a_job_is_laid_over_its_preset() -> None:
    spec = parse_spec(
        {
            "preset": "paper/finetune/flowers-l16",
            "init_from": "ckpt_x",
            "optim": {"lr": 0.03},
            "schedule": {"total_epochs": 2},
        }
    )
    assert isinstance(spec, FinetuneJob)
    assert spec.preset == "paper/finetune/flowers-l16"
    assert spec.optim.lr == 0.03
    assert spec.optim.name == "sgd"
    assert spec.schedule.total_steps is None
    assert spec.schedule.warmup_steps == 100


def test_an_unknown_preset_names_close_ones() -> None:
    found = faults({"preset": "paper/finetune/flower-l16"})
    assert "paper/finetune/flowers-l16" in found["/preset"].message


@pytest.mark.parametrize("name", ["paper/pretrain/_base", "../errors", 3, ["x"]])
def test_presets_are_found_by_their_public_names_only(name: object) -> None:
    assert "/preset" in faults({"preset": name})


def test_a_preset_keeps_its_kind() -> None:
    assert (
        "contradicts preset" in faults({"preset": "demo/fashion-mnist-pretrain", "kind": "finetune"})["/kind"].message
    )
