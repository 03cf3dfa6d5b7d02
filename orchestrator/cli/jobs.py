"""Commands about jobs: submit, list, show, cancel, pause, resume, retry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from configs.load import SpecError, parse_text
from orchestrator.cli import output
from orchestrator.cli.follow import follow_job
from orchestrator.cli.options import Job, Json, Overrides, Token, Url, client_for, find_job, parse_overrides
from orchestrator.schemas import JobPublic

SpecFile = Annotated[
    Path | None, typer.Argument(metavar="[SPEC.yaml]", help="A job description; - reads standard input.")
]
_FOR_TESTS = "data/sample_ids_crc32/"
"""Metrics that prove which samples a rank saw; no number for people."""
Preset = Annotated[str | None, typer.Option("--preset", help="Start from a preset (see `patchwork presets`).")]


def read_spec(path: Path | None, preset: str | None) -> dict[str, Any]:
    """What the user wrote, with the preset's name in it.

    Raises:
        SpecError: it is not a readable mapping.
        typer.BadParameter: neither a file nor a preset, or no such file.
    """
    if path is None and preset is None:
        raise typer.BadParameter("give a job description (SPEC.yaml), or --preset NAME, or both")
    raw: dict[str, Any] = {}
    if path is not None:
        if str(path) != "-" and not path.is_file():
            raise typer.BadParameter(f"there is no file {path}")
        raw = parse_text(sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes())
    if preset is not None:
        if raw.get("preset") not in (None, preset):
            raise SpecError.at("/preset", f"the file names preset {raw['preset']!r}, --preset says {preset!r}")
        raw["preset"] = preset
    return raw


def submit(
    ctx: typer.Context,
    spec: SpecFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option("--name", help="A name to show.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it run; Ctrl-C leaves it running.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan only; nothing is stored.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Submit a job.

    Examples:

      patchwork submit --preset demo/fashion-mnist-pretrain --follow

      patchwork submit my-job.yaml --set optim.lr=3e-4 --set resources.workers=4

      patchwork submit --preset paper/finetune/flowers-l16 --set init_from=job_.../best --dry-run
    """
    raw = read_spec(spec, preset)
    if name is not None:
        raw["name"] = name
    wanted = parse_overrides(overrides)
    with client_for(ctx, url, token) as client:
        if dry_run:
            preview = client.jobs.preview(raw, wanted)
            if as_json:
                output.print_json(preview)
            else:
                from orchestrator.cli.plan import print_plan

                output.console().print("[bold]Valid.[/] Nothing was stored (--dry-run).")
                print_plan(preview.plan)
            return
        job = client.jobs.create(raw, wanted)
        if not follow:
            if as_json:
                output.print_json(job)
                return
            out = output.console()
            out.print(f"Submitted [bold]{job.id}[/] ({escape(job.name)}).")
            out.print(f"  watch it:   patchwork show {job.id} --follow")
            return
        job = follow_job(client, job.id, output.errors() if as_json else output.console())
    if as_json:
        output.print_json(job)
    raise typer.Exit(0 if job.state == "SUCCEEDED" else 1)


def list_jobs(
    ctx: typer.Context,
    state: Annotated[list[str] | None, typer.Option("--state", help="Only in this state; may be repeated.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="pretrain, finetune, evaluate, inspect or export.")] = None,
    project: Annotated[str | None, typer.Option("--project")] = None,
    name: Annotated[str | None, typer.Option("--name", help="A part of the name.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="key=value; may be repeated.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=200, help="At most so many.")] = 20,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """List jobs, the newest first.

    Examples:

      patchwork list --state RUNNING --state QUEUED

      patchwork list --label team=vision -n 100 --json
    """
    with client_for(ctx, url, token) as client:
        states = [s.upper() for s in state or []]
        page = client.jobs.page(state=states, kind=kind, project=project, name=name, label=label or (), limit=limit)
    if as_json:
        output.print_json(page.items)
        return
    out = output.console()
    if not page.items:
        out.print("No jobs." if not (state or kind or project or name or label) else "No jobs match.")
        return
    out.print(output.table(("JOB", "NAME", "KIND", "STATE", "STEP>", "TOP-1>", "CREATED>"), map(_row, page.items)))
    if page.next_cursor:
        out.print(f"[dim]The newest {len(page.items)}; see more with -n.[/]")


def _row(job: JobPublic) -> tuple[str, ...]:
    progress = job.progress
    steps = f"{progress.step:,}" + (f"/{progress.total_steps:,}" if progress.total_steps else "")
    top1 = output.percent(job.last_metrics.get("eval/top1"))
    waits = f" [dim]{job.reason}[/]" if job.state == "QUEUED" and job.reason else ""
    return (
        job.id,
        escape(job.name),
        job.kind,
        output.state(job.state) + waits,
        steps,
        top1,
        output.ago(job.created_at),
    )


def show(
    ctx: typer.Context,
    job: Job = "last",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it until it ends.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Show a job: state and reason, progress, attempts, work lost, checkpoints."""
    with client_for(ctx, url, token) as client:
        found = find_job(client, job)
        if follow:
            found = follow_job(client, found.id, output.errors() if as_json else output.console())
        if as_json:
            output.print_json(found)
        elif not follow:
            _print_job(found)
            _print_checkpoints(client.jobs.checkpoints(found.id))
    if follow:
        raise typer.Exit(0 if found.state == "SUCCEEDED" else 1)


def _print_job(job: JobPublic) -> None:
    out = output.console()
    out.print(f"[bold]{job.id}[/]  {escape(job.name)}  ({job.kind}, project {job.project}, priority {job.priority})")
    out.print(f"  state       {output.state(job.state)}  {escape(output.explanation(job))}")
    if job.queue is not None:
        eta = f", starts in about {output.duration(job.queue.eta_s)}" if job.queue.eta_s is not None else ""
        out.print(f"  queue       position {job.queue.position}{eta}")
    progress = job.progress
    if progress.total_steps:
        left = f", {output.duration(progress.eta_s)} left" if progress.eta_s is not None and not job.is_terminal else ""
        pct = f" ({progress.pct:.0f} %)" if progress.pct is not None else ""
        out.print(f"  progress    step {progress.step:,} of {progress.total_steps:,}{pct}{left}")
    shown = {name: value for name, value in job.last_metrics.items() if not name.startswith(_FOR_TESTS)}
    metrics = "  ".join(f"{name} {output.number(value)}" for name, value in sorted(shown.items()))
    if metrics:
        out.print(f"  metrics     {escape(metrics)}")
    usage = job.usage
    out.print(
        f"  used        {output.number(usage.gpu_seconds)} device-seconds; lost to restarts: {usage.wasted_steps} "
        f"steps, {output.number(usage.wasted_gpu_s)} device-seconds, {output.duration(usage.overhead_s)} restarting"
    )
    for label, value in (("preset", job.preset), ("init from", job.init_from), ("retry of", job.retry_of)):
        if value:
            out.print(f"  {label:<11} {escape(value)}")
    for line in output.failure(job):
        out.print(line)
    if job.attempts:
        rows = [
            (
                str(a.number),
                a.state if a.exit_reason is None else str(a.exit_reason),
                str(a.world_size),
                f"{a.from_step:,} to {a.to_step:,}",
                a.phase,
                escape(a.exit_message.splitlines()[0] if a.exit_message else ""),
            )
            for a in job.attempts
        ]
        out.print(output.table(("ATTEMPT", "STATE", "WORKERS>", "STEPS>", "PHASE", "MESSAGE"), rows))


def _print_checkpoints(checkpoints: tuple[Any, ...]) -> None:
    available = [c for c in checkpoints if c.available]
    if available:
        rows = [
            (
                c.id,
                f"{c.step:,}",
                output.percent(c.metrics.get("eval/top1")),
                output.num_bytes(c.num_bytes),
                ", ".join(c.aliases),
            )
            for c in available
        ]
        output.console().print(output.table(("CHECKPOINT", "STEP>", "TOP-1>", "SIZE>", "ALSO"), rows))


def cancel(ctx: typer.Context, job: Job, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """Ask for a job's end. A running one saves a checkpoint first; `patchwork retry` goes on from it."""
    _steer(ctx, "cancel", job, as_json, url, token)


def pause(ctx: typer.Context, job: Job, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """Let a job save a checkpoint and give its workers back until `patchwork resume`."""
    _steer(ctx, "pause", job, as_json, url, token)


def resume(ctx: typer.Context, job: Job, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """Let a paused job go on."""
    _steer(ctx, "resume", job, as_json, url, token)


def _steer(ctx: typer.Context, action: str, job: str, as_json: bool, url: str | None, token: str | None) -> None:
    with client_for(ctx, url, token) as client:
        found = find_job(client, job)
        done = {"cancel": client.jobs.cancel, "pause": client.jobs.pause, "resume": client.jobs.resume}[action](
            found.id
        )
    if as_json:
        output.print_json(done)
    else:
        output.console().print(f"{done.id}: {action} was asked for; it is {output.state(done.state)}.")


def retry(
    ctx: typer.Context,
    job: Job,
    from_start: Annotated[bool, typer.Option("--from-start", help="Do not use its last checkpoint.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it run.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Queue a failed or cancelled job again, from its last checkpoint."""
    with client_for(ctx, url, token) as client:
        made = client.jobs.retry(find_job(client, job).id, resume=not from_start)
        if follow:
            made = follow_job(client, made.id, output.errors() if as_json else output.console())
    if as_json:
        output.print_json(made)
    elif not follow:
        output.console().print(f"Submitted [bold]{made.id}[/], a retry of {made.retry_of}.")
    if follow:
        raise typer.Exit(0 if made.state == "SUCCEEDED" else 1)
