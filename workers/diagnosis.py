"""Why an attempt ended: from what the ranks said, which processes vanished and what was ordered, to one reason.

Pure. The order of the rules is the policy:

    fenced > hung > ordered to leave > a rank's own, specific failure > vanished processes > other failures
    > failures that only echo a peer's end > the group itself failed > all ranks completed

A vanished process outranks its peers' "connection reset": they are its consequence. It does not outrank a failure that
a dead peer cannot cause (bad data, a corrupt checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from configs.reasons import ExitReason
from configs.states import Desired
from configs.wire import RankFailure


@dataclass(frozen=True)
class RankEnd:
    """How a rank says it ended. `order` counts the ends in the sequence in which they arrived."""

    rank: int
    reason: ExitReason
    node: str = ""
    message: str = ""
    step: int = 0
    checkpoint_step: int | None = None
    error_type: str = ""
    order: int = 0
    sound_step: int | None = None


@dataclass(frozen=True)
class Vanished:
    """A rank whose process died without a word."""

    rank: int
    node: str = ""
    error_type: str = ""
    message: str = ""
    node_is_gone: bool = False
    num_oom_kills: int = 0
    """Processes that the kernel killed on its node for lack of memory since the attempt began there."""


@dataclass(frozen=True)
class Hang:
    """The rank that holds the others up."""

    rank: int
    node: str
    message: str
    suspects: tuple[int, ...] = ()
    """Where several ranks stand equally far back: all of them, `rank` being the first."""


@dataclass(frozen=True)
class Evidence:
    """Everything known of an attempt's end."""

    world_size: int
    ends: Mapping[int, RankEnd] = field(default_factory=dict)
    vanished: tuple[Vanished, ...] = ()
    desired: Desired = Desired.RUN
    fenced: bool = False
    hang: Hang | None = None
    group_error: str = ""
    """Why the worker group as a whole failed, if it did: could not start, its controller died."""
    timed_out_start: bool = False
    died_starting: bool = False
    forced: bool = False
    """The ranks did not leave in time and were ended."""


@dataclass(frozen=True)
class Verdict:
    reason: ExitReason
    message: str
    first_failure: RankFailure | None = None


ORDERED = {
    Desired.STOP: ExitReason.USER_CANCELLED,
    Desired.PAUSE: ExitReason.PAUSED,
    Desired.YIELD: ExitReason.PREEMPTED,
}
LEFT = frozenset(ORDERED.values())
"""What ranks say that left on an order."""
SPECIFIC = frozenset(
    {
        ExitReason.SPEC_INVALID,
        ExitReason.DATA_ERROR,
        ExitReason.NAN_LOSS,
        ExitReason.LOSS_SPIKE,
        ExitReason.OOM_GPU,
        ExitReason.STORAGE_ERROR,
        ExitReason.STORAGE_REFUSED,
        ExitReason.CHECKPOINT_CORRUPT,
        ExitReason.FENCED,
    }
)
"""Failures that a peer's end cannot cause."""

_ECHO = re.compile(
    r"connection (was )?(reset|closed|refused|aborted)|broken pipe|closed by peer|remote process exited|"
    r"peer (has )?(died|exited|closed)|gloo|nccl|process ?group|socket (error|timeout|closed)|rendezvous|"
    r"timed out (after|waiting).*(recv|send|store|peer)|tcp ?store|distnetworkerror|distbackenderror",
    re.IGNORECASE,
)
# Not "OOM" alone: Ray's text for every crashed process names the OOM killer as one of its guesses.
_OOM_HOST = re.compile(r"OutOfMemoryError|running low on memory|memory (monitor|usage threshold)", re.IGNORECASE)
_OOM_GPU = re.compile(r"cuda.{0,40}out of memory|outofmemoryerror", re.IGNORECASE)


def has_failed(end: RankEnd) -> bool:
    """Whether a rank ended in another way than it should."""
    return end.reason is not ExitReason.COMPLETED and end.reason not in LEFT


def is_echo(end: RankEnd) -> bool:
    """Whether a rank's failure may be only the echo of a peer's end."""
    if end.reason is ExitReason.WORKER_LOST:
        return True
    return end.reason not in SPECIFIC and _ECHO.search(f"{end.error_type} {end.message}") is not None


_IN_COLLECTIVE = re.compile(r"torch/distributed|deepspeed/comm|workers/control\.py")


def narrow(hang: Hang, stacks: Mapping[int, tuple[str, ...]], nodes: Mapping[int, str]) -> Hang:
    """The hang, its rank chosen by the stacks of the suspects: one that is in no collective holds up those that are.

    Where all or none are in one (on a GPU a wait shows elsewhere), it stays as it was.
    """
    waiting = {r for r in hang.suspects if any(_IN_COLLECTIVE.search(line) for line in stacks.get(r, ()))}
    culprits = [rank for rank in hang.suspects if rank not in waiting and stacks.get(rank)]
    if not waiting or not culprits:
        return hang
    rank = culprits[0]
    text = f"{hang.message} Rank {rank} holds up ranks {sorted(waiting)}, which wait in a collective."
    return Hang(rank, nodes.get(rank, ""), text)


def diagnose(evidence: Evidence) -> Verdict:
    """The reason an attempt ended, a message for people, and the rank that failed first if one did."""
    failed = sorted((e for e in evidence.ends.values() if has_failed(e)), key=_by_order)
    vanished = sorted((v for v in evidence.vanished if v.rank not in evidence.ends), key=lambda v: v.rank)
    if evidence.fenced:
        return Verdict(ExitReason.FENCED, "The control plane has given this job to a newer attempt.")
    if _all_completed(evidence):
        return Verdict(ExitReason.COMPLETED, "All ranks completed.")
    if evidence.hang is not None:
        hang = evidence.hang
        failure = RankFailure(rank=hang.rank, node=hang.node, error_type="Hung", message=hang.message)
        return Verdict(ExitReason.WORKER_HUNG, hang.message, failure)
    if evidence.desired in ORDERED:
        return _left(evidence, failed, vanished)
    specific = [e for e in failed if e.reason in SPECIFIC]
    if specific:
        return _from_end(specific[0])
    if vanished:
        return _from_vanished(vanished[0], evidence.world_size)
    own = [e for e in failed if not is_echo(e)]
    if own:
        return _from_end(own[0])
    if failed:
        return _from_echo(failed[0])
    if evidence.timed_out_start:
        return Verdict(ExitReason.START_TIMEOUT, evidence.group_error or "The workers did not start in time.")
    if evidence.died_starting:
        return Verdict(ExitReason.WORKER_LOST, f"A worker was lost while starting: {evidence.group_error}")
    if evidence.group_error:
        return Verdict(ExitReason.PLATFORM_ERROR, evidence.group_error)
    return _without_failure(evidence)


def _all_completed(evidence: Evidence) -> bool:
    ends = evidence.ends.values()
    return len(evidence.ends) == evidence.world_size and all(e.reason is ExitReason.COMPLETED for e in ends)


def _left(evidence: Evidence, failed: list[RankEnd], vanished: list[Vanished]) -> Verdict:
    reason = ORDERED[evidence.desired]
    if vanished:
        inner = _from_vanished(vanished[0], evidence.world_size)
    elif failed:
        inner = _from_end(failed[0])
    elif evidence.forced:
        return Verdict(reason, "The ranks did not leave in time and were ended.")
    elif not evidence.ends:
        return Verdict(reason, "Told to leave before the ranks had started.")
    else:
        return Verdict(reason, "All ranks left when told to.")
    return Verdict(reason, f"While leaving: {inner.message}", inner.first_failure)


def _from_end(end: RankEnd) -> Verdict:
    failure = RankFailure(rank=end.rank, node=end.node, error_type=end.error_type, message=end.message)
    reason = end.reason
    if reason not in SPECIFIC and _OOM_GPU.search(f"{end.error_type} {end.message}"):
        reason = ExitReason.OOM_GPU
    return Verdict(reason, f"Rank {end.rank}: {end.message or end.error_type or reason}", failure)


def _from_vanished(lost: Vanished, world_size: int) -> Verdict:
    failure = RankFailure(rank=lost.rank, node=lost.node, error_type=lost.error_type, message=lost.message)
    where = f" on {lost.node}" if lost.node else ""
    if lost.node_is_gone:
        return Verdict(
            ExitReason.NODE_LOST, f"Node {lost.node or '?'} with rank {lost.rank} left the cluster.", failure
        )
    if lost.num_oom_kills:
        text = f"Rank {lost.rank}{where} vanished as the kernel killed a process there for lack of memory."
        return Verdict(ExitReason.OOM_HOST, text, failure)
    if _OOM_HOST.search(f"{lost.error_type} {lost.message}"):
        return Verdict(ExitReason.OOM_HOST, f"Rank {lost.rank}{where} was killed for lack of memory.", failure)
    text = f"The process of rank {lost.rank} (of {world_size}){where} vanished."
    return Verdict(ExitReason.WORKER_LOST, text, failure)


def _from_echo(end: RankEnd) -> Verdict:
    """Every failure is an echo: some peer's connection broke, though no process is known to be gone."""
    failure = RankFailure(rank=end.rank, node=end.node, error_type=end.error_type, message=end.message)
    return Verdict(ExitReason.WORKER_LOST, f"Rank {end.rank} lost its peers: {end.message}", failure)


def _without_failure(evidence: Evidence) -> Verdict:
    left = [e for e in sorted(evidence.ends.values(), key=_by_order) if e.reason in LEFT]
    if left:  # The ranks agreed to leave on an order that this driver has meanwhile forgotten.
        return Verdict(left[0].reason, "All ranks left when told to.")
    missing = sorted(set(range(evidence.world_size)) - set(evidence.ends))
    return Verdict(ExitReason.PLATFORM_ERROR, f"Ranks {missing} ended without saying how.")


def _by_order(end: RankEnd) -> int:
    return end.order
