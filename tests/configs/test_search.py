"""Spaces, and searches refused for what is wrong with them: each with the field, the value and what is allowed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.datasets import PLANNING_CARDS, card_for
from configs.errors import SpecError
from configs.load import list_presets, load_preset, parse_for_plan, parse_spec
from configs.plan import plan
from configs.resolve import canonical_json, data_of, load_resolved, resolve
from configs.search import (
    Choice,
    IntUniform,
    LogUniform,
    Uniform,
    corners,
    finite_values,
    grid,
    in_order,
    value_at_unit,
)
from configs.search_trials import check_search, resolve_search, trial_spec, with_fixed_base, workers_per_trial
from configs.spec import SearchJob, TrainingJob

BASE: dict[str, Any] = {
    "kind": "pretrain",
    "model": {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "image_size": 28},
    "data": {"source": {"type": "synthetic", "num_train": 640, "image_size": 28}},
    "schedule": {"total_steps": 100},
    "train": {"global_batch_size": 64, "seed": 5},
    "resources": {"workers": 2, "gpus_per_worker": 0},
    "eval": {"every_steps": 10},
    "checkpoint": {"every_steps": 20},
}
LR = {"type": "log_uniform", "low": 1e-4, "high": 1e-1}


def searching(**fields: Any) -> dict[str, Any]:
    """A valid search with these fields; `base__…` reaches into the base."""
    spec = {"kind": "search", "base": copy.deepcopy(BASE), "space": {"optim.lr": LR}, "budget": {"trials": 4}}
    for name, value in fields.items():
        *path, last = name.split("__")
        here: dict[str, Any] = spec
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    return spec


def complete(raw: dict[str, Any]) -> TrainingJob:
    spec = parse_spec(raw)
    assert isinstance(spec, TrainingJob)
    data = data_of(spec)
    assert data is not None
    return resolve(spec, card_for(data.source, {}), None)


def planned(raw: dict[str, Any]) -> TrainingJob:
    """As plans resolve it: with the data sets they know."""
    spec = parse_spec(raw)
    assert isinstance(spec, TrainingJob)
    return resolve(spec, card_for(spec.data.source, PLANNING_CARDS), None)


def checked(raw: dict[str, Any]) -> SearchJob:
    """As submission resolves it."""
    spec = parse_spec(raw)
    assert isinstance(spec, SearchJob)
    spec = with_fixed_base(spec)
    return resolve_search(spec, check_search(spec, complete))


def faults(raw: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        checked(raw)
    return {fault.pointer: fault.message for fault in caught.value.errors}


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "pointer", "says"),
    [
        ({"space": {"optim.lrr": LR}}, "/space/optim.lrr", "unknown field 'lrr'. Did you mean lr?"),
        ({"space": {"optim.lr": LR | {"low": -1.0}}}, "/space/optim.lr", "low -1 has no logarithm"),
        ({"space": {"optim.lr": LR | {"low": 0.2}}}, "/space/optim.lr", "low 0.2 is not below high 0.1"),
        ({"space": {"optim.lr": LR | {"type": "log"}}}, "/space/optim.lr/type", "'log_uniform'"),
        ({"space": {"optim.lr": LR | {"high": 1000.0}}}, "/space/optim.lr", "at most 100"),
        ({"space": {"optim.lr": {"type": "choice", "values": [0.1, 0.1]}}}, "/space/optim.lr", "given twice"),
        ({"space": {"optim.lr": {"type": "choice", "values": []}}}, "/space/optim.lr/values", "at least"),
        ({"space": {"optim.lr": LR | {"when": {"optim.name": "sgd"}}}}, "/space", "which is not in the space"),
        ({"space": {"resources.workers": {"type": "int", "low": 1, "high": 2}}}, "/space/resources.workers", "varied"),
        ({"space": {"model.depth": {"type": "int", "low": 2, "high": 2}}}, "/space/model.depth", "empty"),
        ({"algorithm": "grid"}, "/algorithm", "optim.lr is continuous"),
        ({"space": {"optim.lr": {"type": "grid", "values": [0.1]}}}, "/space", "algorithm is random"),
        ({"metric": "eval/top2"}, "/metric", "Did you mean eval/top"),
        ({"metric": "eval/few_shot/5"}, "/metric", "never comes"),
        ({"base__eval": {"at_end": False}}, "/metric", "Nothing is evaluated"),
        ({"base__eval": {"at_end": False, "every_steps": 101}}, "/metric", "base.eval.every_steps to at most 100"),
        ({"mode": "min"}, "/mode", "eval/top1 is better the higher"),
        ({"repeats": 3}, "/budget/trials", "4 is no multiple of repeats 3"),
        ({"repeats": 2, "scheduler": {"name": "asha", "grace_steps": 10}}, "/repeats", "judges single trials"),
        ({"scheduler": {"name": "asha", "grace_steps": 100}}, "/scheduler/grace_steps", "below the 100 steps"),
        (
            {"scheduler": {"name": "asha", "grace_steps": 10}, "base__eval": {}},
            "/base/eval/every_steps",
            "has to come before step 100",
        ),
        ({"scheduler": {"name": "pbt", "interval_steps": 30}}, "/base/checkpoint/every_steps", "20 does not divide"),
        (
            {
                "scheduler": {"name": "pbt", "interval_steps": 20},
                "space": {"model.depth": {"type": "int", "low": 1, "high": 3}},
            },
            "/space/model.depth",
            "cannot change while training",
        ),
        ({"base__resources__workers": {"min": 1, "max": 2}}, "/base/resources/workers", "fixed number of workers"),
        ({"base__queue": {"priority": 3}}, "/base/queue", "search's own place"),
        ({"base__kind": "export"}, "/base/kind", "varies a pretrain or finetune job"),
        ({"base__optim": {"lr": -1.0}, "space": {"train.seed": LR}}, "/space/train.seed", "cannot be varied"),
        ({"final": {"overrides": {"data.trian": "train"}}}, "/final/overrides/data.trian", "unknown field 'trian'"),
        ({"resources": {"workers": 4}}, "/resources", "no effect in a search"),
        ({"budget": {"trials": 0}}, "/budget/trials", "at least 1"),
    ],
)
def test_what_is_wrong_with_a_search_is_said_at_its_field(fields: dict[str, Any], pointer: str, says: str) -> None:
    found = faults(searching(**fields))
    assert pointer in found, found
    assert says in found[pointer]


def test_a_grid_larger_than_the_budget_says_how_large_it_is() -> None:
    space = {
        "optim.lr": {"type": "grid", "values": [0.1, 0.01]},
        "model.depth": {"type": "int", "low": 1, "high": 3},
    }
    found = faults(searching(space=space, algorithm="grid", budget={"trials": 5}))
    assert found == {"/budget/trials": "budget.trials 5 is less than the grid's 6 settings: allowed is at least 6"}
    assert checked(searching(space=space, algorithm="grid", budget={"trials": 6})).budget.trials == 6


# -- what becomes of a good one ----------------------------------------------------------------------------------------
def test_a_search_holds_what_its_trials_take_together() -> None:
    search = checked(searching(concurrency={"min": 2, "max": 3}))
    assert search.resources.worker_range == (4, 6)
    assert (search.resources.cpus_per_worker, workers_per_trial(search)) == (1, 2)
    assert checked(searching()).resources.worker_range == (2, 8), "left out: up to every trial at once"
    assert search.mode == "max"
    assert checked(searching(metric="eval/loss")).sign == -1.0


def test_a_resolved_search_reads_back_as_it_was() -> None:
    search = checked(searching(scheduler={"name": "asha", "grace_steps": 10}, final={}))
    stored = canonical_json(search)
    assert load_resolved(stored) == search
    assert canonical_json(load_resolved(stored)) == stored


def test_a_trial_is_the_base_with_its_setting() -> None:
    search = checked(searching(repeats=2, metric="eval/loss", queue={"priority": 70, "project": "vision"}, final={}))
    trial = complete(trial_spec(search, {"optim.lr": 0.02}, repeat=1))
    assert (trial.optim.lr, trial.train.seed) == (0.02, 6)
    assert trial.checkpoint.metric == "eval/loss"
    assert (trial.queue.priority, trial.queue.project) == (70, "vision")


def test_the_final_run_has_its_changes() -> None:
    search = checked(searching(base__data__holdout={"fraction": 0.1}, final={}))
    assert complete(trial_spec(search, {"optim.lr": 0.02})).data.holdout is not None
    assert complete(trial_spec(search, {"optim.lr": 0.02}, final=True)).data.holdout is None


# -- presets -----------------------------------------------------------------------------------------------------------
# Learning rates and held-out share: Table 4 and appendix B.1.1.
TABLE_4 = {
    "imagenet": ([0.003, 0.01, 0.03, 0.06], 0.01),
    "cifar10": ([0.001, 0.003, 0.01, 0.03], 0.02),
    "cifar100": ([0.001, 0.003, 0.01, 0.03], 0.02),
    "pets": ([0.001, 0.003, 0.01, 0.03], 0.1),
    "flowers": ([0.001, 0.003, 0.01, 0.03], 0.1),
}


@pytest.mark.parametrize("name", TABLE_4)
def test_the_papers_learning_rates_are_a_preset_for_each_data_set(name: str) -> None:
    search = parse_spec({"preset": f"search/{name}-lr", "base": {"init_from": "ckpt_x"}})
    assert isinstance(search, SearchJob)
    rates, share = TABLE_4[name]
    assert [setting["optim.lr"] for setting in grid(search.space)] == rates
    trial = check_search(search, planned)
    assert trial.data.holdout is not None
    assert trial.data.holdout.fraction == share
    assert trial.data.eval == trial.data.train, "judged on the held-out part"
    final = planned(trial_spec(search, {"optim.lr": rates[0]}, final=True))
    assert final.data.holdout is None
    assert final.data.eval != final.data.train
    header = load_preset(f"search/{name}-lr")
    assert header.command.startswith(f"patchwork search create --preset search/{name}-lr")
    assert header.shown == "no"


@pytest.mark.parametrize("name", TABLE_4)
def test_a_search_preset_is_planned_without_a_server_and_a_checkpoint(name: str) -> None:
    search = parse_for_plan({"preset": f"search/{name}-lr"})
    made = plan(search, None, "A100-80GB:8")
    assert made.kind == "finetune"
    assert made.notes[0] == "Of one trial; the search makes 4 trials and a final run."
    assert made.gpu_hours is not None
    assert made.notes[1] == f"All of them together take {5 * made.gpu_hours:,.3g} GPU-hours."


def test_a_preset_that_changes_later_changes_no_trial_to_come() -> None:
    asked = searching(base={"preset": "demo/fashion-mnist-pretrain", "data": {"holdout": {"fraction": 0.1}}}, final={})
    search = parse_spec(asked)
    assert isinstance(search, SearchJob)
    fixed = with_fixed_base(search)
    assert "preset" not in fixed.base
    assert_same_trials(search, fixed, {"optim.lr": 0.02})


@pytest.mark.parametrize("name", TABLE_4)
def test_a_preset_written_out_makes_the_same_trials(name: str) -> None:
    search = parse_spec({"preset": f"search/{name}-lr", "base": {"init_from": "ckpt_x"}})
    assert isinstance(search, SearchJob)
    assert_same_trials(search, with_fixed_base(search), {"optim.lr": 0.01})


def assert_same_trials(search: SearchJob, other: SearchJob, setting: dict[str, Any]) -> None:
    """The trial of this setting and the final run, but for the preset's name."""
    for final in (False, True):
        made = [planned(trial_spec(s, setting, final=final)).model_dump(exclude={"preset"}) for s in (search, other)]
        assert made[0] == made[1]


def test_a_base_that_is_not_valid_is_said_to_be_so_with_its_preset() -> None:
    base = {"preset": "demo/fashion-mnist-pretrain", "optim": {"lrr": 1.0}}
    assert "unknown field 'lrr'" in faults(searching(base=base))["/base/optim/lrr"]
    assert "unknown preset 'demo/x'" in faults(searching(base={"preset": "demo/x"}))["/base/preset"]


def test_every_search_preset_is_one_of_these() -> None:
    assert {p.name for p in list_presets() if p.kind == "search"} == {f"search/{name}-lr" for name in TABLE_4}


# -- spaces ------------------------------------------------------------------------------------------------------------
CONDITIONAL = {
    "optim.name": Choice(type="choice", values=("adamw", "sgd")),
    "optim.lr": LogUniform(type="log_uniform", low=1e-3, high=1.0),
    "optim.momentum": Uniform(type="uniform", low=0.0, high=0.9, step=0.3, when={"optim.name": "sgd"}),
}


def test_conditions_come_after_what_they_depend_on() -> None:
    space = {
        "a": IntUniform(type="int", low=0, high=1, when={"b": 1}),
        "b": IntUniform(type="int", low=0, high=1, when={"c": 1}),
        "c": IntUniform(type="int", low=0, high=1),
    }
    assert in_order(space) == ["c", "b", "a"]
    circle = {"a": space["a"], "b": IntUniform(type="int", low=0, high=1, when={"a": 1})}
    with pytest.raises(ValueError, match="conditions of a, b depend on one another"):
        in_order(circle)


def test_a_grid_leaves_out_what_a_condition_excludes() -> None:
    space = {key: p for key, p in CONDITIONAL.items() if key != "optim.lr"}
    assert list(grid(space)) == [
        {"optim.name": "adamw"},
        *({"optim.name": "sgd", "optim.momentum": momentum} for momentum in (0.0, 0.3, 0.6, 0.9)),
    ]


def test_corners_hold_both_ends_and_every_choice() -> None:
    found = corners(CONDITIONAL)
    assert {setting["optim.lr"] for setting in found} >= {1e-3, 1.0}
    assert {setting["optim.name"] for setting in found} == {"adamw", "sgd"}
    assert all(("optim.momentum" in s) == (s["optim.name"] == "sgd") for s in found)
    assert corners(CONDITIONAL) == found


def test_quantised_values_have_no_dust() -> None:
    assert finite_values(Uniform(type="uniform", low=0.1, high=0.7, step=0.2)) == [0.1, 0.3, 0.5, 0.7]
    assert finite_values(IntUniform(type="int", low=2, high=9, step=3)) == [2, 5, 8]


@given(st.floats(min_value=0.0, max_value=1.0, exclude_max=True))
def test_every_unit_lies_within_the_range(unit: float) -> None:
    log = LogUniform(type="log_uniform", low=1e-5, high=3.0)
    even = Uniform(type="uniform", low=-2.0, high=0.1)
    assert 1e-5 <= value_at_unit(log, unit) <= 3.0
    assert math.isclose(value_at_unit(log, unit), 1e-5 * (3.0 / 1e-5) ** unit, rel_tol=1e-9)
    assert -2.0 <= value_at_unit(even, unit) <= 0.1
    assert value_at_unit(IntUniform(type="int", low=1, high=5, step=2), unit) in (1, 3, 5)
