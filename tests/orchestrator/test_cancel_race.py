"""A cancellation races the end of its job, two hundred times (row 38 of docs/faults.md): one end, told once.

The service, the reconciler and the database are real, each asked by threads of its own. Cluster, driver and object
store are fakes at their seams, which let the users go at a chosen moment of the reconciler's look.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from enum import StrEnum

import pytest
from sqlalchemy import select

from configs.ids import attempt_id
from configs.reasons import ExitReason
from configs.states import AttemptState, Desired, JobState
from orchestrator.control.launcher import JobStatus
from orchestrator.control.reconciler import Reconciler
from orchestrator.control.transitions import enqueue, transition
from orchestrator.services.auth import Actor
from orchestrator.services.jobs import cancel_job
from orchestrator.services.problems import WrongState
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.tables import EventRow, JobRow
from tests.factories import make_attempt, make_job, put_checkpoint, put_exit
from tests.fakes.launcher import FakeLauncher
from tests.fakes.memory_store import MemoryStore

ROUNDS = 200
USERS = 2
RECONCILERS = 2
DEADLINE_S = 20.0
FASTER = 100.0
USER = Actor("tok_test", "ann", "user")
ENDS = {"job.succeeded": JobState.SUCCEEDED, "job.cancelled": JobState.CANCELLED, "job.failed": JobState.FAILED}


class Moment(StrEnum):
    """When the users cancel."""

    AT_ONCE = "all threads are let go together"
    IN_THE_LOOK = "a reconciler has begun to observe a completed attempt"
    BEFORE_THE_DECISION = "a reconciler has observed all of a completed attempt, and waits for them before it decides"
    BEFORE_THE_END = "the driver waits for them, and then leaves on their order"


class WatchedLauncher(FakeLauncher):
    """Calls back where the reconciler's look begins and where it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.on_status: Callable[[], None] = lambda: None
        self.on_leftovers: Callable[[], None] = lambda: None

    def status(self, attempt_id: str) -> JobStatus:
        self.on_status()
        return super().status(attempt_id)

    def leftovers(self, attempt_id: str) -> list[str]:
        found = super().leftovers(attempt_id)
        self.on_leftovers()
        return found


def fast_clock(start: datetime) -> Callable[[], datetime]:
    """Time that runs faster, so that the reconciler's pauses between two looks are short."""
    return lambda: start + (datetime.now(UTC) - start) * FASTER


class Race:
    """One job at its end, and the threads that want something of it."""

    def __init__(self, db: Database, moment: Moment) -> None:
        self.db, self.moment = db, moment
        self.store = MemoryStore()
        self.launcher = WatchedLauncher()
        self.clock = fast_clock(datetime.now(UTC))
        self.settings = Settings(lease_s=3000, stop_grace_s=3600, report_timeout_s=3600)
        self.start = threading.Barrier(USERS + RECONCILERS + 1)
        self.users_go = threading.Event()
        self.answered = threading.Event()
        """A user's cancellation was answered."""
        self.ended = threading.Event()
        self.deadline = time.monotonic() + DEADLINE_S
        self.job_id = self._insert()
        self.attempt = attempt_id(self.job_id, 1)
        if moment in (Moment.AT_ONCE, Moment.BEFORE_THE_END):
            self.users_go.set()
        elif moment is Moment.IN_THE_LOOK:
            self.launcher.on_status = self.users_go.set
        else:
            self.launcher.on_leftovers = self._let_users_go_first

    def _insert(self) -> str:
        """A job that trains its last step on two workers, its last checkpoint committed."""
        job = make_job()
        now = self.clock()
        with self.db.session() as session:
            enqueue(session, job, actor="ann", at=now)
            transition(session, job, JobState.PREPARING, actor="test", at=now)
            transition(session, job, JobState.RUNNING, actor="test", at=now)
            place = {"node": "n1", "pid": 1, "step": 100, "phase": "training", "at": now.isoformat()}
            ranks = {str(rank): {"rank": rank} | place for rank in (0, 1)}
            attempt = make_attempt(job, state=AttemptState.RUNNING, claim_nonce="nonce", ranks=ranks, to_step=100)
            attempt.created_at = attempt.submitted_at = attempt.last_report_at = attempt.last_progress_at = now
            session.add(attempt)
            job.num_attempts = 1
        self.launcher.submit(attempt_id(job.id, 1))
        put_checkpoint(self.store, job, 1, 100)
        return job.id

    def _let_users_go_first(self) -> None:
        self.users_go.set()
        assert self.answered.wait(DEADLINE_S)

    def use(self) -> list[str]:
        """Cancel until the job has ended; what was answered."""
        self.start.wait(DEADLINE_S)
        assert self.users_go.wait(DEADLINE_S)
        answers: list[str] = []
        while not answers or not self.ended.wait(0.05):
            assert time.monotonic() < self.deadline
            try:
                answers.append(cancel_job(self.db, USER, self.job_id).state)
            except WrongState:
                answers.append("wrong_state")
            self.answered.set()
        return answers

    def drive(self) -> ExitReason:
        """What the driver does: leave on an order it has heard of, else complete."""
        self.start.wait(DEADLINE_S)
        if self.moment is Moment.BEFORE_THE_END:
            assert self.answered.wait(DEADLINE_S)
        desired = self.job().desired
        reason = ExitReason.COMPLETED if desired == Desired.RUN else ExitReason.USER_CANCELLED
        put_exit(self.store, self.attempt, reason, last_step=100, ended_at=self.clock())
        self.launcher.end(self.attempt)
        return reason

    def reconcile(self) -> None:
        """Look until the job has ended."""
        reconciler = Reconciler(self.db, self.launcher, self.store, self.settings, clock=self.clock)
        self.start.wait(DEADLINE_S)
        while not JobState(self.job().state).is_terminal:
            assert time.monotonic() < self.deadline, f"{self.job().state}: {self.events()}"
            if not reconciler.run_once():
                self.ended.wait(0.005)
        self.ended.set()

    def job(self) -> JobRow:
        with self.db.reader() as session:
            return session.get_one(JobRow, self.job_id)

    def events(self) -> list[str]:
        with self.db.reader() as session:
            query = select(EventRow.type).where(EventRow.job_id == self.job_id).order_by(EventRow.seq)
            return list(session.scalars(query))

    def run(self) -> str:
        """Returns the event with which the job ended."""
        with ThreadPoolExecutor(USERS + RECONCILERS + 1) as threads:
            users = [threads.submit(self.use) for _ in range(USERS)]
            reconcilers = [threads.submit(self.reconcile) for _ in range(RECONCILERS)]
            driver = threads.submit(self.drive)
            said = driver.result()
            for reconciler in reconcilers:
                reconciler.result()
            answers = [answer for user in users for answer in user.result()]
        return self.judge(said, answers)

    def judge(self, said: ExitReason, answers: list[str]) -> str:
        job, events = self.job(), self.events()
        (end,) = [event for event in events if event in ENDS]
        assert job.state == ENDS[end], events
        assert end == ("job.succeeded" if said is ExitReason.COMPLETED else "job.cancelled"), events
        assert job.reason == said
        after = events[events.index(end) + 1 :]
        assert [event for event in after if event.startswith(("job.", "attempt."))] == [], events
        assert events.count("job.cancel_requested") <= 1, events
        assert events.count("attempt.ended") == 1, events
        # Who was told that the job had ended was told so once it had.
        assert set(answers) <= {JobState.RUNNING, JobState.STOPPING, "wrong_state"}, answers
        assert self.launcher.submissions == [self.attempt], "never run again"
        # Nothing comes after: no look is due, and no order is taken.
        reconciler = Reconciler(self.db, self.launcher, self.store, self.settings, clock=self.clock)
        assert reconciler.run_once() == 0
        with pytest.raises(WrongState):
            cancel_job(self.db, USER, self.job_id)
        assert (self.job().version, self.events()) == (job.version, events)
        return end


@pytest.mark.db
def test_row_38_a_cancellation_races_the_end_two_hundred_times(db: Database) -> None:
    moments = list(Moment)
    ends = Counter((moment, Race(db, moment).run()) for moment in moments * (ROUNDS // len(moments)))
    assert sum(ends.values()) == ROUNDS
    # Where the moment decides who wins, it did, each time; otherwise either may.
    each = ROUNDS // len(moments)
    assert ends[Moment.IN_THE_LOOK, "job.succeeded"] + ends[Moment.IN_THE_LOOK, "job.cancelled"] == each
    assert ends[Moment.BEFORE_THE_DECISION, "job.succeeded"] == each, ends
    assert ends[Moment.BEFORE_THE_END, "job.cancelled"] == each, ends
