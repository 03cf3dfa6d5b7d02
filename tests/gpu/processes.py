"""Ranks of a check in processes of their own, one for each device."""

from __future__ import annotations

import multiprocessing
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from tests.ranks import run_ranks
from workers.distributed import Ranks, init_ranks, leave_ranks


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(f"[gpu-check] {text}", file=sys.stderr, flush=True)


def on_ranks(world_size: int, device: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(ranks, *arguments)` in new processes, one for each device; results by rank.

    Raises:
        RuntimeError, RankFailed: a rank failed; the text is its traceback.
    """
    if device == "cpu":
        return run_ranks(world_size, function, *arguments)
    return spawn_ranks(world_size, device, function, *arguments)


def spawn_ranks(world_size: int, device: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """As `on_ranks`, in processes that share nothing with this one: CUDA does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(results, rank, world_size, device, port, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world_size:
            if results.empty():
                if any(process.exitcode for process in processes):
                    raise RuntimeError(f"a rank died with exit code {[p.exitcode for p in processes]}")
                time.sleep(0.05)
                continue
            rank, result, error = results.get()
            if error:
                raise RuntimeError(f"rank {rank}:\n{error}")
            found[rank] = result
    finally:
        for process in processes:
            if len(found) < world_size:
                process.kill()
            process.join()
    return [found[rank] for rank in range(world_size)]


def _rank(
    results: Any, rank: int, world_size: int, device: str, port: int, function: Callable[..., Any], arguments: Any
) -> None:
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        where = f"cuda:{rank}" if device == "cuda" else "cpu"
        ranks = init_ranks(rank, world_size, f"tcp://127.0.0.1:{port}", where, rank)
        result = function(ranks, *arguments)
        leave_ranks()
        results.put((rank, result, ""))
    except Exception:  # noqa: BLE001 - the parent raises it
        results.put((rank, None, traceback.format_exc()))


def synchronise(ranks: Ranks) -> None:
    """Wait until the device has done what it was given."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
