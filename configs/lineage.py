"""Which checkpoints of a job count: one line of descent through its attempts.

Attempt files say which checkpoint each attempt continued from. A checkpoint that an earlier attempt wrote beyond that
step (a zombie's late commit, or work that was rolled back) is not an ancestor of anything and is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable

from configs.wire import AttemptFile, DataSkip, ParentCut


def cuts(attempt_files: Iterable[AttemptFile]) -> tuple[ParentCut, ...]:
    """How far each earlier attempt counts, from the attempt files found in the bucket, in any order.

    A cut only ever moves down: what one attempt file left out, no later one takes back.
    """
    limits: dict[int, int] = {}
    for file in attempt_files:
        for cut in file.parents:
            limits[cut.attempt] = min(limits.get(cut.attempt, cut.step), cut.step)
    return _sorted(limits)


def parents_of_next(
    number: int, parents: Iterable[ParentCut], resume_from: tuple[int, int] | None
) -> tuple[ParentCut, ...]:
    """The parents to write into attempt `number`'s file.

    Args:
        number: the new attempt's number, from 1.
        parents: the cuts so far (`cuts` of the files before it).
        resume_from: attempt and step of this job's checkpoint it continues from; None: from the start, or from another
            job's checkpoint, so that nothing of the earlier attempts counts.
    """
    limits = {cut.attempt: cut.step for cut in parents}
    origin, step = (0, 0) if resume_from is None else resume_from
    for attempt in range(1, number):
        if attempt == origin:
            limits[attempt] = min(limits.get(attempt, step), step)
        elif attempt > origin:
            limits[attempt] = 0
    return _sorted(limits)


def is_in_lineage(attempt: int, step: int, parents: Iterable[ParentCut]) -> bool:
    """Whether a checkpoint counts. An attempt without a cut (the latest) counts wholly."""
    return all(step <= cut.step for cut in parents if cut.attempt == attempt)


def newest(checkpoints: Iterable[tuple[int, int]], parents: Iterable[ParentCut]) -> tuple[int, int] | None:
    """The (attempt, step) to continue from: the furthest of those that count; None if there is none."""
    limits = tuple(parents)
    counted = [(attempt, step) for attempt, step in checkpoints if is_in_lineage(attempt, step, limits)]
    return max(counted, key=lambda c: (c[1], c[0]), default=None)


def batch_number(step: int, skips: Iterable[DataSkip]) -> int:
    """The global batch that step `step` trains on, counted from 0: its own number, and the batches passed over."""
    return step + sum(skip.num_batches for skip in skips if skip.at_step <= step)


def join_skips(*groups: Iterable[DataSkip]) -> tuple[DataSkip, ...]:
    """All skips, each once: those of the job and those that the checkpoint it continues from knows of."""
    return tuple(dict.fromkeys(skip for group in groups for skip in group))


def _sorted(limits: dict[int, int]) -> tuple[ParentCut, ...]:
    return tuple(ParentCut(attempt=attempt, step=step) for attempt, step in sorted(limits.items()))
