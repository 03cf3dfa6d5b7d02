"""Hyperparameter search: search create, show, trials, best, add, slots, report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orchestrator.cli import output
from orchestrator.cli.follow import Detached
from orchestrator.cli.jobs import Preset, SpecFile, read_spec
from orchestrator.cli.options import Json, Overrides, Token, Url, client_for, parse_overrides
from orchestrator.client import Client, PatchworkError, Unreachable
from orchestrator.search_schemas import SearchPublic, TrialPublic

search_app = typer.Typer(help="Hyperparameter search: many trials of one base, the best one's checkpoint.")
Search = Annotated[str, typer.Argument(metavar="SEARCH", help="A search's id, or `last` for the newest one.")]
POLL_S = 1.0
_ABSENT_S = 60.0
_MAX_ROWS = 30


@search_app.command("create")
def create(
    ctx: typer.Context,
    spec: SpecFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it; Ctrl-C leaves it running.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Submit a search, a job of `kind: search`.

    Examples:

      patchwork search create lr.yaml --follow

      patchwork search create --preset search/flowers-lr --set base.init_from=job_.../best
    """
    raw = read_spec(spec, preset)
    with client_for(ctx, url, token) as client:
        job = client.jobs.create(raw, parse_overrides(overrides))
        if follow:
            found = _follow(client, job.id)
            if as_json:
                output.print_json(found)
            raise typer.Exit(0 if found.job.state == "SUCCEEDED" else 1)
    if as_json:
        output.print_json(job)
        return
    out = output.console()
    out.print(f"Submitted [bold]{job.id}[/] ({escape(job.name)}).")
    out.print(f"  watch it:   patchwork search show {job.id} --follow")


@search_app.command("show")
def show(
    ctx: typer.Context,
    search: Search = "last",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it until it ends.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Show a search: state, trials so far, the best one. With --follow its trials in a live table."""
    with client_for(ctx, url, token) as client:
        job_id = _find(client, search)
        found = _follow(client, job_id) if follow else client.searches.get(job_id)
    if as_json:
        output.print_json(found)
    elif not follow:
        out = output.console()
        for line in _summary(found):
            out.print(line)
    if follow:
        raise typer.Exit(0 if found.job.state == "SUCCEEDED" else 1)


@search_app.command("trials")
def trials(
    ctx: typer.Context,
    search: Search = "last",
    curves: Annotated[bool, typer.Option("--curves", help="Draw each trial's curve.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """List a search's trials: setting, state, value, cost, and why one was stopped."""
    with client_for(ctx, url, token) as client:
        found = client.searches.trials(_find(client, search), curves)
    if as_json:
        output.print_json(found)
        return
    output.console().print(_table(found, curves) if found else "No trials yet.")


@search_app.command("best")
def best(
    ctx: typer.Context, search: Search = "last", as_json: Json = False, url: Url = None, token: Token = None
) -> None:
    """Show the best trial so far and its checkpoint."""
    with client_for(ctx, url, token) as client:
        found = client.searches.best(_find(client, search))
    if as_json:
        output.print_json(found)
        return
    out = output.console()
    out.print(
        f"Trial [bold]{found.number}[/], job {found.job_id}: {output.number(found.value, 6)} at step {found.step:,}"
    )
    for key, value in sorted(found.params.items()):
        out.print(f"  {escape(key)} = {escape(_value(value))}")
    if found.checkpoint is not None:
        out.print(f"  checkpoint  {found.checkpoint}")
        out.print(f"  take it away:  patchwork fetch {found.job_id}")


@search_app.command("add")
def add(
    ctx: typer.Context,
    search: Search,
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, help="How many more.")],
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Make more trials. A search that has ended goes on as a new job that knows its trials."""
    with client_for(ctx, url, token) as client:
        job_id = _find(client, search)
        job = client.searches.add(job_id, trials)
    if as_json:
        output.print_json(job)
    elif job.id == job_id:
        output.console().print(f"{trials} more trials.")
    else:
        output.console().print(f"Goes on as [bold]{job.id}[/].")


@search_app.command("slots")
def slots(
    ctx: typer.Context,
    search: Search,
    slots: Annotated[int | None, typer.Argument(min=1, help="Left out: as many as there are workers.")] = None,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Say how many trials may run side by side from now on; those that run go on."""
    with client_for(ctx, url, token) as client:
        found = client.searches.set_slots(_find(client, search), slots)
    if as_json:
        output.print_json(found)
    else:
        output.console().print(f"{slots} trials side by side." if slots else "As many trials as there are workers.")


@search_app.command("report")
def report(
    ctx: typer.Context,
    search: Search = "last",
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE.png", help="Write it as a PNG.")] = None,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Show what a search found: its settings ranked, importances, cost."""
    with client_for(ctx, url, token) as client:
        job_id = _find(client, search)
        found = client.searches.report(job_id)
        if picture is not None:
            with picture.open("wb") as file:
                client.searches.write_picture(job_id, file)
    if as_json:
        output.print_json(found)
        return
    out = output.console()
    rows = [
        (
            str(place),
            output.number(setting.mean, 6),
            output.number(setting.std, 3),
            escape(_params(setting.params)),
            ", ".join(map(str, setting.trials)),
            "" if setting.is_complete else "stopped",
        )
        for place, setting in enumerate(found.settings[:_MAX_ROWS], start=1)
    ]
    out.print(output.table(("PLACE>", f"{found.metric.upper()}>", "STD>", "SETTING", "TRIALS", ""), rows))
    for key, share in sorted(found.importances.items(), key=lambda item: -item[1]):
        out.print(f"  {escape(key)}  importance {share:.2f}")
    out.print(f"  used  {output.number(found.gpu_seconds)} device-seconds")
    if picture is not None:
        out.print(f"  picture  {picture}", markup=False)


# -- showing -----------------------------------------------------------------------------------------------------------
def _find(client: Client, search: str) -> str:
    if search != "last":
        return search
    items = client.jobs.page(kind="search", limit=1).items
    if not items:
        raise LookupError("There is no search yet: submit one with `patchwork search create`.")
    return items[0].id


def _follow(client: Client, job_id: str) -> SearchPublic:
    """The search's trials in a table that stays, until it ends; in a file or pipe, a line for each trial that ended.

    Raises:
        Detached: Ctrl-C.
        Unreachable: the server stayed away for a minute.
    """
    out, answered, said = output.console(), time.monotonic(), 0
    try:
        with Live(console=out, auto_refresh=False, transient=False) if out.is_terminal else _Silent() as live:
            while True:
                try:
                    search, made = client.searches.get(job_id), client.searches.trials(job_id)
                    answered = time.monotonic()
                except Unreachable:
                    if time.monotonic() - answered > _ABSENT_S:
                        raise
                    time.sleep(POLL_S)
                    continue
                live.update(Group(*map(Text.from_markup, _summary(search)), _table(made)), refresh=True)
                if not out.is_terminal and search.num_ended > said:
                    said = search.num_ended
                    best_value = output.number(search.best.value, 6) if search.best is not None else "-"
                    out.print(
                        f"{said}/{search.num_trials} trials ended, best {search.metric} {best_value}", markup=False
                    )
                if search.job.is_terminal:
                    break
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        raise Detached(job_id) from None
    if not out.is_terminal:
        for line in _summary(search):
            out.print(line)
    if search.job.state == "FAILED":
        raise PatchworkError(f"The search failed: {output.explanation(search.job)}")
    return search


def _say_progress(search: SearchPublic, num_ended: int) -> None:
    value = output.number(search.best.value, 6) if search.best is not None else "-"
    line = f"{num_ended}/{search.num_trials} trials ended, best {search.metric} {value}"
    output.console().print(line, markup=False)


class _Silent:
    """In place of a live table where nobody looks."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, *_: object, **__: object) -> None:
        pass


def _summary(search: SearchPublic) -> list[str]:
    job = search.job
    states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(search.states.items()))
    lines = [
        f"[bold]{job.id}[/]  {escape(job.name)}  (search, {search.metric} {search.mode})",
        f"  state       {output.state(job.state)}  {escape(output.explanation(job))}",
        f"  trials      {search.num_ended} of {search.num_trials} ended{f' ({states})' if states else ''}",
        f"  used        {output.number(search.gpu_seconds)} device-seconds in trials",
    ]
    if search.best is not None:
        value = output.number(search.best.value, 6)
        lines.append(f"  best        trial {search.best.number}: {value}  {escape(_params(search.best.params))}")
    if search.final is not None:
        lines.append(
            f"  final run   {search.final.job_id}: {search.final.state} {output.number(search.final.value, 6)}"
        )
    return lines


def _table(trials: tuple[TrialPublic, ...], curves: bool = False) -> Table:
    shown = trials if len(trials) <= _MAX_ROWS else trials[-_MAX_ROWS:]
    columns = ["TRIAL>", "STATE", "STEP>", "VALUE>", "SECONDS>", "SETTING", "WHY"] + (["CURVE"] if curves else [])
    return output.table(columns, [_row(trial, curves) for trial in shown])


def _row(trial: TrialPublic, curves: bool) -> tuple[str, ...]:
    steps = f"{trial.step:,}" + (f"/{trial.total_steps:,}" if trial.total_steps else "")
    why = trial.message.partition("\n")[0] if trial.state != "SUCCEEDED" else ""
    name = "final" if trial.role == "final" else str(trial.number)
    cells = (
        name,
        output.state(trial.state),
        steps,
        output.number(trial.value, 6),
        output.number(trial.gpu_seconds, 3),
        escape(_params(trial.params)),
        escape(why[:100]),
    )
    return (*cells, output.sparkline([value for _, value in trial.curve])) if curves else cells


def _params(params: dict[str, object]) -> str:
    return "  ".join(f"{key}={_value(value)}" for key, value in sorted(params.items()))


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
