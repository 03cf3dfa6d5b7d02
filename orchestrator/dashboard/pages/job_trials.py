"""The trials of a search: what each was given, how far it is and what it reached."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame, section, url
from orchestrator.schemas import JobPublic
from orchestrator.search_schemas import TrialPage, TrialPublic
from orchestrator.services.jobs import get_job
from orchestrator.services.searches import list_trials

_SHOWN = 500


def draw(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab."""
    metric = str(job.spec.get("metric", "value"))
    with parts.card("Trials", flush=True) as head:
        with head:
            compare = parts.link("Compare the newest twenty", url("/compare"), "small")
        table = section(lambda view: _draw(view, metric))

    def show(view: TrialPage) -> None:
        newest = ",".join(trial.job_id for trial in view.items[-20:])
        compare.props["href"] = url("/compare", jobs=newest, names=metric)
        table(view)

    def read() -> Look[TrialPage]:
        ended = get_job(frame.services.db, job.id).is_terminal
        return Look(list_trials(frame.services.db, job.id, with_curves=False), SELDOM_S if ended else EVERY_S)

    frame.follow(("trials", job.id), read, show)
    return lambda _: None


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
