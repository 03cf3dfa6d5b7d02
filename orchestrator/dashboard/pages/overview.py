"""The service at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from nicegui import ui

from configs.states import JobState
from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import Look
from orchestrator.dashboard.frame import PATIENCE_S, Frame, Site, section, url
from orchestrator.schemas import JobPublic, NodePublic
from orchestrator.services.overview import read_overview
from orchestrator.view_schemas import OverviewPublic

_STALE_S = 45.0


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/overview", response_timeout=PATIENCE_S)
    async def show(request: Request) -> None:
        view = await site.access.run(lambda: read_overview(site.services.db))
        with Frame(site, request, "Overview", "overview") as frame:
            _Page(frame).show(view)


class _Page:
    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        with parts.tag("div", "", "head"), parts.tag("div", "", "title"):
            parts.tag("h1", "Overview")
        self._warning = section(_draw_warning, _warning)
        self._tiles = section(_draw_tiles, _tiles)
        with parts.card("Running", flush=True) as head:
            with head:
                parts.link("All jobs", url("/jobs"), "small")
            self._running = _Table("Jobs that run", _RUNNING, _draw_idle)
        with parts.card("Queue", flush=True) as head:
            with head:
                self._more = parts.tag("span", "", "soft small")
            self._queue = _Table("Jobs that wait, in the order in which they start", _QUEUE, _draw_no_queue)
        with parts.tag("div", "", "cols"):
            with parts.card("Failed in the last 7 days", flush=True):
                self._failed = _Table("Jobs that failed lately", _FAILED, _draw_no_failures)
            with parts.card("Cluster", flush=True):
                self._nodes = _Table("Nodes of the cluster", _NODES, _draw_no_nodes)
        frame.follow("overview", lambda: Look(read_overview(frame.services.db)), self.show)

    def show(self, view: OverviewPublic) -> None:
        self._warning(view)
        self._tiles(view)
        self._running.show([_running_row(job) for job in view.active])
        self._queue.show([_queue_row(job) for job in view.queued])
        waiting = view.counts.get(JobState.QUEUED, 0)
        rest = f"the first {len(view.queued)} of {waiting:,}" if waiting > len(view.queued) else ""
        parts.set_text(self._more, rest)
        self._failed.show([_failed_row(job) for job in view.failed])
        self._nodes.show([_node_row(node) for node in view.cluster.nodes])


class _Table:
    """Rows, or what to say when there are none."""

    def __init__(self, caption: str, columns: Sequence[dict[str, Any]], draw_empty: Any) -> None:
        with parts.tag("div", "", "scroll-x") as self._box:
            self._rows = parts.Rows(caption, columns)
        with parts.tag("div") as self._empty:
            draw_empty()

    def show(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows.show_rows(rows)
        parts.show(self._box, bool(rows))
        parts.show(self._empty, not rows)


# -- on top ------------------------------------------------------------------------------------------------------------
def _warning(view: OverviewPublic) -> str:
    cluster, now = view.cluster, datetime.now(UTC)
    if cluster.controller_at is None:
        return "No controller has run yet: jobs wait until one does."
    if (now - cluster.controller_at).total_seconds() > _STALE_S:
        return "The controller gives no sign: nothing starts until it is back. Jobs that run go on."
    if not cluster.reachable:
        return f"The cluster does not answer: nothing starts until it does. {cluster.message}"
    return ""


def _draw_warning(view: OverviewPublic) -> None:
    if text := _warning(view):
        parts.tag("p", text, "note-box warn", role="status")


def _tiles(view: OverviewPublic) -> list[tuple[str, str, str, str]]:
    counts, devices, storage = view.counts, view.devices, view.storage
    active = sum(counts.get(state, 0) for state in JobState if state.holds_resources)
    unit = "GPUs" if devices.gpus else "CPUs"
    used, there = (devices.gpus_used, devices.gpus) if devices.gpus else (devices.cpus_used, devices.cpus)
    alive = sum(1 for node in view.cluster.nodes if node.alive)
    nodes = f"on {alive} {'node' if alive == 1 else 'nodes'}"
    paused = f"{words.count(counts.get('PAUSED', 0))} paused"
    return [
        ("Running", words.count(active), "hold workers now", url("/jobs", state="active")),
        ("Queued", words.count(counts.get("QUEUED", 0)), paused, url("/jobs", state="QUEUED")),
        (f"{unit} in use", f"{used:g} of {there:g}", nodes, ""),
        ("Succeeded", words.count(counts.get("SUCCEEDED", 0)), "in all", url("/jobs", state="SUCCEEDED")),
        ("Failed", words.count(counts.get("FAILED", 0)), "in all", url("/jobs", state="FAILED")),
        ("Checkpoints kept", words.size(storage.num_bytes), f"{words.count(storage.num_checkpoints)} of them", ""),
    ]


def _draw_tiles(view: OverviewPublic) -> None:
    with parts.tag("div", "", "tiles"):
        for label, value, note, href in _tiles(view):
            with parts.tag("a" if href else "div", "", "tile", **({"href": href} if href else {})):
                parts.tag("span", label, "label")
                parts.tag("span", value, "value")
                parts.tag("span", note, "note")


# -- tables ------------------------------------------------------------------------------------------------------------
_RUNNING = (
    {"key": "name", "label": "Job"},
    {"key": "state", "label": "State"},
    {"key": "progress", "label": "Progress"},
    {"key": "eta", "label": "Left", "end": True},
    {"key": "speed", "label": "Images/s", "end": True},
    {"key": "mfu", "label": "MFU", "end": True},
    {"key": "loss", "label": "Loss", "end": True},
    {"key": "top1", "label": "Top-1", "end": True},
)
_QUEUE = (
    {"key": "name", "label": "Job"},
    {"key": "position", "label": "Place", "end": True},
    {"key": "why", "label": "Why it waits"},
    {"key": "priority", "label": "Priority", "end": True},
    {"key": "since", "label": "Waits since", "end": True},
)
_FAILED = (
    {"key": "name", "label": "Job"},
    {"key": "why", "label": "Why"},
    {"key": "at", "label": "When", "end": True},
)
_NODES = (
    {"key": "id", "label": "Node"},
    {"key": "state", "label": "State"},
    {"key": "cpus", "label": "CPUs", "end": True},
    {"key": "gpus", "label": "GPUs", "end": True},
)


def name_cell(job: JobPublic) -> parts.Cell:
    return {"text": job.name, "href": url(f"/jobs/{job.id}"), "sub": f"{job.kind} · {job.project}"}


def progress_cell(job: JobPublic) -> parts.Cell:
    """A bar with its steps; nothing for a job without steps."""
    progress = job.progress
    if progress.pct is None:
        return ""
    tone = words.STATE_TONES.get(job.state, "")
    steps = f"{progress.step:,} of {progress.total_steps:,}" if progress.total_steps else ""
    return {"text": f"{progress.pct:.0f} %", "pct": progress.pct, "tone": tone, "sub": steps, "label": "Progress"}


def _running_row(job: JobPublic) -> dict[str, Any]:
    last = job.last_metrics
    speed = last.get("perf/images_per_s")
    return {
        "id": job.id,
        "name": name_cell(job),
        "state": parts.state_cell(job.state),
        "progress": progress_cell(job),
        "eta": words.duration(job.progress.eta_s),
        "speed": words.NONE if speed is None else f"{speed:,.0f}",
        "mfu": words.percent(last.get("perf/mfu")),
        "loss": words.measured("train/loss", last.get("train/loss")),
        "top1": words.percent(last.get("eval/top1")),
    }


def _queue_row(job: JobPublic) -> dict[str, Any]:
    queue = job.queue
    why = queue.message if queue is not None else "It is about to start."
    return {
        "id": job.id,
        "name": name_cell(job),
        "position": str(queue.position) if queue is not None else words.NONE,
        "why": {"text": why, "sub": (queue.reason or "") if queue is not None else ""},
        "priority": str(job.priority),
        "since": {"ago": job.state_since.isoformat()},
    }


def _failed_row(job: JobPublic) -> dict[str, Any]:
    return {
        "id": job.id,
        "name": name_cell(job),
        "why": {"text": job.reason or "", "sub": job.message.splitlines()[0][:300] if job.message else ""},
        "at": {"ago": job.ended_at.isoformat()} if job.ended_at else "",
    }


def _node_row(node: NodePublic) -> dict[str, Any]:
    return {
        "id": node.id[:24],
        "state": {"text": "Alive", "tone": "good"} if node.alive else {"text": "Gone", "tone": "bad"},
        "cpus": f"{node.cpus:g}",
        "gpus": f"{node.gpus:g} {node.accelerator or ''}".strip(),
    }


def _draw_idle() -> None:
    with parts.empty("Nothing runs at the moment."):
        parts.link("Submit a job", url("/submit"))


def _draw_no_queue() -> None:
    parts.empty("Nobody waits.", "A job that finds no room waits here, with its place and the reason.")


def _draw_no_failures() -> None:
    parts.empty("No failures.", "What fails is listed here with its diagnosis.")


def _draw_no_nodes() -> None:
    parts.empty("No nodes have been seen.", "The controller looks at the cluster every second.")
