"""By construction: the step reads nothing back from the device but one number, the norm that clipping needs.

A dispatch mode sees every operation that would make the host wait for a GPU: a tensor's value asked for, or a shape
that depends on values. It runs on the CPU, where these are free; on a GPU each would stop the queue of kernels.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.reasons import ExitReason
from tests.fakes.dir_store import DirStore
from tests.fakes.recording_reporter import RecordingReporter
from tests.ranks import run_ranks
from tests.workers.attempts import tiny_spec
from tests.workers.rank_jobs import train_directly
from workers.distributed import Ranks

pytestmark = pytest.mark.ranks
STEPS = 8
SYNCS = {
    torch.ops.aten._local_scalar_dense.default,  # item(), float(), bool(), tolist()
    torch.ops.aten.nonzero.default,  # indexing with a mask
    torch.ops.aten._unique2.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
ROOT = Path(__file__).parents[2]


class Syncs(TorchDispatchMode):
    """Counts them by the innermost function of ours or of DeepSpeed's that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SYNCS:
            self.sites[_site()] += 1
        return func(*args, **(kwargs or {}))


def _site() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("workers", "vit"):
            return f"{path.relative_to(ROOT).as_posix()}:{frame.name}"
        if path.parts[-3:-1] == ("torch", "optim"):
            return "torch.optim"  # its step counters lie on the host
        if "deepspeed" in path.parts:
            return f"deepspeed/{path.name}:{frame.name}"
    return "elsewhere"


def count(ranks: Ranks, root: str, stage: int, extra: dict[str, Any]) -> dict[str, int]:
    train = {"precision": "bf16", "log_every_steps": 1000, "global_batch_size": 8, "micro_batch_size": 2} | extra
    spec = tiny_spec(zero={"stage": stage}, train=train, schedule={"total_steps": STEPS}, eval={"at_end": False})
    with Syncs() as syncs:
        outcome, _ = train_directly(ranks, spec, 1, DirStore(Path(root)), RecordingReporter())
    assert outcome.reason is ExitReason.COMPLETED, outcome
    return dict(syncs.sites)


@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.9}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_step_waits_for_the_device_once(stage: int, extra: dict[str, Any], tmp_path: Path) -> None:
    # On one rank stage 0 is built, whatever was asked for.
    sites = run_ranks(1 if stage == 0 else 2, count, str(tmp_path), stage, extra)[0]
    ours = {site: number for site, number in sites.items() if site.startswith(("workers/", "vit/"))}
    del ours["vit/init.py:lecun_normal_"]  # while the model is built
    # The first and the last step are logged: their loss, and at stages 1 to 3 a norm that is still on the device.
    expected = {"workers/loop.py:_report_step": 2 if stage == 0 else 4}
    if stage == 0:
        # Where DeepSpeed checks no norm, we do, once a step, to clip and to skip what is not finite.
        expected["workers/engine.py:_step_replicated"] = STEPS
    assert ours == expected
    theirs = {site for site in sites if site.startswith("deepspeed/")}
    at_start = {"deepspeed/utils.py:assert_lst_len_same_as_other_ranks", "deepspeed/utils.py:<listcomp>"}
    assert theirs - at_start == (set() if stage == 0 else {"deepspeed/utils.py:is_invalid_grad_norm"})
    assert "elsewhere" not in sites
