"""Leases: who may act for a job now. Taken and given back by one guarded UPDATE, the same on every database.

A lease is a token with an expiry. Expiry lets another process take over from one that died; the token keeps a process
that was merely paused from writing afterwards: whoever took over has changed it (`guarded`).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, and_, or_, select, update
from sqlalchemy.orm import Session

from configs.states import Desired, JobState
from orchestrator.storage.db import Database, upsert
from orchestrator.storage.events import lock_job
from orchestrator.storage.tables import JobRow, LeaseRow

LEADER = "leader"
_WATCHED = (JobState.PREPARING, JobState.RUNNING, JobState.RECOVERING, JobState.PAUSING, JobState.STOPPING)
_ENDED = tuple(state for state in JobState if state.is_terminal)
_CLAIM_TRIES = 5


@dataclass(frozen=True)
class Claim:
    """The right to act for one job until `expires_at`, and to write as long as nobody else has taken it."""

    job_id: str
    token: str
    owner: str
    expires_at: datetime


class LeaseLost(Exception):
    """Another process has taken the lease: whatever this one was about to write is void."""


def claim_due(db: Database, owner: str, now: datetime, lease_s: float) -> Claim | None:
    """Take the job that has waited longest for a look, or None if none is due.

    Due are live attempts whose next look has come, queued jobs that the scheduler let go, jobs at rest whose `desired`
    has changed, and jobs that have ended and whose checkpoints were not tidied up yet (these have a next look).
    """
    token = secrets.token_hex(16)
    expires_at = now + timedelta(seconds=lease_s)
    # The condition stands twice on purpose. PostgreSQL runs the subquery once; when another process takes the same row
    # in between, the outer condition is checked again on the row as it is now, and this UPDATE changes nothing.
    oldest = select(JobRow.id).where(_is_due(now)).order_by(JobRow.next_look_at.asc().nulls_first(), JobRow.id).limit(1)
    statement = (
        update(JobRow)
        .where(JobRow.id == oldest.scalar_subquery(), _is_due(now))
        .values(lease_token=token, lease_owner=owner, lease_expires_at=expires_at)
        .returning(JobRow.id)
        .execution_options(synchronize_session=False)
    )
    for _ in range(_CLAIM_TRIES):
        # Read first: on SQLite an UPDATE that finds nothing would still take the write lock from the API.
        with db.reader() as session:
            if session.scalar(select(JobRow.id).where(_is_due(now)).limit(1)) is None:
                return None
        with db.session() as session:
            job_id = session.scalar(statement)
        if job_id is not None:
            return Claim(job_id, token, owner, expires_at)
    return None


def claim_job(db: Database, job_id: str, owner: str, now: datetime, lease_s: float) -> Claim | None:
    """Take this very job, if nobody has it."""
    claim = Claim(job_id, secrets.token_hex(16), owner, now + timedelta(seconds=lease_s))
    free = or_(JobRow.lease_expires_at.is_(None), JobRow.lease_expires_at < now)
    values = {"lease_token": claim.token, "lease_owner": owner, "lease_expires_at": claim.expires_at}
    with db.session() as session:
        taken = session.execute(update(JobRow).where(JobRow.id == job_id, free).values(**values))
        return claim if cast(CursorResult[Any], taken).rowcount == 1 else None


def renew(db: Database, claim: Claim, now: datetime, lease_s: float) -> Claim:
    """The same claim with a later expiry.

    Raises:
        LeaseLost: another process has taken the job.
    """
    expires_at = now + timedelta(seconds=lease_s)
    _write(db, claim, {"lease_expires_at": expires_at})
    return replace(claim, expires_at=expires_at)


def release(db: Database, claim: Claim, next_look_at: datetime | None) -> None:
    """Give the job back, to be looked at again at `next_look_at` (None: only when something about it changes).

    Raises:
        LeaseLost: another process has taken the job; it decides when to look again.
    """
    given_back = {"lease_token": None, "lease_owner": None, "lease_expires_at": None, "next_look_at": next_look_at}
    _write(db, claim, given_back)


def guarded(session: Session, claim: Claim) -> JobRow:
    """The claimed job's row, locked for this transaction. Every write of a reconciler begins here.

    Raises:
        LeaseLost: another process has taken the job.
    """
    job = lock_job(session, claim.job_id)
    if job is None or job.lease_token != claim.token:
        raise LeaseLost(f"{claim.owner} no longer holds the lease of {claim.job_id}")
    return job


def hold_leadership(db: Database, owner: str, token: str, now: datetime, lease_s: float) -> bool:
    """Take or renew the controllers' leadership. Returns whether `owner` with `token` leads until now + `lease_s`."""
    with db.session() as session:
        upsert(session, LeaseRow, [{"name": LEADER}], ["name"], update=[])
        free = or_(LeaseRow.token.is_(None), LeaseRow.token == token, LeaseRow.expires_at < now)
        values = {"token": token, "owner": owner, "expires_at": now + timedelta(seconds=lease_s)}
        result = session.execute(update(LeaseRow).where(LeaseRow.name == LEADER, free).values(**values))
        return cast(CursorResult[Any], result).rowcount == 1


def give_up_leadership(db: Database, token: str) -> None:
    """Let another controller lead at once. Nothing happens if `token` does not lead."""
    with db.session() as session:
        mine = and_(LeaseRow.name == LEADER, LeaseRow.token == token)
        session.execute(update(LeaseRow).where(mine).values(token=None, owner=None, expires_at=None))


def _is_due(now: datetime) -> ColumnElement[bool]:
    """The condition under which a job wants a reconciler."""
    free = or_(JobRow.lease_expires_at.is_(None), JobRow.lease_expires_at < now)
    look_has_come = or_(JobRow.next_look_at.is_(None), JobRow.next_look_at <= now)
    wants_change = or_(
        # A trial that runs is looked after by its search's driver.
        and_(JobRow.state.in_(_WATCHED), JobRow.search_id.is_(None)),
        and_(JobRow.state == JobState.QUEUED, or_(JobRow.start_workers.is_not(None), JobRow.desired != Desired.RUN)),
        and_(JobRow.state == JobState.PAUSED, JobRow.desired != Desired.PAUSE),
        and_(JobRow.state.in_(_ENDED), JobRow.next_look_at.is_not(None)),
    )
    return and_(free, look_has_come, wants_change)


def _write(db: Database, claim: Claim, values: dict[str, Any]) -> None:
    mine = and_(JobRow.id == claim.job_id, JobRow.lease_token == claim.token)
    with db.session() as session:
        result = session.execute(
            update(JobRow).where(mine).values(**values).execution_options(synchronize_session=False)
        )
        if cast(CursorResult[Any], result).rowcount != 1:
            raise LeaseLost(f"{claim.owner} no longer holds the lease of {claim.job_id}")
