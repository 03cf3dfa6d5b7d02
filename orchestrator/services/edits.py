"""What may be changed of a job after it was submitted: its priority while it waits, and its labels."""

from __future__ import annotations

from configs.states import JobState
from orchestrator.schemas import JobEdit, JobPublic
from orchestrator.services.auth import Actor
from orchestrator.services.jobs import check_version, find_job, publish
from orchestrator.services.problems import Invalid, WrongState, field_error
from orchestrator.storage.db import Database
from orchestrator.storage.events import lock_job, record


def edit_job(db: Database, actor: Actor, job_id: str, wanted: JobEdit, if_match: str | None = None) -> JobPublic:
    """The job with another priority or other labels. What it has already is no change.

    Raises:
        NotFound, PreconditionFailed.
        Invalid: nothing is to be changed.
        WrongState: a priority for a job that has ended.
    """
    if wanted.priority is None and wanted.labels is None:
        errors = [field_error("", "nothing is to be changed", {}, "priority, labels")]
        raise Invalid("The body is not valid: give priority or labels.", errors=errors)
    with db.session() as session:
        find_job(session, job_id)
        row = lock_job(session, job_id)
        assert row is not None, "jobs are never deleted"
        check_version(row, if_match)
        changes = []
        if wanted.priority is not None and wanted.priority != row.priority:
            if JobState(row.state).is_terminal:
                raise WrongState(
                    f"The job is {row.state}: its priority does not matter any more.",
                    hint="Labels can be changed at any time.",
                    state=row.state,
                )
            changes.append(f"priority {row.priority} to {wanted.priority}")
            row.priority = wanted.priority
        if wanted.labels is not None and wanted.labels != row.labels:
            changes.append("labels")
            row.labels = dict(wanted.labels)
        if changes:
            row.version += 1
            data = wanted.model_dump(exclude_none=True)
            record(session, job_id, "job.edited", f"Changed: {', '.join(changes)}", actor.name, data=data)
        return publish(session, [row])[0]
