"""The driver's loop with a hub in this process and a worker group of the test's own; no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from configs.ids import checkpoint_id
from configs.layout import attempt_key, exit_key
from configs.reasons import ExitReason
from configs.states import Desired
from configs.wire import AttemptFile, ClaimRequest, ExitFile, Heartbeat, MetricPoint
from tests.fakes.control_plane import SECRET, FakeControlPlane
from tests.fakes.dir_store import DirStore
from workers.control_plane import ControlPlane
from workers.courier import Courier, Couriers
from workers.diagnosis import RankEnd
from workers.driver import DriverError, Run, drive, keep_environment_to_driver, own_attempt_id, put_exit, read_attempt
from workers.forwarder import Forwarder
from workers.hub import Push, RankInfo, ReportHub
from workers.logs import log_path, node_log_dir
from workers.node import NodeSettings
from workers.store import Data, StorageError
from workers.worker_group import GroupEnd, ProcessFailure

JOB = "job_01JZZZZZZZZZZZZZZZZZZZZZZZ"
ATTEMPT = "att_01JZZZZZZZZZZZZZZZZZZZZZZZ_0001"
DIED = ProcessFailure("ActorDiedError", "worker process crashed")


class ScriptedGroup:
    """A worker group in which one thing happens at each look: the script's next line."""

    def __init__(self, *script: Callable[[], GroupEnd | None]) -> None:
        self._script = iter(script)
        self.is_stopped = False

    def start(self) -> None:
        pass

    def wait_first_failure(self, timeout_s: float) -> GroupEnd | None:
        step = next(self._script, None)
        assert step is not None, "the driver should have ended by now"
        return step()

    def stop(self) -> None:
        self.is_stopped = True


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """Everything a run needs, and the hands of its ranks."""

    def __init__(self, directory: Path, server: FakeControlPlane) -> None:
        self.server = server
        self.store = DirStore(directory / "store")
        self.clock = Clock()
        self.hub = ReportHub(self.clock)
        self.log_dir = directory / "logs"
        self.courier = Courier(ATTEMPT, self.log_dir, "own", self.store)
        control_plane = ControlPlane(server.url, SECRET, ATTEMPT)
        claim = ClaimRequest(nonce="nonce-0001", node="n", pid=1)
        self.forwarder = Forwarder(control_plane, claim, directory / "spool", 10, interval_s=0.02)
        self.forwarder.claim(5.0)
        self.forwarder.start()
        self.dead_nodes: set[str] = set()
        self.terminated = threading.Event()
        for rank in range(2):
            self.hub.enter(RankInfo(rank, "own", f"host-{rank}", 2**22 + rank))

    def drive(self, *script: Callable[[], GroupEnd | None], **settings: Any) -> ExitFile:
        group = ScriptedGroup(*script)
        attempt = make_attempt()
        run = Run(
            attempt,
            NodeSettings(log_dir=self.log_dir, **settings),
            self.store,
            self.hub,
            group,
            self.forwarder,
            Couriers(ATTEMPT, self.courier, "own"),
            lambda node_id: node_id not in self.dead_nodes,
            clock=self.clock,
            terminated=self.terminated,
        )
        written = drive(run)
        assert group.is_stopped
        assert written is not None
        assert ExitFile.model_validate_json(self.store.get(exit_key(ATTEMPT))) == written
        return written

    # -- what can happen -----------------------------------------------------------------------------------------------
    def nothing(self) -> None:
        return None

    def beat(self, *steps: int, checkpoints: tuple[str, ...] = ()) -> Callable[[], None]:
        """Each rank pushes its step."""

        def act() -> None:
            for rank, step in enumerate(steps):
                heartbeat = Heartbeat(rank=rank, node="n", pid=1, phase="training", step=step, at=datetime.now(UTC))
                point = MetricPoint(name="train/loss", step=step, value=1.0, at=datetime.now(UTC))
                self.hub.push(Push(heartbeat, (point,) if rank == 0 else (), (), checkpoints if rank == 0 else ()))

        return act

    def end(self, rank: int, reason: ExitReason, **fields: Any) -> Callable[[], None]:
        return lambda: self.hub.finish(RankEnd(rank, reason, f"host-{rank}", **fields))

    def sleep(self, seconds: float) -> Callable[[], None]:
        def act() -> None:
            self.clock.now += seconds

        return act

    def order(self, desired: Desired) -> Callable[[], None]:
        """The control plane gives an order, and the driver has heard it."""

        def act() -> None:
            self.server.attempt(ATTEMPT).desired = desired
            poll(lambda: self.forwarder.desired is desired)

        return act

    def supersede(self) -> None:
        self.server.attempt(ATTEMPT).superseded = True
        poll(lambda: self.forwarder.is_fenced)


def poll(look: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def make_attempt() -> AttemptFile:
    return AttemptFile(
        job_id=JOB,
        attempt_id=ATTEMPT,
        number=1,
        spec={"resources": {"workers": 2, "gpus_per_worker": 0}, "schedule": {"total_steps": 10}},
        spec_hash="",
        training_fingerprint="",
        world_size=2,
        created_at=datetime.now(UTC),
    )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    server = FakeControlPlane()
    bench = Bench(tmp_path, server)
    yield bench
    bench.forwarder.finish(5.0)
    bench.courier.close()
    server.go_away()


def test_completed(bench: Bench) -> None:
    ckpt = checkpoint_id(JOB, 10, 1)
    written = bench.drive(
        bench.beat(3, 3),
        bench.beat(10, 10, checkpoints=(ckpt,)),
        bench.end(0, ExitReason.COMPLETED, step=10, checkpoint_step=10),
        bench.end(1, ExitReason.COMPLETED, step=10),
    )
    assert (written.reason, written.last_step, written.checkpoint_step) == (ExitReason.COMPLETED, 10, 10)
    attempt = bench.server.attempt(ATTEMPT)
    assert attempt.is_finished
    assert attempt.values("train/loss") == {3: 1.0, 10: 1.0}
    assert attempt.checkpoints == [ckpt]


def test_a_rank_that_the_kernel_killed_for_memory_is_told_from_one_that_vanished(bench: Bench, tmp_path: Path) -> None:
    # What the kernel counts is the only thing that tells them apart.
    counts = tmp_path / "proc" / "vmstat"
    counts.parent.mkdir()
    counts.write_text("pgfault 7\noom_kill 3\n")
    bench.courier.close()
    bench.courier = Courier(ATTEMPT, bench.log_dir, "own", bench.store, root=tmp_path)

    def killed() -> GroupEnd:
        counts.write_text("pgfault 9\noom_kill 4\n")
        return GroupEnd({1: DIED})

    written = bench.drive(bench.beat(5, 4), killed)
    assert written.reason is ExitReason.OOM_HOST
    assert written.message == "Rank 1 on host-1 vanished as the kernel killed a process there for lack of memory."
    assert written.first_failure is not None
    assert written.first_failure.rank == 1


def test_vanished_rank_is_named_with_its_last_lines(bench: Bench) -> None:
    path = log_path(node_log_dir(bench.log_dir, ATTEMPT, "own"), "rank-00001")
    path.parent.mkdir(parents=True)
    path.write_text("first\nlast words\n")
    written = bench.drive(
        bench.beat(5, 4),
        bench.end(0, ExitReason.WORKER_LOST, message="Connection reset by peer", step=5),
        lambda: GroupEnd({1: DIED}),
    )
    assert written.reason is ExitReason.WORKER_LOST
    assert written.first_failure is not None
    assert (written.first_failure.rank, written.first_failure.node) == (1, "host-1")
    assert written.first_failure.last_lines == ("first", "last words")
    assert written.last_step == 4


def test_words_that_arrive_with_the_groups_end_count(bench: Bench) -> None:
    """A rank reports bad data in the moment its process is taken down."""

    def both() -> GroupEnd:
        bench.end(1, ExitReason.DATA_ERROR, message="image 7")()
        return GroupEnd({1: DIED})

    assert bench.drive(bench.beat(1, 1), both).reason is ExitReason.DATA_ERROR


def test_node_lost(bench: Bench) -> None:
    bench.dead_nodes.add("own")
    assert bench.drive(lambda: GroupEnd({0: DIED})).reason is ExitReason.NODE_LOST


def test_peers_of_a_failed_rank_are_not_waited_for_long(bench: Bench) -> None:
    written = bench.drive(bench.end(0, ExitReason.DATA_ERROR, message="image 7"), bench.sleep(4.0), bench.sleep(2.0))
    assert (written.reason, written.message) == (ExitReason.DATA_ERROR, "Rank 0: image 7")


@pytest.mark.parametrize(
    ("desired", "reason"),
    [
        (Desired.STOP, ExitReason.USER_CANCELLED),
        (Desired.PAUSE, ExitReason.PAUSED),
        (Desired.YIELD, ExitReason.PREEMPTED),
    ],
)
def test_orders_reach_the_ranks_and_give_the_reason(bench: Bench, desired: Desired, reason: ExitReason) -> None:
    seen: list[Desired] = []

    def rank_hears() -> None:
        heartbeat = Heartbeat(rank=0, node="n", pid=1, phase="training", step=6, at=datetime.now(UTC))
        seen.append(bench.hub.push(Push(heartbeat)))

    written = bench.drive(
        bench.beat(5, 5),
        bench.order(desired),
        rank_hears,
        bench.end(0, reason, step=6, checkpoint_step=6),
        bench.end(1, reason, step=6, checkpoint_step=6),
    )
    assert seen == [desired]
    assert (written.reason, written.checkpoint_step, written.first_failure) == (reason, 6, None)


def test_an_order_stays_and_ranks_that_do_not_leave_are_ended(bench: Bench) -> None:
    written = bench.drive(
        bench.beat(5, 5),
        bench.order(Desired.STOP),
        bench.order(Desired.RUN),
        bench.sleep(59.0),
        bench.sleep(2.0),
        stop_grace_s=60.0,
        hang_timeout_s=500.0,
    )
    assert (written.reason, written.message) == (
        ExitReason.USER_CANCELLED,
        "The ranks did not leave in time and were ended.",
    )


def test_an_order_before_the_ranks_have_started_ends_at_once(bench: Bench) -> None:
    bench.hub = ReportHub(bench.clock)
    written = bench.drive(bench.order(Desired.STOP), bench.nothing)
    assert (written.reason, written.message) == (
        ExitReason.USER_CANCELLED,
        "Told to leave before the ranks had started.",
    )


def test_ranks_that_left_wait_for_the_one_that_commits(bench: Bench) -> None:
    written = bench.drive(
        bench.beat(5, 5),
        bench.order(Desired.PAUSE),
        bench.end(1, ExitReason.PAUSED, step=6),
        bench.sleep(30.0),
        bench.end(0, ExitReason.PAUSED, step=6, checkpoint_step=6),
    )
    assert (written.reason, written.checkpoint_step) == (ExitReason.PAUSED, 6)
    assert written.message == "All ranks left when told to."


def test_sigterm_without_an_order_gives_the_job_back(bench: Bench) -> None:
    def term() -> None:
        bench.terminated.set()

    written = bench.drive(bench.beat(5, 5), term, bench.sleep(4.0), bench.sleep(2.0), term_grace_s=5.0)
    assert written.reason is ExitReason.PREEMPTED


def test_sigterm_after_an_order_keeps_its_reason(bench: Bench) -> None:
    def term() -> None:
        bench.terminated.set()

    written = bench.drive(bench.beat(5, 5), bench.order(Desired.STOP), term, bench.sleep(6.0), term_grace_s=5.0)
    assert written.reason is ExitReason.USER_CANCELLED


def test_fenced(bench: Bench) -> None:
    bench.supersede()
    assert bench.drive(bench.nothing).reason is ExitReason.FENCED


def test_hung_rank_is_named(bench: Bench) -> None:
    written = bench.drive(
        bench.beat(0, 0),
        bench.beat(5, 4),
        bench.sleep(50.0),
        bench.beat(5, 4),
        bench.sleep(60.0),
        bench.beat(5, 4),
        bench.nothing,
        hang_timeout_s=100.0,
        silent_timeout_s=1000.0,
    )
    assert written.reason is ExitReason.WORKER_HUNG
    assert written.first_failure is not None
    assert written.first_failure.rank == 1


def test_ranks_that_never_start(bench: Bench) -> None:
    bench.hub = ReportHub(bench.clock)
    bench.hub.enter(RankInfo(0, "own", "host-0", 1))
    written = bench.drive(bench.sleep(119.0), bench.sleep(2.0), start_timeout_s=120.0)
    assert (written.reason, written.message) == (ExitReason.START_TIMEOUT, "Ranks [1] did not start within 120 s.")


def test_a_rank_that_raised_to_ray_is_a_fault_of_ours(bench: Bench) -> None:
    written = bench.drive(lambda: GroupEnd({0: ProcessFailure("OSError", "disk full", has_died=False)}))
    assert (written.reason, written.message) == (ExitReason.PLATFORM_ERROR, "Rank 0: disk full")


def test_the_first_exit_file_counts(bench: Bench) -> None:
    first = ExitFile(attempt_id=ATTEMPT, reason=ExitReason.DRIVER_LOST, ended_at=datetime.now(UTC))
    second = first.model_copy(update={"reason": ExitReason.COMPLETED})
    assert put_exit(bench.store, first, 1.0)
    assert put_exit(bench.store, second, 1.0)
    assert ExitFile.model_validate_json(bench.store.get(exit_key(ATTEMPT))).reason is ExitReason.DRIVER_LOST


class AbsentStore(DirStore):
    def put(self, key: str, data: Data, *, if_none_match: bool = False) -> None:
        raise StorageError("away")


def test_exit_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    exit_file = ExitFile(attempt_id=ATTEMPT, reason=ExitReason.COMPLETED, ended_at=datetime.now(UTC))
    assert not put_exit(AbsentStore(tmp_path), exit_file, deadline_s=0.0)


def test_read_attempt(tmp_path: Path) -> None:
    store = DirStore(tmp_path)
    with pytest.raises(DriverError, match=ATTEMPT):
        read_attempt(store, ATTEMPT)
    store.put(attempt_key(ATTEMPT), b"{}")
    with pytest.raises(DriverError, match=ATTEMPT):
        read_attempt(store, ATTEMPT)
    store.put(attempt_key(ATTEMPT), make_attempt().model_dump_json().encode())
    assert read_attempt(store, ATTEMPT) == make_attempt().model_copy(
        update={"created_at": read_attempt(store, ATTEMPT).created_at}
    )


def test_own_attempt_id() -> None:
    config = '{"runtime_env": {}, "metadata": {"job_submission_id": "%s"}}'
    assert own_attempt_id({"RAY_JOB_CONFIG_JSON_ENV_VAR": config % ATTEMPT}) == ATTEMPT
    for environment in (
        {},
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": config % "raysubmit_1"},
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{"},
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"},
    ):
        with pytest.raises(DriverError):
            own_attempt_id(environment)


def test_environment_of_the_ray_job_stays_with_the_driver() -> None:
    environment = {
        "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {"env_vars": {"A": "1"}, "pip": []}, "metadata": {"m": 1}}'
    }
    keep_environment_to_driver(environment)
    assert environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] == '{"runtime_env": {"pip": []}, "metadata": {"m": 1}}'
