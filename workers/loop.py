"""The training loop.

Between two steps lies a boundary, where all ranks do the same thing in the same order:

1. read the control word of the last boundary and issue the next: orders, failures, finished uploads
2. evaluate, if it is time
3. begin a checkpoint, if it is time

and then one step: learning rate; forward and backward (`workers.step`); update; report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch.distributed as dist
from torch import Tensor

from configs.failpoints import failpoint
from configs.reasons import ExitReason
from configs.spec import TrainingJob
from configs.states import Desired
from configs.train import SpikeRollback
from vit.schedule import learning_rate
from workers.checkpoint import Checkpointer, Progress
from workers.control import LEAVES_WITH, ControlWord
from workers.data.loader import TrainLoader
from workers.distributed import Ranks
from workers.ema import WeightAverage
from workers.engine import Engine, Update
from workers.outcome import RankOutcome
from workers.report import Reporter
from workers.spike import describe_spike, is_spike, sound_step, watch_loss
from workers.step import Accumulated, accumulate
from workers.throughput import Throughput

Evaluate = Callable[[Callable[[], bool]], dict[str, float] | None]
"""Measures the model as it is now; asks its argument after each batch whether to go on; None if it was told not to."""


def train(
    spec: TrainingJob,
    engine: Engine,
    loader: TrainLoader,
    evaluate: Evaluate,
    checkpointer: Checkpointer,
    throughput: Throughput,
    ranks: Ranks,
    reporter: Reporter,
    start: Progress,
    average: WeightAverage | None = None,
) -> RankOutcome:
    """Train a resolved job from `start` to its last step, an order to leave, or a failure.

    `loader` begins at `start.step`. Every rank calls this with the same job and start, and leaves after the same step.
    The step is at a boundary the number of global batches consumed; a skipped one consumed its batch too.
    """
    options, schedule, total_steps = spec.train, spec.schedule, spec.schedule.total_steps
    assert total_steps is not None, "epochs and examples are steps in a resolved job"
    control = ControlWord(ranks)
    progress = start

    while True:
        reporter.heartbeat("training", progress.step)
        is_last = progress.step == total_steps
        is_new = progress.step > start.step

        # What all ranks decided at the last boundary.
        word = control.exchange(checkpointer.word(reporter.desired()))
        checkpointer.settle(word)
        if word.failure is not None:
            control.drain()
            return _stopped(word.failure, checkpointer, progress)
        if word.order is not Desired.RUN:
            return _leave(LEAVES_WITH[word.order], {}, checkpointer, control, reporter, progress, worth_saving=is_new)

        measured: dict[str, float] = {}
        # Resumed at a step whose evaluation an order cut off, it is made up for.
        is_due = progress.step > 0 and not progress.is_measured and _is_due(spec.eval.every_steps, progress.step)
        if is_due or (is_last and spec.eval.at_end):
            reporter.heartbeat("evaluating", progress.step)
            result = evaluate(partial(_may_go_on, control, checkpointer, reporter, progress.step))
            if result is None:
                continue  # to read why
            measured = result
            if ranks.is_first:
                for name, value in measured.items():
                    reporter.metric(name, progress.step, value)
            reporter.heartbeat("training", progress.step)

        if is_last:
            return _leave(ExitReason.COMPLETED, measured, checkpointer, control, reporter, progress)
        if is_new or measured:
            checkpointer.maybe_save(progress, measured, control)

        failpoint("loop.step", rank=ranks.rank, step=progress.step)

        # One step.
        started, waited_before = time.perf_counter(), loader.wait_s
        lr = learning_rate(
            progress.step, spec.optim.lr, schedule.warmup_steps or 0, total_steps, schedule.decay, schedule.min_lr
        )
        batch = accumulate(spec, engine, next(loader), ranks, progress.step)
        update = engine.step(lr)
        if average is not None and update.applied:
            average.update()
        progress = _advance(progress, update.applied)
        throughput.add(time.perf_counter() - started, loader.wait_s - waited_before)

        if not update.applied:
            if ranks.is_first:
                _report_skip(reporter, progress, options.global_batch_size)
            if progress.nonfinite_steps >= options.max_nonfinite_steps:
                checkpointer.drain(control)
                message = f"the gradient was not finite for {progress.nonfinite_steps} steps in a row (lr {lr:.3g})"
                return _diverged(message, options.spike_rollback, checkpointer, reporter, ranks, progress)

        if progress.step % options.log_every_steps == 0 or progress.step in (start.step + 1, total_steps):
            mean_loss = _report_step(reporter, ranks, progress.step, batch, update, lr)
            throughput.report(progress.step)
            if options.spike_rollback is not None and progress.step % options.log_every_steps == 0:
                watch = watch_loss(progress.loss_watch, progress.step, float(mean_loss), options.spike_rollback)
                progress = replace(progress, loss_watch=watch)
                if is_spike(watch, options.spike_rollback):
                    checkpointer.drain(control)
                    message = describe_spike(watch, float(mean_loss), options.spike_rollback)
                    return _diverged(message, options.spike_rollback, checkpointer, reporter, ranks, progress)


def _report_step(reporter: Reporter, ranks: Ranks, step: int, batch: Accumulated, update: Update, lr: float) -> Tensor:
    """Report a step; returns its loss, the mean over the ranks. Every rank calls this: the mean is taken together."""
    mean_loss = _mean_over_ranks(batch.loss, ranks)
    mean_right = None if batch.right is None else _mean_over_ranks(batch.right, ranks)
    if ranks.is_first:
        reporter.metric("train/loss", step, float(mean_loss))
        if mean_right is not None:
            reporter.metric("train/top1", step, float(mean_right))
        reporter.metric("train/lr", step, lr)
        reporter.metric("train/grad_norm", step, float(update.grad_norm))
    reporter.metric(f"data/sample_ids_crc32/rank-{ranks.rank:05d}", step, batch.samples_crc32)
    return mean_loss


def _advance(progress: Progress, applied: bool) -> Progress:
    step, skipped, in_a_row = progress.step + 1, progress.skipped_steps, progress.nonfinite_steps
    if applied:
        return replace(progress, step=step, nonfinite_steps=0, is_measured=False)
    return replace(progress, step=step, skipped_steps=skipped + 1, nonfinite_steps=in_a_row + 1, is_measured=False)


def _is_due(every_steps: int | None, step: int) -> bool:
    return every_steps is not None and step % every_steps == 0


def _may_go_on(control: ControlWord, checkpointer: Checkpointer, reporter: Reporter, step: int) -> bool:
    """During an evaluation: exchange words after each batch, so that an order is not kept waiting for its end."""
    reporter.heartbeat("evaluating", step)
    word = control.exchange(checkpointer.word(reporter.desired()))
    checkpointer.settle(word)
    return word.order is Desired.RUN and word.failure is None


def _leave(
    reason: ExitReason,
    measured: dict[str, float],
    checkpointer: Checkpointer,
    control: ControlWord,
    reporter: Reporter,
    progress: Progress,
    worth_saving: bool = True,
) -> RankOutcome:
    """Save and leave. If nothing was done since the start there is nothing to save."""
    reporter.heartbeat("saving", progress.step)
    if worth_saving:
        failure = checkpointer.finish(progress, measured, control)
        if failure is not None:
            return _stopped(failure, checkpointer, progress)
    else:
        control.drain()
    reporter.heartbeat("finishing", progress.step)
    return RankOutcome(reason, "", progress.step, checkpointer.committed_step)


def _diverged(
    message: str,
    rollback: SpikeRollback | None,
    checkpointer: Checkpointer,
    reporter: Reporter,
    ranks: Ranks,
    progress: Progress,
) -> RankOutcome:
    """Leave because training has gone wrong: for good, or (`rollback`) to go on from before that, on other data."""
    message = f"{message}, at step {progress.step}"
    if rollback is None:
        return RankOutcome(ExitReason.NAN_LOSS, message, progress.step, checkpointer.committed_step)
    sound = sound_step(progress.loss_watch)
    if ranks.is_first:
        data = {"step": progress.step, "sound_step": sound, "calm_step": progress.loss_watch.calm_step}
        reporter.event("loss.spike", message, data)
    return RankOutcome(ExitReason.LOSS_SPIKE, message, progress.step, checkpointer.committed_step, sound_step=sound)


def _stopped(failure: ExitReason, checkpointer: Checkpointer, progress: Progress) -> RankOutcome:
    """Leave because a checkpoint could not be written, by this rank or another."""
    message = checkpointer.failure_message or "another rank could not write its part of a checkpoint"
    return RankOutcome(failure, message, progress.step, checkpointer.committed_step)


def _report_skip(reporter: Reporter, progress: Progress, global_batch_size: int) -> None:
    last = progress.step * global_batch_size
    reporter.event(
        "step.skipped",
        f"step {progress.step} changed nothing: its gradient was not finite",
        {"step": progress.step, "positions": [last - global_batch_size, last], "in_a_row": progress.nonfinite_steps},
    )


def _mean_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    dist.all_reduce(value)
    return value / ranks.world_size
