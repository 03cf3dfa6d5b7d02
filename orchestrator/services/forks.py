"""A new job made of another one: the same description with changes, from the start or from one of its checkpoints."""

from __future__ import annotations

import json

from sqlalchemy.orm import Session

from orchestrator.schemas import JobFork
from orchestrator.services.auth import Actor
from orchestrator.services.idempotency import Key, claim
from orchestrator.services.jobs import find_job
from orchestrator.services.problems import Invalid, field_error
from orchestrator.services.submission import Request, Submitted, job_row, prepare, queue_prepared, replayed
from orchestrator.storage.db import Database
from orchestrator.storage.events import lock_job, record
from orchestrator.storage.registry import resolve_ref
from orchestrator.storage.tables import CheckpointRow, JobRow

_ALIASES = ("latest", "best")
_TRAINING = ("pretrain", "finetune")


def fork_request(old: JobRow, wanted: JobFork) -> Request:
    """What the user of `old` sent, with the changes of the fork laid over it."""
    spec = {**old.submitted.get("spec", {})}
    overrides = {**old.submitted.get("overrides", {})}
    if wanted.name is not None:
        spec["name"] = wanted.name
        # The old name may stand there, and would be laid over the new one.
        overrides.pop("name", None)
    if wanted.checkpoint is not None and old.kind in _TRAINING:
        # "auto" would choose another one for another number of workers, and that is part of what is learned.
        overrides["train.micro_batch_size"] = json.loads(old.spec_json)["train"]["micro_batch_size"]
    return Request(spec, {**overrides, **wanted.overrides})


def fork_job(db: Database, actor: Actor, job_id: str, wanted: JobFork, key: Key | None) -> Submitted:
    """Queue a job with the description of another one and changes to it. With a checkpoint it goes on from there,
    optimizer and all; what is learned must then be the same as it was.

    Raises:
        NotFound: there is no such job.
        SpecError: the description is not valid with these changes.
        Invalid: there is no such checkpoint, or the changes do not allow to go on from one.
        KeyReused: the key was used for another request.
    """
    with db.session() as session:
        earlier = claim(session, key)
        if earlier is not None:
            return replayed(earlier)
        find_job(session, job_id)
        # Before the checkpoint's row: retention takes the two locks in this order, too.
        old = lock_job(session, job_id)
        assert old is not None, "jobs are never deleted"
        request = fork_request(old, wanted)
        prepared = prepare(session, request, hold=True)
        row = job_row(request, prepared)
        checkpoint = None if wanted.checkpoint is None else _find(session, old, wanted.checkpoint)
        if checkpoint is not None:
            _check_same_training(old, row, checkpoint)
            row.resume_from, row.step = checkpoint.id, checkpoint.step
        submitted = queue_prepared(session, actor, row, prepared, key)
        how = f"from step {checkpoint.step}" if checkpoint is not None else "from the start"
        data = {"job_id": row.id, "checkpoint": row.resume_from}
        record(session, job_id, "job.forked", f"Forked as {row.id}, {how}", actor.name, data=data)
        data = {"job_id": job_id, "checkpoint": row.resume_from}
        record(session, row.id, "job.forked_from", f"A fork of {job_id}, {how}", actor.name, data=data)
        return submitted


def _find(session: Session, old: JobRow, wanted: str) -> CheckpointRow:
    reference = f"{old.id}/{wanted}" if wanted in _ALIASES else wanted
    row = resolve_ref(session, reference, hold=True)
    if row is None or row.job_id != old.id:
        message = f"job {old.id} has no checkpoint {wanted!r} that is kept"
        errors = [field_error("/checkpoint", message, wanted, "latest, best, or the id of one that it has")]
        raise Invalid(f"{message[0].upper()}{message[1:]}.", errors=errors)
    return row


def _check_same_training(old: JobRow, row: JobRow, checkpoint: CheckpointRow) -> None:
    if row.kind not in _TRAINING:
        message = f"{row.kind} jobs keep nothing to go on from"
    elif row.training_fingerprint != old.training_fingerprint:
        message = (
            "the changes alter what is learned (model, data, optim, schedule, batch, precision or seed), and the "
            "optimizer's state at a checkpoint belongs to what it was"
        )
    else:
        return
    errors = [field_error("/checkpoint", message, checkpoint.id, "null, to start anew")]
    hint = "Fork without a checkpoint, or start a fine-tune from the checkpoint's weights (init_from)."
    raise Invalid(f"This fork cannot go on from {checkpoint.id}: {message}.", errors=errors, hint=hint)
