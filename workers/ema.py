"""The moving average of the weights (Polyak averaging): this rank's part of it, whatever the ZeRO stage.

After every update, average <- decay * average + (1 - decay) * weights, from the weights that training starts with. Each
rank averages the runs of fp32 weights it owns (workers/owned.py) and no more. A skipped step changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from workers.owned import HasDeepSpeed, owned, publish_weights


class WeightAverage:
    """Made when the engine holds the weights to start from; all ranks have one."""

    def __init__(self, engine: HasDeepSpeed, decay: float) -> None:
        self._engine = engine
        self._decay = decay
        self._runs = list(owned(engine))
        self._averages = [run.of(run.flat).clone() for run in self._runs]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        if self._runs:
            torch._foreach_lerp_(self._averages, [run.of(run.flat) for run in self._runs], 1.0 - self._decay)

    @property
    def slices(self) -> Mapping[str, Tensor]:
        """The averages by the name of their weight, each a run as long as the one `owned` yields: to save and fill."""
        return {run.name: average for run, average in zip(self._runs, self._averages, strict=True)}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts the model has the averaged weights; afterwards its own, bit for bit (collective)."""
        self._exchange()
        yield
        # Not after a failure: this rank's peers may wait for it elsewhere, and it is about to leave.
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for run, average in zip(self._runs, self._averages, strict=True):
            weights = run.of(run.flat)
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
        publish_weights(self._engine)
