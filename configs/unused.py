"""What a user asked for that would have no effect in this job: refused by name.

Only what the user wrote is looked at, not what a preset or a default says, and only where it asks for something: a
field set to what it is anyway is no mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from configs.data import Augment, DataConfig
from configs.errors import FieldError, value_at
from configs.pictures import READ_IMAGES
from configs.spec import EvaluateJob, FinetuneJob, InspectJob, JobSpec, PretrainJob, SearchJob


def unused_fields(raw: Mapping[str, Any], spec: JobSpec) -> list[FieldError]:
    """The faults of `raw`, what the user wrote, that became `spec`."""
    if isinstance(spec, EvaluateJob):
        faults = _of_evaluation(spec.data, "an evaluate job")
    elif isinstance(spec, InspectJob):
        faults = _of_inspection(spec)
    elif isinstance(spec, PretrainJob | FinetuneJob):
        faults = _of_training(spec)
    elif isinstance(spec, SearchJob):
        why = "in a search: it holds what concurrency trials of base.resources take"
        faults = iter([("resources", why, "nothing")])
    else:
        return []
    return [
        FieldError("/" + field.replace(".", "/"), f"{field} has no effect {why}", value, allowed)
        for field, why, allowed in faults
        if (value := value_at(raw, tuple(field.split(".")))) is not None
    ]


_Fault = tuple[str, str, str]
"""Field, why it has no effect, what is allowed there."""


def _of_evaluation(data: DataConfig | None, job: str) -> Iterator[_Fault]:
    if data is None:
        return
    why = f"in {job}: it is for training"
    if data.subset is not None and (data.holdout is None or data.holdout.of == "split"):
        yield "data.subset", why, "null"
    if data.augment != Augment():
        yield "data.augment", why, "nothing"
    if data.mix is not None:
        yield "data.mix", why, "null"
    if data.holdout is None and data.train != _default("train"):
        yield "data.train", f"in {job} without data.holdout: it reads data.eval", "nothing"
    yield from _beside_holdout(data)


def _of_inspection(spec: InspectJob) -> Iterator[_Fault]:
    yield from _of_evaluation(spec.data, "an inspect job")
    for field, pictures in (
        ("num_images", {"attention_distance"}),
        ("num_rollout_images", {"attention_rollout"}),
        ("batch_size", READ_IMAGES),
        ("seed", READ_IMAGES),
    ):
        if pictures.isdisjoint(spec.wanted(None)):
            yield field, f"without {' or '.join(sorted(pictures))} among the pictures", "nothing"


def _of_training(spec: PretrainJob | FinetuneJob) -> Iterator[_Fault]:
    yield from _beside_holdout(spec.data)
    if spec.eval.happens:
        return
    why = "where nothing is evaluated: set eval.every_steps, or leave eval.at_end true"
    if spec.checkpoint.keep_best > 0:
        yield "checkpoint.keep_best", why, "0"
    if spec.checkpoint.metric != type(spec.checkpoint).model_fields["metric"].default:
        yield "checkpoint.metric", why, "nothing"


def _beside_holdout(data: DataConfig) -> Iterator[_Fault]:
    if data.holdout is not None and data.eval not in (data.train, _default("eval")):
        why = f"beside data.holdout: the held-out part of {data.train!r} is evaluated; for data.eval set holdout: null"
        yield "data.eval", why, "nothing"


def _default(field: str) -> Any:
    return DataConfig.model_fields[field].default
