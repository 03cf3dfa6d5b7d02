"""The training engine: what the loop asks for, and DeepSpeed behind it.

Non-finite gradients: no engine ever applies one. ZeRO stages 1 to 3 check the global gradient norm themselves and skip
the step; at stage 0 DeepSpeed would write NaN into every weight, so the same check is made here. Either way it is the
only time per step that the host waits for the device.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.cost import built_stage
from configs.spec import TrainingJob
from vit.optim import build_optimizer, freeze, set_learning_rate
from workers.deepspeed_config import deepspeed_config
from workers.distributed import Ranks
from workers.owned import create_moments, locate_parameters


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """While it lasts, importing `module` fails as where it is not installed; no change if it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    applied: bool
    """False: the gradient was not finite and nothing changed."""
    grad_norm: float | Tensor
    """Of the global batch's mean gradient, before clipping; infinite if not applied. As a tensor it lies on the device:
    to read it is to wait for the update."""


class Engine(Protocol):
    """All ranks call each method the same number of times in the same order."""

    def forward(self, images: Tensor, representation: bool = False, sources: Tensor | None = None) -> Tensor:
        """Logits (B, C) of normalised images (B, channels, H, W), or the (B, D) vector that the classifier reads, in
        the job's precision. `sources` corrupts patches (vit/masked.py): logits are then (B, n, C), of each patch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss, divided by the number of micro-batches per step."""
        ...

    def step(self, lr: float) -> Update:
        """Reduce over ranks, clip and update with this learning rate, once per global batch."""
        ...

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts: no gradients, no dropout."""
        ...


class DeepSpeedEngine:
    """DeepSpeed ZeRO 0 to 3. `deepspeed` is DeepSpeed's own engine, which only checkpoints look into."""

    def __init__(
        self, deepspeed: Any, zero_stage: int, clip_grad_norm: float | None, is_compiled: bool = False
    ) -> None:
        self.deepspeed = deepspeed
        self.zero_stage = zero_stage
        self._clip_grad_norm = clip_grad_norm
        self._is_compiled = is_compiled

    def forward(self, images: Tensor, representation: bool = False, sources: Tensor | None = None) -> Tensor:
        if sources is not None:
            return self.deepspeed(images, sources=sources)
        return self.deepspeed(images, representation=True) if representation else self.deepspeed(images)

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # counts the micro-batch and no more

    def step(self, lr: float) -> Update:
        assert self.deepspeed.is_gradient_accumulation_boundary(), "step() is called once per global batch"
        set_learning_rate(self.deepspeed.optimizer, lr)
        if self.zero_stage == 0:
            return self._step_replicated()
        self.deepspeed.step()
        applied = bool(self.deepspeed.was_step_applied())
        return Update(applied, self.deepspeed.get_global_grad_norm() if applied else float("inf"))

    def _step_replicated(self) -> Update:
        gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
        grad_norm = float(_global_norm(gradients))
        applied = grad_norm < float("inf")  # false for NaN too
        if not applied:
            # An optimizer passes over parameters without a gradient: no update, no decay, no step counted.
            self.deepspeed.zero_grad()
        elif self._clip_grad_norm is not None:
            # As stages 1 to 3 clip, to the last bit but one: bf16 makes visible differences of invisible ones.
            torch._foreach_mul_(gradients, 1.0 / max((grad_norm + 1e-6) / self._clip_grad_norm, 1.0))
        self.deepspeed.step()
        return Update(applied, grad_norm if applied else float("inf"))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.deepspeed.eval()
        # Compiled code is for training: an evaluation's other mode and batch size would be compiled for once more.
        stance: Any = torch.compiler.set_stance("force_eager") if self._is_compiled else contextlib.nullcontext()
        try:
            with stance, torch.no_grad():
                yield
        finally:
            self.deepspeed.train()


def _global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients as one vector, summed in fp64 as ZeRO does and rounded to fp32."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def build_engine(model: nn.Module, spec: TrainingJob, ranks: Ranks, micro_batch_size: int) -> DeepSpeedEngine:
    """Put the model and its optimizer under DeepSpeed. The model comes initialised, in fp32 and equal on all ranks."""
    deepspeed = _import_deepspeed()
    zero_stage = built_stage(spec.zero.stage, ranks.world_size)
    freeze(model, spec.optim.train)
    optimizer = build_optimizer(model, spec.optim, fused=is_fused(ranks))
    if spec.train.compile:
        model.compile()  # in place: names of parameters stay; the first step compiles
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(
            zero_stage=zero_stage,
            precision=spec.train.precision,
            clip_grad_norm=spec.optim.clip_grad_norm,
            global_batch_size=spec.train.global_batch_size,
            micro_batch_size=micro_batch_size,
            world_size=ranks.world_size,
        ),
    )
    built = DeepSpeedEngine(engine, zero_stage, spec.optim.clip_grad_norm, spec.train.compile)
    create_moments(built)
    locate_parameters(built)
    return built


def is_fused(ranks: Ranks) -> bool:
    """Whether the optimizer is one kernel: on GPUs, whose update is bounded by the bytes it moves."""
    return ranks.device.type == "cuda"


def _import_deepspeed() -> Any:
    # Imported here: the import takes seconds and reads the environment that init_ranks sets.
    # Its autotuner, of which nothing is used, imports mlflow where that is installed: seconds of every start.
    with hidden("mlflow"):
        import deepspeed
        import deepspeed.comm
        import deepspeed.ops

    # torch tells DeepSpeed to use newer names of its collectives; that is for DeepSpeed to hear, not for users.
    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)
    # The shared-memory op of gloo groups needs a compiler and leaves 140 MB behind in /dev/shm when killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
