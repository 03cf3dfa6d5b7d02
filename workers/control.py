"""The control word: how all ranks decide the same thing at the same step without waiting for one another.

Three int64 go through an asynchronous MAX all-reduce on the control group, issued at one step boundary and read at the
next. A rank that learns of an order, or whose upload failed, needs no extra collective: at the next boundary everyone
knows. The device is never synchronised for it.

    word[0]  the strongest order of any rank: run 0 < yield 1 < pause 2 < stop 3
    word[1]  the gravest failure of any rank's background work: none 0 < STORAGE_ERROR 1
             < STORAGE_REFUSED 2 < FENCED 3
    word[2]  minus the number of checkpoints this rank has uploaded, so that MAX gives what *all* have uploaded
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from configs.reasons import ExitReason
from configs.states import Desired
from workers.distributed import Ranks

ORDERS = (Desired.RUN, Desired.YIELD, Desired.PAUSE, Desired.STOP)
FAILURES = (None, ExitReason.STORAGE_ERROR, ExitReason.STORAGE_REFUSED, ExitReason.FENCED)
LEAVES_WITH = {
    Desired.YIELD: ExitReason.PREEMPTED,
    Desired.PAUSE: ExitReason.PAUSED,
    Desired.STOP: ExitReason.USER_CANCELLED,
}


@dataclass(frozen=True)
class Word:
    """What the ranks agreed on."""

    order: Desired = Desired.RUN
    failure: ExitReason | None = None
    num_uploaded: int = 0
    """Checkpoints that every rank has uploaded, counted from the start of the attempt."""


class ControlWord:
    """One exchange per step boundary, in the same place on every rank."""

    def __init__(self, ranks: Ranks) -> None:
        self._group = ranks.control_group
        self._in_flight: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, mine: Word) -> Word:
        """Read the word issued at the last call (none yet: a quiet one), and issue this rank's next."""
        agreed = self.drain()
        word = _encode(mine)
        work = dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._in_flight = word, work
        return agreed

    def agree(self, mine: Word) -> Word:
        """Exchange and wait: for the end of training, when there is no next boundary."""
        self.drain()
        word = _encode(mine)
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._group)
        return _decode(word)

    def drain(self) -> Word:
        """Wait for the word in flight, if any. Call before leaving the process groups."""
        if self._in_flight is None:
            return Word()
        word, work = self._in_flight
        work.wait()
        self._in_flight = None
        return _decode(word)


def _encode(word: Word) -> torch.Tensor:
    return torch.tensor([ORDERS.index(word.order), FAILURES.index(word.failure), -word.num_uploaded], dtype=torch.int64)


def _decode(word: torch.Tensor) -> Word:
    order, failure, uploaded = word.tolist()
    return Word(ORDERS[order], FAILURES[failure], -uploaded)
