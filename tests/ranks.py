"""Several ranks without Ray: processes on this machine with a gloo group, for tests marked `ranks`.

They are forked from a server that has imported torch and deepspeed once; a launch takes about a second.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.distributed import TCPStore

from workers.distributed import Ranks, init_ranks, leave_ranks

_PRELOADED = ["torch", "torch._dynamo", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "workers.attempt"]


@dataclass(frozen=True)
class Died:
    """What `run_ranks` returns for a rank whose process ended without a result."""

    exitcode: int | None


class RankFailed(Exception):
    """A rank raised; the text is its traceback."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, may_die: bool = False, timeout_s: float = 280.0
) -> list[Any]:
    """`function(ranks, *arguments)` on `world_size` ranks of one group: their results, by rank. Results are pickled,
    and hold no tensors (torch would send file descriptors of a process that is gone).

    The first rank that raises ends the others. With `may_die`, a process that ends without a result is a `Died`, and
    the others are ended too (they would wait for it).
    """
    context = _context()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(rank, world_size, store.port, sender, function, arguments), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        return _collect(processes, pipes, may_die, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _collect(processes: list[BaseProcess], pipes: list[Connection], may_die: bool, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(deadline - time.monotonic(), 0.0))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} gave no result in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                kind, value = pipe.recv()
            except EOFError:
                processes[rank].join()
                if not may_die:
                    raise RankFailed(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
                died = Died(processes[rank].exitcode)
                return [results.get(r, died if r == rank else Died(None)) for r in range(len(pipes))]
            if kind == "error":
                raise RankFailed(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    rank: int, world_size: int, port: int, sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage often; what the server preloaded is none
    try:
        store = TCPStore("127.0.0.1", port, is_master=False)
        ranks: Ranks = init_ranks(rank, world_size, store, "cpu", rank)
        result = function(ranks, *arguments)
        leave_ranks()
        sender.send(("result", result))
    except Exception:  # noqa: BLE001 - the parent raises it
        sender.send(("error", traceback.format_exc()))


@cache
def _context() -> ForkServerContext:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
