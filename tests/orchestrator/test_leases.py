from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from configs.states import Desired, JobState
from orchestrator.control.leases import (
    Claim,
    LeaseLost,
    claim_due,
    give_up_leadership,
    guarded,
    hold_leadership,
    release,
    renew,
)
from orchestrator.storage.db import Database
from orchestrator.storage.tables import JobRow
from tests.factories import NOW, add_job

pytestmark = pytest.mark.db
LEASE_S = 15.0


def put(db: Database, **fields: object) -> str:
    job = add_job(db)
    with db.session() as session:
        row = session.get_one(JobRow, job.id)
        for name, value in fields.items():
            setattr(row, name, value)
    return job.id


def claim(db: Database, owner: str = "a", after_s: float = 0.0) -> Claim | None:
    return claim_due(db, owner, NOW + timedelta(seconds=after_s), LEASE_S)


@pytest.mark.parametrize(
    ("fields", "is_due"),
    [
        ({"state": JobState.QUEUED}, False),
        ({"state": JobState.QUEUED, "start_workers": 2}, True),
        ({"state": JobState.QUEUED, "desired": Desired.STOP}, True),
        ({"state": JobState.QUEUED, "desired": Desired.PAUSE}, True),
        ({"state": JobState.PREPARING}, True),
        ({"state": JobState.RUNNING}, True),
        ({"state": JobState.RUNNING, "next_look_at": NOW + timedelta(seconds=1)}, False),
        ({"state": JobState.RUNNING, "next_look_at": NOW}, True),
        ({"state": JobState.RECOVERING}, True),
        ({"state": JobState.PAUSING}, True),
        ({"state": JobState.STOPPING}, True),
        ({"state": JobState.PAUSED, "desired": Desired.PAUSE}, False),
        ({"state": JobState.PAUSED, "desired": Desired.RUN}, True),
        ({"state": JobState.PAUSED, "desired": Desired.STOP}, True),
        ({"state": JobState.SUCCEEDED}, False),
        ({"state": JobState.FAILED, "desired": Desired.STOP}, False),
        ({"state": JobState.CANCELLED}, False),
    ],
)
def test_which_jobs_are_due(db: Database, fields: dict[str, object], is_due: bool) -> None:
    job_id = put(db, **fields)
    taken = claim(db)
    assert (taken.job_id if taken else None) == (job_id if is_due else None)


def test_a_claimed_job_is_not_claimed_again_until_its_lease_ends(db: Database) -> None:
    put(db, state=JobState.RUNNING)
    assert claim(db) is not None
    assert claim(db, "b", LEASE_S - 1) is None
    assert claim(db, "b", LEASE_S + 1) is not None


def test_the_one_that_has_waited_longest_comes_first(db: Database) -> None:
    put(db, state=JobState.RUNNING, next_look_at=NOW - timedelta(seconds=1))
    oldest = put(db, state=JobState.RUNNING, next_look_at=NOW - timedelta(seconds=9))
    taken = claim(db)
    assert taken is not None
    assert taken.job_id == oldest


def test_release_sets_the_next_look(db: Database) -> None:
    put(db, state=JobState.RUNNING)
    taken = claim(db)
    assert taken is not None
    release(db, taken, NOW + timedelta(seconds=5))
    assert claim(db, "b", 4) is None
    assert claim(db, "b", 5) is not None


def test_a_stale_token_is_refused_everywhere(db: Database) -> None:
    """The first holder was paused past its lease; the second one took over."""
    job_id = put(db, state=JobState.RUNNING)
    stale = claim(db, "a")
    fresh = claim(db, "b", LEASE_S + 1)
    assert stale is not None
    assert fresh is not None

    def write_guarded() -> None:
        with db.session() as session:
            guarded(session, stale).message = "written by a zombie"

    for use in (write_guarded, lambda: renew(db, stale, NOW, LEASE_S), lambda: release(db, stale, None)):
        with pytest.raises(LeaseLost, match=job_id):
            use()
    with db.session() as session:
        assert guarded(session, fresh).message == ""


def test_a_late_holder_may_still_write_if_nobody_took_over(db: Database) -> None:
    put(db, state=JobState.RUNNING)
    taken = claim(db)
    assert taken is not None
    renewed = renew(db, taken, NOW + timedelta(seconds=LEASE_S + 60), LEASE_S)
    assert renewed.token == taken.token
    assert renewed.expires_at > taken.expires_at


def test_racing_controllers_never_hold_the_same_job(db: Database) -> None:
    jobs = {put(db, state=JobState.RUNNING) for _ in range(12)}

    def take_all(owner: str) -> list[str]:
        taken = []
        while (mine := claim(db, owner)) is not None:
            taken.append(mine.job_id)
        return taken

    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(take_all, ["a", "b", "c", "d"]))
    assert Counter(job for share in shares for job in share) == Counter(jobs)


def test_one_controller_leads_until_its_lease_ends_or_it_gives_up(db: Database) -> None:
    def lead(token: str, after_s: float) -> bool:
        return hold_leadership(db, token, token, NOW + timedelta(seconds=after_s), LEASE_S)

    assert lead("a", 0)
    assert not lead("b", 1)
    assert lead("a", 10)
    assert not lead("b", 16)
    assert lead("b", 26)
    assert not lead("a", 27)
    give_up_leadership(db, "a")
    assert not lead("a", 28)
    give_up_leadership(db, "b")
    assert lead("a", 28)


def test_racing_controllers_elect_one(db: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        led = list(pool.map(lambda token: hold_leadership(db, token, token, NOW, LEASE_S), ["a", "b", "c", "d"]))
    assert sum(led) == 1
