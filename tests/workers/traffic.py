"""What a rank sends: every collective of torch.distributed while the mode is on, in bytes.

Counted is what bandwidth-optimal algorithms send, which are NCCL's: rings for all-reduce, all-gather and
reduce-scatter, chains for reduce and broadcast, per rank of n on the mean

    all-reduce       2 (n - 1) / n of the tensor
    reduce-scatter     (n - 1) / n of the whole input
    all-gather         (n - 1) / n of the whole output
    reduce, broadcast  (n - 1) / n of the tensor

gloo's algorithms for the same calls may send more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fakes.dir_store import DirStore
from tests.fakes.recording_reporter import RecordingReporter
from tests.workers.attempts import tiny_spec
from tests.workers.rank_jobs import train_directly
from workers.distributed import Ranks
from workers.engine import DeepSpeedEngine, Engine, Update

C10D = torch.ops.c10d
# The argument whose bytes count, and how often each travels, in units of (n - 1) / n.
COUNTED: dict[Any, tuple[int, int]] = {
    C10D.allreduce_.default: (0, 2),
    C10D.allreduce_coalesced_.default: (0, 2),
    C10D.reduce_.default: (0, 1),
    C10D.broadcast_.default: (0, 1),
    C10D._reduce_scatter_base_.default: (1, 1),
    C10D.reduce_scatter_.default: (1, 1),
    C10D.reduce_scatter_tensor_coalesced_.default: (1, 1),
    C10D._allgather_base_.default: (0, 1),
    C10D.allgather_.default: (0, 1),
    C10D.allgather_into_tensor_coalesced_.default: (0, 1),
    C10D.barrier.default: (0, 0),
}


class Traffic(TorchDispatchMode):
    """Counts, by the collective's name, while it is on.

    Raises:
        NotImplementedError: a collective is called whose traffic it does not know.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self._sent: Counter[str] = Counter()
        """Times n, to stay with whole numbers."""
        self._world_size = world_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            if func not in COUNTED:
                raise NotImplementedError(f"the traffic of {func}")
            argument, times = COUNTED[func]
            self._sent[func.overloadpacket.__name__.strip("_")] += (
                times * (self._world_size - 1) * _bytes(args[argument])
            )
        return func(*args, **(kwargs or {}))

    def by_collective(self) -> dict[str, float]:
        """Bytes sent so far by a rank, on the mean over ranks."""
        return {name: sent / self._world_size for name, sent in self._sent.items()}


def _bytes(value: Tensor | list[Any]) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value))


STEP_TRAFFIC: dict[int, Callable[[int], int]] = {
    0: lambda _: 2,  # one all-reduce of gradients
    1: lambda _: 1 + 1,  # gradients to their owners, weights back
    2: lambda micro_batches: micro_batches + 1,  # the same, but gradients of each micro-batch
    3: lambda micro_batches: 2 * micro_batches,  # weights and gradients of each micro-batch
}
"""What a step with so many micro-batches sends per rank, in units of all weights times (n - 1) / n.

Stage 3 gathers a weight a second time for the backward pass, 3 in all, if more weights are used in between than
DeepSpeed's stage3_max_reuse_distance (1e9); in models of up to half as many, as here, none is."""


@dataclass(frozen=True)
class StepTraffic:
    """What a rank sends in one step, and what it should."""

    num_weights: int
    sent: dict[str, float]
    """Bytes by collective, from the end of one update to the end of the next."""

    @property
    def weights_sent(self) -> float:
        """In units of the model's weights, all 4 bytes each."""
        return sum(self.sent.values()) / (4 * self.num_weights)


class _Watched:
    """An engine that notes what had been sent after each update."""

    def __init__(self, engine: Engine, traffic: Traffic) -> None:
        self._engine = engine
        self._traffic = traffic
        self.forward, self.backward, self.evaluating = engine.forward, engine.backward, engine.evaluating
        self.notes: list[dict[str, float]] = []

    def step(self, lr: float) -> Update:
        update = self._engine.step(lr)
        self.notes.append(self._traffic.by_collective())
        return update


def step_traffic(ranks: Ranks, stage: int, micro_batch_size: int, folder: str) -> StepTraffic:
    """The traffic of the last of some steps in our loop, with all it exchanges besides weights and gradients."""
    spec = tiny_spec(
        model={"embed_dim": 128, "depth": 6, "num_heads": 2, "mlp_dim": 512},
        schedule={"total_steps": 5, "warmup_steps": 1},
        train={"global_batch_size": 12, "micro_batch_size": micro_batch_size},
        zero={"stage": stage},
    )
    traffic = Traffic(ranks.world_size)
    watched: list[_Watched] = []

    def wrap(engine: DeepSpeedEngine) -> Engine:
        watched.append(_Watched(engine, traffic))
        return watched[0]

    with traffic:
        _, engine = train_directly(ranks, spec, 1, DirStore(folder), RecordingReporter(), wrap)
    before, after = watched[0].notes[-2:]
    sent = {name: after[name] - before.get(name, 0.0) for name in after if after[name] > before.get(name, 0.0)}
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in engine.deepspeed.module.parameters())
    return StepTraffic(weights, sent)
