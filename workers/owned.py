"""Which part of the training state this rank owns: the one place that knows how DeepSpeed lays it out.

    stage 0     everything is replicated; rank r owns the r-th part of each tensor
    stages 1-2  each parameter group is one flat fp32 tensor cut into world_size partitions; a parameter's fragment of
                this rank's partition is at `p._hp_mapping`
    stage 3     each parameter is cut into world_size partitions of `partition_numel()`, the last one padded; this
                rank's lies at `grad_position` of `fp32_partitioned_groups_flat`

A frozen parameter belongs to no flat tensor: at stages 0 to 2 it is replicated and cut as at stage 0, at stage 3 it is
cut like the others and lies in its own `ds_tensor`. It has no moments.

Optimizer moments have the layout of the flat fp32 tensors they belong to. Written against DeepSpeed 0.19.8, which is
pinned exactly; tests/workers/test_checkpoint.py moves a state between stages and world sizes and compares bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from vit.lamb import Lamb, Piece


class HasDeepSpeed(Protocol):
    """An engine whose insides may be looked at."""

    @property
    def deepspeed(self) -> Any: ...

    @property
    def zero_stage(self) -> int: ...


@dataclass(frozen=True)
class Owned:
    """Elements [start, start + numel) of the flattened parameter `name` live at flat[offset : offset + numel]."""

    name: str
    start: int
    numel: int
    flat: Tensor
    """fp32; also the key of its moments in the optimizer's state."""
    offset: int
    is_frozen: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """This run of `flat`, or of a moment, which has flat's layout: a 1-D view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def owned(engine: HasDeepSpeed) -> Iterator[Owned]:
    """Every run of weights that this rank owns; the ranks together own each element once. Saving and loading both
    follow it."""
    deepspeed = engine.deepspeed
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name, p in deepspeed.module.named_parameters():
        if engine.zero_stage == 3:
            start = min(rank * p.partition_numel(), p.ds_numel)
            end = min(start + p.partition_numel(), p.ds_numel)
            if p.requires_grad:
                group, offset, _ = p._z3_optimizer.grad_position[p._z3_optimizer.get_param_id(p)]
                run = Owned(name, start, end - start, p._z3_optimizer.fp32_partitioned_groups_flat[group], offset)
            else:
                run = Owned(name, start, end - start, p.ds_tensor, 0, is_frozen=True)
        elif engine.zero_stage == 0 or not p.requires_grad:
            start, end = p.numel() * rank // world_size, p.numel() * (rank + 1) // world_size
            run = Owned(name, start, end - start, p, start, is_frozen=not p.requires_grad)
        else:
            fragment = p._hp_mapping
            if fragment is None:
                continue
            flat = deepspeed.optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
            here, there = fragment.lp_fragment_address, fragment.hp_fragment_address
            run = Owned(name, here.start, here.numel, flat, there.start)
        if run.numel:
            yield run


def shapes(engine: HasDeepSpeed) -> dict[str, tuple[int, ...]]:
    """The full shape of each weight, partitioned or not."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.deepspeed.module.named_parameters()}


def moment_names(engine: HasDeepSpeed) -> tuple[str, ...]:
    """What the optimizer keeps for each weight."""
    optimizer = _torch_optimizer(engine)
    if isinstance(optimizer, AdamW | Lamb):
        return ("exp_avg", "exp_avg_sq")
    assert isinstance(optimizer, SGD), type(optimizer)
    return ("momentum_buffer",) if any(group["momentum"] for group in optimizer.param_groups) else ()


def moment(engine: HasDeepSpeed, flat: Tensor, name: str) -> Tensor:
    """A moment of a flat tensor, of its shape."""
    return _torch_optimizer(engine).state[flat][name]


def create_moments(engine: HasDeepSpeed) -> None:
    """Create the optimizer's moments as zeros, as its first step would: then a state of any age can be saved, and a
    loaded one has somewhere to go. (A zero momentum buffer gives SGD's first step: momentum * 0 + gradient.)"""
    optimizer = _torch_optimizer(engine)
    for flat in _flats(engine):
        state: dict[str, Tensor] = {name: torch.zeros_like(flat, requires_grad=False) for name in moment_names(engine)}
        if isinstance(optimizer, AdamW | Lamb):
            # Where torch's own first step would put it: a fused kernel reads it itself.
            device = flat.device if optimizer.defaults.get("fused") else None
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device=device)
        optimizer.state[flat] = state


def locate_parameters(engine: HasDeepSpeed) -> None:
    """Tell an optimizer that needs to know (LAMB) which parameters its flat tensors are made of."""
    optimizer = _torch_optimizer(engine)
    if not isinstance(optimizer, Lamb) or engine.zero_stage == 0:
        return
    numbers = {name: number for number, name in enumerate(shapes(engine))}
    pieces: dict[Tensor, list[Piece]] = {flat: [] for flat in _flats(engine)}
    for run in owned(engine):
        if not run.is_frozen:
            pieces[run.flat].append(Piece(numbers[run.name], run.offset, run.numel))
    optimizer.locate(pieces, len(numbers), dist.all_reduce)


def begin_load(engine: HasDeepSpeed) -> None:
    """Call before filling what `owned` yields."""
    # Of what is replicated each rank fills its part only; finish_load adds the parts up, bit by bit.
    for p in _replicated(engine):
        p.detach().zero_()
    if engine.zero_stage == 0:
        for flat in _flats(engine):
            for name in moment_names(engine):
                moment(engine, flat, name).zero_()


def finish_load(engine: HasDeepSpeed, optimizer_step: int) -> None:
    """Call after filling what `owned` yields: brings the model's weights in line, on all ranks (collective).

    `optimizer_step` is the number of updates that the moments have seen.
    """
    optimizer = _torch_optimizer(engine)
    for flat in _flats(engine):
        if "step" in optimizer.state[flat]:
            optimizer.state[flat]["step"].fill_(float(optimizer_step))
    if engine.zero_stage == 0:
        for flat in _flats(engine):
            for name in moment_names(engine):
                _add_bits(moment(engine, flat, name))
    for p in _replicated(engine):
        _add_bits(p.detach())
    _publish_partitions(engine)


@torch.no_grad()
def publish_weights(engine: HasDeepSpeed) -> None:
    """Bring the model's weights, on all ranks, in line with what each rank has written to what it owns (collective)."""
    runs = {run.name: run for run in owned(engine)} if _replicated(engine) else {}
    for name, p in engine.deepspeed.module.named_parameters():
        if not _is_replicated(engine, p):
            continue
        flat, run = p.detach().view(-1), runs.get(name)
        start, end = (0, 0) if run is None else (run.start, run.start + run.numel)
        flat[:start].zero_()
        flat[end:].zero_()
        _add_bits(flat)
    _publish_partitions(engine)


def _publish_partitions(engine: HasDeepSpeed) -> None:
    """From the flat fp32 tensors to the model's weights, at stages 1 to 3."""
    zero = engine.deepspeed.optimizer
    if engine.zero_stage == 3:
        # A forward pass leaves gathered weights behind for the next one, which would not see the new ones.
        zero._partition_all_parameters()
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
            zero._unflatten_partitioned_parameters(index)
    elif engine.zero_stage > 0:
        zero.update_lp_params()


def _add_bits(tensor: Tensor) -> None:
    """Add up what the ranks hold, where all but one hold zero bits: an integer sum keeps every bit, also of -0.0 and
    NaN."""
    dist.all_reduce(tensor.view(-1).view(torch.int32))


def _replicated(engine: HasDeepSpeed) -> list[Tensor]:
    """The parameters that every rank holds whole and that no partition stands behind."""
    return [p for p in engine.deepspeed.module.parameters() if _is_replicated(engine, p)]


def _is_replicated(engine: HasDeepSpeed, p: Tensor) -> bool:
    return engine.zero_stage == 0 or (engine.zero_stage < 3 and not p.requires_grad)


def _torch_optimizer(engine: HasDeepSpeed) -> Optimizer:
    optimizer = engine.deepspeed.optimizer
    return optimizer if engine.zero_stage == 0 else optimizer.optimizer


def _flats(engine: HasDeepSpeed) -> list[Tensor]:
    """The tensors that the optimizer updates on this rank."""
    deepspeed = engine.deepspeed
    if engine.zero_stage == 0:
        return [p for p in deepspeed.module.parameters() if p.requires_grad]
    if engine.zero_stage == 3:
        return list(deepspeed.optimizer.fp32_partitioned_groups_flat)
    return list(deepspeed.optimizer.single_partition_of_fp32_groups)
