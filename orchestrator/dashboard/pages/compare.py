"""Up to twenty jobs side by side: curves over one another, last and best values, where their descriptions differ."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from fastapi import Request
from nicegui import ui

from configs.ids import JOB_ID
from configs.states import JobState
from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import PATIENCE_S, Frame, Site, section, url
from orchestrator.services.compare import MAX_JOBS, compare_jobs
from orchestrator.services.jobs import JobFilter, list_jobs
from orchestrator.view_schemas import ComparedSeries, ComparisonPublic

_MAX_POINTS = 400
_SHARE_OF_TIME = 0.05
_DEFAULT_NAMES = ("train/loss", "eval/top1")
_X = {"step": "Step", "seconds": "Time since the start", "images": "Images seen"}
_SMOOTHING = {"0": "None", "0.6": "Light", "0.9": "Strong", "0.97": "Very strong"}
_LOWER_IS_BETTER = ("loss", "step_time", "wait")


def register(site: Site) -> None:
    """Add the page."""

    @ui.page("/compare", response_timeout=PATIENCE_S)
    async def show(request: Request) -> None:
        query = request.query_params
        jobs = [job_id for job_id in query.get("jobs", "").split(",") if JOB_ID.match(job_id)]
        names = [name for name in query.get("names", "").split(",") if name][:12]
        with Frame(site, request, "Compare", "compare") as frame:
            _Page(frame, list(dict.fromkeys(jobs))[:MAX_JOBS], names or list(_DEFAULT_NAMES), query.get("x", "step"))


class _Page:
    def __init__(self, frame: Frame, jobs: list[str], names: list[str], x: str) -> None:
        self.frame, self.jobs, self.names = frame, jobs, names
        self._how: dict[str, Any] = {"x": x if x in _X else "step", "smooth": 0.0, "log": False}
        self._charts: dict[str, parts.Chart] = {}
        self._shown: dict[str, tuple[ComparedSeries, ...]] = {}
        self._stop: Callable[[], None] = lambda: None
        with parts.tag("div", "", "head"):
            with parts.tag("div", "", "title"):
                parts.tag("h1", "Compare")
            parts.button("Add jobs", self._open_add)
        self._none = parts.tag("section", "", "card")
        with self._none, parts.empty("Choose jobs to lay over one another.", f"Up to {MAX_JOBS} at a time."):
            parts.button("Add jobs", self._open_add, "main")
        with parts.stack() as self._content:
            self._controls()
            self._grid = parts.tag("div", "", "charts two")
            with parts.card("Jobs", flush=True), parts.tag("div", "", "scroll-x"):
                self._table = section(self._draw_table, _table_key)
            with parts.card("Where their descriptions differ", flush=True):
                self._differences = section(_draw_differences, lambda view: (view.differences, view.jobs))
        self._content.classes("wide-gap")
        self._follow()

    def _follow(self) -> None:
        self._stop()
        parts.show(self._none, not self.jobs)
        parts.show(self._content, bool(self.jobs))
        if not self.jobs:
            return
        jobs, names, db = tuple(self.jobs), tuple(self.names), self.frame.services.db

        def read() -> Look[ComparisonPublic]:
            started = time.monotonic()
            view = compare_jobs(db, jobs, names, _MAX_POINTS)
            is_final = all(JobState(job.state).is_terminal for job in view.jobs)
            took = time.monotonic() - started
            return Look(view, SELDOM_S if is_final else max(EVERY_S, took / _SHARE_OF_TIME))

        self._stop = self.frame.follow(("compare", jobs, names), read, self._show)

    def _remember(self) -> None:
        names = "" if tuple(self.names) == _DEFAULT_NAMES else ",".join(self.names)
        x = "" if self._how["x"] == "step" else self._how["x"]
        ui.navigate.history.replace(url("/compare", jobs=",".join(self.jobs), names=names, x=x))

    # -- what to show --------------------------------------------------------------------------------------------------
    def _controls(self) -> None:
        with parts.tag("div", "", "filters"):
            parts.choice("Horizontal axis", _X, self._how["x"], lambda v: self._change(x=v))
            parts.choice("Smoothing", _SMOOTHING, "0", lambda v: self._change(smooth=float(v)))
            axes = {"linear": "Linear", "log": "Logarithmic"}
            parts.choice("Vertical axis", axes, "linear", lambda v: self._change(log=v == "log"))
            self._more = parts.tag("div")
            self._more_names: tuple[str, ...] = ()

    def _offer_names(self, names: tuple[str, ...]) -> None:
        left = tuple(name for name in names if name not in self.names and not name.startswith("data/sample_ids"))
        if left == self._more_names:
            return
        self._more_names = left
        self._more.clear()
        with self._more:
            parts.choice("Add a chart", {"": "Choose …"} | {name: name for name in left}, "", self._add_name)

    def _add_name(self, name: str) -> None:
        if name and name not in self.names and len(self.names) < 12:
            self.names.append(name)
            self._remember()
            self._follow()

    def _change(self, **how: Any) -> None:
        self._how |= how
        for chart in self._charts.values():
            chart.draw(self._how)
        self._remember()

    # -- the view ------------------------------------------------------------------------------------------------------
    def _show(self, view: ComparisonPublic) -> None:
        self._offer_names(view.names)
        for name in self.names:
            found = tuple(series for series in view.series if series.name == name)
            if not found or self._shown.get(name) == found:
                continue
            self._shown[name] = found
            if name not in self._charts:
                with self._grid:
                    self._charts[name] = parts.Chart(name)
            series = [_line(one, view) for one in found]
            self._charts[name].draw({"unit": _unit(name), "series": series, **self._how})
        self._table(view)
        self._differences(view)

    def _draw_table(self, view: ComparisonPublic) -> None:
        columns: list[dict[str, Any]] = [{"key": "name", "label": "Job"}, {"key": "state", "label": "State"}]
        for name in self.names:
            columns += [
                {"key": f"last {name}", "label": f"{name}, last", "end": True},
                {"key": f"best {name}", "label": "best", "end": True},
            ]
        columns.append({"key": "remove", "label": "", "end": True})
        by_job = {(one.index, one.name): one for one in view.series}
        rows = []
        for job in view.jobs:
            row: dict[str, Any] = {
                "id": job.id,
                "name": {"text": job.name, "href": url(f"/jobs/{job.id}"), "sub": job.kind},
                "state": parts.state_cell(job.state),
                "remove": {"text": "", "action": "remove", "button": "Remove", "label": f"Remove {job.name}"},
            }
            for name in self.names:
                one = by_job.get((job.index, name))
                row[f"last {name}"] = words.measured(name, one.last if one else None)
                row[f"best {name}"] = words.measured(name, _best(one) if one else None)
            rows.append(row)
        parts.Rows("Jobs compared", columns, on_act=lambda job_id, _: self._remove(job_id)).show_rows(rows)

    def _remove(self, job_id: str) -> None:
        self.frame.go(url("/compare", jobs=",".join(j for j in self.jobs if j != job_id)))

    async def _open_add(self) -> None:
        page = await self.frame.read(lambda: list_jobs(self.frame.services.db, JobFilter(), 50, None))
        box, body = parts.dialog("Add jobs")
        chosen: list[str] = []
        with body:
            parts.tag("p", "The newest jobs. Others can be picked on the page Jobs.", "soft")
            with parts.tag("div", "", "choose"):
                for job in page.items:
                    if job.id not in self.jobs:
                        label = f"{job.name} · {job.kind} · {words.STATE_WORDS.get(job.state, job.state)}"
                        parts.checkbox(label, False, lambda on, i=job.id: chosen.append(i) if on else chosen.remove(i))  # type: ignore[misc]

            def add() -> None:
                jobs = [*self.jobs, *chosen][:MAX_JOBS]
                self.frame.go(url("/compare", jobs=",".join(jobs)))

            with parts.row():
                parts.button("Compare", add, "main")
                parts.button("Close", box.close)
        box.open()


def _unit(name: str) -> str:
    is_share = name.startswith(("eval/top", "eval/knn", "eval/few_shot/")) or name in ("perf/mfu", "perf/data_wait")
    return "percent" if is_share else "seconds" if "step_time" in name else "number"


def _line(one: ComparedSeries, view: ComparisonPublic) -> dict[str, Any]:
    job = view.jobs[one.index]
    # ECharts knows lines by their names: those of two jobs may be the same.
    namesakes = sum(1 for other in view.jobs if other.name == job.name)
    name = job.name if namesakes == 1 else f"{job.name} ({job.id[-4:]})"
    batch = job.global_batch_size or 1
    return {
        "name": name,
        "place": one.index,
        "steps": one.steps,
        "seconds": one.seconds,
        "images": [step * batch for step in one.steps],
        "values": one.values,
    }


def _best(one: ComparedSeries) -> float | None:
    return one.lowest if any(word in one.name for word in _LOWER_IS_BETTER) else one.highest


def _table_key(view: ComparisonPublic) -> object:
    return view.jobs, tuple((one.index, one.name, one.last, one.lowest, one.highest) for one in view.series)


def _draw_differences(view: ComparisonPublic) -> None:
    if not view.differences:
        if len(view.jobs) < 2:
            parts.empty("Add another job to see where they differ.")
        else:
            parts.empty("Nowhere: their descriptions are the same.")
        return
    columns = [
        {"key": "field", "label": "Field"},
        *({"key": f"job {job.index}", "label": job.name} for job in view.jobs),
    ]
    rows = [
        {
            "id": difference.pointer,
            "field": difference.pointer.strip("/").replace("/", "."),
            **{f"job {i}": words.NONE if v is None else _text(v) for i, v in enumerate(difference.values)},
        }
        for difference in view.differences
    ]
    with parts.tag("div", "", "scroll-x"):
        parts.Rows("Where the descriptions differ", columns).show_rows(rows)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
