"""The reconciler one look at a time, on a real database; cluster, object store and clock are the tests'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from configs.ids import attempt_id, checkpoint_id
from configs.layout import attempt_key, checkpoint_prefix, rank_files_key
from configs.reasons import ExitReason, QueueReason
from configs.states import AttemptState, Desired, JobState
from configs.wire import AttemptFile, DataSkip, MetricPoint, ParentCut, RankFiles, to_columns
from orchestrator.control.launcher import LaunchState, NodeInfo
from orchestrator.control.leases import claim_due
from orchestrator.control.queue_view import schedule_queue, store_cluster
from orchestrator.control.reconciler import TIDY_AGAIN_S, Reconciler
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.registry import register_manifests
from orchestrator.storage.tables import AttemptRow, CheckpointRow, EventRow, JobRow, MetricRow
from tests.factories import add_job, make_spec, put_checkpoint, put_exit
from tests.fakes.clock import FakeClock
from tests.fakes.launcher import FakeLauncher
from tests.fakes.memory_store import MemoryStore


class World:
    """A control plane of one reconciler, and what tests do to it."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.clock = FakeClock()
        self.store = MemoryStore()
        self.launcher = FakeLauncher()
        self.settings = Settings(
            poll_s=1, lease_s=15, stop_grace_s=60, start_timeout_s=180, hang_timeout_s=100, report_timeout_s=60
        )
        self.restart()

    def restart(self) -> None:
        """Another controller process begins."""
        self.reconciler = Reconciler(
            self.db, self.launcher, self.store, self.settings, clock=self.clock, jitter=lambda: 0.5
        )

    def submit(self, spec: dict[str, Any] | None = None, **fields: Any) -> str:
        return add_job(self.db, spec, **fields).id

    def schedule(self) -> None:
        store_cluster(self.db, self.launcher.cluster(), "", self.clock())
        schedule_queue(self.db, self.clock())

    def look(self, times: int = 1) -> None:
        """Let the reconciler look at what is due, so many times, with a poll interval in between."""
        for _ in range(times):
            self.clock.advance(self.settings.poll_s)
            while self.reconciler.run_once():
                pass

    def start(self, spec: dict[str, Any] | None = None, **fields: Any) -> str:
        """A job whose first attempt runs on two workers."""
        job_id = self.submit(spec, **fields)
        self.schedule()
        self.look()
        self.report(job_id, step=0)
        self.look()
        assert self.job(job_id).state == JobState.RUNNING
        return job_id

    def report(self, job_id: str, step: int, phase: str = "training") -> None:
        """What the API notes when both ranks' heartbeats come in."""
        now = self.clock()
        with self.db.session() as session:
            attempt = self.attempts(job_id)[-1]
            row = session.get_one(AttemptRow, attempt.id)
            row.claim_nonce = "nonce"
            row.ranks = {str(r): {"rank": r, "node": "n1", "step": step} for r in range(row.world_size)}
            row.last_report_at = row.last_progress_at = now
            row.phase = phase
            row.to_step = max(row.to_step, step)
            if step > row.from_step and row.first_step_at is None:
                row.first_step_at = now

    def desire(self, job_id: str, desired: Desired) -> None:
        with self.db.session() as session:
            row = session.get_one(JobRow, job_id)
            row.desired = desired
            row.next_look_at = None

    def end(self, job_id: str, reason: ExitReason | None = None, **fields: Any) -> None:
        """The last attempt's driver leaves, with or without an exit file."""
        attempt = self.attempts(job_id)[-1].id
        if reason is not None:
            put_exit(self.store, attempt, reason, **({"ended_at": self.clock()} | fields))
        self.launcher.end(attempt, LaunchState.SUCCEEDED if reason else LaunchState.FAILED)

    def job(self, job_id: str) -> JobRow:
        with self.db.reader() as session:
            return session.get_one(JobRow, job_id)

    def attempts(self, job_id: str) -> list[AttemptRow]:
        with self.db.reader() as session:
            query = select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.number)
            return list(session.scalars(query))

    def events(self, job_id: str) -> list[str]:
        with self.db.reader() as session:
            query = select(EventRow.type).where(EventRow.job_id == job_id).order_by(EventRow.seq)
            return list(session.scalars(query))

    def attempt_file(self, job_id: str, number: int) -> AttemptFile:
        return AttemptFile.model_validate_json(self.store.get(attempt_key(attempt_id(job_id, number))))


@pytest.fixture
def world(db: Database) -> Iterator[World]:
    return World(db)


def order_during_next_look(world: World, job_id: str, desired: Desired) -> None:
    """A user's order comes in after the reconciler has read the job and before it writes."""
    orders = [desired]

    def jitter() -> float:
        if orders:
            world.desire(job_id, orders.pop())
        return 0.5

    world.reconciler = Reconciler(
        world.db, world.launcher, world.store, world.settings, clock=world.clock, jitter=jitter
    )


# -- the ordinary life ----------------------------------------------------------------------
@pytest.mark.db
def test_the_life_of_a_job_that_succeeds(world: World) -> None:
    job_id = world.submit()
    world.look()
    assert world.job(job_id).state == JobState.QUEUED
    world.schedule()
    assert world.job(job_id).start_workers == 2
    world.look()
    job = world.job(job_id)
    assert (job.state, job.num_attempts, job.start_workers) == (JobState.PREPARING, 1, None)
    assert world.launcher.submissions == [attempt_id(job_id, 1)]
    file = world.attempt_file(job_id, 1)
    assert (file.number, file.world_size, file.resume_from, file.parents) == (1, 2, None, ())
    assert file.spec == make_spec()

    world.report(job_id, step=0, phase="building")
    world.look()
    assert world.job(job_id).state == JobState.RUNNING
    assert world.attempts(job_id)[0].state == AttemptState.RUNNING
    world.report(job_id, step=100)
    put_checkpoint(world.store, world.job(job_id), 1, 100, metrics={"eval/top1": 0.5})
    world.end(job_id, ExitReason.COMPLETED, last_step=100)
    world.look()
    job, attempt = world.job(job_id), world.attempts(job_id)[0]
    assert (job.state, job.reason, job.step) == (JobState.SUCCEEDED, ExitReason.COMPLETED, 100)
    assert (attempt.state, attempt.exit_reason, attempt.to_step) == (AttemptState.ENDED, ExitReason.COMPLETED, 100)
    assert job.wasted_steps == 0
    assert job.overhead_s == 0
    assert attempt.ended_at is not None
    assert job.gpu_seconds == (attempt.ended_at - attempt.created_at).total_seconds() * 2 > 0
    assert world.events(job_id) == [
        "job.queued",
        "job.scheduled",
        "job.preparing",
        "attempt.created",
        "attempt.submitted",
        "job.running",
        "checkpoint.committed",
        "attempt.ended",
        "job.succeeded",
    ]
    world.look(5)
    assert world.launcher.submissions == [attempt_id(job_id, 1)]


@pytest.mark.db
def test_a_lost_attempt_is_followed_by_one_that_continues(world: World) -> None:
    job_id = world.start()
    world.report(job_id, step=1)
    world.clock.advance(28)
    world.report(job_id, step=29)
    put_checkpoint(world.store, world.job(job_id), 1, 20)
    world.end(job_id, ExitReason.WORKER_LOST, last_step=30)
    world.look()
    job = world.job(job_id)
    assert (job.state, job.reason, job.infra_failures) == (JobState.RECOVERING, ExitReason.WORKER_LOST, 1)
    assert job.not_before == world.clock() + timedelta(seconds=2)
    world.look()
    assert len(world.attempts(job_id)) == 1
    world.look(2)
    first, second = world.attempts(job_id)
    assert (second.from_step, second.from_checkpoint) == (20, checkpoint_id(job_id, 20, 1))
    file = world.attempt_file(job_id, 2)
    assert file.parents == (ParentCut(attempt=1, step=20),)
    assert file.resume_from is not None
    assert file.resume_from.prefix == checkpoint_prefix(job_id, 20, 1)
    job = world.job(job_id)
    assert (job.state, job.step) == (JobState.RECOVERING, 20)
    # Steps 21 to 30 are done again; it took 28 s from step 1 to step 30 as far as anybody heard.
    assert (job.wasted_steps, first.wasted_steps) == (10, 10)
    assert job.wasted_gpu_s == pytest.approx(10 * (28 / 29) * 2)
    world.clock.advance(4)
    world.report(job_id, step=21)
    world.look()
    assert world.job(job_id).state == JobState.RUNNING
    put_checkpoint(world.store, world.job(job_id), 2, 100)
    world.end(job_id, ExitReason.COMPLETED, last_step=100)
    world.look()
    job = world.job(job_id)
    assert (job.state, job.wasted_steps) == (JobState.SUCCEEDED, 10)
    assert job.overhead_s == 5, "from the second attempt's creation to its first step"


def test_waste_is_timed_by_the_step_times_that_were_reported(world: World) -> None:
    job_id = world.start()
    with world.db.session() as session:
        for rank, step, value in ((0, 10, 9.0), (0, 30, 0.5), (1, 30, 0.7), (0, 40, 0.6)):
            name = f"perf/step_time_s/rank-{rank:05d}"
            session.add(MetricRow(job_id=job_id, name=name, step=step, attempt=1, value=value, at=world.clock()))
    put_checkpoint(world.store, world.job(job_id), 1, 20)
    world.report(job_id, step=40)
    world.end(job_id, ExitReason.WORKER_LOST, last_step=40)
    world.look(5)
    job = world.job(job_id)
    assert job.wasted_steps == 20
    assert job.wasted_gpu_s == pytest.approx(20 * 0.6 * 2)


def test_a_step_that_only_its_loss_tells_of_is_counted(world: World) -> None:
    job_id = world.start()
    put_checkpoint(world.store, world.job(job_id), 1, 20)
    world.report(job_id, step=25)
    with world.db.session() as session:
        session.add(MetricRow(job_id=job_id, name="train/loss", step=28, attempt=1, value=1.0, at=world.clock()))
    world.end(job_id)
    world.look(5)
    first, second = world.attempts(job_id)
    assert (first.to_step, second.from_step, world.job(job_id).wasted_steps) == (28, 20, 8)


def test_an_order_during_a_long_back_off_is_obeyed_soon(world: World) -> None:
    job_id = world.start()
    with world.db.session() as session:
        session.get_one(JobRow, job_id).infra_failures = 2
    world.settings = world.settings.model_copy(update={"backoff_initial_s": 300.0, "backoff_max_s": 300.0})
    world.restart()
    world.end(job_id)
    world.look()
    with world.db.session() as session:  # as a cancellation whose wake-up was overwritten
        session.get_one(JobRow, job_id).desired = Desired.STOP
    world.look(6)
    assert world.job(job_id).state == JobState.CANCELLED


def test_a_job_that_fails_for_good_counts_what_came_after_its_last_checkpoint(world: World) -> None:
    job_id = world.start()
    put_checkpoint(world.store, world.job(job_id), 1, 20)
    world.report(job_id, step=35)
    world.end(job_id, ExitReason.USER_ERROR, last_step=35, error_type="KeyError")
    world.look()
    job = world.job(job_id)
    assert (job.state, job.reason, job.wasted_steps) == (JobState.FAILED, ExitReason.USER_ERROR, 15)
    assert job.message == "said so"


def test_the_infrastructure_budget_ends(world: World) -> None:
    job_id = world.start(make_spec(retry={"max_infra_failures": 2}))
    for _ in range(3):
        world.end(job_id)
        world.look(10)
        if world.job(job_id).state == JobState.RECOVERING:
            world.report(job_id, step=1)
            world.look()
    job = world.job(job_id)
    assert (job.state, job.reason, len(world.attempts(job_id))) == (JobState.FAILED, ExitReason.DRIVER_LOST, 3)


# -- cut off between two steps ----------------------------------------------------------------------
def lose_reply_of_attempt_file(world: World) -> None:
    world.store.lose_next_reply = True


def lose_reply_of_submission(world: World) -> None:
    world.launcher.lose_next_reply = True


def store_is_away(world: World) -> None:
    world.store.fail_next = 1


def cluster_is_away(world: World) -> None:
    world.launcher.is_away = True


@pytest.mark.db
@pytest.mark.parametrize(
    "fault", [lose_reply_of_attempt_file, lose_reply_of_submission, store_is_away, cluster_is_away]
)
def test_a_start_that_is_cut_off_loses_nothing_and_starts_nothing_twice(
    world: World, fault: Callable[[World], None]
) -> None:
    job_id = world.submit()
    world.schedule()
    fault(world)
    world.look()
    world.launcher.is_away = False
    world.restart()
    world.look(3)
    job = world.job(job_id)
    assert (job.state, job.num_attempts, job.infra_failures) == (JobState.PREPARING, 1, 0)
    assert set(world.launcher.submissions) == {attempt_id(job_id, 1)}
    assert [a.number for a in world.attempts(job_id)] == [1]
    assert world.attempts(job_id)[0].submitted_at is not None or world.launcher.states
    world.report(job_id, step=0)
    world.look()
    assert world.job(job_id).state == JobState.RUNNING


def test_killed_between_the_row_and_the_submission(world: World) -> None:
    """The row is there, the cluster never heard of it (fault row 17)."""
    job_id = world.submit()
    world.schedule()
    world.look()
    del world.launcher.states[attempt_id(job_id, 1)]
    with world.db.session() as session:
        session.get_one(AttemptRow, attempt_id(job_id, 1)).submitted_at = None
    world.restart()
    world.look()
    assert world.launcher.submissions == [attempt_id(job_id, 1)] * 2
    assert world.attempts(job_id)[0].submitted_at is not None


def test_killed_between_the_submission_and_its_note(world: World) -> None:
    """The cluster runs it, the row does not say so (fault row 18): it is adopted, not submitted again."""
    job_id = world.submit()
    world.schedule()
    world.look()
    with world.db.session() as session:
        session.get_one(AttemptRow, attempt_id(job_id, 1)).submitted_at = None
    world.restart()
    world.report(job_id, step=0)
    world.look()
    assert world.launcher.submissions == [attempt_id(job_id, 1)]
    assert world.job(job_id).state == JobState.RUNNING


def test_an_attempt_file_left_by_another_start_is_not_overwritten(world: World) -> None:
    """Cut off after the file was written; meanwhile the job may be let go with another number of workers."""
    job_id = world.submit(make_spec(resources={"workers": {"min": 1, "max": 4}, "gpus_per_worker": 0}))
    world.schedule()
    world.store.lose_next_reply = True
    world.look()
    before = world.attempt_file(job_id, 1)
    with world.db.session() as session:
        session.get_one(JobRow, job_id).start_workers = 1
    world.look(2)
    assert world.attempt_file(job_id, 1) == before
    assert before.world_size == 4
    assert [(a.number, a.world_size) for a in world.attempts(job_id)] == [(2, 1)]
    assert world.launcher.submissions == [attempt_id(job_id, 2)]


def test_a_reconciler_paused_past_its_lease_writes_nothing(world: World) -> None:
    """While it starts an attempt another controller takes the job over (fault row 20)."""
    job_id = world.submit()
    world.schedule()

    class Paused(MemoryStore):
        def put(self, key: str, data: bytes, *, if_none_match: bool = False) -> None:
            super().put(key, data, if_none_match=if_none_match)
            world.clock.advance(60)
            assert claim_due(world.db, "another", world.clock(), 15) is not None

    world.store = Paused()
    world.restart()
    world.clock.advance(1)
    assert world.reconciler.run_once() == 1
    assert world.job(job_id).state == JobState.QUEUED
    assert world.attempts(job_id) == []
    assert world.launcher.submissions == []


def test_two_controllers_start_one_attempt(world: World) -> None:
    job_id = world.submit()
    world.schedule()
    other = Reconciler(world.db, world.launcher, world.store, world.settings, clock=world.clock)
    world.clock.advance(1)
    assert world.reconciler.run_once() + other.run_once() == 1
    assert world.launcher.submissions == [attempt_id(job_id, 1)]


# -- what is lost, and what only seems so ----------------------------------------------------------------------
def test_a_cluster_that_is_away_is_a_condition(world: World) -> None:
    job_id = world.start()
    world.launcher.is_away = True
    world.clock.advance(3600)
    world.look(3)
    job = world.job(job_id)
    assert (job.state, job.reason) == (JobState.RUNNING, QueueReason.CLUSTER_UNREACHABLE)
    assert world.events(job_id).count("job.condition") == 1
    world.launcher.is_away = False
    world.report(job_id, step=5)
    world.look()
    job = world.job(job_id)
    assert (job.state, job.reason, job.message) == (JobState.RUNNING, None, "")
    assert len(world.attempts(job_id)) == 1


def test_an_object_store_that_is_away_is_a_condition(world: World) -> None:
    job_id = world.start()
    world.end(job_id, ExitReason.WORKER_LOST)
    world.store.fail_next = 100
    world.look(3)
    job = world.job(job_id)
    assert job.state == JobState.RUNNING
    assert "object store" in job.message
    world.store.fail_next = 0
    world.look()
    assert world.job(job_id).state == JobState.RECOVERING


def test_another_cluster_ends_what_ran_on_the_old_one(world: World) -> None:
    job_id = world.start()
    world.launcher.replace_cluster("session_2")
    world.look()
    assert world.attempts(job_id)[0].exit_reason == ExitReason.CLUSTER_LOST
    world.look(4)
    attempts = world.attempts(job_id)
    assert [a.cluster_id for a in attempts] == ["session_1", "session_2"]
    assert world.launcher.submissions[-1] == attempt_id(job_id, 2)


def test_nothing_follows_until_the_remains_are_removed(world: World) -> None:
    job_id = world.start()
    attempt = attempt_id(job_id, 1)
    world.launcher.remains[attempt] = ["actor 7 RayTrainWorker"]
    world.end(job_id, ExitReason.WORKER_LOST)
    world.clock.advance(1)
    assert world.reconciler.run_once() == 1
    job = world.job(job_id)
    assert (job.state, world.launcher.reaped) == (JobState.RUNNING, [attempt])
    assert "actor 7" in job.message
    assert len(world.attempts(job_id)) == 1
    world.look(5)
    assert len(world.attempts(job_id)) == 2


def test_recovering_keeps_its_place_then_queues(world: World) -> None:
    job_id = world.start()
    world.launcher.nodes = (NodeInfo(id="n2", cpus=1),)
    world.end(job_id, ExitReason.NODE_LOST)
    world.look(10)
    job = world.job(job_id)
    assert (job.state, job.reason) == (JobState.RECOVERING, QueueReason.WAITING_FOR_WORKERS)
    rival = world.submit(make_spec(resources={"workers": 1, "gpus_per_worker": 0}))
    world.schedule()
    assert world.job(rival).start_workers is None, "the place is reserved"
    world.look(60)
    assert world.job(job_id).state == JobState.QUEUED
    world.schedule()
    assert world.job(job_id).reason == QueueReason.EXCEEDS_CLUSTER
    assert world.job(rival).start_workers == 1


def test_an_elastic_job_recovers_on_what_is_left(world: World) -> None:
    job_id = world.start(make_spec(resources={"workers": {"min": 1, "max": 4}, "gpus_per_worker": 0}))
    assert world.attempts(job_id)[0].world_size == 4
    world.launcher.nodes = (NodeInfo(id="n2", cpus=3),)
    world.end(job_id, ExitReason.NODE_LOST)
    world.look(5)
    assert world.attempts(job_id)[1].world_size == 2, "3 workers do not divide the batch of 8"


def test_workers_that_never_start_are_given_up(world: World) -> None:
    job_id = world.submit()
    world.schedule()
    world.look()
    world.clock.advance(200)
    world.look(2)
    assert world.launcher.stopped == [attempt_id(job_id, 1)]
    assert world.attempts(job_id)[0].exit_reason == ExitReason.START_TIMEOUT
    assert world.job(job_id).state == JobState.RECOVERING


def test_a_driver_that_does_not_end_is_stopped_again_and_again_and_told_of_once(world: World) -> None:
    job_id = world.submit()
    world.schedule()
    world.look()
    world.launcher.states[attempt_id(job_id, 1)] = LaunchState.PENDING
    world.clock.advance(200)
    for _ in range(3):
        world.look(2)
        world.clock.advance(21)
    assert world.launcher.stopped == [attempt_id(job_id, 1)] * 3
    assert world.events(job_id).count("attempt.killed") == 1


# -- checkpoints ----------------------------------------------------------------------
def test_checkpoints_are_registered_and_retained_while_it_runs(world: World) -> None:
    job_id = world.start()
    job = world.job(job_id)
    for step in (10, 20, 30):
        put_checkpoint(world.store, job, 1, step)
    world.look(3)
    with world.db.reader() as session:
        rows = session.execute(select(CheckpointRow.step, CheckpointRow.deleted_at).order_by(CheckpointRow.step)).all()
    assert [(step, deleted is not None) for step, deleted in rows] == [(10, True), (20, False), (30, False)]


def test_a_checkpoint_with_missing_files_is_passed_over(world: World) -> None:
    job_id = world.start()
    job = world.job(job_id)
    for step in (10, 20):
        put_checkpoint(world.store, job, 1, step)
    shard = f"{checkpoint_prefix(job_id, 20, 1)}shards/weights-00000-of-00001.safetensors"
    world.store.delete([shard])
    world.report(job_id, step=25)
    world.end(job_id, ExitReason.WORKER_LOST, last_step=25)
    world.look(5)
    assert world.attempts(job_id)[1].from_step == 10
    assert world.job(job_id).wasted_steps == 15
    assert "checkpoint.invalidated" in world.events(job_id)


def test_a_corrupt_checkpoint_is_not_used_again(world: World) -> None:
    job_id = world.start()
    job = world.job(job_id)
    for step in (10, 20):
        put_checkpoint(world.store, job, 1, step)
    world.end(job_id, ExitReason.WORKER_LOST)
    world.look(5)
    assert world.attempts(job_id)[-1].from_step == 20
    world.report(job_id, step=20, phase="loading")
    world.end(job_id, ExitReason.CHECKPOINT_CORRUPT)
    world.look(8)
    assert world.attempts(job_id)[-1].from_step == 10
    assert world.attempt_file(job_id, 3).parents == (ParentCut(attempt=1, step=10), ParentCut(attempt=2, step=0))


def test_after_a_loss_spike_it_goes_back_to_before_it_and_passes_over_the_data(world: World) -> None:
    spec = make_spec() | {"train": {"spike_rollback": {"max_rollbacks": 2}}}
    job_id = world.start(spec)
    for step in (10, 20, 30):
        put_checkpoint(world.store, world.job(job_id), 1, step)
    world.report(job_id, step=35)
    world.end(job_id, ExitReason.LOSS_SPIKE, last_step=35, sound_step=24)
    world.look(2)
    first = DataSkip(attempt_id=attempt_id(job_id, 1), at_step=20, num_batches=15)
    second = world.attempt_file(job_id, 2)
    assert second.resume_from is not None
    assert (second.resume_from.checkpoint_id, second.skips) == (checkpoint_id(job_id, 20, 1), (first,))
    assert second.parents == (ParentCut(attempt=1, step=20),), "what came after it counts no more"

    # Lost before it saved anything: the data is still passed over.
    world.report(job_id, step=22)
    world.end(job_id, ExitReason.WORKER_LOST, last_step=22)
    world.look(4)
    assert world.attempt_file(job_id, 3).skips == (first,)

    put_checkpoint(world.store, world.job(job_id), 3, 40)
    world.report(job_id, step=44)
    world.end(job_id, ExitReason.LOSS_SPIKE, last_step=44, sound_step=5)
    world.look(2)
    fourth = world.attempt_file(job_id, 4)
    assert fourth.resume_from is not None
    assert fourth.resume_from.checkpoint_id == checkpoint_id(job_id, 20, 1), "the oldest kept where none is sound"
    assert fourth.skips == (first, DataSkip(attempt_id=attempt_id(job_id, 3), at_step=20, num_batches=24))

    world.end(job_id, ExitReason.LOSS_SPIKE, last_step=22, sound_step=21)
    world.look()
    assert (world.job(job_id).state, world.job(job_id).reason) == (JobState.FAILED, ExitReason.LOSS_SPIKE)


def test_a_retried_job_continues_from_another_jobs_checkpoint(world: World) -> None:
    old = world.start()
    checkpoint = put_checkpoint(world.store, world.job(old), 1, 40)
    world.end(old, ExitReason.USER_ERROR, last_step=40)
    world.look()
    new = world.start(resume_from=checkpoint)
    file = world.attempt_file(new, 1)
    assert file.resume_from is not None
    assert file.resume_from.checkpoint_id == checkpoint
    assert (world.attempts(new)[0].from_step, file.parents) == (40, ())


def test_a_retried_job_that_fails_early_wastes_only_its_own_steps(world: World) -> None:
    old = world.submit()
    checkpoint = put_checkpoint(world.store, world.job(old), 1, 40)
    register_manifests(world.db, world.store, old)
    world.desire(old, Desired.STOP)
    world.look()
    job_id = world.start(resume_from=checkpoint)
    world.end(job_id, ExitReason.NAN_LOSS, last_step=45)
    world.look()
    assert (world.job(job_id).state, world.job(job_id).wasted_steps) == (JobState.FAILED, 5)


def test_a_retried_job_that_resumes_does_not_need_what_it_was_initialised_from(world: World) -> None:
    old = world.submit()
    checkpoint = put_checkpoint(world.store, world.job(old), 1, 40)
    register_manifests(world.db, world.store, old)
    world.desire(old, Desired.STOP)
    world.look()
    gone = checkpoint_id(old, 20, 1)
    job_id = world.submit(make_spec(kind="finetune"), init_from=gone, resume_from=checkpoint)
    world.schedule()
    world.look()
    file = world.attempt_file(job_id, 1)
    assert file.resume_from is not None
    assert (file.resume_from.checkpoint_id, file.init_from) == (checkpoint, None)


def test_best_of_another_job_is_resolved_once_at_the_first_launch(world: World) -> None:
    source = world.start()
    best = put_checkpoint(world.store, world.job(source), 1, 50, metrics={"eval/top1": 0.9})
    tuned = world.submit(make_spec(kind="finetune"), init_from=f"{source}/best")
    world.schedule()
    job = world.job(tuned)
    assert (job.reason, job.start_workers) == (QueueReason.DEPENDENCY, None)
    put_checkpoint(world.store, world.job(source), 1, 100, metrics={"eval/top1": 0.8})
    world.end(source, ExitReason.COMPLETED, last_step=100)
    world.look()
    world.schedule()
    world.look()
    assert world.job(tuned).init_from == best
    init_from = world.attempt_file(tuned, 1).init_from
    assert init_from is not None
    assert init_from.checkpoint_id == best


def test_a_job_whose_source_never_came_fails_with_the_reason(world: World) -> None:
    source = world.submit()
    world.desire(source, Desired.STOP)
    world.look()
    assert world.job(source).state == JobState.CANCELLED
    tuned = world.submit(make_spec(kind="finetune"), init_from=f"{source}/best")
    world.schedule()
    world.look()
    job = world.job(tuned)
    assert (job.state, job.reason) == (JobState.FAILED, ExitReason.SPEC_INVALID)
    assert source in job.message
    assert world.launcher.submissions == []


# -- orders ----------------------------------------------------------------------
@pytest.mark.parametrize("let_go", [False, True])
def test_cancelling_a_queued_job(world: World, let_go: bool) -> None:
    job_id = world.submit()
    if let_go:
        world.schedule()
    world.desire(job_id, Desired.STOP)
    world.look()
    assert world.job(job_id).state == JobState.CANCELLED
    assert world.launcher.submissions == []


def test_cancelling_a_running_job_gives_it_time_to_leave(world: World) -> None:
    job_id = world.start()
    world.desire(job_id, Desired.STOP)
    world.look(5)
    assert world.job(job_id).state == JobState.STOPPING
    assert world.launcher.stopped == []
    put_checkpoint(world.store, world.job(job_id), 1, 7)
    world.end(job_id, ExitReason.USER_CANCELLED, last_step=7)
    world.look()
    job = world.job(job_id)
    assert (job.state, job.reason, job.wasted_steps) == (JobState.CANCELLED, ExitReason.USER_CANCELLED, 0)


def test_a_cancelled_job_that_does_not_leave_is_ended(world: World) -> None:
    job_id = world.start()
    world.desire(job_id, Desired.STOP)
    world.look()
    world.clock.advance(61)
    world.look(2)
    assert world.launcher.stopped == [attempt_id(job_id, 1)]
    assert world.job(job_id).state == JobState.CANCELLED


def test_completion_that_races_a_cancellation_wins(world: World) -> None:
    job_id = world.start()
    world.desire(job_id, Desired.STOP)
    world.look()
    put_checkpoint(world.store, world.job(job_id), 1, 100)
    world.end(job_id, ExitReason.COMPLETED, last_step=100)
    world.look(3)
    assert world.job(job_id).state == JobState.SUCCEEDED
    ends = [e for e in world.events(job_id) if e in ("job.succeeded", "job.cancelled", "job.failed")]
    assert ends == ["job.succeeded"]


def test_cancelling_while_it_recovers(world: World) -> None:
    job_id = world.start()
    world.end(job_id, ExitReason.WORKER_LOST)
    world.look()
    world.desire(job_id, Desired.STOP)
    world.look()
    assert world.job(job_id).state == JobState.CANCELLED
    assert len(world.attempts(job_id)) == 1


def test_a_job_cancelled_between_attempts_counts_what_is_not_kept(world: World) -> None:
    job_id = world.start()
    put_checkpoint(world.store, world.job(job_id), 1, 20)
    world.report(job_id, step=30)
    world.end(job_id, ExitReason.WORKER_LOST, last_step=30)
    world.look()
    assert (world.job(job_id).state, world.job(job_id).wasted_steps) == (JobState.RECOVERING, 0)
    world.desire(job_id, Desired.STOP)
    world.look()
    assert (world.job(job_id).state, world.job(job_id).wasted_steps) == (JobState.CANCELLED, 10)


def test_pause_and_resume(world: World) -> None:
    job_id = world.start()
    world.desire(job_id, Desired.PAUSE)
    world.look()
    assert world.job(job_id).state == JobState.PAUSING
    put_checkpoint(world.store, world.job(job_id), 1, 12)
    world.end(job_id, ExitReason.PAUSED, last_step=12)
    world.look()
    assert world.job(job_id).state == JobState.PAUSED
    world.look(3)
    world.desire(job_id, Desired.RUN)
    world.look()
    assert world.job(job_id).state == JobState.QUEUED
    world.schedule()
    world.look()
    job, attempt = world.job(job_id), world.attempts(job_id)[-1]
    assert (job.state, attempt.number, attempt.from_step) == (JobState.PREPARING, 2, 12)
    assert (job.wasted_steps, job.infra_failures, job.user_failures) == (0, 0, 0)


class MortalStore(MemoryStore):
    """Ends the process that deletes something, once."""

    is_mortal = True

    def delete(self, keys: Iterable[str]) -> None:
        if self.is_mortal:
            self.is_mortal = False
            raise SystemExit
        super().delete(keys)


@pytest.mark.db
@pytest.mark.parametrize("reason", [ExitReason.COMPLETED, ExitReason.USER_ERROR])
def test_a_controller_that_dies_before_it_tidied_up_leaves_it_to_the_next(world: World, reason: ExitReason) -> None:
    world.store = MortalStore()
    world.restart()
    job_id = world.start()
    world.report(job_id, step=100)
    put_checkpoint(world.store, world.job(job_id), 1, 100)
    orphan = f"{checkpoint_prefix(job_id, 50, 1)}shards/weights-00000-of-00002.safetensors"
    world.store.put(orphan, b"half a checkpoint")
    world.end(job_id, reason, last_step=100)
    with pytest.raises(SystemExit):
        world.look()
    ended = world.job(job_id)
    assert JobState(ended.state).is_terminal
    assert orphan in world.store.objects
    world.restart()
    world.look()
    assert orphan in world.store.objects, "the dead one's lease still holds"
    world.clock.advance(world.settings.lease_s)
    world.look()
    assert orphan not in world.store.objects
    assert (world.job(job_id).state, world.job(job_id).version) == (ended.state, ended.version)
    assert world.job(job_id).next_look_at is None, "done"


def test_what_a_store_that_is_away_keeps_from_being_tidied_up_is_tidied_up_later(world: World) -> None:
    job_id = world.start()
    put_checkpoint(world.store, world.job(job_id), 1, 100)
    orphan = f"{checkpoint_prefix(job_id, 50, 1)}shards/weights-00000-of-00002.safetensors"
    world.store.put(orphan, b"half a checkpoint")
    world.end(job_id, ExitReason.COMPLETED, last_step=100)
    world.store.fail_delete = 1
    world.look()
    assert (world.job(job_id).state, orphan in world.store.objects) == (JobState.SUCCEEDED, True)
    world.look(int(TIDY_AGAIN_S) + 1)
    assert orphan not in world.store.objects


def test_a_second_pause_while_preparing_has_a_grace_of_its_own(world: World) -> None:
    job_id = world.submit()
    world.schedule()
    world.look()
    for seconds in (59, 0):  # the second pause comes when the first one's grace would be over
        world.desire(job_id, Desired.PAUSE)
        world.look()
        job, attempt = world.job(job_id), world.attempts(job_id)[-1]
        assert (job.state, job.reason, job.message) == (JobState.PAUSING, ExitReason.PAUSED, "Pausing.")
        assert attempt.stop_requested_at == world.clock()
        world.desire(job_id, Desired.RUN)
        world.look()
        assert world.attempts(job_id)[-1].stop_requested_at is None
        assert world.job(job_id).message == "Resumed before it had left its workers."
        world.clock.advance(seconds)
    assert world.launcher.stopped == []
    world.report(job_id, step=0)
    world.look()
    assert world.job(job_id).state == JobState.RUNNING


def test_a_cancellation_that_comes_while_a_yield_is_written_down_is_not_lost(world: World) -> None:
    job_id = world.start()
    world.desire(job_id, Desired.YIELD)
    world.look()
    world.end(job_id, ExitReason.PREEMPTED)
    order_during_next_look(world, job_id, Desired.STOP)
    world.look(2)
    assert (world.job(job_id).state, world.job(job_id).desired) == (JobState.CANCELLED, Desired.STOP)


def test_a_cancellation_that_comes_while_a_resumption_is_written_down_is_not_lost(world: World) -> None:
    job_id = world.submit()
    world.desire(job_id, Desired.PAUSE)
    world.look()
    assert world.job(job_id).state == JobState.PAUSED
    world.desire(job_id, Desired.RUN)
    order_during_next_look(world, job_id, Desired.STOP)
    world.look(2)
    assert (world.job(job_id).state, world.job(job_id).desired) == (JobState.CANCELLED, Desired.STOP)


def test_yielding_goes_back_into_the_queue_at_no_cost(world: World) -> None:
    job_id = world.start()
    world.desire(job_id, Desired.YIELD)
    world.look()
    world.end(job_id, ExitReason.PREEMPTED)
    world.look()
    job = world.job(job_id)
    assert (job.state, job.desired, job.infra_failures) == (JobState.QUEUED, Desired.RUN, 0)


def test_the_deadline(world: World) -> None:
    job_id = world.start(make_spec(queue={"deadline_s": 100}))
    world.clock.advance(100)
    world.report(job_id, step=3)
    world.look()
    job = world.job(job_id)
    assert (job.state, job.desired) == (JobState.STOPPING, Desired.STOP)
    world.end(job_id, ExitReason.USER_CANCELLED)
    world.look()
    job = world.job(job_id)
    assert (job.state, job.reason) == (JobState.FAILED, ExitReason.DEADLINE)


def test_the_deadline_is_the_reason_even_if_the_cluster_is_replaced_meanwhile(world: World) -> None:
    job_id = world.start(make_spec(queue={"deadline_s": 100}))
    world.clock.advance(101)
    world.report(job_id, step=1)
    world.look()
    assert world.job(job_id).state == JobState.STOPPING
    world.launcher.replace_cluster("session_2")
    world.look(2)
    assert (world.job(job_id).state, world.job(job_id).reason) == (JobState.FAILED, ExitReason.DEADLINE)


def test_trouble_with_one_job_is_not_the_others(world: World) -> None:
    broken = world.submit()
    with world.db.session() as session:
        session.get_one(JobRow, broken).dataset = {"not": "a card"}
    healthy = world.submit()
    world.schedule()
    world.look(3)
    assert world.job(healthy).state == JobState.PREPARING
    assert world.job(broken).state == JobState.QUEUED


@pytest.mark.db
def test_what_a_killed_driver_had_not_delivered_is_in_its_last_checkpoint(world: World) -> None:
    job_id = world.start()
    world.report(job_id, step=25)
    put_checkpoint(world.store, world.job(job_id), 1, 20)
    point = MetricPoint(name="train/loss", step=20, value=1.5, at=world.clock())
    record = RankFiles(rank=0, files=(), measured=to_columns([point]))
    key = rank_files_key(checkpoint_prefix(job_id, 20, 1), 0, 2)
    world.store.put(key, record.model_dump_json().encode())
    world.end(job_id)
    world.look()
    assert world.attempts(job_id)[0].exit_reason == ExitReason.DRIVER_LOST
    with world.db.reader() as session:
        rows = session.scalars(select(MetricRow).where(MetricRow.job_id == job_id)).all()
    assert [(row.attempt, row.name, row.step, row.value) for row in rows] == [(1, "train/loss", 20, 1.5)]
    assert world.job(job_id).last_metrics == {"train/loss": 1.5}
