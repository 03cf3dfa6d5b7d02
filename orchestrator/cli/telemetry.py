"""Commands about what a job says: logs, metrics, events."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import typer
from rich.markup import escape

from configs.wire import LogLine
from orchestrator.cli import output
from orchestrator.cli.follow import Detached
from orchestrator.cli.options import Job, Json, Token, Url, client_for, find_job
from orchestrator.client import Client
from orchestrator.schemas import EventPublic


def logs(
    ctx: typer.Context,
    job: Job = "last",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with lines as they arrive.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", "-n", min=1, max=10_000, help="Only the last lines.")] = None,
    stream: Annotated[str | None, typer.Option("--stream", help="driver, rank-00000, …")] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1)] = None,
    level: Annotated[
        str | None, typer.Option("--level", help="This level and above: debug, info, warning, error.")
    ] = None,
    grep: Annotated[str | None, typer.Option("--grep", help="Only lines that hold this text.")] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="Only lines in which this is found.")] = None,
    since: Annotated[str | None, typer.Option("--since", help="From this time on, such as 2026-01-31T12:00Z.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="Before this time.")] = None,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Print a job's log: the driver's and every rank's lines, merged by time.

    Examples:

      patchwork logs -f job_...

      patchwork logs last --stream rank-00001 --level warning

      patchwork logs last --regex "loss: (nan|inf)" --since 2026-01-31T12:00Z
    """
    filters: dict[str, Any] = {"stream": stream, "attempt": attempt, "level": level, "q": grep}
    filters |= {"regex": regex, "since": since, "until": until}
    with client_for(ctx, url, token) as client:
        job_id = find_job(client, job).id
        read = client.jobs.follow_logs if follow else client.jobs.log_lines
        try:
            for line in read(job_id, tail=tail, **filters):
                sys.stdout.write(line.model_dump_json() + "\n" if as_json else _plain(line))
                if follow:
                    sys.stdout.flush()
        except KeyboardInterrupt:
            raise Detached(job_id) from None


def _plain(line: LogLine) -> str:
    """A line for people; what could move the terminal's cursor is escaped."""
    message = output.printable(line.msg).rstrip("\n").replace("\n", "\n    ")
    return f"{line.t.astimezone():%H:%M:%S} {line.stream:<10} {line.level:<7} {message}\n"


def events(
    ctx: typer.Context,
    job: Job = "last",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with events as they happen.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Print what happened to a job, and who did it."""
    with client_for(ctx, url, token) as client:
        job_id = find_job(client, job).id
        read = client.jobs.follow_events if follow else client.jobs.events
        try:
            for event in read(job_id):
                if as_json:
                    sys.stdout.write(event.model_dump_json() + "\n")
                else:
                    output.console().print(_event(event))
        except KeyboardInterrupt:
            raise Detached(job_id) from None


def _event(event: EventPublic) -> str:
    who = f" [dim]({escape(event.actor)})[/]" if event.actor else ""
    return f"{event.at.astimezone():%Y-%m-%d %H:%M:%S}  [bold]{event.type}[/]  {escape(event.message)}{who}"


def metrics(
    ctx: typer.Context,
    job: Job = "last",
    names: Annotated[list[str] | None, typer.Argument(help="Such as train/loss eval/top1; left out: all.")] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write every point to FILE; - is standard output.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="The same as Parquet, for pandas and others.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="DIR", help="Fetch its event files into DIR/<job>.")
    ] = None,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Show a job's metrics: last value, range and curve of each; or write every point to a file.

    Examples:

      patchwork metrics last train/loss eval/top1

      patchwork metrics job_... --csv points.csv

      patchwork metrics last --tensorboard runs     # then: tensorboard --logdir runs
    """
    if sum(option is not None for option in (csv, parquet, tensorboard)) + as_json > 1:
        raise typer.BadParameter("give one of --csv, --parquet, --tensorboard and --json")
    if tensorboard is not None and names:
        raise typer.BadParameter(f"names ({names[0]}) do not apply with --tensorboard: its files hold every metric")
    with client_for(ctx, url, token) as client:
        if csv is not None:
            _write_points(client, find_job(client, job).id, names or [], csv, "csv")
            return
        if parquet is not None:
            _write_points(client, find_job(client, job).id, names or [], parquet, "parquet")
            return
        if tensorboard is not None:
            _fetch_event_files(client, find_job(client, job).id, tensorboard)
            return
        found = client.jobs.metrics(find_job(client, job).id, names or (), max_points=400)
    if as_json:
        output.print_json(found)
        return
    rows = []
    for series in found.series:
        known = [v for v in series.values if v is not None]
        last = output.number(series.values[-1]) if series.values else "-"
        spread = f"{output.number(min(known))} to {output.number(max(known))}" if known else "-"
        steps = f"{series.steps[-1]:,}" if series.steps else "-"
        rows.append((series.name, last, steps, spread, output.sparkline(series.values)))
    if not rows:
        known_names = ", ".join(found.names)
        output.console().print(f"No such metric; there are: {known_names}" if known_names else "No metrics yet.")
        return
    output.console().print(output.table(("METRIC", "LAST>", "STEP>", "RANGE", "CURVE"), rows))


def _write_points(client: Client, job_id: str, names: list[str], path: Path, format: Literal["csv", "parquet"]) -> None:
    """Write every point to `path`, which appears only when it is whole."""
    if str(path) == "-":
        client.jobs.write_metrics(job_id, sys.stdout.buffer, names, format)
        return
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}")
    num_bytes = _written_whole(path, lambda file: client.jobs.write_metrics(job_id, file, names, format))
    output.console().print(f"[bold]{escape(str(path))}[/]: {output.num_bytes(num_bytes)}.")


def _fetch_event_files(client: Client, job_id: str, directory: Path) -> None:
    """Bring `directory`/<job> up to what the server has. Files only grow: one of the same length is not fetched."""
    folder = directory / job_id
    files = client.jobs.event_files(job_id)
    if not files:
        output.console().print("No event files: nothing was measured yet, or the server's setting tensorboard is off.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    for file in files:
        path = folder / Path(file.name).name
        if not path.exists() or path.stat().st_size != file.num_bytes:
            num_bytes += _written_whole(path, partial(client.jobs.write_event_file, job_id, file.name))
    out = output.console()
    out.print(f"[bold]{escape(str(folder))}[/]: {len(files)} event files, {output.num_bytes(num_bytes)} fetched.")
    out.print(f"tensorboard --logdir {escape(str(directory))}", soft_wrap=True)


def _written_whole(path: Path, write: Callable[[BinaryIO], int]) -> int:
    """Write a file that appears only when it is whole. Returns its number of bytes."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            num_bytes = write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return num_bytes
