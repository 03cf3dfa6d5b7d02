"""The trials of a search: the best, what all of them show, and what each was given and reached."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame, section, url
from orchestrator.dashboard.pages.job_search_plots import SearchPlots
from orchestrator.schemas import JobPublic
from orchestrator.search_schemas import TrialPage, TrialPublic
from orchestrator.services.jobs import get_job
from orchestrator.services.problems import NotFound
from orchestrator.services.searches import get_report, get_search, list_trials

_SHOWN = 500
_SHARE_OF_TIME = 0.05
"""Of a second at most so much goes into reading the trials of one search, however many they are."""


@dataclass(frozen=True)
class _Found:
    """What there is to see of a search."""

    trials: TrialPage
    best: TrialPublic | None
    mode: str
    importances: dict[str, float]
    is_final: bool


def draw(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab."""
    metric = str(job.spec.get("metric", "value"))
    best = section(lambda view: _draw_best(view, metric), lambda view: view.best)
    plots = SearchPlots(job)
    with parts.card("Trials", flush=True) as head:
        with head:
            compare = parts.link("Compare the newest twenty", url("/compare"), "small")
        table = section(lambda view: _draw(view, metric))

    def show(view: _Found) -> None:
        newest = ",".join(trial.job_id for trial in view.trials.items[-20:])
        compare.props["href"] = url("/compare", jobs=newest, names=metric)
        best(view)
        plots.show(view.trials.items, is_max=view.mode == "max")
        plots.show_importances(view.importances)
        table(view.trials)

    def read() -> Look[_Found]:
        started = time.monotonic()
        view = _read(frame, job.id)
        took = time.monotonic() - started
        return Look(view, SELDOM_S if view.is_final else max(EVERY_S, took / _SHARE_OF_TIME))

    frame.follow(("trials", job.id), read, show)
    return lambda _: None


def _read(frame: Frame, job_id: str) -> _Found:
    services = frame.services
    ended = get_job(services.db, job_id).is_terminal
    trials = list_trials(services.db, job_id, with_curves=True)
    search = get_search(services.db, job_id)
    try:
        importances = get_report(services.db, services.store, job_id).importances if ended else {}
    except NotFound:
        # A search that failed or was cancelled leaves none.
        importances = {}
    return _Found(trials, search.best, search.mode, importances, ended)


def _draw_best(view: _Found, metric: str) -> None:
    if view.best is None:
        return
    best = view.best
    with parts.card("Best so far"), parts.row():
        parts.link(f"Trial {best.number}", url(f"/jobs/{best.job_id}"), "strong")
        parts.tag("span", f"{metric} {words.measured(metric, best.value)}", "num")
        for name, value in best.params.items():
            parts.tag("span", f"{name}={_text(value)}", "tag")
        if best.checkpoint is not None:
            parts.link("Its checkpoints", url(f"/jobs/{best.job_id}", tab="checkpoints"))


def _draw(view: TrialPage, metric: str) -> None:
    if not view.items:
        parts.empty("No trials yet.", "They appear when the search has started.")
        return
    names = sorted({name for trial in view.items for name in trial.params})[:6]
    columns: list[dict[str, Any]] = [
        {"key": "number", "label": "Trial"},
        {"key": "state", "label": "State"},
        *({"key": f"param {name}", "label": name, "end": True} for name in names),
        {"key": "value", "label": metric, "end": True},
        {"key": "step", "label": "Steps", "end": True},
    ]
    with parts.tag("div", "", "scroll-x"):
        parts.Rows("Trials of the search", columns).show_rows([_row(trial, metric) for trial in view.items[:_SHOWN]])


def _row(trial: TrialPublic, metric: str) -> dict[str, Any]:
    name = f"{trial.number}" + (" (final)" if trial.role == "final" else "")
    total = f" of {trial.total_steps:,}" if trial.total_steps else ""
    return {
        "id": trial.job_id,
        "number": {"text": name, "href": url(f"/jobs/{trial.job_id}")},
        "state": parts.state_cell(trial.state),
        "value": words.measured(metric, trial.value),
        "step": f"{trial.step:,}{total}",
        **{f"param {key}": _text(value) for key, value in trial.params.items()},
    }


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
