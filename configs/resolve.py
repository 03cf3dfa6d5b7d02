"""From a valid job description to a complete one, once, at submission.

Sizes come from the checkpoint, classes and counts from the data set's card, durations become optimizer steps, and the
micro-batch is pinned. The result is stored as canonical JSON and never computed again.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from pydantic_core import to_json

from configs.cost import DEFAULT_GPU_GIB, GPUS, largest_micro_batch
from configs.data import Augment, DataConfig, ImagesSource
from configs.datasets import num_eval_examples, num_train_examples
from configs.errors import FieldError, SpecError, field_errors
from configs.inherit import SourceCheckpoint, grid_faults, inherit, kept_head_faults, patch_faults
from configs.model import ModelConfig, NetworkConfig, num_colours
from configs.pictures import pictures_of, why_not
from configs.spec import (
    AnyJob,
    EvaluateJob,
    ExportJob,
    FinetuneJob,
    ImportJob,
    InspectJob,
    JobSpec,
    PretrainJob,
    SearchJob,
    job_spec_adapter,
)
from configs.train import Every, Schedule
from configs.wire import DatasetCard

__all__ = [
    "SourceCheckpoint",
    "canonical_json",
    "data_of",
    "load_resolved",
    "num_eval_examples",
    "num_train_examples",
    "resolve",
    "spec_hash",
    "steps",
    "training_fingerprint",
]

Job = TypeVar("Job", bound=AnyJob)


def data_of(spec: JobSpec, source: SourceCheckpoint | None = None) -> DataConfig | None:
    """The data a job reads: its own, or (evaluate, inspect) that of its checkpoint. None: it reads none (export,
    import, pictures of weights; of a search its trials do), or unknown."""
    if isinstance(spec, ExportJob | ImportJob | SearchJob):
        return None
    if isinstance(spec, InspectJob) and not spec.reads_images(None if source is None else source.model):
        return None
    if spec.data is not None:
        return spec.data
    return None if source is None else source.data


def resolve(spec: Job, dataset: DatasetCard | None, source: SourceCheckpoint | None) -> Job:
    """The complete description of the same job.

    Args:
        dataset: card of the job's data (`data_of`); None only if it reads none.
        source: the checkpoint named by `init_from`. None for pretrain; for a fine-tune that gives all sizes itself it
            may be None too, to plan it.

    Raises:
        SpecError: splits, classes, sizes or counts contradict one another; each at its field.
    """
    job: JobSpec = spec
    document = job.model_dump(mode="json")
    if isinstance(job, (PretrainJob, FinetuneJob)):
        changes = _training(job, document, dataset, source)
    elif isinstance(job, EvaluateJob):
        changes = _evaluation(job, dataset, source)
    elif isinstance(job, InspectJob):
        changes = _inspection(job, dataset, source)
    else:
        changes = {}
        if isinstance(job, ExportJob) and source is not None and job.format != "safetensors":
            _refuse_without_classifier("/format", f"format {job.format}", job.format, source, "safetensors")
    document |= changes
    try:
        # Validated afresh: what was filled in has to obey the same rules.
        return cast(Job, load_resolved(document))
    except ValidationError as error:
        raise SpecError(field_errors(error, document, type(job))) from None


# -- training ----------------------------------------------------------------------------------------------------------
def _training(
    spec: PretrainJob | FinetuneJob,
    document: dict[str, Any],
    card: DatasetCard | None,
    source: SourceCheckpoint | None,
) -> dict[str, Any]:
    if card is None:
        raise SpecError.at("/data/source", "the data set is not known")
    _refuse_without_labels(spec.kind, spec.data)
    faults: list[FieldError] = []
    model = dict(document["model"])
    if isinstance(spec, FinetuneJob):
        model |= inherit(spec.model, source, spec.keep_head, faults)
    if spec.train.objective == "masked_patch":
        model |= {"head": "masked_patch", "num_classes": _num_colours(spec.model, faults)}
    else:
        model["num_classes"] = _num_classes(spec.model.num_classes, card, faults)
    if isinstance(spec, FinetuneJob) and spec.keep_head and source is not None:
        faults.extend(kept_head_faults(source, card))
    data = _fill_data(spec.data, source)
    num_examples = _count(data, card, faults)
    if num_examples is not None and spec.train.global_batch_size > num_examples:
        faults.append(
            FieldError(
                "/train/global_batch_size",
                f"train.global_batch_size {spec.train.global_batch_size} is more than the {num_examples} "
                "training examples",
                spec.train.global_batch_size,
                f"at most {num_examples}",
            )
        )
    if faults or num_examples is None:
        raise SpecError(faults)
    config = ModelConfig.model_validate(model).network()
    micro_batch_size = spec.train.micro_batch_size
    if micro_batch_size == "auto":
        micro_batch_size = _micro_batch_size(spec, config)
    batch = spec.train.global_batch_size
    return {
        "model": model,
        "data": document["data"] if data is spec.data else data.model_dump(mode="json"),
        "schedule": _schedule(spec.schedule, num_examples, batch),
        "train": document["train"] | {"micro_batch_size": micro_batch_size},
        "checkpoint": _checkpoint(spec, document["checkpoint"], num_examples, batch),
        "eval": _cadence(spec.eval, document["eval"], num_examples, batch),
    }


def _num_classes(given: int | None, card: DatasetCard, faults: list[FieldError]) -> int:
    if given is not None and given != card.num_classes:
        faults.append(
            FieldError(
                "/model/num_classes",
                f"model.num_classes {given} contradicts data set {card.name}, which has {card.num_classes} classes",
                given,
                str(card.num_classes),
            )
        )
    return card.num_classes


def _num_colours(model: ModelConfig, faults: list[FieldError]) -> int:
    colours = num_colours(model.in_channels)
    if model.num_classes not in (None, colours):
        message = (
            f"model.num_classes {model.num_classes}: train.objective masked_patch tells {colours} colours of "
            f"{model.in_channels} channels apart"
        )
        faults.append(FieldError("/model/num_classes", message, model.num_classes, str(colours)))
    return colours


def _fill_data(data: DataConfig, source: SourceCheckpoint | None) -> DataConfig:
    """Normalisation not given is the checkpoint's. With a holdout, evaluation reads the training split's held-out
    part."""
    changes: dict[str, Any] = {}
    if source is not None:
        changes |= {f: getattr(source.preprocess, f) for f in ("mean", "std") if f not in data.model_fields_set}
    if data.holdout is not None:
        changes["eval"] = data.train
    return data.model_copy(update=changes) if changes else data


def _count(data: DataConfig, card: DatasetCard, faults: list[FieldError]) -> int | None:
    """Training examples, after noting every fault of the splits; None if they cannot be counted."""
    count = None
    try:
        count = num_train_examples(data, card)
    except SpecError as error:
        faults.extend(error.errors)
    if data.holdout is None:
        try:
            num_eval_examples(data, card)
        except SpecError as error:
            faults.extend(error.errors)
    return count


def _micro_batch_size(spec: PretrainJob | FinetuneJob, config: NetworkConfig) -> int:
    """The largest that fits the job's accelerator; the smallest if by the cost model none does, as the plan says."""
    gpu = GPUS.get(spec.resources.accelerator or "")
    memory_gib = None
    if spec.resources.gpus_per_worker > 0:
        memory_gib = gpu.memory_gib if gpu else DEFAULT_GPU_GIB
    found = largest_micro_batch(
        config,
        global_batch_size=spec.train.global_batch_size,
        world_sizes=spec.allowed_world_sizes,
        zero_stage=spec.zero.stage,
        optimizer=spec.optim.name,
        precision=spec.train.precision,
        checkpointing=spec.train.activation_checkpointing,
        memory_gib=memory_gib,
        even=spec.data.mix is not None,
        ema=spec.train.ema_decay is not None,
    )
    return found or (1 if spec.data.mix is None else 2)


# -- durations ---------------------------------------------------------------------------------------------------------
def steps(
    in_steps: int | None, in_epochs: float | None, in_examples: int | None, num_examples: int, global_batch_size: int
) -> int | None:
    """A duration in optimizer steps, however it was given: rounded, and at least 1 unless it is 0. None: not given.

    An epoch is `num_examples` images; round(1281167 / 1024 * 90) = 112,603 is big_vision's rule too.
    """
    if in_steps is not None:
        return in_steps
    if in_epochs is not None:
        images = in_epochs * num_examples
    elif in_examples is not None:
        images = float(in_examples)
    else:
        return None
    return 0 if images == 0 else max(1, round(images / global_batch_size))


def _schedule(schedule: Schedule, num_examples: int, batch: int) -> dict[str, Any]:
    total = steps(schedule.total_steps, schedule.total_epochs, schedule.total_examples, num_examples, batch)
    warmup = steps(schedule.warmup_steps, schedule.warmup_epochs, schedule.warmup_examples, num_examples, batch) or 0
    assert total is not None
    if warmup > total:
        field = next(f for f in ("steps", "epochs", "examples") if getattr(schedule, f"warmup_{f}") is not None)
        given = getattr(schedule, f"warmup_{field}")
        raise SpecError.at(
            f"/schedule/warmup_{field}",
            f"schedule.warmup_{field} {given} is {warmup} steps, more than the {total} steps in all",
            given,
            f"at most {total} steps",
        )
    return {"total_steps": total, "warmup_steps": warmup, "decay": schedule.decay, "min_lr": schedule.min_lr}


def _cadence(every: Every, document: dict[str, Any], num_examples: int, batch: int) -> dict[str, Any]:
    resolved = steps(every.every_steps, every.every_epochs, every.every_examples, num_examples, batch)
    return document | {"every_steps": resolved, "every_epochs": None, "every_examples": None}


def _checkpoint(
    spec: PretrainJob | FinetuneJob, document: dict[str, Any], num_examples: int, batch: int
) -> dict[str, Any]:
    """Without evaluation no checkpoint is a best one."""
    resolved = _cadence(spec.checkpoint, document, num_examples, batch)
    return resolved if spec.eval.happens else resolved | {"keep_best": 0}


# -- evaluation --------------------------------------------------------------------------------------------------------
def _evaluation(spec: EvaluateJob, card: DatasetCard | None, source: SourceCheckpoint | None) -> dict[str, Any]:
    if source is None:
        raise SpecError.at("/init_from", f"checkpoint {spec.init_from} is not known", spec.init_from)
    data = data_of(spec, source)
    if data is None:
        raise SpecError.at("/data", f"data is missing: {source.checkpoint_id} does not say what it was trained on")
    if card is None:
        raise SpecError.at("/data/source", "the data set is not known")
    _refuse_without_labels(spec.kind, data)
    faults: list[FieldError] = []
    if spec.image_size is not None:
        faults.extend(patch_faults("image_size", (spec.image_size, spec.image_size), source.model))
        faults.extend(grid_faults("image_size", (spec.image_size, spec.image_size), source.model))
    if not source.model.has_classifier:
        if spec.few_shot is None and spec.neighbours is None:
            what = f"accuracy of {spec.init_from}"
            allowed = "a checkpoint with a classifier, or few_shot or neighbours, which look at features"
            _refuse_without_classifier("/init_from", what, spec.init_from, source, allowed)
    elif card.num_classes != source.model.num_classes:
        faults.append(
            FieldError(
                "/data/source",
                f"data set {card.name} has {card.num_classes} classes, checkpoint {source.checkpoint_id} tells "
                f"{source.model.num_classes} apart",
                card.name,
                f"a data set with {source.model.num_classes} classes",
            )
        )
    if spec.data is not None:
        data = _fill_evaluation_data(spec.data, source, faults)
    try:
        num_eval_examples(data, card)
    except SpecError as error:
        faults.extend(error.errors)
    if spec.real_labels is not None:
        faults.extend(_real_label_faults(spec.real_labels, data, source))
    if faults:
        raise SpecError(faults)
    data = _only_evaluated(data)
    height, width = source.model.image_size
    image_size = spec.image_size or (height if height == width else None)
    return {"data": data.model_dump(mode="json"), "image_size": image_size}


def _inspection(spec: InspectJob, card: DatasetCard | None, source: SourceCheckpoint | None) -> dict[str, Any]:
    if source is None:
        raise SpecError.at("/init_from", f"checkpoint {spec.init_from} is not known", spec.init_from)
    faults: list[FieldError] = []
    there = pictures_of(source.model)
    for index, name in enumerate(spec.pictures or ()):
        if (reason := why_not(name, source.model)) is not None:
            faults.append(FieldError(f"/pictures/{index}", f"pictures: {name} {reason}", name, ", ".join(there)))
    wanted = [name for name in there if name in spec.wanted(source.model)]
    if not spec.reads_images(source.model):
        if spec.data is not None:
            message = f"data has no effect: {', '.join(wanted)} shows weights only and reads no images"
            faults.append(FieldError("/data", message, spec.data.model_dump(mode="json"), "nothing"))
        if faults:
            raise SpecError(faults)
        return {"pictures": wanted, "data": None}
    data = data_of(spec, source)
    if data is None:
        message = f"data is missing: {source.checkpoint_id} does not say what it was trained on"
        faults.append(FieldError("/data", message, None, "a data set; or pictures that read no images"))
    if faults or data is None:
        raise SpecError(faults)
    if card is None:
        raise SpecError.at("/data/source", "the data set is not known")
    data = _fill_evaluation_data(data, source, faults) if spec.data is not None else data
    counts = _image_counts(spec, data, card, faults)
    if faults:
        raise SpecError(faults)
    data = _only_evaluated(data)
    return {"pictures": wanted, "data": data.model_dump(mode="json")} | counts


def _image_counts(spec: InspectJob, data: DataConfig, card: DatasetCard, faults: list[FieldError]) -> dict[str, int]:
    """How many images are looked at: what was asked for must be there, what was not is at most
    what there is. Of uploaded images all are shown."""
    try:
        available = num_eval_examples(data, card)
    except SpecError as error:
        faults.extend(error.errors)
        return {}
    counts = {}
    for field in ("num_images", "num_rollout_images"):
        given: int = getattr(spec, field)
        if given > available and field in spec.model_fields_set:
            message = f"{field} {given} is more than the {available} images of the evaluation split"
            faults.append(FieldError(f"/{field}", message, given, f"at most {available}"))
        named = isinstance(data.source, ImagesSource) and field not in spec.model_fields_set
        counts[field] = available if named else min(given, available)
    return counts


def _real_label_faults(path: str, data: DataConfig, source: SourceCheckpoint) -> list[FieldError]:
    why = None
    if data.holdout is not None:
        why = "the checkpoint's data has a holdout: name data without one, the file is about the images of a split"
    elif not source.model.has_classifier:
        why = f"checkpoint {source.checkpoint_id} has no classifier"
    return [] if why is None else [FieldError("/real_labels", f"real_labels does not apply: {why}", path, "nothing")]


def _refuse_without_labels(kind: str, data: DataConfig) -> None:
    if isinstance(data.source, ImagesSource):
        message = f"uploaded images have no labels, which a job of kind {kind} needs: only inspect jobs read them"
        raise SpecError.at("/data/source/type", message, data.source.type, "torchvision, folder, synthetic")


def _refuse_without_classifier(
    pointer: str, what: str, value: object, source: SourceCheckpoint, allowed: str | None
) -> None:
    if not source.model.has_classifier:
        raise SpecError.at(
            pointer,
            f"{what}: checkpoint {source.checkpoint_id} was pre-trained with train.objective masked_patch and has no "
            "classifier; fine-tune it first",
            value,
            allowed,
        )


def _only_evaluated(data: DataConfig) -> DataConfig:
    """Without what was only for training: the checkpoint's own data says it too. A subset stays where the images that
    are evaluated were held out of it."""
    is_held_out_of_it = data.holdout is not None and data.holdout.of == "subset"
    subset = data.subset if is_held_out_of_it else None
    return data.model_copy(update={"subset": subset, "augment": Augment(), "mix": None})


def _fill_evaluation_data(data: DataConfig, source: SourceCheckpoint, faults: list[FieldError]) -> DataConfig:
    filled = _fill_data(data, source)
    if "eval_crop" not in data.model_fields_set:
        filled = filled.model_copy(update={"eval_crop": source.preprocess.crop})
    for field in ("mean", "std"):
        count = len(getattr(filled, field))
        if count not in (1, source.model.in_channels):
            message = f"data.{field} has {count} values, the checkpoint's in_channels is {source.model.in_channels}"
            faults.append(FieldError(f"/data/{field}", message, list(getattr(filled, field))))
    return filled


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


# -- identity ----------------------------------------------------------------------------------------------------------
def canonical_json(spec: JobSpec) -> bytes:
    """The one spelling of a resolved job that is stored and hashed."""
    return _canonical(spec.model_dump(mode="json"))


def load_resolved(stored: bytes | dict[str, Any]) -> JobSpec:
    """The job that `canonical_json` wrote. Raises pydantic.ValidationError if it is none."""
    text = stored if isinstance(stored, bytes) else to_json(stored)
    return job_spec_adapter.validate_json(text)


def spec_hash(stored: bytes) -> str:
    """Hash of the stored canonical JSON; computed once and kept beside it."""
    return "sha256:" + hashlib.sha256(stored).hexdigest()


_TRAINING = {
    "model",
    "data",
    "optim",
    "schedule",
    "train",
    "init_from",
    "keep_head",
    "image_size",
    "precision",
    "format",
    "file",
    "preprocess",
    "config",
    "weights",
}
# Settings that change how a job runs but not what it computes.
_NOT_TRAINING = {
    "train": {"log_every_steps", "max_nonfinite_steps"},
    "data": {"loader_workers", "max_corrupt"},
}


def training_fingerprint(spec: JobSpec, data_fingerprint: str) -> str:
    """What a resumed attempt must agree on: kind, model, data, optimizer, schedule, batch, precision, seed, origin.

    Not in it: names, queue, retries, workers, ZeRO stage, checkpoint and evaluation cadence.
    """
    document = spec.model_dump(mode="json", include=_TRAINING)
    kept: dict[str, Any] = {"kind": spec.kind, "data_fingerprint": data_fingerprint}
    for part in _TRAINING:
        value = document.get(part)
        if isinstance(value, dict):
            value = {field: v for field, v in value.items() if field not in _NOT_TRAINING.get(part, ())}
        kept[part] = value
    return spec_hash(_canonical(kept))


def _canonical(document: dict[str, Any]) -> bytes:
    return _ENCODER.encode(document).encode()
