"""What a search has found so far, drawn: history, parallel coordinates, curves, importances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.dashboard import parts
from orchestrator.dashboard.frame import url
from orchestrator.schemas import JobPublic
from orchestrator.search_schemas import TrialPublic

_MAX_CURVES = 40
_MAX_AXES = 9
_PERCENT = ("eval/top1", "eval/top5", "eval/knn")


class SearchPlots:
    """Four pictures side by side. Those with nothing to show are hidden."""

    def __init__(self, job: JobPublic) -> None:
        self._metric = str(job.spec.get("metric", "value"))
        self._is_max = True
        self._space: dict[str, Any] = job.spec.get("space", {})
        self._unit = "percent" if self._metric in _PERCENT else "number"
        with parts.tag("div", "", "charts two"):
            self._history = parts.Chart(f"History of {self._metric}")
            self._curves = parts.Chart(f"Curves of {self._metric}")
            self._parallel = parts.Chart("Parallel coordinates")
            self._parallel.box.classes("whole")
            self._importances = parts.Chart("Importances (PED-ANOVA)")
        for chart in (self._history, self._curves, self._parallel, self._importances):
            parts.show(chart.box, False)

    def show(self, trials: Sequence[TrialPublic], *, is_max: bool) -> None:
        """Draw these trials; with `is_max` larger values are better."""
        self._is_max = is_max
        valued = [trial for trial in trials if trial.value is not None]
        for chart, changes in (
            (self._history, self._history_of(valued)),
            (self._curves, self._curves_of(trials)),
            (self._parallel, self._parallel_of(valued)),
        ):
            _draw(chart, changes)

    def show_importances(self, importances: dict[str, float]) -> None:
        """Draw what the search's report says; nothing while it has none."""
        rows = [{"name": name, "value": share} for name, share in sorted(importances.items(), key=lambda x: x[1])]
        _draw(self._importances, {"kind": "bars", "rows": rows, "size": len(rows)})

    def _history_of(self, valued: Sequence[TrialPublic]) -> dict[str, Any]:
        points: list[dict[str, Any]] = []
        best: list[list[float]] = []
        for trial in (trial for trial in valued if trial.role == "trial"):
            value = _value(trial)
            better = max if self._is_max else min
            best.append([trial.number, better(value, best[-1][1]) if best else value])
            points.append({"x": trial.number, "y": value, "name": _name(trial), "href": url(f"/jobs/{trial.job_id}")})
        return {"kind": "history", "unit": self._unit, "points": points, "best": best, "size": len(points)}

    def _curves_of(self, trials: Sequence[TrialPublic]) -> dict[str, Any]:
        shown = [trial for trial in trials if trial.curve][-_MAX_CURVES:]
        series = [
            {"name": _name(t), "steps": [step for step, _ in t.curve], "values": [value for _, value in t.curve]}
            for t in shown
        ]
        return {"unit": self._unit, "series": series, "size": len(series)}

    def _parallel_of(self, valued: Sequence[TrialPublic]) -> dict[str, Any]:
        names = sorted({name for trial in valued for name in trial.params})[:_MAX_AXES]
        # A line from an axis to nowhere tells nothing: trials that have all of them.
        whole = [trial for trial in valued if all(name in trial.params for name in names)]
        axes = [self._axis(name, [trial.params[name] for trial in whole]) for name in names]
        values = [_value(trial) for trial in whole]
        low, high = (min(values), max(values)) if values else (0.0, 0.0)
        rows = []
        for trial, value in zip(whole, values, strict=True):
            share = (value - low) / (high - low) if high > low else 1.0
            rows.append(
                {
                    "name": _name(trial),
                    "href": url(f"/jobs/{trial.job_id}"),
                    "values": [*(_place(trial.params[n], a) for n, a in zip(names, axes, strict=True)), value],
                    "good": share if self._is_max else 1.0 - share,
                }
            )
        return {"kind": "parallel", "axes": [*axes, {"name": self._metric}], "rows": rows, "size": len(rows)}

    def _axis(self, name: str, values: Sequence[Any]) -> dict[str, Any]:
        if all(_is_number(value) for value in values):
            is_log = "log" in str(self._space.get(name, {}).get("type", "")) and all(value > 0 for value in values)
            return {"name": name, "log": is_log}
        return {"name": name, "options": sorted({str(value) for value in values})}


def _draw(chart: parts.Chart, changes: dict[str, Any]) -> None:
    parts.show(chart.box, changes["size"] > 0)
    if changes["size"]:
        chart.draw(changes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _place(value: Any, axis: dict[str, Any]) -> Any:
    return str(value) if "options" in axis else value


def _value(trial: TrialPublic) -> float:
    assert trial.value is not None
    return trial.value


def _name(trial: TrialPublic) -> str:
    return f"Trial {trial.number}" + (" (final)" if trial.role == "final" else "")
