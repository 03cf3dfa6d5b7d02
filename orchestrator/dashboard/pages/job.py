"""One job: where it stands, what may be done with it, and in tabs everything else that is known of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Request
from nicegui import ui

from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import PATIENCE_S, Frame, Site, section, url
from orchestrator.dashboard.pages import (
    job_actions,
    job_checkpoints,
    job_curves,
    job_exports,
    job_history,
    job_logs,
    job_pictures,
    job_spec,
    job_trials,
)
from orchestrator.schemas import JobPublic
from orchestrator.services.jobs import get_job
from orchestrator.services.problems import NotFound

Tab = Callable[[Frame, JobPublic], Callable[[JobPublic], None]]
"""Draws a tab; returns what to call when the job has changed."""
TABS: dict[str, tuple[str, Tab]] = {
    "curves": ("Curves", job_curves.draw),
    "attempts": ("Attempts", job_history.draw_attempts),
    "logs": ("Logs", job_logs.draw),
    "checkpoints": ("Checkpoints", job_checkpoints.draw),
    "description": ("Description", job_spec.draw),
    "events": ("Events", job_history.draw_events),
}
_FIRST_OF_KIND: dict[str, dict[str, tuple[str, Tab]]] = {
    "export": {"files": ("Files", job_exports.draw)},
    "inspect": {"pictures": ("Pictures", job_pictures.draw)},
    "search": {"trials": ("Trials", job_trials.draw)},
}
_WITHOUT_CURVES = ("inspect", "search", "export", "import")


def tabs_of(kind: str) -> dict[str, tuple[str, Tab]]:
    """The tabs of a kind of job, the one that is open at first in front."""
    return _FIRST_OF_KIND.get(kind, {}) | {
        name: tab for name, tab in TABS.items() if name != "curves" or kind not in _WITHOUT_CURVES
    }


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/jobs/{job_id}", response_timeout=PATIENCE_S)
    async def show(request: Request, job_id: str) -> None:
        try:
            job = await site.access.run(lambda: get_job(site.services.db, job_id))
        except NotFound as error:
            ui.context.client.status_code = 404
            with Frame(site, request, "Not found", "jobs"), parts.empty(error.detail):
                parts.link("All jobs", url("/jobs"))
            return
        with Frame(site, request, job.name, "jobs") as frame:
            _Page(frame, job, request.query_params.get("tab", ""))


def job_reader(frame: Frame, job_id: str) -> Callable[[], Look[JobPublic]]:
    """Reads a job each second until it has ended."""

    def read() -> Look[JobPublic]:
        job = get_job(frame.services.db, job_id)
        return Look(job, SELDOM_S if job.is_terminal else EVERY_S)

    return read


class _Page:
    def __init__(self, frame: Frame, job: JobPublic, tab: str) -> None:
        self.frame = frame
        self.job = job
        self._drawn: dict[str, tuple[Any, Callable[[JobPublic], None]]] = {}
        self._tabs = tabs_of(job.kind)
        self._first = next(iter(self._tabs))
        with parts.tag("div", "", "head"):
            with parts.tag("div", "", "title"):
                with parts.row():
                    parts.tag("h1", job.name)
                    self._state = section(_draw_state, lambda job: job.state)
                self._where = section(_draw_where, lambda job: (job.labels, job.priority))
            self._actions = section(
                lambda job: job_actions.draw(frame, job), lambda job: (job.allowed_actions, job.is_terminal)
            )
        self._why = section(_draw_why, lambda job: (job.state, job.reason, job.message, job.queue))
        self._progress = _Progress()
        with parts.tag("nav", "", "tabs", aria_label="What to see of the job"):
            self._links = {name: self._tab_link(name, text) for name, (text, _) in self._tabs.items()}
        self._panels = parts.tag("div")
        self.show(job)
        self._open(tab if tab in self._tabs else self._first)
        frame.follow(("job", job.id), job_reader(frame, job.id), self.show)

    def show(self, job: JobPublic) -> None:
        self.job = job
        for part in (self._state, self._where, self._actions, self._why, self._progress.show):
            part(job)
        for _, update in self._drawn.values():
            update(job)

    def _tab_link(self, name: str, text: str) -> Any:
        link = parts.link(text, url(f"/jobs/{self.job.id}", tab=name))
        # A middle click opens it beside this page, as any link.
        link.on("click", lambda _: self._open(name), js_handler="(e) => { if (e.ctrlKey || e.metaKey) return; "
                "e.preventDefault(); emit(); }")  # fmt: skip
        return link

    def _open(self, name: str) -> None:
        if name not in self._drawn:
            with self._panels, parts.stack() as panel:
                self._drawn[name] = (panel, self._tabs[name][1](self.frame, self.job))
        for other, (panel, _) in self._drawn.items():
            parts.show(panel, other == name)
        for other, link in self._links.items():
            link.props["aria-current"] = "page" if other == name else "false"
            link.update()
        if self.frame.client.has_socket_connection:
            ui.navigate.history.replace(url(f"/jobs/{self.job.id}", tab="" if name == self._first else name))


class _Progress:
    """The bar, and numbers beside it."""

    def __init__(self) -> None:
        with parts.card(classes="progress"):
            with parts.row():
                self._steps = parts.tag("span", "", "strong num")
                self._left = parts.tag("span", "", "soft num grow")
                self._pct = parts.tag("span", "", "strong num")
            self._bar = parts.meter(0.0, "", "Progress")
            self._numbers = section(_draw_numbers, _numbers)

    def show(self, job: JobPublic) -> None:
        progress = job.progress
        total = f" of {progress.total_steps:,}" if progress.total_steps else ""
        counted = f"{progress.step:,}{total} trials" if job.kind == "search" else f"Step {progress.step:,}{total}"
        parts.set_text(self._steps, counted if progress.step or total else "")
        eta = f"about {words.duration(progress.eta_s)} left" if progress.eta_s is not None else ""
        parts.set_text(self._left, eta)
        parts.set_text(self._pct, "" if progress.pct is None else f"{progress.pct:.0f} %")
        self._bar.classes(replace=f"meter {words.STATE_TONES.get(job.state, '')}")
        parts.set_meter(self._bar, progress.pct or 0.0)
        self._numbers(job)


def _numbers(job: JobPublic) -> tuple[tuple[str, str], ...]:
    last, usage = job.last_metrics, job.usage
    shown = [
        (label, words.measured(name, last[name]))
        for label, name in (
            ("Loss", "train/loss"),
            ("Top-1", "eval/top1"),
            ("Throughput", "perf/images_per_s"),
            ("MFU", "perf/mfu"),
            ("Waiting for data", "perf/data_wait"),
        )
        if name in last
    ]
    shown.append(("Device time", words.duration(usage.gpu_seconds)))
    if usage.wasted_steps:
        shown.append(("Done again", f"{usage.wasted_steps:,} steps"))
    return tuple(shown)


def _draw_numbers(job: JobPublic) -> None:
    with parts.row():
        for label, value in _numbers(job):
            with parts.tag("span", "", "num"):
                parts.tag("span", f"{label} ", "soft")
                parts.tag("span", value, "strong")


def _draw_state(job: JobPublic) -> None:
    parts.chip(job.state, big=True)


def _draw_where(job: JobPublic) -> None:
    with parts.row("tight soft small"):
        parts.tag("span", f"{job.kind} · project {job.project} · priority {job.priority} · by {job.created_by} ·")
        parts.ago(job.created_at)
        parts.tag("code", job.id)
        for key, value in job.labels.items():
            parts.tag("span", f"{key}={value}", "tag")


def _draw_why(job: JobPublic) -> None:
    """Why it waits or how it ended, and what to do next."""
    if job.queue is not None:
        with parts.tag("p", "", "note-box"):
            parts.tag("span", f"Place {job.queue.position} in the queue. ", "strong")
            parts.tag("span", job.queue.message)
        return
    tone = {"FAILED": "bad", "RECOVERING": "warn", "CANCELLED": "", "PAUSED": ""}.get(job.state)
    if tone is None or not (job.reason or job.message):
        return
    with parts.tag("div", "", f"note-box {tone}", role="status"), parts.stack("tight"):
        parts.tag("p", job.reason or "", "strong")
        parts.tag("p", job.message, "pre")
        if job.advice:
            parts.tag("p", f"What to do: {job.advice}")
