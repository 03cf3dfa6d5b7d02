"""What starts, what waits and why: pure functions of a view of queue and cluster. No clock, no database, no network.

Order is strict: priority, then age. A gang starts whole or not at all. The first job that the cluster has no room for
holds back everything behind it, so that a large job is never starved by a stream of small ones; jobs that cannot run
anyway (dependency, back-off, too large for this cluster) hold back nobody.

Ray places; this only makes sure that what it starts can be placed now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from configs.reasons import QueueReason
from orchestrator.control.launcher import NodeInfo


@dataclass(frozen=True)
class Worker:
    """What one worker of a job holds."""

    cpus: int
    gpus: int = 0
    accelerator: str | None = None

    def __str__(self) -> str:
        cpus = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        return f"{self.gpus} {self.accelerator or 'GPU'} and {cpus}" if self.gpus else cpus


@dataclass(frozen=True)
class WaitingJob:
    """A queued job. `world_sizes`: the worker counts it may start with."""

    job_id: str
    priority: int
    created_at: datetime
    world_sizes: tuple[int, ...]
    worker: Worker
    depends_on: tuple[tuple[str, str], ...] = ()
    """(job id, state) of each job that must succeed first and has not."""
    not_before: datetime | None = None


@dataclass(frozen=True)
class Reservation:
    """Workers that a job holds, or was promised. `nodes`: one name for each worker whose place is known."""

    job_id: str
    world_size: int
    worker: Worker
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunningSearch:
    """A search that runs, whose trials may be more or fewer. `places`: trials side by side now; `most`: that its spec
    or a user allows."""

    job_id: str
    attempt: int
    worker: Worker
    per_trial: int
    began_with: int
    places: int
    most: int


@dataclass(frozen=True)
class ClusterView:
    """Everything `schedule` looks at. `nodes` is None while the cluster does not answer."""

    nodes: tuple[NodeInfo, ...] | None
    waiting: tuple[WaitingJob, ...]
    reserved: tuple[Reservation, ...]
    now: datetime


@dataclass(frozen=True)
class Start:
    """Let the job go with so many workers."""

    job_id: str
    world_size: int


@dataclass(frozen=True)
class Wait:
    """The job's place in the line (from 1) and why it is not started."""

    job_id: str
    reason: QueueReason
    message: str
    position: int


Decision = Start | Wait


def schedule(view: ClusterView) -> list[Decision]:
    """One decision for each waiting job, in the order of the line.

    All `Start` decisions together are placeable on what is free now.
    """
    free = _Free.of(view.nodes or ())
    for reservation in view.reserved:
        free.take_reserved(reservation)
    decisions: list[Decision] = []
    position = 1
    head: WaitingJob | None = None
    for job in in_order(view.waiting):
        decision = _held_back(job, view, position) or _behind(job, head, position) or _try(job, free, position)
        if isinstance(decision, Wait):
            position += 1
            if decision.reason is QueueReason.WAITING_FOR_WORKERS:
                head = job
        decisions.append(decision)
    return decisions


def share_places(view: ClusterView, decisions: Sequence[Decision], searches: Iterable[RunningSearch]) -> dict[str, int]:
    """How many trials each search may run side by side now. What is free goes to searches, the oldest first, as long as
    nobody waits for workers; then each falls back to what it began with, as its trials end."""
    if view.nodes is None:
        return {}
    free = _Free.of(view.nodes)
    num_missing = sum(free.take_reserved(reservation) for reservation in view.reserved)
    workers = {job.job_id: job.worker for job in view.waiting}
    for decision in decisions:
        if isinstance(decision, Start):
            free.take(workers[decision.job_id], decision.world_size)
    # By a job in the queue, or by one that is to recover and has lost its place.
    is_wanted = num_missing > 0 or any(
        isinstance(d, Wait) and d.reason is QueueReason.WAITING_FOR_WORKERS for d in decisions
    )
    shares = {}
    for search in sorted(searches, key=lambda search: search.job_id):
        most = min(search.most, search.began_with) if is_wanted else search.most
        share = min(most, search.places + free.num_slots(search.worker) // search.per_trial)
        free.take(search.worker, max(0, share - search.places) * search.per_trial)
        shares[search.job_id] = share
    return shares


def in_order(waiting: Iterable[WaitingJob]) -> list[WaitingJob]:
    """The line: higher priority first, then older, then by id so that two equal jobs never swap."""
    return sorted(waiting, key=lambda job: (-job.priority, job.created_at, job.job_id))


def fitting_world_size(
    nodes: Sequence[NodeInfo], reserved: Iterable[Reservation], worker: Worker, world_sizes: Iterable[int]
) -> int | None:
    """The first of `world_sizes` that has room beside `reserved`; None if none has."""
    free = _Free.of(nodes)
    for reservation in reserved:
        free.take_reserved(reservation)
    slots = free.num_slots(worker)
    return next((size for size in world_sizes if size <= slots), None)


def _held_back(job: WaitingJob, view: ClusterView, position: int) -> Wait | None:
    """The reasons that have nothing to do with what is free."""
    if job.depends_on:
        return Wait(job.job_id, QueueReason.DEPENDENCY, _dependencies(job.depends_on), position)
    if view.nodes is None:
        return Wait(job.job_id, QueueReason.CLUSTER_UNREACHABLE, "The Ray cluster does not answer.", position)
    if job.not_before is not None and job.not_before > view.now:
        message = f"Tries again at {job.not_before:%H:%M:%S} UTC."
        return Wait(job.job_id, QueueReason.BACKING_OFF, message, position)
    return _too_large(job, view.nodes, position)


def _too_large(job: WaitingJob, nodes: Sequence[NodeInfo], position: int) -> Wait | None:
    """Whether even the empty cluster has no room for the smallest allowed number of workers."""
    if not job.world_sizes:
        message = "No allowed number of workers divides the batch."
        return Wait(job.job_id, QueueReason.PLACEMENT_IMPOSSIBLE, message, position)
    smallest = min(job.world_sizes)
    slots = _Free.of(nodes).num_slots(job.worker)
    if smallest <= slots:
        return None
    wanted = f"{_workers(smallest)} with {job.worker} each"
    usable = [node for node in nodes if node.alive and _matches(node, job.worker)]
    enough_cpus = sum(node.cpus for node in usable) >= smallest * job.worker.cpus
    enough_gpus = sum(node.gpus for node in usable) >= smallest * job.worker.gpus
    if enough_cpus and enough_gpus:
        message = f"Needs {wanted}; the cluster has as many in all, but its nodes hold only {slots} such workers."
        return Wait(job.job_id, QueueReason.PLACEMENT_IMPOSSIBLE, message, position)
    message = f"Needs {wanted}; the whole cluster holds {slots} such workers."
    return Wait(job.job_id, QueueReason.EXCEEDS_CLUSTER, message, position)


def _behind(job: WaitingJob, head: WaitingJob | None, position: int) -> Wait | None:
    if head is None:
        return None
    if head.priority > job.priority:
        message = f"Behind {head.job_id}, whose priority is {head.priority}; this job's is {job.priority}."
        return Wait(job.job_id, QueueReason.BEHIND_HIGHER_PRIORITY, message, position)
    return Wait(job.job_id, QueueReason.BEHIND_OLDER, f"Behind {head.job_id}, which is older.", position)


def _try(job: WaitingJob, free: _Free, position: int) -> Decision:
    slots = free.num_slots(job.worker)
    fitting = [size for size in job.world_sizes if size <= slots]
    if fitting:
        free.take(job.worker, max(fitting))
        return Start(job.job_id, max(fitting))
    message = f"Needs {_workers(min(job.world_sizes))} with {job.worker} each; {slots} such are free."
    return Wait(job.job_id, QueueReason.WAITING_FOR_WORKERS, message, position)


class _Free:
    """What is free on each node while decisions are made."""

    def __init__(self, nodes: Sequence[NodeInfo], cpus: list[float], gpus: list[float]) -> None:
        self.nodes, self.cpus, self.gpus = nodes, cpus, gpus

    @classmethod
    def of(cls, nodes: Iterable[NodeInfo]) -> _Free:
        """All of every live node, in an order that does not depend on the listing's."""
        alive = sorted((node for node in nodes if node.alive), key=lambda node: node.id)
        return cls(alive, [node.cpus for node in alive], [node.gpus for node in alive])

    def num_slots(self, worker: Worker) -> int:
        """How many such workers have room now."""
        return sum(self._slots_on(i, worker) for i in range(len(self.nodes)))

    def take(self, worker: Worker, count: int) -> int:
        """Take up to `count` workers, on as few nodes as possible, as Ray's PACK does. Returns how many had no room."""
        for i in sorted(range(len(self.nodes)), key=lambda i: -self._slots_on(i, worker)):
            taken = min(count, self._slots_on(i, worker))
            self._take_on(i, worker, taken)
            count -= taken
        return count

    def take_reserved(self, reservation: Reservation) -> int:
        """Take what a job holds, where it is known to hold it. What fits nowhere any more (a lost node) is dropped;
        returns how many workers that are."""
        unknown = reservation.world_size
        for name in reservation.nodes[: reservation.world_size]:
            places = [i for i, node in enumerate(self.nodes) if name in (node.id, node.host)]
            # Several nodes of one name (raylets that share a machine) do not tell which: leave it to `take`.
            if len(places) == 1:
                self._take_on(places[0], reservation.worker, 1)
                unknown -= 1
        return self.take(reservation.worker, unknown)

    def _slots_on(self, i: int, worker: Worker) -> int:
        if not _matches(self.nodes[i], worker):
            return 0
        slots = math.floor(self.cpus[i] / worker.cpus)
        if worker.gpus:
            slots = min(slots, math.floor(self.gpus[i] / worker.gpus))
        return max(slots, 0)

    def _take_on(self, i: int, worker: Worker, count: int) -> None:
        self.cpus[i] -= count * worker.cpus
        self.gpus[i] -= count * worker.gpus


def _matches(node: NodeInfo, worker: Worker) -> bool:
    return worker.accelerator is None or node.accelerator == worker.accelerator


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def _dependencies(depends_on: tuple[tuple[str, str], ...]) -> str:
    return "Waits for " + ", ".join(f"{job_id} ({state})" for job_id, state in depends_on) + "."
