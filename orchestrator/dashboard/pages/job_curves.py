"""Curves of a job, live: one chart for each thing that is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.dashboard import parts
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame
from orchestrator.schemas import JobPublic
from orchestrator.services.curves import Curve, Curves, read_curves

MAX_POINTS = 400
_SHARE_OF_TIME = 0.05
"""Of a second at most so much goes into reading the curves of one job, however long it is."""
_SMOOTHING = {"0": "None", "0.6": "Light", "0.9": "Strong", "0.97": "Very strong"}


@dataclass(frozen=True)
class _Kind:
    """A chart: its title, whose names it holds, and their unit."""

    title: str
    prefixes: tuple[str, ...]
    unit: str = "number"


_KINDS = (
    _Kind("Loss", ("train/loss", "eval/loss")),
    _Kind("Accuracy", ("eval/top1", "eval/top5", "eval/knn", "eval/few_shot/"), "percent"),
    _Kind("Learning rate", ("train/lr",)),
    _Kind("Gradient norm", ("train/grad_norm",)),
    _Kind("Throughput, images/s", ("perf/images_per_s",)),
    _Kind("Model FLOPs utilisation", ("perf/mfu",), "percent"),
    _Kind("Waiting for data", ("perf/data_wait",), "percent"),
    _Kind("Step time by rank", ("perf/step_time_s/",), "seconds"),
)
_HIDDEN = ("data/sample_ids_crc32/", "eval/num_examples")
"""Numbers for tests, not for eyes."""


def draw(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab."""
    page = _Curves()
    frame.follow(("curves", job.id), _reader(frame, job.id), page.show)
    return lambda job: page.say(job)


class _Curves:
    def __init__(self) -> None:
        self._charts: dict[str, parts.Chart] = {}
        self._shown: dict[str, dict[str, Curve]] = {}
        self._how: dict[str, Any] = {"smooth": 0.0, "log": False}
        with parts.row():
            parts.choice("Smoothing", _SMOOTHING, "0", lambda v: self._change(smooth=float(v)))
            parts.choice(
                "Vertical axis", {"linear": "Linear", "log": "Logarithmic"}, "linear",
                lambda v: self._change(log=v == "log"),
            )  # fmt: skip
        self._grid = parts.tag("div", "", "charts")
        with parts.tag("section", "", "card") as self._none:
            self._none_text = parts.tag("div", "", "empty")
            with self._none_text:
                self._title = parts.tag("p", "No curves yet.", "strong")
                self._hint = parts.tag("p", "")
        self._none.set_visibility(True)

    def say(self, job: JobPublic) -> None:
        """What stands there while there are no curves."""
        waits = "They appear with the first steps."
        parts.set_text(self._hint, "It ended before anything was measured." if job.is_terminal else waits)

    def show(self, view: Curves) -> None:
        parts.show(self._none, not view.curves)
        for kind, curves in _grouped(view.curves):
            if self._shown.get(kind.title) == curves:
                continue
            self._shown[kind.title] = curves
            if kind.title not in self._charts:
                with self._grid:
                    self._charts[kind.title] = parts.Chart(kind.title)
            series = [_series(name, curve, kind) for name, curve in curves.items()]
            self._charts[kind.title].draw({"unit": kind.unit, "series": series, **self._how})

    def _change(self, **how: Any) -> None:
        self._how |= how
        for chart in self._charts.values():
            chart.draw(self._how)


def _grouped(curves: Mapping[str, Curve]) -> list[tuple[_Kind, dict[str, Curve]]]:
    """Charts with their curves, the known ones first, then one for whatever else is measured."""
    left = {name: curve for name, curve in curves.items() if not name.startswith(_HIDDEN)}
    found = []
    for kind in _KINDS:
        own = {name: left.pop(name) for prefix in kind.prefixes for name in sorted(left) if name.startswith(prefix)}
        if own:
            found.append((kind, own))
    for name, curve in sorted(left.items()):
        found.append((_Kind(name, (name,)), {name: curve}))
    return found


def _series(name: str, curve: Curve, kind: _Kind) -> dict[str, Any]:
    short = name.removeprefix("perf/step_time_s/") if "/rank-" in name else name
    one: dict[str, Any] = {"name": short, "steps": curve.steps, "values": curve.values}
    if curve.num_points > len(curve.steps) and kind.title == "Loss":
        one |= {"lows": curve.lows, "highs": curve.highs}
    return one


def _reader(frame: Frame, job_id: str) -> Callable[[], Look[Curves]]:
    last: list[Curves] = []

    def read() -> Look[Curves]:
        started = time.monotonic()
        view = read_curves(frame.services.db, job_id, MAX_POINTS, last[0] if last else None)
        last[:] = [view]
        took = time.monotonic() - started
        return Look(view, SELDOM_S if view.is_final else max(EVERY_S, took / _SHARE_OF_TIME))

    return read
