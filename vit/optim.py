"""Optimizers: which parameters are trained, which decay, and how fast each layer learns."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from configs.train import Optim, TrainedPart
from vit.lamb import Lamb

HEAD_PREFIXES = ("pre_logits.", "head.")
_BLOCK = re.compile(r"^blocks\.([0-9]+)\.")


def freeze(model: nn.Module, part: TrainedPart) -> None:
    """Leave only `part` trainable: `all`; `head` (linear probe: the head, `pre_logits` included); `attention` (the
    attention layers, positions and the head: facebookresearch/deit `--attn-only`). Fixed positions stay fixed."""
    for name, p in model.named_parameters():
        is_trained = (
            part == "all"
            or name.startswith(HEAD_PREFIXES)
            or (part == "attention" and (".attn." in name or "pos_embed" in name))
        )
        p.requires_grad_(p.requires_grad and is_trained)


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter, for layer-wise decay of the learning rate: 0 the embeddings (patches, class token,
    registers, positions), i + 1 block i, and one more for what follows the blocks (facebookresearch/mae
    `lr_decay.py`)."""
    names = [name for name, _ in model.named_parameters()]
    blocks = {name: int(match[1]) + 1 for name in names if (match := _BLOCK.match(name))}
    last = max(blocks.values(), default=0) + 1
    embeddings = ("patch_embed.", "cls_token", "reg_token", "mask_token", "pos_embed")
    return {name: blocks.get(name, 0 if name.startswith(embeddings) else last) for name in names}


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Two groups: the kernels of dense and convolution layers, which decay, and everything else (biases, norms, class
    token, positions), which does not. Parameters keep the model's order. google-research/big_vision masks decay the
    same way, by `.*/kernel$`.

    With `layer_decay` d there are two groups per layer, and each says in `lr_scale` by what its learning rate is
    multiplied: d to the power of the number of layers above it.
    """
    kernels = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    numbers = dict.fromkeys(dict(trained), 0) if layer_decay is None else layer_numbers(model)
    top = max(numbers.values(), default=0)
    groups = []
    for number in range(top + 1):
        here = [p for name, p in trained if numbers[name] == number]
        scale = {} if layer_decay is None else {"lr_scale": layer_decay ** (top - number)}
        groups += [
            {"params": [p for p in here if id(p) in kernels], "weight_decay": weight_decay} | scale,
            {"params": [p for p in here if id(p) not in kernels], "weight_decay": 0.0} | scale,
        ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Give each group its learning rate: `lr` times its `lr_scale`, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def build_optimizer(model: nn.Module, optim: Optim, fused: bool = False) -> Optimizer:
    """AdamW with decoupled decay, `p <- p - lr * weight_decay * p` on kernels; LAMB; or SGD with momentum, whose decay
    is added to the gradient as torch does. The loop sets the learning rate from `vit.schedule` before every update.
    Frozen parameters (`freeze`) are left out. `fused`: AdamW and SGD by one kernel that reads and writes each number
    once, rather than by one for every operation; its rounding differs."""
    groups = param_groups(model, optim.weight_decay, optim.layer_decay)
    if optim.name == "adamw":
        return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
    if optim.name == "lamb":
        return Lamb(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    return SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused)
