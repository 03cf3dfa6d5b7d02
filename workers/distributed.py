"""Which rank this process is, and the process groups it talks on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""The last resort: the driver's progress watchdog names a hung rank long before."""


@dataclass(frozen=True)
class Ranks:
    """This process among the workers of an attempt."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control_group: dist.ProcessGroup
    """A second gloo group: the control word travels on it and never waits for the device."""

    @property
    def is_first(self) -> bool:
        """Rank 0 reports what is true of all ranks, and commits checkpoints."""
        return self.rank == 0


def init_ranks(
    rank: int, world_size: int, rendezvous: Store | str, device: torch.device | str, local_rank: int = 0
) -> Ranks:
    """Join the process groups of an attempt: NCCL on GPUs, gloo on CPU, and gloo for control.

    Args:
        rendezvous: a store that all ranks share (rank 0 hosts a TCPStore), or an address such as tcp://host:port.
        device: what this rank computes on; on a GPU, its index among those this process sees.
        local_rank: its place among the ranks of its node.
    """
    device = torch.device(device)
    _set_environment(rank, world_size, local_rank, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    where = {"init_method": rendezvous} if isinstance(rendezvous, str) else {"store": rendezvous}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
        # Else NCCL guesses it from the rank, which is wrong where a process sees its own device only.
        device_id=device if device.type == "cuda" else None,
        **where,
    )
    control_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    assert isinstance(control_group, dist.ProcessGroup)
    return Ranks(rank, world_size, local_rank, device, control_group)


def leave_ranks() -> None:
    """Leave the process groups, after the last collective."""
    dist.destroy_process_group()


def _set_environment(rank: int, world_size: int, local_rank: int, device: torch.device) -> None:
    """What DeepSpeed reads from the environment, set before it is imported for the first time."""
    os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(world_size)
    os.environ["LOCAL_RANK"] = str(device.index or 0 if device.type == "cuda" else local_rank)
    # DeepSpeed looks for MPI unless these are set; the groups exist by then and neither is used.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cpu":
        # Without it DeepSpeed counts NUMA nodes as devices.
        os.environ["LOCAL_SIZE"] = str(world_size)
