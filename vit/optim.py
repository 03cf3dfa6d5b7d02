"""Optimizers, and which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from configs.train import Optim


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: the kernels of dense and convolution layers, which decay, and everything else (biases, norms, class
    token, positions), which does not. Parameters keep the model's order. google-research/big_vision masks decay the
    same way, by `.*/kernel$`."""
    kernels = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in kernels], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in kernels], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, optim: Optim) -> Optimizer:
    """AdamW with decoupled decay, `p <- p - lr * weight_decay * p` on kernels, or SGD with momentum, whose decay is
    added to the gradient as torch does. The loop sets each group's `lr` from `vit.schedule` before every update."""
    groups = param_groups(model, optim.weight_decay)
    if optim.name == "adamw":
        return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    return SGD(groups, lr=optim.lr, momentum=optim.momentum)
