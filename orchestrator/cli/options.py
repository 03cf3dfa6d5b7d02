"""Options that many commands share, and the client they lead to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer

from orchestrator.client import Client, connect
from orchestrator.schemas import JobPublic

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="PATCHWORK_URL", help="The server; left out: that of `patchwork up` on this machine."),
]
Token = Annotated[str | None, typer.Option("--token", envvar="PATCHWORK_TOKEN", help="Your token for it.")]
DataDirectory = Annotated[
    Path | None,
    typer.Option("--data-dir", envvar="PATCHWORK_DATA_DIR", help="Where `patchwork up` keeps everything."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or `last` for the newest one.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as --set optim.lr=3e-4.")
]


@dataclass(frozen=True)
class Wiring:
    """What the program hands to its commands; tests put a transport here."""

    transport: httpx.BaseTransport | None = None


def client_for(ctx: typer.Context, url: str | None, token: str | None) -> Client:
    """The client of the server that the options, the environment or `patchwork up` name. Raises NotConfigured."""
    wiring = ctx.obj if isinstance(ctx.obj, Wiring) else Wiring()
    return connect(url, token, transport=wiring.transport)


def find_job(client: Client, job: str) -> JobPublic:
    """The job with this id; the newest one for `last`.

    Raises:
        LookupError: there is no job yet.
        ApiError: there is no such job.
    """
    if job != "last":
        return client.jobs.get(job)
    items = client.jobs.page(limit=1).items
    if not items:
        raise LookupError("There is no job yet: submit one with `patchwork submit`.")
    return items[0]


def parse_overrides(given: list[str] | None) -> dict[str, str]:
    """KEY=VALUE pairs. Raises typer.BadParameter."""
    overrides = {}
    for pair in given or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{pair!r}: expected KEY=VALUE, such as optim.lr=3e-4", param_hint="--set")
        overrides[key] = value
    return overrides
