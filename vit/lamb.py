"""LAMB (You et al., arXiv 1904.00962), also where a parameter's elements are spread over several flat tensors.

The trust ratio needs each parameter's norm, but under ZeRO an optimizer sees one flat tensor per group, which holds a
piece of many parameters. `locate` tells it where they lie and how to add up norms over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + numel) of a flat tensor belong to parameter number `parameter`."""

    parameter: int
    offset: int
    numel: int


class Lamb(Optimizer):
    """As apex's FusedLAMB (adam_w_mode, grad_averaging, bias_correction, use_nvlamb off) after the global norm was
    clipped, which the engine does:

        u = m_hat / (sqrt(v_hat) + eps) + weight_decay * p
        p <- p - lr * (|p| / |u|) * u         in groups with weight decay, where both norms are positive
        p <- p - lr * u                       elsewhere: biases, norms, class token, positions
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._pieces: Mapping[Tensor, Sequence[Piece]] = {}
        self._num_parameters = 0
        self._add_up: Callable[[Tensor], object] | None = None

    def locate(
        self, pieces: Mapping[Tensor, Sequence[Piece]], num_parameters: int, add_up: Callable[[Tensor], object]
    ) -> None:
        """Take each tensor of `pieces` as a flat one. `add_up` sums a tensor in place over all ranks that hold pieces
        of the same parameters, which must step the same groups in the same order."""
        self._pieces, self._num_parameters, self._add_up = pieces, num_parameters, add_up

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "the engine computes gradients before the step"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1.0
        count = float(state["step"])  # on the CPU: nothing waits for the device
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.lerp_(p.grad, 1.0 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(p.grad, p.grad, value=1.0 - beta2)
        denominator = exp_avg_sq.sqrt().div_((1.0 - beta2**count) ** 0.5).add_(group["eps"])
        update = (exp_avg / (1.0 - beta1**count)).div_(denominator)
        if group["weight_decay"] != 0.0:
            update.add_(p, alpha=group["weight_decay"])
            self._scale(update, p)
        p.add_(update, alpha=-group["lr"])

    def _scale(self, update: Tensor, p: Tensor) -> None:
        """Multiply each parameter's part of `update` by its trust ratio."""
        if self._add_up is None:
            norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in (p, update)])
            update.mul_(_trust_ratio(norms).to(update.dtype))
            return
        pieces, flat, flat_update = self._pieces[p], p.view(-1), update.view(-1)
        squares = torch.zeros(2, self._num_parameters, dtype=torch.float64, device=p.device)
        for piece in pieces:
            here = slice(piece.offset, piece.offset + piece.numel)
            for row, tensor in enumerate((flat, flat_update)):
                squares[row, piece.parameter] = torch.linalg.vector_norm(tensor[here], dtype=torch.float64).square()
        self._add_up(squares)
        ratios = _trust_ratio(squares.sqrt()).to(update.dtype)
        for piece in pieces:
            flat_update[piece.offset : piece.offset + piece.numel].mul_(ratios[piece.parameter])


def _trust_ratio(norms: Tensor) -> Tensor:
    """|p| / |u| of norms (2, ...), and 1 where either is 0."""
    weights, updates = norms
    both = (weights > 0) & (updates > 0)
    return torch.where(both, weights / updates.where(both, 1.0), 1.0)
