"""Commands that change jobs or lay them side by side: edit, fork, compare; and the service at a glance."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape

from orchestrator.cli import output
from orchestrator.cli.follow import follow_job
from orchestrator.cli.options import Job, Json, Overrides, Token, Url, client_for, find_job, parse_overrides


def edit(
    ctx: typer.Context,
    job: Job,
    priority: Annotated[int | None, typer.Option("--priority", min=0, max=100, help="Higher ones start first.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="key=value, set; may be repeated.")] = None,
    unlabel: Annotated[list[str] | None, typer.Option("--unlabel", metavar="KEY", help="Removed.")] = None,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Change a job's priority, while it has not ended, or its labels.

    Examples:

      patchwork edit last --priority 90

      patchwork edit job_... --label paper=yes --unlabel draft
    """
    if priority is None and not label and not unlabel:
        raise typer.BadParameter("give --priority, --label or --unlabel")
    changes = {}
    for pair in label or []:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{pair!r}: expected KEY=VALUE, such as team=vision", param_hint="--label")
        changes[key] = value
    with client_for(ctx, url, token) as client:
        found = find_job(client, job)
        labels = {k: v for k, v in found.labels.items() if k not in (unlabel or [])} | changes
        wanted = labels if label or unlabel else None
        # What others changed since it was read must not be lost: labels are stored whole.
        done = client.jobs.edit(found.id, priority=priority, labels=wanted, if_match=found.etag)
    if as_json:
        output.print_json(done)
        return
    shown = ", ".join(f"{key}={value}" for key, value in sorted(done.labels.items())) or "none"
    output.console().print(f"{done.id}: priority {done.priority}, labels {escape(shown)}.")


def fork(
    ctx: typer.Context,
    job: Job,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--from", metavar="CHECKPOINT", help="latest, best or ckpt_…; else from the start."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="A name to show.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it run.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Submit a new job made of another one: its description with changes.

    Examples:

      patchwork fork last --set optim.lr=1e-4 --name slower

      patchwork fork job_... --from latest --set resources.workers=4
    """
    wanted = parse_overrides(overrides)
    with client_for(ctx, url, token) as client:
        made = client.jobs.fork(find_job(client, job).id, wanted, checkpoint=checkpoint, name=name)
        if follow:
            made = follow_job(client, made.id, output.errors() if as_json else output.console())
    if as_json:
        output.print_json(made)
    elif not follow:
        where = f"from {made.resume_from}" if made.resume_from else "from the beginning"
        output.console().print(f"Submitted [bold]{made.id}[/] ({escape(made.name)}), {where}.")
    if follow:
        raise typer.Exit(0 if made.state == "SUCCEEDED" else 1)


def compare(
    ctx: typer.Context,
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...", help="Up to 20 jobs, each an id or `last`.")],
    metric: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="May be repeated; left out: train/loss, eval/top1.")
    ] = None,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Lay jobs side by side: last and best values, curves, and where their descriptions differ.

    Examples:

      patchwork compare job_... job_... -m train/loss -m eval/top1
    """
    names = metric or ["train/loss", "eval/top1"]
    with client_for(ctx, url, token) as client:
        ids = [find_job(client, job).id for job in jobs]
        found = client.jobs.compare(ids, names, max_points=200)
    if as_json:
        output.print_json(found)
        return
    out = output.console()
    for name in names:
        rows = []
        for series in (one for one in found.series if one.name == name):
            job = found.jobs[series.index]
            spread = f"{output.number(series.lowest)} to {output.number(series.highest)}"
            line = output.sparkline(series.values)
            rows.append((job.id, escape(job.name), output.number(series.last), spread, line))
        if rows:
            out.print(output.table(("JOB", "NAME", f"{name.upper()}>", "RANGE", "CURVE"), rows))
    if found.differences:
        head = ("FIELD", *(job.id for job in found.jobs))
        out.print(output.table(head, [(escape(d.pointer), *map(_shown, d.values)) for d in found.differences]))
    elif len(ids) > 1:
        out.print("Their descriptions are the same.")


def _shown(value: Any) -> str:
    return "-" if value is None else escape(value if isinstance(value, str) else json.dumps(value))


def lineage(ctx: typer.Context, job: Job, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """Show what a job came of and what came of it: retries, forks, fine-tunes and whatever else took its weights."""
    with client_for(ctx, url, token) as client:
        found = client.jobs.lineage(find_job(client, job).id)
    if as_json:
        output.print_json(found)
        return
    names = {one.id: one.name for one in found.jobs}
    origins: dict[str, list[str]] = {one.id: [] for one in found.jobs}
    for link in found.links:
        origins[link.target].append(f"{link.how} of {names[link.source]} ({link.checkpoint or link.source})")
    rows = [
        (one.id, escape(one.name), one.kind, output.state(one.state), escape("; ".join(origins[one.id])))
        for one in found.jobs
    ]
    out = output.console()
    out.print(output.table(("JOB", "NAME", "KIND", "STATE", "CAME OF"), rows))
    if not found.complete:
        out.print("There are more; these are the nearest.")


def overview(ctx: typer.Context, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """Show the service at a glance: what runs, who waits and why, what failed lately, what is used."""
    with client_for(ctx, url, token) as client:
        view = client.overview()
    if as_json:
        output.print_json(view)
        return
    out, devices = output.console(), view.devices
    counts = ", ".join(f"{number} {state.lower()}" for state, number in view.counts.items() if number)
    out.print(f"jobs       {counts or 'none yet'}")
    out.print(
        f"devices    {devices.gpus_used:g} of {devices.gpus:g} GPUs, {devices.cpus_used:g} of {devices.cpus:g} CPUs"
    )
    out.print(f"kept       {view.storage.num_checkpoints} checkpoints, {output.num_bytes(view.storage.num_bytes)}")
    if view.active:
        rows = [
            (job.id, escape(job.name), output.state(job.state), output.percent((job.progress.pct or 0) / 100))
            for job in view.active
        ]
        out.print(output.table(("RUNS", "NAME", "STATE", "DONE>"), rows))
    if view.queued:
        waits = [(job.id, escape(job.name), escape(job.queue.message if job.queue else "")) for job in view.queued]
        out.print(output.table(("WAITS", "NAME", "WHY"), waits))
    if view.failed:
        failed = [
            (job.id, escape(job.name), str(job.reason), output.ago(job.ended_at or job.created_at))
            for job in view.failed
        ]
        out.print(output.table(("FAILED", "NAME", "WHY", "WHEN>"), failed))
