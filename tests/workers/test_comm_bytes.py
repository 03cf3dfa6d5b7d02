"""How much a step sends: what theory says of each ZeRO stage, and nothing else of any size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.workers.traffic import STEP_TRAFFIC, StepTraffic, step_traffic
from workers.distributed import Ranks

pytestmark = pytest.mark.ranks
GLOBAL_BATCH = 12
TOLERANCE = 0.02


def all_stages(ranks: Ranks, micro_batch_size: int, folder: str) -> dict[int, StepTraffic]:
    return {stage: step_traffic(ranks, stage, micro_batch_size, f"{folder}/{stage}") for stage in STEP_TRAFFIC}


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_sends_what_its_stage_needs(world_size: int, tmp_path: Path) -> None:
    measured = run_ranks(world_size, all_stages, GLOBAL_BATCH // world_size, str(tmp_path))[0]
    for stage, traffic in measured.items():
        assert traffic.num_weights > 1_000_000
        expected = STEP_TRAFFIC[stage](1) * (world_size - 1) / world_size
        assert traffic.weights_sent == pytest.approx(expected, rel=TOLERANCE), (stage, traffic.sent)


def test_accumulation_sends_gradients_once_where_they_are_whole(tmp_path: Path) -> None:
    """Stages 2 and 3 keep no whole gradients: they send each micro-batch's; stages 0 and 1 send one sum."""
    measured = run_ranks(2, all_stages, GLOBAL_BATCH // 4, str(tmp_path))[0]
    for stage, traffic in measured.items():
        assert traffic.weights_sent == pytest.approx(STEP_TRAFFIC[stage](2) / 2, rel=TOLERANCE), (stage, traffic.sent)
