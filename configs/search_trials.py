"""The trials of a search: a setting as a whole job description, and a search checked against some of its trials.

A trial's description is the base with the setting laid over it, so that whatever is wrong with a setting is found by
the same rules as in any other job, and before anything is queued.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from configs.errors import FieldError, SpecError, close_matches, field_errors, show, to_pointer, value_at
from configs.load import UNDECIDED, apply_overrides, parse_spec, with_preset
from configs.resolve import load_resolved
from configs.search import Asha, Concurrency, FinalRun, MedianStopping, Pbt, Setting, corners
from configs.service import Resources, WorkerRange
from configs.spec import SearchJob, TrainingJob
from configs.train import Checkpoint
from configs.unused import unused_fields

MUTABLE_PREFIXES = ("optim.", "data.augment.", "data.mix.")
"""What may change in the middle of a training without making its state meaningless."""
_FIXED = ("optim.name", "optim.train", "data.augment.repeats")
_NOT_VARIED = ("kind", "preset", "name", "labels", "queue", "resources", "retry", "init_from", "schema_version")
Complete = Callable[[dict[str, Any]], TrainingJob]
"""From a raw description to a resolved job. Raises SpecError."""


def trial_spec(
    search: SearchJob, setting: Mapping[str, Any], repeat: int = 0, *, final: bool = False, init_from: str | None = None
) -> dict[str, Any]:
    """The raw description of one trial. `init_from`: the checkpoint that the base's reference stands for.

    Raises:
        SpecError: the base is not valid, or a key of the setting goes through something that is no mapping.
    """
    overrides: dict[str, Any] = dict(setting)
    if final and search.final is not None:
        overrides |= search.final.overrides
    if init_from is not None:
        overrides["init_from"] = init_from
    raw = apply_overrides(search.base, overrides)
    if (kind := raw.get("kind")) not in (None, "pretrain", "finetune"):
        # Before its fields, which would all be wrong.
        raise _not_a_training(kind)
    spec = parse_spec(raw)
    if not isinstance(spec, TrainingJob):
        raise _not_a_training(spec.kind)
    overrides = {
        "train.seed": (spec.train.seed + repeat) % 2**31,
        "queue": search.queue.model_dump(mode="json", exclude={"deadline_s"}),
    }
    kept = Checkpoint.model_fields["metric"].annotation
    if spec.eval.happens and search.metric in _literals(kept):
        overrides["checkpoint.metric"] = search.metric
    return apply_overrides(raw, overrides)


def with_fixed_base(search: SearchJob) -> SearchJob:
    """The same search with its base's preset written out: what the preset says now, every trial is made of.

    What a preset says and the base leaves without effect (the split to evaluate, beside a held-out part) is kept for
    the final run, where it may have one. A base that is not valid stays as it is, for `check_search` to say so.
    """
    if search.base.get("preset") is None:
        return search
    setting = corners(search.space)[0]
    try:
        base = with_preset(search.base)
        trial = parse_spec(apply_overrides(search.base, setting))
    except SpecError:
        return search
    del base["preset"]
    for_final: dict[str, Any] = {}
    for fault in unused_fields(base, trial):
        *path, last = fault.pointer[1:].split("/")
        owner = value_at(base, tuple(path))
        assert isinstance(owner, dict), "a field that has a value is in a mapping"
        for_final[".".join([*path, last])] = owner.pop(last)
    return search.model_copy(update={"base": base, "final": _with_overrides(search.final, base, setting, for_final)})


def _with_overrides(
    final: FinalRun | None, base: Mapping[str, Any], setting: Setting, more: Mapping[str, Any]
) -> FinalRun | None:
    """A final run with more overrides, unless they have no effect there either."""
    if final is None:
        return None
    changed = final.model_copy(update={"overrides": {**more, **final.overrides}})
    try:
        parse_spec(apply_overrides(base, {**setting, **changed.overrides}))
    except SpecError:
        return final
    return changed


def undecided(search: SearchJob) -> SearchJob:
    """To plan a search: one whose base says no checkpoint to start from, with a stand-in for it."""
    try:
        base = with_preset(search.base)
    except SpecError:
        return search
    if base.get("kind") != "finetune" or "init_from" in base:
        return search
    return search.model_copy(update={"base": {**search.base, "init_from": UNDECIDED}})


def check_search(search: SearchJob, complete: Complete) -> TrainingJob:
    """A resolved trial of the search, after corners and samples of its space were resolved into whole jobs.

    Raises:
        SpecError: each fault at the key of the space that it is about, else at the base.
    """
    faults = _fixed_keys(search)
    trials: list[TrainingJob] = []
    for setting in corners(search.space):
        try:
            trials.append(complete(trial_spec(search, setting)))
            if search.final is not None:
                complete(trial_spec(search, setting, final=True))
        except SpecError as error:
            faults.extend(_at_the_space(fault, search, setting) for fault in error.errors)
    if not faults:
        for trial in trials:
            faults.extend(_rule_faults(search, trial))
    if faults:
        raise SpecError(_distinct(faults))
    return trials[0]


def resolve_search(search: SearchJob, trial: TrainingJob) -> SearchJob:
    """The complete description of the search: what its trials hold together, and how a value is judged."""
    size, _ = trial.resources.worker_range
    slots = search.concurrency
    if slots is None:
        slots = Concurrency(min=1, max=min(1000, search.budget.trials))
    elif isinstance(slots, int):
        slots = Concurrency(min=slots, max=slots)
    resources = Resources(
        workers=WorkerRange(min=slots.min * size, max=min(4096, slots.max * size)),
        gpus_per_worker=trial.resources.gpus_per_worker,
        cpus_per_worker=trial.resources.cpus_per_worker,
        accelerator=trial.resources.accelerator,
    )
    document = search.model_dump(mode="json") | {
        "mode": search.natural_mode,
        "concurrency": slots.model_dump(mode="json"),
        "resources": resources.model_dump(mode="json"),
    }
    try:
        resolved = load_resolved(document)
    except ValidationError as error:
        raise SpecError(field_errors(error, document, SearchJob)) from None
    assert isinstance(resolved, SearchJob)
    return resolved


def workers_per_trial(search: SearchJob) -> int:
    """How many workers one trial of a resolved search takes."""
    assert isinstance(search.concurrency, Concurrency), "a resolved search says its concurrency"
    low, _ = search.resources.worker_range
    return low // search.concurrency.min


def is_mutable(key: str) -> bool:
    """Whether population-based training may change this key between two steps."""
    return key.startswith(MUTABLE_PREFIXES) and key not in _FIXED


def _not_a_training(kind: object) -> SpecError:
    message = f"kind {show(kind)}: a search varies a pretrain or finetune job"
    return SpecError.at("/kind", message, kind, "pretrain, finetune")


def _fixed_keys(search: SearchJob) -> list[FieldError]:
    faults = []
    for key in search.space:
        top = key.partition(".")[0]
        if top in _NOT_VARIED or key == "train.seed":
            faults.append(_at_key(key, f"{key} cannot be varied: it says how a trial is run", key))
        elif isinstance(search.scheduler, Pbt) and not is_mutable(key):
            allowed = ", ".join(f"{prefix}*" for prefix in MUTABLE_PREFIXES)
            faults.append(_at_key(key, f"{key} cannot change while training, as scheduler pbt does", key, allowed))
    if "queue" in search.base:
        message = "base.queue has no effect: trials have the search's own place in the queue, set queue"
        faults.append(FieldError("/base/queue", message, search.base["queue"], "nothing"))
    return faults


def _rule_faults(search: SearchJob, trial: TrainingJob) -> list[FieldError]:
    """What the search's rules ask of its trials."""
    faults = _metric_faults(search, trial)
    low, high = trial.resources.worker_range
    if low != high:
        message = f"base.resources.workers {low} to {high}: a trial has a fixed number of workers"
        faults.append(FieldError("/base/resources/workers", message, [low, high], "a number"))
    total, rule = trial.schedule.total_steps, search.scheduler
    assert total is not None, "a resolved job counts its steps"
    every = trial.eval.every_steps
    if rule.name != "none" and search.metric.startswith("eval/") and (every is None or every >= total):
        message = f"scheduler {rule.name} judges trials on their way: {search.metric} has to come before step {total}"
        faults.append(FieldError("/base/eval/every_steps", message, every, f"a number below {total}"))
    if isinstance(rule, Asha | MedianStopping) and rule.grace_steps >= total:
        message = f"scheduler.grace_steps {rule.grace_steps} is not below the {total} steps of a trial: none would stop"
        faults.append(FieldError("/scheduler/grace_steps", message, rule.grace_steps, f"below {total}"))
    if isinstance(rule, Pbt):
        faults.extend(_pbt_faults(rule, trial, total))
    return faults


def _pbt_faults(rule: Pbt, trial: TrainingJob, total: int) -> list[FieldError]:
    interval, faults = rule.interval_steps, []
    if interval >= total:
        message = f"scheduler.interval_steps {interval} is not below the {total} steps of a trial"
        faults.append(FieldError("/scheduler/interval_steps", message, interval, f"below {total}"))
    for part, every in (("eval", trial.eval.every_steps), ("checkpoint", trial.checkpoint.every_steps)):
        if every is None or interval % every:
            message = f"base.{part}.every_steps {show(every)} does not divide scheduler.interval_steps {interval}"
            faults.append(FieldError(f"/base/{part}/every_steps", message, every, f"a divisor of {interval}"))
    return faults


def _metric_faults(search: SearchJob, trial: TrainingJob) -> list[FieldError]:
    """A metric that would never come."""
    known = ["train/loss"]
    every, total = trial.eval.every_steps, trial.schedule.total_steps
    assert total is not None, "a resolved job counts its steps"
    happens = trial.eval.at_end or (every is not None and every <= total)
    if happens:
        known += ["eval/top1", "eval/top5", "eval/loss"]
        if trial.eval.few_shot is not None:
            known += [f"eval/few_shot/{shots}" for shots in trial.eval.few_shot.shots]
    if search.metric in known:
        return []
    hint = close_matches(search.metric, known)
    if not happens and search.metric.startswith("eval/"):
        hint = f" Nothing is evaluated: set base.eval.every_steps to at most {total}, or leave base.eval.at_end true."
    message = f"metric {search.metric} never comes from these trials.{hint}"
    return [FieldError("/metric", message, search.metric, ", ".join(known))]


def _at_the_space(fault: FieldError, search: SearchJob, setting: Setting) -> FieldError:
    """A fault of a trial's description, at the key that brought it; else at the base, with the setting."""
    for key in sorted(setting, key=len, reverse=True):
        at = to_pointer(key.split("."))
        if fault.pointer == at or fault.pointer.startswith(f"{at}/"):
            message = f"{fault.message} (with {key} {show(setting[key])})"
            return _at_key(key, message, setting[key], fault.allowed)
    if search.final is not None:
        for key, value in search.final.overrides.items():
            if fault.pointer.startswith(to_pointer(key.split("."))):
                return FieldError(to_pointer(["final", "overrides", key]), fault.message, value, fault.allowed)
    return FieldError(f"/base{fault.pointer}", fault.message, fault.value, fault.allowed)


def _at_key(key: str, message: str, value: object, allowed: str | None = None) -> FieldError:
    return FieldError(to_pointer(["space", key]), message, value, allowed)


def _distinct(faults: Iterable[FieldError]) -> list[FieldError]:
    """One fault for each place: the first."""
    by_place = sorted(enumerate(faults), key=lambda numbered: (numbered[1].pointer, numbered[0]))
    return [next(group)[1] for _, group in itertools.groupby(by_place, key=lambda numbered: numbered[1].pointer)]


def _literals(annotation: Any) -> tuple[Any, ...]:
    return tuple(getattr(annotation, "__args__", ()))
