"""A hybrid and a BiT ResNet at every ZeRO stage: one of two workers is killed with SIGKILL, and two others end where
the first would have, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from configs.layout import manifest_key
from configs.reasons import ExitReason
from configs.states import Desired
from tests.fakes.dir_store import DirStore
from tests.fakes.recording_reporter import RecordingReporter
from tests.ranks import Died, run_ranks
from tests.workers.attempts import make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, assert_same_bits, read_state, run_attempts
from tests.workers.test_model_families import FAMILIES
from workers.attempt import run_rank
from workers.distributed import Ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]  # the fixture holds many runs

VARIANTS = [(family, stage) for family in ("hybrid", "bit") for stage in (0, 1, 2, 3)]
STEPS, EVERY = 24, 4


def train_until_killed(ranks: Ranks, run: Run, root: str) -> None:
    """Rank 1 kills itself in the middle of training, as soon as a checkpoint is committed."""
    store = DirStore(root)

    def order(step: int) -> Desired:
        if ranks.rank == 1 and any(committed(store, run.attempt.number)):
            os.kill(os.getpid(), signal.SIGKILL)
        return Desired.RUN

    run_rank(run.attempt, ranks, RecordingReporter(order), store, None)


def committed(store: DirStore, number: int) -> Iterator[int]:
    """The steps of an attempt's committed checkpoints before the last step."""
    for step in range(EVERY, STEPS, EVERY):
        if (store.root / manifest_key(saved_at(step, number).prefix)).exists():
            yield step


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[DirStore, list[Result], list[Any], list[Result]]:
    """Each variant undisturbed; killed; and continued from the killed one's newest checkpoint."""
    store = DirStore(tmp_path_factory.mktemp("killed"))
    root = str(store.root)
    specs = [
        tiny_spec(
            zero={"stage": stage},
            checkpoint={"every_steps": EVERY},
            **(FAMILIES[family] | {"schedule": {"total_steps": STEPS, "warmup_steps": 1}, "eval": {"at_end": False}}),
        )
        for family, stage in VARIANTS
    ]
    whole = run_ranks(2, run_attempts, [Run(make_attempt(spec, 2, 3 * i + 1)) for i, spec in enumerate(specs)], root)[0]
    killed, continued = [], []
    for i, spec in enumerate(specs):
        number = 3 * i + 2
        killed.append(run_ranks(2, train_until_killed, Run(make_attempt(spec, 2, number)), root, may_die=True)[1])
        newest = saved_at(max(committed(store, number)), number)
        continued.append(Run(make_attempt(spec, 2, number + 1, resume_from=newest)))
    return store, whole, killed, run_ranks(2, run_attempts, continued, root)[0]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_killed_worker_changes_nothing(runs: Any, variant: tuple[str, int]) -> None:
    store, whole, killed, continued = runs
    i = VARIANTS.index(variant)
    assert killed[i] == Died(-signal.SIGKILL)
    assert whole[i].outcome.reason is ExitReason.COMPLETED, whole[i].outcome
    assert continued[i].outcome.reason is ExitReason.COMPLETED, continued[i].outcome
    done_again = continued[i].losses
    assert 0 < len(done_again) < STEPS
    assert done_again == whole[i].losses[-len(done_again) :]
    _, state = read_state(store, saved_at(STEPS, 3 * i + 1).prefix)
    _, again = read_state(store, saved_at(STEPS, 3 * i + 3).prefix)
    assert_same_bits(state, again)
