"""`patchwork vtab`: judge a checkpoint by fine-tunes on many data sets, with one setting for all of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from configs.load import SpecError, parse_text
from orchestrator.cli import output
from orchestrator.cli.options import Json, Overrides, Token, Url, client_for, parse_overrides
from orchestrator.client import Client
from orchestrator.schemas import TERMINAL_STATES
from orchestrator.vtab_schemas import VtabReport

vtab_app = typer.Typer(help="VTAB-1k: judge a checkpoint by fine-tunes on many data sets.", no_args_is_help=True)
POLL_S = 2.0


@vtab_app.command("run")
def run_suite(
    ctx: typer.Context,
    suite: Annotated[Path, typer.Argument(metavar="SUITE.yaml", help="The data sets, under `tasks`.")],
    init_from: Annotated[
        str | None, typer.Option("--from", metavar="CHECKPOINT", help="ckpt_… or job_…/best; left out: the file's.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The suite's name; left out: the file's.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Of each fine-tune (2500).")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Train on 800 of each 1,000 images, measure on the other 200.")
    ] = False,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for all of them; Ctrl-C leaves them.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Queue a fine-tune on 1,000 training images of each data set. All are queued, or none.

    Examples:

      patchwork vtab run suite.yaml --from job_.../best --name l16-vtab --follow

      patchwork vtab run suite.yaml --from ckpt_... --name trial --held-out --steps 500 --set optim.lr=0.003
    """
    body = read_suite(suite)
    given = {"init_from": init_from, "name": name, "steps": steps, "held_out": held_out or None}
    body |= {field: value for field, value in given.items() if value is not None}
    if overrides:
        own = body.get("overrides", {})
        body["overrides"] = (own if isinstance(own, dict) else {}) | parse_overrides(overrides)
    with client_for(ctx, url, token) as client:
        report = client.vtab.create(body)
        if follow:
            report = _wait(client, report.name)
    _print(report, as_json)
    if follow:
        raise typer.Exit(0 if report.num_done == len(report.results) else 1)
    if not as_json:
        output.console().print(f"  results:   patchwork vtab report {report.name}", markup=False)


@vtab_app.command("report")
def report_suite(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The suite's name.")],
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Show what a suite has found: top-1 of each data set, means by group. A mean waits for all of its data sets."""
    with client_for(ctx, url, token) as client:
        report = client.vtab.get(name)
    _print(report, as_json)


def read_suite(path: Path) -> dict[str, Any]:
    """The suite that a file describes.

    Raises:
        SpecError: it is no readable mapping.
        typer.BadParameter: there is no such file.
    """
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}")
    found = parse_text(path.read_bytes())
    if "tasks" not in found:
        raise SpecError.at("/tasks", f"{path} names no data sets: expected them under tasks")
    return found


def _wait(client: Client, name: str) -> VtabReport:
    """The report once every job has ended."""
    said = ""
    while True:
        report = client.vtab.get(name)
        states = {result.task: result.state for result in report.results}
        line = ", ".join(f"{task} {state}" for task, state in states.items())
        if line != said:
            output.errors().print(line, markup=False)
            said = line
        if all(state in TERMINAL_STATES for state in states.values()):
            return report
        time.sleep(POLL_S)


def _print(report: VtabReport, as_json: bool) -> None:
    if as_json:
        output.print_json(report)
        return
    out = output.console()
    out.print(f"[bold]{escape(report.name)}[/]  {escape(report.init_from)}, measured on: {report.split}")
    rows = [
        (
            escape(result.task),
            escape(result.group),
            result.job_id,
            output.state(result.state),
            f"{result.step:,}" + (f"/{result.total_steps:,}" if result.total_steps else ""),
            output.percent(result.top1),
        )
        for result in report.results
    ]
    out.print(output.table(("DATA SET", "GROUP", "JOB", "STATE", "STEP>", "TOP-1>"), rows))
    means = [(escape(g.name), f"{g.num_done}/{g.num_tasks}", output.percent(g.top1)) for g in report.groups]
    means.append(("all", f"{report.num_done}/{len(report.results)}", output.percent(report.top1)))
    out.print(output.table(("MEAN OF", "DONE>", "TOP-1>"), means))
