"""`patchwork report`: the card of a run, as Markdown or JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.markup import escape

from orchestrator.cli import output
from orchestrator.cli.options import Job, Json, Token, Url, client_for, find_job
from orchestrator.schemas import JobCard, MetricSeries

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|#"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def report(
    ctx: typer.Context,
    job: Job = "last",
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Left out: standard output.")] = None,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Write a card of a run: what was asked, versions, data, seeds, curves, evaluations, cost, how to reproduce it.

    Examples:

      patchwork report last -o run.md

      patchwork report job_... --json
    """
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {out.parent}")
    with client_for(ctx, url, token) as client:
        card = client.jobs.card(find_job(client, job).id)
    text = card.model_dump_json(indent=2) + "\n" if as_json else to_markdown(card)
    if out is None:
        sys.stdout.write(text)
        return
    out.write_text(text, encoding="utf-8")
    output.console().print(f"[bold]{escape(str(out))}[/]: the card of {card.job.id}.")


def to_markdown(card: JobCard) -> str:
    """The card as a Markdown page. Users' text is escaped."""
    sections = (
        _head(card),
        _training(card),
        _curves(card.curves),
        _evaluations(card),
        _cost(card),
        _attempts(card),
        _checkpoints(card),
        _reproduce(card),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(card: JobCard) -> str:
    job = card.job
    ended = f", ended {job.ended_at:%Y-%m-%d %H:%M} UTC" if job.ended_at is not None else ""
    lines = [
        f"# {_text(job.name)}",
        "",
        f"`{job.id}` · {job.kind} · **{job.state}**" + (f" ({_text(job.reason)})" if job.reason else ""),
    ]
    if job.message:
        lines += ["", _text(job.message.partition("\n")[0])]
    labels = ", ".join(f"{_text(key)}={_text(value)}" for key, value in sorted(job.labels.items()))
    facts = [
        ("Project", _text(job.project)),
        ("By", _text(job.created_by)),
        ("Submitted", f"{job.created_at:%Y-%m-%d %H:%M} UTC{ended}"),
        ("Labels", labels),
        ("Preset", _text(job.preset or "")),
        ("Starts from", _text(job.init_from or "")),
        ("Retry of", _text(job.retry_of or "")),
    ]
    return "\n".join([*lines, "", _table(("", ""), [(name, value) for name, value in facts if value])])


def _training(card: JobCard) -> str:
    rows = [
        ("Spec", f"`{card.job.spec_hash}`"),
        ("Training fingerprint", f"`{card.job.training_fingerprint}`"),
    ]
    if card.data is not None:
        splits = ", ".join(f"{_text(split.name)} {split.num_examples:,}" for split in card.data.splits)
        rows.append(("Data", f"{_text(card.data.name)} ({splits}), {card.data.num_classes} classes"))
        rows.append(("Data fingerprint", f"`{card.data.fingerprint}`"))
        trained = card.trained_data_fingerprint
        if trained is not None and trained != card.data.fingerprint:
            rows.append(("Data as trained", f"`{trained}`"))
    rows += [(f"`{key}`", str(seed)) for key, seed in sorted(card.seeds.items())]
    rows += [(_text(name), _text(version)) for name, version in sorted(card.versions.items())]
    if card.manifest_of is None:
        rows.append(("Versions", "not recorded: no checkpoint is left"))
    return "## What ran\n\n" + _table(("", ""), rows)


def _curves(curves: Sequence[MetricSeries]) -> str:
    rows = [_curve(series) for series in curves if series.steps]
    if not rows:
        return "## Curves\n\nNo metrics."
    return "## Curves\n\n" + _table(("Metric", "First:", "Last:", "At step:", "Lowest:", "Highest:", "Curve"), rows)


def _curve(series: MetricSeries) -> tuple[str, ...]:
    lows = [value for value in series.lows if value is not None]
    highs = [value for value in series.highs if value is not None]
    return (
        f"`{series.name}`",
        output.number(series.values[0]),
        output.number(series.values[-1]),
        f"{series.steps[-1]:,}",
        output.number(min(lows, default=None)),
        output.number(max(highs, default=None)),
        f"`{output.sparkline(series.values, 30)}`",
    )


def _evaluations(card: JobCard) -> str:
    if not card.evaluations:
        return ""
    rows = [
        (
            f"`{found.checkpoint_id}`",
            f"{_text(found.dataset)} {_text(found.split)}",
            f"{found.num_examples:,}",
            ", ".join(f"{_text(name)} {output.number(value)}" for name, value in sorted(found.metrics.items())),
        )
        for found in card.evaluations
    ]
    return "## Evaluations\n\n" + _table(("Checkpoint", "Data", "Examples:", "Found"), rows)


def _cost(card: JobCard) -> str:
    usage, work = card.job.usage, card.work
    rows = [
        ("Device-seconds", output.number(usage.gpu_seconds)),
        ("of them for steps done again", output.number(usage.wasted_gpu_s)),
        ("Steps done again", f"{usage.wasted_steps:,}"),
        ("Seconds of restarts", output.number(usage.overhead_s)),
        ("exaFLOPs, planned / done / again", " / ".join(map(output.number, (work.planned, work.done, work.repeated)))),
    ]
    note = "Operations are computed (6 x multiply-accumulates of a forward pass for each image), not measured."
    return "## Cost and work lost\n\n" + _table(("", ":"), rows) + f"\n\n{note}"


def _attempts(card: JobCard) -> str:
    rows = [
        (
            str(attempt.number),
            str(attempt.world_size),
            f"{attempt.from_step:,} to {attempt.to_step:,}",
            attempt.exit_reason or attempt.state,
            f"{attempt.wasted_steps:,}",
            _text(attempt.exit_message.partition("\n")[0]),
        )
        for attempt in card.job.attempts
    ]
    head = ("Attempt:", "Workers:", "Steps:", "Ended", "Steps lost:", "Message")
    return "## Attempts\n\n" + _table(head, rows) if rows else ""


def _checkpoints(card: JobCard) -> str:
    rows = [
        (
            f"`{checkpoint.id}`",
            f"{checkpoint.step:,}",
            output.percent(checkpoint.metrics.get("eval/top1")),
            output.num_bytes(checkpoint.num_bytes),
            ", ".join(checkpoint.aliases) if checkpoint.available else "deleted",
        )
        for checkpoint in card.checkpoints
    ]
    return "## Checkpoints\n\n" + _table(("Checkpoint", "Step:", "Top-1:", "Size:", ""), rows) if rows else ""


def _reproduce(card: JobCard) -> str:
    steps = "\n".join(f"{number}. {line}" for number, line in enumerate(card.reproduce, 1))
    spec = yaml.safe_dump(card.job.spec, sort_keys=False, allow_unicode=True, width=float("inf"))
    fence = "```"
    while fence in spec:
        fence += "`"
    return f"## How to reproduce\n\n{steps}\n\n{fence}yaml\n{spec}{fence}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns whose name ends in : are right-aligned."""

    def lines() -> Iterator[str]:
        yield "| " + " | ".join(column.removesuffix(":") for column in columns) + " |"
        yield "|" + "|".join("---:" if column.endswith(":") else "---" for column in columns) + "|"
        for row in rows:
            yield "| " + " | ".join(row) + " |"

    return "\n".join(lines())


def _text(value: str) -> str:
    """Users' text as text: no markup, no HTML, no new line."""
    return " ".join(value.split()).translate(_SPECIAL)
