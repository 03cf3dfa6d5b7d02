"""Loss spikes: when one is seen, how far back it goes, and what the next attempt trains on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from configs.lineage import batch_number, join_skips
from configs.reasons import ExitReason
from configs.train import SpikeRollback
from configs.wire import DataSkip, LossWatch
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Run, run_attempts
from workers.checkpoint import read_manifest
from workers.spike import is_spike, sound_step, watch_loss

OPTIONS = SpikeRollback(factor=2.0, window=3, patience=2)


def watched(losses: list[float], options: SpikeRollback = OPTIONS) -> LossWatch:
    watch = LossWatch()
    for step, loss in enumerate(losses, 1):
        watch = watch_loss(watch, step, loss, options)
    return watch


def test_a_spike_is_several_high_losses_in_a_row() -> None:
    assert not is_spike(watched([1.0, 1.1, 0.9, 2.1]), OPTIONS)
    watch = watched([1.0, 1.1, 0.9, 2.1, 2.2])
    assert is_spike(watch, OPTIONS)
    assert (watch.calm, watch.calm_step) == ((1.0, 1.1, 0.9), 3)
    # The loss at step 3 was that of the weights after step 2.
    assert sound_step(watch) == 2
    assert not is_spike(watched([1.0, 1.1, 0.9, 2.1, 1.9, 2.1]), OPTIONS), "a calm one in between begins anew"


def test_high_is_meant_of_the_latest_losses() -> None:
    assert watched([9.0, 8.0, 7.0, 6.0, 5.0, 4.0]).calm == (6.0, 5.0, 4.0)
    assert watched([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 10.1]).num_high == 1
    assert watched([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 9.9]).num_high == 0


def test_before_the_window_is_full_only_infinite_losses_are_high() -> None:
    assert watched([1.0, 50.0]).num_high == 0
    watch = watched([1.0, math.nan, math.inf])
    assert is_spike(watch, OPTIONS)
    assert sound_step(watch) == 0
    assert sound_step(watched([math.nan])) == 0


def test_data_that_was_passed_over_is_not_seen_again() -> None:
    first, second = (
        DataSkip(attempt_id=f"att_{n}", at_step=at, num_batches=count) for n, at, count in ((1, 4, 3), (2, 6, 5))
    )
    assert [batch_number(step, (first, second)) for step in range(8)] == [0, 1, 2, 3, 7, 8, 14, 15]
    assert join_skips((first,), (first, second)) == (first, second)


# -- through the loop --------------------------------------------------------------------------------------------------
CRC = "data/sample_ids_crc32/rank-00000"


def diverging(**train: Any) -> Any:
    """A learning rate that grows until the loss leaves where it was."""
    return tiny_spec(
        optim={"name": "sgd", "lr": 12.0, "weight_decay": 0.0, "clip_grad_norm": None},
        schedule={"total_steps": 30, "warmup_steps": 30},
        train={"spike_rollback": {"factor": 2.0, "window": 3, "patience": 2} | train},
        checkpoint={"every_steps": 2, "keep_last": 20},
        zero={"stage": 1},
    )


@pytest.mark.ranks
def test_all_ranks_leave_with_the_step_that_was_sound_and_go_on_with_other_data(tmp_path: Path) -> None:
    spec = diverging()
    by_rank = run_ranks(2, run_attempts, [Run(make_attempt(spec, 2))], str(tmp_path))
    outcomes = [results[0].outcome for results in by_rank]
    assert {outcome.reason for outcome in outcomes} == {ExitReason.LOSS_SPIKE}, outcomes
    assert len({(outcome.step, outcome.sound_step) for outcome in outcomes}) == 1
    first, spiked, sound = by_rank[0][0], outcomes[0].step, outcomes[0].sound_step
    assert sound is not None
    assert 3 <= sound < spiked < 30
    (event,) = (event for event in first.events if event[0] == "loss.spike")
    assert event[2] == {"step": spiked, "sound_step": sound, "calm_step": sound + 1}

    store, start = DirStore(tmp_path), sound - sound % 2
    assert len(read_manifest(store, saved_at(start).prefix).loss_watch.calm) == min(start, 3)
    skip = DataSkip(attempt_id="att_1", at_step=start, num_batches=spiked - start)
    second = make_attempt(spec, 2, 2, resume_from=saved_at(start)).model_copy(update={"skips": (skip,)})
    calm = tiny_spec(schedule={"total_steps": 30, "warmup_steps": 30}, optim={"lr": 1e-6}, zero={"stage": 1})
    runs = [Run(second), Run(make_attempt(calm, 2, 3))]
    again, whole = run_ranks(2, run_attempts, runs, str(tmp_path))[0]
    assert ("data.skipped", f"{spiked - start} global batches are passed over", {"step": start}) in again.events
    seen = again.metrics[CRC]
    assert seen, "it went on"
    for step, samples in seen.items():
        if step + spiked - start <= 30:
            assert samples == whole.metrics[CRC][step + spiked - start], step
    saved = max(step for step in seen if step % 2 == 0 and step < again.outcome.step)
    manifest = read_manifest(store, saved_at(saved, 2).prefix)
    assert manifest.skips == (skip,)
    assert manifest.position == (saved + spiked - start) * 16


@pytest.mark.ranks
def test_a_gradient_that_stays_infinite_is_a_spike_too(tmp_path: Path) -> None:
    spec = tiny_spec(
        data={"std": [1e-42]}, train={"spike_rollback": {}}, checkpoint={"every_steps": 2}, zero={"stage": 1}
    )
    result = run_ranks(1, run_attempts, [Run(make_attempt(spec, 1))], str(tmp_path))[0][0]
    assert (result.outcome.reason, result.outcome.sound_step) == (ExitReason.LOSS_SPIKE, 0)


@pytest.mark.ranks
def test_resume_decides_as_an_undisturbed_run(tmp_path: Path) -> None:
    """Resumed right before the spike, the losses before it are still known."""
    spec = diverging()
    whole = run_ranks(1, run_attempts, [Run(make_attempt(spec, 1))], str(tmp_path))[0][0]
    assert whole.outcome.reason is ExitReason.LOSS_SPIKE
    latest = (whole.outcome.step - 1) // 2 * 2
    resumed = Run(make_attempt(spec, 1, 2, resume_from=saved_at(latest)))
    again = run_ranks(1, run_attempts, [resumed], str(tmp_path))[0][0]
    assert (again.outcome.reason, again.outcome.step, again.outcome.sound_step) == (
        ExitReason.LOSS_SPIKE,
        whole.outcome.step,
        whole.outcome.sound_step,
    )
