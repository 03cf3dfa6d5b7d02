"""What a search found, for machines (JSON) and for people (a picture): ranking, history, curves, importances."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import structlog

from configs.layout import search_picture_key, search_report_key
from configs.search import finite_values, in_order
from configs.search_results import best_trial, ranked
from configs.search_wire import SearchReport, SettingReport, TrialRecord
from configs.spec import SearchJob
from workers.search.samplers import distribution_of
from workers.store import ObjectStore

log = structlog.get_logger(__name__)
MIN_FOR_IMPORTANCES = 4
_MAX_LINES = 40


def write_report(
    store: ObjectStore, job_id: str, search: SearchJob, trials: Sequence[TrialRecord]
) -> TrialRecord | None:
    """Writes both files and returns the best trial; None, and nothing is written, if no trial left a value."""
    report = make_report(job_id, search, trials)
    if report is None:
        return None
    store.put(search_report_key(job_id), report.model_dump_json(indent=1).encode())
    store.put(search_picture_key(job_id), draw(search, report, trials))
    return report.best


def make_report(job_id: str, search: SearchJob, trials: Sequence[TrialRecord]) -> SearchReport | None:
    """The report; None if no trial left a value."""
    best = best_trial(search, trials)
    if best is None:
        return None
    settings = tuple(
        SettingReport(
            params=result.params,
            mean=result.mean,
            std=result.std,
            trials=tuple(trial.number for trial in result.trials),
            is_complete=result.is_complete,
        )
        for result in ranked(search, trials)
        if result.mean is not None
    )
    return SearchReport(
        job_id=job_id,
        metric=search.metric,
        mode=search.natural_mode,
        algorithm=search.algorithm,
        scheduler=search.scheduler.name,
        best=best,
        final=next((t for t in trials if t.role == "final"), None),
        settings=settings,
        importances=importances(search, settings),
        states=dict(Counter(str(trial.state) for trial in trials)),
        gpu_seconds=sum(trial.gpu_seconds for trial in trials),
        created_at=datetime.now(UTC),
    )


def importances(search: SearchJob, settings: Sequence[SettingReport]) -> dict[str, float]:
    """How much each key mattered, together 1. Of settings that came to their end; keys with a condition are left out,
    since not every setting has them. Empty with too few settings, or when all did alike."""
    import optuna

    usual = [key for key in in_order(search.space) if not search.space[key].when]
    complete = [s for s in settings if s.is_complete and all(key in s.params for key in usual)]
    varied = [key for key in usual if len({repr(s.params[key]) for s in complete}) > 1]
    if len(complete) < MIN_FOR_IMPORTANCES or not varied or len({s.mean for s in complete}) < 2:
        return {}
    study = optuna.create_study(direction="maximize" if search.sign > 0 else "minimize")
    for setting in complete:
        distributions, internal = {}, {}
        for key in varied:
            distributions[key], internal[key] = distribution_of(search.space[key], setting.params[key])
        study.add_trial(optuna.trial.create_trial(params=internal, distributions=distributions, value=setting.mean))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied)
    return {key: round(float(value), 6) for key, value in found.items()}


# -- the picture -------------------------------------------------------------------------------------------------------
def draw(search: SearchJob, report: SearchReport, trials: Sequence[TrialRecord]) -> bytes:
    """A PNG of four pictures: history, curves, parallel coordinates, importances."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    shown = [trial for trial in sorted(trials, key=lambda t: t.number) if trial.role == "trial"]
    _draw_history(axes[0][0], search, shown)
    _draw_curves(axes[0][1], search, shown, report.best.number)
    _draw_parallel(axes[1][0], search, report)
    _draw_importances(axes[1][1], report)
    figure.suptitle(f"{search.name}: {search.metric}, best {report.best.value:.6g} (trial {report.best.number})")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _draw_history(axis: Any, search: SearchJob, trials: Sequence[TrialRecord]) -> None:
    axis.set_title("History")
    points = [(t.number, t.value, t.state == "SUCCEEDED") for t in trials if t.value is not None]
    for is_complete, marker, label in ((True, "o", "to its end"), (False, "x", "stopped or failed")):
        chosen = [(number, value) for number, value, complete in points if complete == is_complete]
        if chosen:
            axis.scatter(*zip(*chosen, strict=True), marker=marker, label=label)
    best, line = None, []
    for number, value, _ in points:
        best = value if best is None or search.sign * value > search.sign * best else best
        line.append((number, best))
    if line:
        axis.step(*zip(*line, strict=True), where="post", linewidth=1, color="black", label="best so far")
    axis.set_xlabel("trial")
    axis.set_ylabel(search.metric)
    axis.legend(fontsize="small")


def _draw_curves(axis: Any, search: SearchJob, trials: Sequence[TrialRecord], best: int) -> None:
    axis.set_title("Curves")
    for trial in trials:
        if trial.curve:
            is_best = trial.number == best
            style = {"linewidth": 2.0, "zorder": 3, "color": "black"} if is_best else {"linewidth": 0.8, "alpha": 0.7}
            axis.plot(*zip(*trial.curve, strict=True), marker=".", **style)
    axis.set_xlabel("step")
    axis.set_ylabel(search.metric)


def _draw_parallel(axis: Any, search: SearchJob, report: SearchReport) -> None:
    axis.set_title("Settings, the best darkest")
    keys = in_order(search.space)
    settings = report.settings[:_MAX_LINES]
    for rank, setting in reversed(list(enumerate(settings))):
        places = [_place(search, key, setting.params[key]) if key in setting.params else None for key in keys]
        line = [(i, place) for i, place in enumerate(places) if place is not None]
        shade = 0.85 * rank / max(1, len(settings) - 1)
        axis.plot(*zip(*line, strict=True), color=str(shade), linewidth=2.0 if rank == 0 else 1.0, marker=".")
    axis.set_xticks(range(len(keys)), keys, rotation=20, ha="right", fontsize="small")
    axis.set_yticks([0.0, 1.0], ["low", "high"])


def _place(search: SearchJob, key: str, value: Any) -> float:
    """Where a value lies in its parameter's range, from 0 to 1."""
    import math

    parameter = search.space[key]
    values = finite_values(parameter)
    if values is not None:
        return values.index(value) / max(1, len(values) - 1) if value in values else 0.5
    low, high = float(parameter.low), float(parameter.high)  # type: ignore[union-attr]
    if parameter.type == "log_uniform":
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (float(value) - low) / (high - low)


def _draw_importances(axis: Any, report: SearchReport) -> None:
    axis.set_title("Importances (PED-ANOVA)")
    if not report.importances:
        axis.text(0.5, 0.5, "too few settings came to their end", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    names = sorted(report.importances, key=lambda key: report.importances[key])
    axis.barh(names, [report.importances[name] for name in names])
    axis.set_xlim(0.0, 1.0)
