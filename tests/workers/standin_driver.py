"""The driver with a stand-in for training: real processes, real peers, no model. Run as a Ray job's entrypoint.

What the ranks do is told by the attempt's spec under "standin".
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.ids import checkpoint_id
from configs.reasons import ExitReason
from configs.states import Desired


@dataclass
class StandinOutcome:
    reason: ExitReason
    message: str = ""
    step: int = 0
    checkpoint_step: int | None = None
    error_type: str = ""
    sound_step: int | None = None


def run_rank(attempt: Any, ranks: Any, reporter: Any, store: Any, data_root: Path | None) -> StandinOutcome:
    """Steps of `step_s` seconds with one all-reduce each, as training would."""
    import torch
    import torch.distributed as dist

    plan = attempt.spec["standin"]
    print(f"\x1b[31mtorch threads {torch.get_num_threads()}\x1b[0m of rank {ranks.rank}", flush=True)
    reporter.event("standin.started", f"rank {ranks.rank} started", {"at": time.time()})
    leave = {
        Desired.STOP: ExitReason.USER_CANCELLED,
        Desired.PAUSE: ExitReason.PAUSED,
        Desired.YIELD: ExitReason.PREEMPTED,
    }
    orders = list(leave)
    step = 0
    while step < plan["steps"]:
        # The first element counts the ranks; the second is a little control word.
        word = torch.tensor([1, 0])
        desired = reporter.desired()
        if desired in leave:
            word[1] = orders.index(desired) + 1
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        step += 1
        reporter.heartbeat("training", step)
        if ranks.rank == 0:
            reporter.metric("train/loss", step, 1.0 / step)
        if word[1]:
            if ranks.rank == 0:
                reporter.checkpoint(checkpoint_id(attempt.job_id, step, attempt.number))
            return StandinOutcome(leave[orders[int(word[1]) - 1]], "left when told to", step, step)
        if plan.get("fail_at") == step and ranks.rank == plan.get("fail_rank", 0):
            return StandinOutcome(ExitReason.DATA_ERROR, "image 7 of train is missing", step, None, "DataError")
        if plan.get("hang_at") == step and ranks.rank == plan.get("hang_rank", 0):
            time.sleep(3600)
        time.sleep(plan.get("step_s", 0.0))
    return StandinOutcome(ExitReason.COMPLETED, "", step, step)


if __name__ == "__main__":
    from workers.driver import main

    status = main(run_rank)
    sys.stdout.flush()
    os._exit(status)
