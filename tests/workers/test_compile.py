"""torch.compile under the real engine: one graph, the same losses, exact resume, evaluation beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import SpecError
from configs.reasons import ExitReason
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, assert_same_bits, read_state, run_attempts
from workers.distributed import Ranks

pytestmark = pytest.mark.timeout(900)  # compiling takes its time
STAGES = (0, 1, 2)


def spec_of(stage: int, compile: bool = True) -> Any:
    """At stage 0 without dropout, whose masks a compiled model draws otherwise; at stage 2 with activation
    checkpointing."""
    return tiny_spec(
        model={"dropout": 0.0, "drop_path": 0.0} if stage == 0 else {},
        zero={"stage": stage},
        checkpoint={"every_steps": 3},
        eval={"every_steps": 2, "at_end": True, "batch_size": 8},
        train={"compile": compile, "activation_checkpointing": stage == 2},
    )


def compiled_runs(ranks: Ranks, runs: list[Run], root: str) -> tuple[list[Result], dict[str, int], int]:
    """The results, where graphs broke, and how many graphs there were."""
    results = run_attempts(ranks, runs, root)
    counters = torch._dynamo.utils.counters
    return results, dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[DirStore, Any]:
    root = tmp_path_factory.mktemp("compiled")
    whole = [Run(make_attempt(spec_of(stage), 1, 2 * stage + 1)) for stage in STAGES]
    resumed = [
        Run(make_attempt(spec_of(stage), 1, 2 * stage + 2, resume_from=saved_at(3, 2 * stage + 1))) for stage in STAGES
    ]
    # Each of three models is compiled anew where no cache knows it: half a minute of both cores.
    return DirStore(root), run_ranks(1, compiled_runs, [*whole, *resumed], str(root), timeout_s=800.0)[0]


@pytest.mark.ranks
def test_every_step_is_one_graph(compiled: Any) -> None:
    _, (results, breaks, num_graphs) = compiled
    assert [result.outcome.reason for result in results] == [ExitReason.COMPLETED] * 6, [r.outcome for r in results]
    assert breaks == {}
    assert num_graphs == len(STAGES), "one for each kind of model; none for evaluations"


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_compiled_training_resumes_exactly(compiled: Any, stage: int) -> None:
    store, (results, _, _) = compiled
    assert results[3 + stage].losses == results[stage].losses[3:]
    (_, whole), (_, again) = (read_state(store, saved_at(6, 2 * stage + n).prefix) for n in (1, 2))
    assert_same_bits(whole, again)
    assert results[stage].metrics["eval/top1"].keys() == {2, 4, 6}


@pytest.mark.ranks
def test_it_learns_what_the_uncompiled_model_learns(compiled: Any, tmp_path: Path) -> None:
    _, (results, _, _) = compiled
    run = Run(make_attempt(spec_of(0, compile=False), 1))
    eager = run_ranks(1, run_attempts, [run], str(tmp_path))[0][0]
    assert results[0].losses == pytest.approx(eager.losses, abs=1e-5)


def test_it_is_refused_at_stage_3() -> None:
    with pytest.raises(SpecError, match=r"train.compile applies to zero.stage 0 to 2, zero.stage is 3"):
        tiny_spec(train={"compile": True}, zero={"stage": 3})
