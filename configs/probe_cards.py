"""The data sets that features are probed on, checked at submission against what is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from configs.data import FolderSource, Source
from configs.datasets import card_for
from configs.errors import FieldError, SpecError
from configs.probes import FewShot, Neighbours, ProbeData
from configs.spec import EvaluateJob, FinetuneJob, JobSpec, PretrainJob
from configs.wire import DatasetCard

_Probe = TypeVar("_Probe", FewShot, Neighbours)


def probed_sources(spec: JobSpec) -> tuple[Source, ...]:
    """The data sets that a job probes in place of its own."""
    if isinstance(spec, EvaluateJob):
        probes: tuple[FewShot | Neighbours | None, ...] = (spec.few_shot, spec.neighbours)
    elif isinstance(spec, PretrainJob | FinetuneJob):
        probes = (spec.eval.few_shot,)
    else:
        probes = ()
    return tuple(dataset.source for probe in probes if probe is not None for dataset in probe.datasets)


def fill_probes(spec: JobSpec, registered: Mapping[str, DatasetCard]) -> JobSpec:
    """The same job, which says of each folder that it probes what it holds now.

    Args:
        registered: cards of registered folders by name.

    Raises:
        SpecError: a data set is not known, or has no such split; each at its place.
    """
    faults: list[FieldError] = []
    if isinstance(spec, EvaluateJob):
        changes = {
            "few_shot": _filled(spec.few_shot, "/few_shot", registered, faults),
            "neighbours": _filled(spec.neighbours, "/neighbours", registered, faults),
        }
        filled: JobSpec = spec.model_copy(update=changes)
    elif isinstance(spec, PretrainJob | FinetuneJob):
        few_shot = _filled(spec.eval.few_shot, "/eval/few_shot", registered, faults)
        filled = spec.model_copy(update={"eval": spec.eval.model_copy(update={"few_shot": few_shot})})
    else:
        return spec
    if faults:
        raise SpecError(faults)
    return filled


def _filled(
    probe: _Probe | None, pointer: str, registered: Mapping[str, DatasetCard], faults: list[FieldError]
) -> _Probe | None:
    if probe is None or not probe.datasets:
        return probe
    filled = []
    for index, dataset in enumerate(probe.datasets):
        place = f"{pointer}/datasets/{index}"
        try:
            filled.append(_with_fingerprint(dataset, registered))
        except SpecError as error:
            faults.extend(
                # Its pointers and messages are those of a job's own data.
                FieldError(place + e.pointer.removeprefix("/data"), _relative(e.message), e.value, e.allowed)
                for e in error.errors
            )
    return probe.model_copy(update={"datasets": tuple(filled)})


def _with_fingerprint(dataset: ProbeData, registered: Mapping[str, DatasetCard]) -> ProbeData:
    card = card_for(dataset.source, registered)
    faults = []
    for field in ("train", "eval"):
        split = getattr(dataset, field)
        names = [info.name for info in card.splits]
        if split not in names:
            known = ", ".join(names)
            message = f"{field} {split!r}: data set {card.name} has no such split, it has {known}"
            faults.append(FieldError(f"/{field}", message, split, known))
    if dataset.fingerprint not in (None, card.fingerprint):
        message = f"data set {card.name} holds other images now: its fingerprint is {card.fingerprint}"
        faults.append(FieldError("/fingerprint", message, dataset.fingerprint, "nothing, for what it holds now"))
    if faults:
        raise SpecError(faults)
    if not isinstance(dataset.source, FolderSource):
        return dataset
    return dataset.model_copy(update={"fingerprint": card.fingerprint})


def _relative(message: str) -> str:
    return message.removeprefix("data.")
