"""The classification of an attempt's end, as a table."""

from __future__ import annotations

import pytest

from configs.reasons import ExitReason
from configs.states import Desired
from workers.diagnosis import Evidence, Hang, RankEnd, Vanished, diagnose, is_echo, narrow

DONE = [RankEnd(r, ExitReason.COMPLETED, step=10) for r in range(2)]
RESET = RankEnd(
    0, ExitReason.WORKER_LOST, "a", "Connection reset by peer [127.0.0.1]:4321", 5, error_type="RuntimeError"
)
GLOO = RankEnd(
    0, ExitReason.PLATFORM_ERROR, "a", "[../gloo/transport/tcp/pair.cc:534] closed", 5, error_type="RuntimeError"
)
DATA = RankEnd(1, ExitReason.DATA_ERROR, "b", "image 7 is missing", 5, error_type="DataError", order=1)
BUG = RankEnd(1, ExitReason.PLATFORM_ERROR, "b", "list index out of range", 5, error_type="IndexError", order=1)
NAN = [RankEnd(r, ExitReason.NAN_LOSS, message="loss is nan at step 5", order=1 - r) for r in range(2)]
GONE = Vanished(
    1,
    "b",
    "ActorDiedError",
    "Worker unexpectedly exits with a connection error code 2. End of file. There are some potential root causes. (1) "
    "The process is killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called.",
)


def left(reason: ExitReason) -> dict[int, RankEnd]:
    return {r: RankEnd(r, reason, step=7, checkpoint_step=7, order=r) for r in range(2)}


def ends(*given: RankEnd) -> dict[int, RankEnd]:
    return {end.rank: end for end in given}


TABLE = {
    "all ranks completed": (Evidence(2, ends(*DONE)), ExitReason.COMPLETED, None),
    "completed though told to stop": (Evidence(2, ends(*DONE), desired=Desired.STOP), ExitReason.COMPLETED, None),
    "one rank vanished": (Evidence(2, vanished=(GONE,)), ExitReason.WORKER_LOST, 1),
    "a vanished rank outranks its peer's reset": (Evidence(2, ends(RESET), (GONE,)), ExitReason.WORKER_LOST, 1),
    "and its peer's gloo error": (Evidence(2, ends(GLOO), (GONE,)), ExitReason.WORKER_LOST, 1),
    "and a peer's unknown error": (Evidence(3, ends(BUG), (Vanished(2),)), ExitReason.WORKER_LOST, 2),
    "bad data outranks a vanished rank": (Evidence(3, ends(DATA), (Vanished(2),)), ExitReason.DATA_ERROR, 1),
    "bad data outranks a peer's reset": (Evidence(2, ends(RESET, DATA)), ExitReason.DATA_ERROR, 1),
    "a bug outranks a peer's reset": (Evidence(2, ends(RESET, BUG)), ExitReason.PLATFORM_ERROR, 1),
    "only echoes": (Evidence(2, ends(RESET)), ExitReason.WORKER_LOST, 0),
    "the first of equal failures": (Evidence(2, ends(*NAN)), ExitReason.NAN_LOSS, 1),
    "a process ended after its rank had spoken": (
        Evidence(2, ends(DATA), (GONE,)),
        ExitReason.DATA_ERROR,
        1,
    ),
    "node gone": (Evidence(2, vanished=(Vanished(1, "b", node_is_gone=True),)), ExitReason.NODE_LOST, 1),
    "killed by the memory monitor": (
        Evidence(2, vanished=(Vanished(1, "b", "OutOfMemoryError", "node running low on memory"),)),
        ExitReason.OOM_HOST,
        1,
    ),
    "killed by the kernel for memory": (
        Evidence(2, ends(RESET), (Vanished(1, "b", "ActorDiedError", GONE.message, num_oom_kills=1),)),
        ExitReason.OOM_HOST,
        1,
    ),
    "CUDA out of memory as an unknown error": (
        Evidence(1, ends(RankEnd(0, ExitReason.PLATFORM_ERROR, message="CUDA error: out of memory"))),
        ExitReason.OOM_GPU,
        0,
    ),
    "cancelled": (
        Evidence(2, left(ExitReason.USER_CANCELLED), desired=Desired.STOP),
        ExitReason.USER_CANCELLED,
        None,
    ),
    "paused": (Evidence(2, left(ExitReason.PAUSED), desired=Desired.PAUSE), ExitReason.PAUSED, None),
    "preempted": (Evidence(2, left(ExitReason.PREEMPTED), desired=Desired.YIELD), ExitReason.PREEMPTED, None),
    "cancelled, but did not leave": (Evidence(2, desired=Desired.STOP, forced=True), ExitReason.USER_CANCELLED, None),
    "cancelled, and a rank vanished on the way": (
        Evidence(2, vanished=(GONE,), desired=Desired.STOP),
        ExitReason.USER_CANCELLED,
        1,
    ),
    "left, though the order is forgotten": (Evidence(2, left(ExitReason.PAUSED)), ExitReason.PAUSED, None),
    "hung": (Evidence(2, hang=Hang(1, "b", "rank 1 is silent")), ExitReason.WORKER_HUNG, 1),
    "hung while told to stop": (
        Evidence(2, desired=Desired.STOP, hang=Hang(1, "b", "rank 1 is silent")),
        ExitReason.WORKER_HUNG,
        1,
    ),
    "fenced": (Evidence(2, ends(*DONE), (GONE,), fenced=True), ExitReason.FENCED, None),
    "never placed": (Evidence(2, group_error="no room", timed_out_start=True), ExitReason.START_TIMEOUT, None),
    "lost while starting": (Evidence(2, group_error="node died", died_starting=True), ExitReason.WORKER_LOST, None),
    "Ray Train's own failure": (Evidence(2, group_error="ActorDiedError: controller"), ExitReason.PLATFORM_ERROR, None),
    "a rank that said nothing": (Evidence(2, ends(DONE[0])), ExitReason.PLATFORM_ERROR, None),
}


@pytest.mark.parametrize("case", TABLE)
def test_reason_and_first_failed_rank(case: str) -> None:
    evidence, reason, rank = TABLE[case]
    verdict = diagnose(evidence)
    assert verdict.reason is reason
    assert (verdict.first_failure.rank if verdict.first_failure else None) == rank
    assert verdict.message


def test_message_names_rank_and_cause() -> None:
    verdict = diagnose(Evidence(2, ends(RESET, DATA)))
    assert verdict.message == "Rank 1: image 7 is missing"
    assert verdict.first_failure is not None
    assert (verdict.first_failure.error_type, verdict.first_failure.node) == ("DataError", "b")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Connection closed by peer [10.0.0.2]:31", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("Broken pipe", True),
        ("rendezvous: rank 0 did not start within 120 s", True),
        ("index 12 is out of bounds", False),
    ],
)
def test_echoes_are_told_from_causes(message: str, expected: bool) -> None:
    assert is_echo(RankEnd(0, ExitReason.PLATFORM_ERROR, message=message)) is expected


WAITING = ("Thread 0x1", '  File "/x/torch/distributed/distributed_c10d.py", line 3913 in all_reduce')
BUSY = ("Thread 0x1", '  File "/x/workers/data/loader.py", line 12 in __next__')


@pytest.mark.parametrize(
    ("stacks", "rank", "is_explained"),
    [
        ({0: WAITING, 1: BUSY, 2: WAITING}, 1, True),
        ({0: WAITING, 1: WAITING, 2: WAITING}, 0, False),
        ({0: BUSY, 1: BUSY, 2: BUSY}, 0, False),
        ({0: WAITING, 1: (), 2: WAITING}, 0, False),
        ({}, 0, False),
    ],
)
def test_stacks_tell_who_holds_up_whom(stacks: dict[int, tuple[str, ...]], rank: int, is_explained: bool) -> None:
    hang = narrow(Hang(0, "a", "Nothing moves.", (0, 1, 2)), stacks, {1: "b"})
    assert hang.rank == rank
    assert ("Rank 1 holds up ranks [0, 2]" in hang.message) is is_explained
    assert hang.node == ("b" if is_explained else "a")


def test_specific_failures_are_never_echoes() -> None:
    assert not is_echo(RankEnd(0, ExitReason.STORAGE_ERROR, message="Connection reset by peer"))
