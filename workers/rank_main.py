"""One rank's process: from the function Ray Train calls to the last word in the hub.

    redirect_output -> enter -> meet_peers -> init_ranks -> run_rank -> finish

A rank never raises to Ray: how it ended is a value (RankEnd). Only a process that dies is told by Ray.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import structlog

from configs.layout import rank_stream
from configs.reasons import ExitReason
from configs.service import Resources
from configs.states import Desired
from configs.wire import AttemptFile, Heartbeat, MetricColumns, MetricPoint, Phase, WorkerEvent, to_columns
from workers import logs
from workers.diagnosis import RankEnd
from workers.hub import Push, RankInfo
from workers.node import NodeSettings, load_node_settings, open_store

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

log = structlog.get_logger(__name__)
PUSH_INTERVAL_S = 1.0
_MAX_BUFFERED = 50_000
FLUSH_S = 5.0
"""How long a flush waits for a driver that is slow to answer."""
_RENDEZVOUS_S = 120.0
_MESSAGE_CHARS = 4_000
_HUB_LOST = 70
"""Exit status of a rank whose driver is gone."""
# By name: this module is imported before torch and boto3 may be.
_STORE_FAILURES = {"StorageError": ExitReason.STORAGE_ERROR, "StoreRefused": ExitReason.STORAGE_REFUSED}


class Hub(Protocol):
    """What a rank calls of workers.hub.ReportHub, wherever that lives."""

    def enter(self, info: RankInfo) -> Desired: ...

    def publish(self, address: str) -> None: ...

    def rendezvous(self) -> str | None: ...

    def push(self, push: Push) -> Desired: ...

    def finish(self, end: RankEnd) -> None: ...


class HubLost(Exception):
    """The hub's process is gone, and so is the driver."""


class RemoteHub:
    """The hub as an actor. Calls wait for their reply."""

    def __init__(self, actor: Any, timeout_s: float = 30.0) -> None:
        self._actor = actor
        self._timeout_s = timeout_s

    def enter(self, info: RankInfo) -> Desired:
        desired: Desired = self._get(self._actor.enter.remote(info))
        return desired

    def publish(self, address: str) -> None:
        self._get(self._actor.publish.remote(address))

    def rendezvous(self) -> str | None:
        address: str | None = self._get(self._actor.rendezvous.remote())
        return address

    def push(self, push: Push) -> Desired:
        desired: Desired = self._get(self._actor.push.remote(push))
        return desired

    def finish(self, end: RankEnd) -> None:
        self._get(self._actor.finish.remote(end))

    def _get(self, reference: Any) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            return ray.get(reference, timeout=self._timeout_s)
        except RayActorError as error:
            raise HubLost(str(error)) from error
        except GetTimeoutError as error:
            raise TimeoutError("the hub does not answer") from error


class RankReporter:
    """The Reporter of a rank: notes are taken under a lock, a thread pushes them every second. Training never waits."""

    def __init__(
        self, hub: Hub, info: RankInfo, on_hub_lost: Callable[[], None], interval_s: float = PUSH_INTERVAL_S
    ) -> None:
        self._hub = hub
        self._info = info
        self._on_hub_lost = on_hub_lost
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._phase: Phase = "starting"
        self._step = 0
        self._beats = 0
        self._metrics: deque[MetricPoint] = deque(maxlen=_MAX_BUFFERED)
        self._measured: deque[MetricPoint] = deque(maxlen=_MAX_BUFFERED)
        self._events: deque[WorkerEvent] = deque(maxlen=_MAX_BUFFERED)
        self._checkpoints: list[str] = []
        self._desired = Desired.RUN
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._num_taken = 0
        self._num_sent = 0
        self._sent = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def heartbeat(self, phase: Phase, step: int) -> None:
        with self._lock:
            self._phase, self._step = phase, step
            self._beats += 1

    def metric(self, name: str, step: int, value: float) -> None:
        number = float(value)
        point = MetricPoint(name=name, step=step, value=number if math.isfinite(number) else None, at=datetime.now(UTC))
        with self._lock:
            self._metrics.append(point)
            self._measured.append(point)

    def event(self, type_: str, message: str, data: dict[str, Any] | None = None) -> None:
        event = WorkerEvent(type=type_, message=message, at=datetime.now(UTC), data=data or {})
        with self._lock:
            self._events.append(event)

    def checkpoint(self, checkpoint_id: str) -> None:
        with self._lock:
            self._checkpoints.append(checkpoint_id)

    def desired(self) -> Desired:
        # Asked at every step and every batch of an evaluation: a sign of life, too.
        self._beats += 1
        return self._desired

    def flush(self) -> None:
        with self._sent:
            # What is noted by now goes with the next push at the latest; one under way may have been taken before.
            target = self._num_taken + 1
            self._wake.set()
            self._sent.wait_for(lambda: self._num_sent >= target or self._stop.is_set(), FLUSH_S)

    def take_measured(self) -> tuple[MetricColumns, ...]:
        with self._lock:
            points = list(self._measured)
            self._measured.clear()
        return to_columns(points)

    @property
    def step(self) -> int:
        return self._step

    def close(self) -> None:
        """Pushes what is left and ends the thread."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=self._interval_s + 30.0)

    def _run(self) -> None:
        unsent: Push | None = None
        while True:
            self._wake.wait(self._interval_s)
            self._wake.clear()
            is_last = self._stop.is_set()
            push = unsent or self._take()
            try:
                self._desired = self._hub.push(push)
                unsent = None
                with self._sent:
                    self._num_sent = self._num_taken
                    self._sent.notify_all()
            except HubLost:
                self._on_hub_lost()
                return
            except Exception:  # noqa: BLE001 - reporting must live on; the push is tried again
                log.warning("A push failed and is repeated.", error=traceback.format_exc(limit=3))
                unsent = push
            if is_last:
                if unsent is None and self._has_more():
                    continue
                return

    def _has_more(self) -> bool:
        with self._lock:
            return bool(self._metrics or self._events or self._checkpoints)

    def _take(self) -> Push:
        with self._lock:
            heartbeat = Heartbeat(
                rank=self._info.rank,
                node=self._info.node,
                pid=self._info.pid,
                phase=self._phase,
                step=self._step,
                at=datetime.now(UTC),
                beats=self._beats,
            )
            push = Push(heartbeat, tuple(self._metrics), tuple(self._events), tuple(self._checkpoints))
            self._num_taken += 1
            self._metrics.clear()
            self._events.clear()
            self._checkpoints = []
        return push


def rank_main(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker: `rank_process_main` as the rank that Train says."""
    from ray.train import get_context

    context = get_context()
    rank_process_main(config, context.get_world_rank(), context.get_local_rank())


def rank_process_main(config: dict[str, Any], rank: int, local_rank: int) -> None:
    """What the process of rank `rank` does, the `local_rank`-th of its node. `config`: the attempt file as JSON, the
    hub's handle, the rank's function."""
    import ray

    attempt = AttemptFile.model_validate_json(config["attempt"])
    settings = load_node_settings()
    node_id = ray.get_runtime_context().get_node_id()
    node_dir = logs.node_log_dir(settings.log_dir, attempt.attempt_id, node_id)
    logs.redirect_output(logs.log_path(node_dir, rank_stream(rank)))
    logs.configure(sys.stderr)
    info = RankInfo(rank, node_id, socket.gethostname(), os.getpid())
    hub = RemoteHub(config["hub"])
    hub.enter(info)
    reporter = RankReporter(hub, info, on_hub_lost=_leave_orphaned)
    log.info("Rank started.", rank=rank, world_size=attempt.world_size, node=info.node, pid=info.pid)
    end = run(attempt, info, local_rank, hub, reporter, settings, config.get("run_rank"))
    log.info("Rank ended.", rank=rank, reason=str(end.reason), message=end.message, step=end.step)
    reporter.close()
    hub.finish(end)


def run(
    attempt: AttemptFile,
    info: RankInfo,
    local_rank: int,
    hub: Hub,
    reporter: RankReporter,
    settings: NodeSettings,
    run_rank: Callable[..., Any] | None = None,
) -> RankEnd:
    """Joins the peers and runs the attempt's work. Returns how it ended; whatever was raised is in it.

    `run_rank` is workers.attempt.run_rank unless a test brings its own.
    """
    try:
        resources = Resources.model_validate(attempt.spec["resources"])
        limit_threads(resources.cpus_per_worker)
        from workers.distributed import init_ranks

        work = run_rank or _load_run_rank()
        store = meet_peers(hub, info.rank, attempt.world_size)
        device = "cuda:0" if resources.gpus_per_worker else "cpu"
        ranks = init_ranks(info.rank, attempt.world_size, store, device, local_rank=local_rank)
        outcome = work(attempt, ranks, reporter, open_store(settings), settings.data_root)
    except Exception as error:  # the top of a rank: how it ended must reach the driver
        log.error("The rank failed.", exc_info=True)
        return RankEnd(
            info.rank,
            _STORE_FAILURES.get(type(error).__name__, ExitReason.PLATFORM_ERROR),
            node=info.node,
            message=str(error)[:_MESSAGE_CHARS],
            step=reporter.step,
            error_type=type(error).__name__,
        )
    return RankEnd(
        info.rank,
        outcome.reason,
        node=info.node,
        message=(outcome.message or "")[:_MESSAGE_CHARS],
        step=outcome.step,
        checkpoint_step=outcome.checkpoint_step,
        error_type=outcome.error_type or "",
        sound_step=outcome.sound_step,
    )


def _load_run_rank() -> Callable[..., Any]:
    from workers.attempt import run_rank

    return run_rank


def limit_threads(num_threads: int) -> None:
    """As many threads as the rank was given cores: sums on CPU also depend on it."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    import torch

    torch.set_num_threads(num_threads)


def meet_peers(hub: Hub, rank: int, world_size: int) -> Store:
    """The key-value store all ranks share. Rank 0 hosts it on its node's address, on a free port, and tells the hub.

    Raises:
        TimeoutError: rank 0 did not publish an address in time.
    """
    from ray.util import get_node_ip_address
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address = get_node_ip_address()
    use_interface_of(address)
    if rank == 0:
        listener = socket.create_server((address, 0), backlog=2 * world_size)
        port = listener.getsockname()[1]
        # The store takes the descriptor over; without one it would listen on every interface.
        store = TCPStore(
            address, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        hub.publish(f"{address}:{port}")
        return store
    host, _, port_text = _wait_for_address(hub).rpartition(":")
    return TCPStore(host, int(port_text), world_size, is_master=False)


def use_interface_of(address: str) -> None:
    """Makes gloo and NCCL talk on the network interface that has this address, unless the operator chose one."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            if name != "lo":
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _wait_for_address(hub: Hub) -> str:
    deadline = time.monotonic() + _RENDEZVOUS_S
    while (address := hub.rendezvous()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rendezvous: rank 0 did not start within {_RENDEZVOUS_S:.0f} s")
        time.sleep(0.05)
    return address


def _leave_orphaned() -> None:
    """The driver is gone: nobody would hear of further work, and another attempt may follow."""
    log.error("The driver is gone; this rank ends.")
    os._exit(_HUB_LOST)
