"""The checkpoint a job starts from, as submission needs to know it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from configs.errors import SpecError
from configs.model import network_adapter
from configs.resolve import SourceCheckpoint, data_of, load_resolved
from configs.spec import FinetuneJob, PretrainJob
from configs.states import JobState
from configs.wire import DatasetCard, Preprocess
from orchestrator.storage.registry import resolve_ref
from orchestrator.storage.tables import CheckpointRow, JobRow


def find_source(
    session: Session, reference: str, depends_on: Sequence[str], *, hold: bool
) -> tuple[SourceCheckpoint, str]:
    """The checkpoint that `init_from` names, and how to store the reference: its id, or the reference as it came while
    a job that this one depends on is still to leave it. With `hold` retention cannot delete it before this transaction
    has stored the reference.

    Raises:
        SpecError: at /init_from, if there is no such checkpoint and none is to come.
    """
    job_id, _, which = reference.partition("/")
    owner = session.get(JobRow, job_id) if which else None
    if which and owner is None:
        raise SpecError.at("/init_from", f"there is no job {job_id}", reference)
    if owner is not None and job_id in depends_on and not JobState(owner.state).is_terminal:
        return _promised(owner, reference), reference
    row = resolve_ref(session, reference, hold=hold)
    if row is not None:
        return _found(session, row), row.id
    if owner is None:
        raise SpecError.at("/init_from", f"there is no checkpoint {reference}, or it was deleted", reference)
    if JobState(owner.state).is_terminal:
        raise SpecError.at("/init_from", f"job {job_id} ended without a checkpoint ({owner.state})", reference)
    raise SpecError.at(
        "/init_from",
        f"job {job_id} has no checkpoint yet: put it into queue.depends_on to wait for it",
        reference,
        f"queue.depends_on: [{job_id}]",
    )


def _found(session: Session, row: CheckpointRow) -> SourceCheckpoint:
    owner = session.get_one(JobRow, row.job_id)
    return SourceCheckpoint(
        checkpoint_id=row.id,
        prefix=row.prefix,
        model=network_adapter.validate_python(row.model),
        preprocess=Preprocess.model_validate(row.preprocess),
        data=data_of(load_resolved(owner.spec_json)),
    )


def _promised(owner: JobRow, reference: str) -> SourceCheckpoint:
    """What a job that has not finished will leave: its resolved description says all that matters."""
    spec = load_resolved(owner.spec_json)
    if not isinstance(spec, PretrainJob | FinetuneJob):
        raise SpecError.at("/init_from", f"job {owner.id} is of kind {spec.kind}: it leaves no checkpoint", reference)
    card = DatasetCard.model_validate(owner.dataset)
    return SourceCheckpoint(
        checkpoint_id=reference,
        prefix="",
        model=spec.model.network(),
        preprocess=Preprocess(
            image_size=spec.model.image_hw,
            in_channels=spec.model.in_channels,
            mean=spec.data.mean,
            std=spec.data.std,
            crop=spec.data.eval_crop,
            class_names=card.class_names,
        ),
        data=spec.data,
    )
