"""What a job will take, before it is queued: memory by ZeRO stage, steps, operations, hours.

Nothing here was measured on a GPU by us; every plan says so in its notes, with the assumption behind its hours.
"""

from __future__ import annotations

import re
from typing import Any

from configs.calibration import Calibration
from configs.cost import GPUS, Gpu, macs_per_image, num_parameters
from configs.datasets import PLANNING_CARDS, card_for
from configs.errors import SpecError, close_matches
from configs.load import parse_spec
from configs.planned import CheapestPlan, Plan, StagePlan
from configs.resolve import SourceCheckpoint, num_eval_examples, resolve
from configs.search_trials import check_search, resolve_search, undecided, with_fixed_base
from configs.spec import EvaluateJob, ExportJob, ImportJob, InspectJob, JobSpec, SearchJob, TrainingJob
from configs.training_plan import TrainingPlanner
from configs.wire import DatasetCard

__all__ = ["CheapestPlan", "Plan", "StagePlan", "plan", "plan_of_trials"]


def plan(
    spec: JobSpec,
    card: DatasetCard | None,
    gpu: str | None = None,
    source: SourceCheckpoint | None = None,
    calibration: Calibration | None = None,
    resolved: JobSpec | None = None,
) -> Plan:
    """The plan of a job, resolved or not.

    Args:
        card: of the job's data; None only if it reads none.
        gpu: "H100" or "H100:8" to plan for those instead of what the job asks for.
        source: the checkpoint of `init_from`, if it is known.
        calibration: what finished jobs measured; it takes the place of assumptions.
        resolved: what `spec` resolves to, if that is known already.

    Raises:
        SpecError: the job does not resolve, the GPU is unknown, or the batch cannot be divided among so many.
    """
    if isinstance(spec, ExportJob):
        return _plan_export(source)
    if isinstance(spec, ImportJob):
        return Plan(kind="import", world_size=1, notes=("Reads one file and writes its weights as a checkpoint.",))
    if isinstance(spec, SearchJob):
        return _plan_search(spec, gpu, calibration)
    complete = resolve(spec, card, source) if resolved is None else resolved
    if isinstance(complete, EvaluateJob):
        return _plan_evaluation(complete, card, source)
    if isinstance(complete, InspectJob):
        return _plan_inspection(complete, source)
    assert card is not None
    assert isinstance(spec, TrainingJob)
    assert isinstance(complete, TrainingJob)
    device, world_size = _parse_gpu(gpu)
    return TrainingPlanner(spec, complete, card, device, world_size, calibration).plan()


# -- searches ----------------------------------------------------------------------------------------------------------
def _plan_search(search: SearchJob, gpu: str | None, calibration: Calibration | None) -> Plan:
    """With the data sets that plans know; its checkpoint need not be chosen yet."""
    made: list[Plan] = []

    def complete(raw: dict[str, Any]) -> TrainingJob:
        trial = parse_spec(raw)
        assert isinstance(trial, TrainingJob), "trials are trainings"
        card = card_for(trial.data.source, PLANNING_CARDS)
        resolved = resolve(trial, card, None)
        if not made:
            made.append(plan(trial, card, gpu, None, calibration, resolved))
        return resolved

    search = with_fixed_base(undecided(search))
    return plan_of_trials(resolve_search(search, check_search(search, complete)), made[0])


def plan_of_trials(search: SearchJob, of_trial: Plan) -> Plan:
    """The plan of a resolved search: that of one trial, and what all of them take at most."""
    count = search.budget.trials + (search.final is not None)
    trials = f"{search.budget.trials} trials" + (" and a final run" if search.final is not None else "")
    notes = [f"Of one trial; the search makes {trials}."]
    if of_trial.gpu_hours is not None:
        earlier = "; what is stopped early takes less" if search.scheduler.name in ("asha", "median") else ""
        notes.append(f"All of them together take {count * of_trial.gpu_hours:,.3g} GPU-hours{earlier}.")
    return of_trial.model_copy(update={"notes": (*notes, *of_trial.notes)})


def _parse_gpu(gpu: str | None) -> tuple[Gpu | None, int | None]:
    """ "H100:8" as a GPU and a count."""
    if gpu is None:
        return None, None
    match = re.fullmatch(r"([A-Za-z0-9-]+)(?::([1-9][0-9]{0,3}))?", gpu)
    known = ", ".join(GPUS)
    if match is None:
        raise SpecError.at("/gpu", f"gpu {gpu!r}: expected a GPU and a count, such as H100:8", gpu, known)
    # Ray says A100-80G, people also say A100-80GB and h100.
    name = match[1].upper().removesuffix("B")
    if name not in GPUS:
        hint = close_matches(name, GPUS)
        raise SpecError.at("/gpu", f"unknown GPU {match[1]!r}: expected one of {known}.{hint}", gpu, known)
    return GPUS[name], int(match[2]) if match[2] else None


# -- jobs that do not train --------------------------------------------------------------------------------------------
def _plan_evaluation(spec: EvaluateJob, card: DatasetCard | None, source: SourceCheckpoint | None) -> Plan:
    # resolve() has refused the job otherwise.
    assert spec.data is not None
    assert card is not None
    assert source is not None
    config = source.model
    if spec.image_size is not None:
        config = config.model_copy(update={"image_size": (spec.image_size, spec.image_size)})
    images = num_eval_examples(spec.data, card)
    return Plan(
        kind=spec.kind,
        parameters=num_parameters(config),
        macs=macs_per_image(config),
        exaflops=2 * macs_per_image(config) * images / 1e18,
        num_examples=images,
        world_size=spec.resources.worker_range[1],
        notes=("One forward pass over the split; hours are not planned.",),
    )


def _plan_inspection(spec: InspectJob, source: SourceCheckpoint | None) -> Plan:
    # resolve() has refused the job otherwise.
    assert source is not None
    config = source.model
    images = 0
    if "attention_rollout" in spec.wanted(config):
        images = spec.num_rollout_images
    if "attention_distance" in spec.wanted(config):
        images = max(images, spec.num_images)
    return Plan(
        kind=spec.kind,
        parameters=num_parameters(config),
        macs=macs_per_image(config),
        exaflops=2 * macs_per_image(config) * images / 1e18,
        num_examples=images,
        world_size=1,
        notes=(f"Draws {', '.join(spec.wanted(config))}; hours are not planned.",),
    )


def _plan_export(source: SourceCheckpoint | None) -> Plan:
    facts: dict[str, Any] = {}
    if source is not None:
        facts = {"parameters": num_parameters(source.model), "checkpoint_bytes": num_parameters(source.model) * 4}
    return Plan(kind="export", world_size=1, notes=("Reads one checkpoint and writes its weights.",), **facts)
