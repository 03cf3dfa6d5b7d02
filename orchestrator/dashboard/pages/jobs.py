"""All jobs: filtered, sorted and paged by the server, with actions on those that are picked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from fastapi import Request
from nicegui import ui

from configs.ids import JOB_ID
from configs.states import JobState
from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import Look
from orchestrator.dashboard.frame import PATIENCE_S, Frame, Site, url
from orchestrator.dashboard.pages.overview import name_cell, progress_cell
from orchestrator.schemas import JobPage, JobPublic
from orchestrator.services import jobs, submission
from orchestrator.services.auth import Actor
from orchestrator.services.jobs import JobFilter, Sort
from orchestrator.services.problems import ApiError

PAGE = 50
_COUNT_EVERY = 5
_STATES = {"": "Any", "active": "Holds workers"} | {state.value: words.STATE_WORDS[state.value] for state in JobState}
_KINDS = {"": "Any"} | {kind: kind for kind in words.KINDS}
_SORTS = {
    "-created": "Newest first",
    "created": "Oldest first",
    "-priority": "Highest priority",
    "priority": "Lowest priority",
    "name": "Name, A to Z",
    "-name": "Name, Z to A",
}
_COLUMNS = (
    {"key": "name", "label": "Job", "sort": "name"},
    {"key": "state", "label": "State"},
    {"key": "progress", "label": "Progress"},
    {"key": "loss", "label": "Loss", "end": True},
    {"key": "top1", "label": "Top-1", "end": True},
    {"key": "priority", "label": "Priority", "end": True, "sort": "priority"},
    {"key": "by", "label": "By"},
    {"key": "created", "label": "Submitted", "end": True, "sort": "created"},
)
_BULK: dict[str, Callable[[Any, Actor, str], object]] = {
    "Pause": jobs.pause_job,
    "Resume": jobs.resume_job,
    "Cancel": jobs.cancel_job,
    "Retry": lambda db, actor, job_id: submission.retry_job(db, actor, job_id, True, None),
}


@dataclass(frozen=True)
class Wanted:
    """What the address of the page says."""

    q: str = ""
    state: str = ""
    kind: str = ""
    project: str = ""
    label: str = ""
    sort: str = "-created"
    cursors: tuple[str, ...] = ()
    """Of the pages before this one and of this one; none: the first."""

    @property
    def filter(self) -> JobFilter:
        states = tuple(s.value for s in JobState if s.holds_resources) if self.state == "active" else (self.state,)
        return JobFilter(
            states=states if self.state else (),
            kind=self.kind or None,
            project=self.project or None,
            name=self.q or None,
            labels=tuple(part for part in self.label.split() if "=" in part),
        )

    @property
    def address(self) -> str:
        sort = "" if self.sort == "-created" else self.sort
        fields = {"q": self.q, "state": self.state, "kind": self.kind, "project": self.project, "label": self.label}
        return url("/jobs", **fields, sort=sort, page=".".join(self.cursors))


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/jobs", response_timeout=PATIENCE_S)
    async def show(request: Request) -> None:
        query = request.query_params
        wanted = Wanted(
            **{name: query.get(name, "")[:256] for name in ("q", "kind", "project", "label")},
            state=query.get("state", "") if query.get("state", "") in _STATES else "",
            sort=query.get("sort", "") if query.get("sort", "") in get_args(Sort) else "-created",
            cursors=tuple(filter(None, query.get("page", "").split("."))),
        )
        with Frame(site, request, "Jobs", "jobs") as frame:
            _Page(frame, wanted)


class _Page:
    def __init__(self, frame: Frame, wanted: Wanted) -> None:
        self.frame = frame
        self.wanted = wanted
        self._stop: Callable[[], None] = lambda: None
        self._picked: list[str] = []
        self._next: str | None = None
        with parts.tag("div", "", "head"):
            with parts.tag("div", "", "title"):
                parts.tag("h1", "Jobs")
            if frame.may_write:
                parts.link("Submit a job", url("/submit"), "btn main")
        self._filters()
        with parts.card(flush=True) as head:
            with head:
                self._number = parts.tag("span", "", "grow soft num", role="status")
                self._bulk()
            with parts.tag("div", "", "scroll-x") as self._box:
                self._rows = parts.Rows(
                    "Jobs", _COLUMNS, selectable=True, on_pick=self._on_pick, on_sort=self._on_column
                )
            with parts.tag("div") as self._none:
                parts.empty("No jobs match.", "Change the filters above, or submit a job.")
            self._none.set_visibility(False)
            with parts.row("pager"):
                self._newer = parts.button("Previous page", self._back, disabled=True)
                self._older = parts.button("Next page", self._forward, disabled=True)
        self._follow()

    # -- what is wanted ------------------------------------------------------------------------------------------------
    def _filters(self) -> None:
        w = self.wanted
        with parts.tag("div", "", "filters", role="search"):
            parts.text_field(
                "Name or id", w.q, lambda v: self._want(q=v), classes="wide", placeholder="A part of the name"
            )
            parts.choice("State", _STATES, w.state, lambda v: self._want(state=v))
            parts.choice("Kind", _KINDS, w.kind, lambda v: self._want(kind=v))
            parts.text_field("Project", w.project, lambda v: self._want(project=v), placeholder="Any")
            parts.text_field("Labels", w.label, lambda v: self._want(label=v), placeholder="team=vision")
            self._sort = parts.choice("Order", _SORTS, w.sort, lambda v: self._want(sort=v))

    def _want(self, **changes: Any) -> None:
        q = changes.get("q", "").strip()
        if JOB_ID.match(q):
            self.frame.go(url(f"/jobs/{q}"))
            return
        self._show_wanted(replace(self.wanted, cursors=(), **{k: v.strip() for k, v in changes.items()}))

    def _show_wanted(self, wanted: Wanted) -> None:
        if wanted == self.wanted:
            return
        self.wanted = wanted
        ui.navigate.history.replace(wanted.address)
        self._unpick()
        self._follow()

    def _on_column(self, name: str) -> None:
        first = {"name": "name", "priority": "-priority", "created": "-created"}[name]
        other = first.removeprefix("-") if first.startswith("-") else f"-{first}"
        sort = other if self.wanted.sort == first else first
        self._sort.set_value(sort)
        self._want(sort=sort)

    def _forward(self) -> None:
        if self._next is not None:
            self._show_wanted(replace(self.wanted, cursors=(*self.wanted.cursors, self._next)))

    def _back(self) -> None:
        self._show_wanted(replace(self.wanted, cursors=self.wanted.cursors[:-1]))

    # -- what there is -------------------------------------------------------------------------------------------------
    def _follow(self) -> None:
        self._stop()
        wanted = self.wanted
        self._rows.show_sort(wanted.sort.removeprefix("-"), wanted.sort.startswith("-"))
        self._stop = self.frame.follow(("jobs", wanted), _reader(self.frame, wanted), self._show)

    def _show(self, view: JobPage) -> None:
        self._next = view.next_cursor
        self._rows.show_rows([_row(job) for job in view.items])
        number = view.num_matching or 0
        first = PAGE * len(self.wanted.cursors)
        shown = f"{first + 1:,} to {first + len(view.items):,} of {number:,}" if number > len(view.items) else ""
        parts.set_text(self._number, shown or f"{number:,} job{'' if number == 1 else 's'}")
        parts.show(self._box, bool(view.items))
        parts.show(self._none, not view.items)
        for button, off in ((self._newer, not self.wanted.cursors), (self._older, view.next_cursor is None)):
            if button.props.get("disabled") != off:
                button.props["disabled"] = off
                button.update()

    # -- bulk actions --------------------------------------------------------------------------------------------------
    def _bulk(self) -> None:
        with parts.row("tight") as self._actions:
            self._num_picked = parts.tag("span", "", "soft small", role="status")
            if self.frame.may_write:
                for name in _BULK:
                    parts.button(name, lambda name=name: self._do(name), "danger" if name == "Cancel" else "")  # type: ignore[misc]
            parts.button("Compare", self._compare)
        self._actions.set_visibility(False)

    def _on_pick(self, picked: list[str]) -> None:
        self._picked = [job_id for job_id in picked if JOB_ID.match(job_id)][:PAGE]
        parts.set_text(self._num_picked, f"{len(self._picked)} selected")
        parts.show(self._actions, bool(self._picked))

    def _unpick(self) -> None:
        self._rows.unpick()
        self._on_pick([])

    async def _do(self, name: str) -> None:
        picked, work = list(self._picked), _BULK[name]

        def each(actor: Actor) -> list[str]:
            refused = []
            for job_id in picked:
                try:
                    work(self.frame.services.db, actor, job_id)
                except ApiError as error:
                    refused.append(f"{job_id}: {error.detail}")
            return refused

        refused = await self.frame.act(each)
        if refused is None:
            return
        done = len(picked) - len(refused)
        self._unpick()
        if done:
            self.frame.say(f"{name}: asked for {done} job{'' if done == 1 else 's'}.")
        if refused:
            more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            self.frame.say(f"{name} was refused for {refused[0]}{more}", bad=True)

    def _compare(self) -> None:
        self.frame.go(url("/compare", jobs=",".join(self._picked[:20])))


def _reader(frame: Frame, wanted: Wanted) -> Callable[[], Look[JobPage]]:
    """Reads the page each second, and the number of matching jobs every few seconds."""
    db, looks, number = frame.services.db, 0, 0
    cursor = wanted.cursors[-1] if wanted.cursors else None

    def read() -> Look[JobPage]:
        nonlocal looks, number
        page = jobs.list_jobs(db, wanted.filter, PAGE, cursor, cast(Sort, wanted.sort))
        if looks % _COUNT_EVERY == 0:
            is_all = page.next_cursor is None and not wanted.cursors
            number = len(page.items) if is_all else jobs.count_jobs(db, wanted.filter)
        looks += 1
        return Look(page.model_copy(update={"num_matching": number}))

    return read


def _row(job: JobPublic) -> dict[str, Any]:
    last = job.last_metrics
    why = job.queue.message if job.queue is not None else (job.reason or "")
    state = parts.state_cell(job.state)
    return {
        "id": job.id,
        "name": name_cell(job),
        "state": {**state, "sub": why[:160]} if isinstance(state, dict) and job.state != "SUCCEEDED" else state,
        "progress": progress_cell(job),
        "loss": words.measured("train/loss", last.get("train/loss")) if "train/loss" in last else "",
        "top1": words.percent(last.get("eval/top1")) if "eval/top1" in last else "",
        "priority": str(job.priority),
        "by": job.created_by,
        "created": {"ago": job.created_at.isoformat()},
    }
