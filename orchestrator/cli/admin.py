"""Commands about the server: cluster, data sets, tokens, version."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer
from rich.markup import escape

from orchestrator.cli import output
from orchestrator.cli.options import Json, Token, Url, client_for
from orchestrator.client import NotConfigured, PatchworkError

datasets_app = typer.Typer(help="Data sets: list them, register image folders.", no_args_is_help=True)
tokens_app = typer.Typer(help="Tokens: list, make and revoke them (administrators).", no_args_is_help=True)


def cluster(ctx: typer.Context, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """Show the machines, what runs on them, and whether every part of the server works."""
    with client_for(ctx, url, token) as client:
        found, readiness = client.cluster(), client.readiness()
    if as_json:
        output.print_json({"cluster": found.model_dump(mode="json"), "readiness": readiness.model_dump(mode="json")})
        return
    out = output.console()
    reachable = "[green]reachable[/]" if found.reachable else "[red]not reachable[/]"
    out.print(f"Ray cluster {escape(found.cluster_id or '-')}: {reachable} {escape(found.message)}")
    rows = [
        (
            node.id[:12],
            "[green]alive[/]" if node.alive else "[red]gone[/]",
            f"{node.cpus:g}",
            f"{node.gpus:g}",
            node.accelerator or "-",
        )
        for node in found.nodes
    ]
    if rows:
        out.print(output.table(("NODE", "STATE", "CPUS>", "GPUS>", "ACCELERATOR"), rows))
    if found.jobs:
        out.print("Jobs: " + ", ".join(f"{count} {output.state(state)}" for state, count in found.jobs.items()))
    for sink in found.sinks:
        mark = "[green]ok[/]" if sink.ok else "[red]fails[/]"
        out.print(f"  {sink.name:<14}{mark}  [dim]{escape(sink.message) or 'metrics are written to it'}[/]")
    for check in readiness.checks:
        mark = "[green]ok[/]" if check.ok else "[red]fails[/]"
        out.print(f"  {check.name:<14}{mark}  [dim]{escape(check.message)}[/]")


@datasets_app.command("list")
def list_datasets(ctx: typer.Context, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """List the data sets that jobs may name."""
    with client_for(ctx, url, token) as client:
        found = client.datasets()
    if as_json:
        output.print_json(found)
        return
    rows = [
        (
            escape(d.name),
            d.card.type,
            f"{d.card.num_classes:,}",
            ", ".join(f"{split.name} {split.num_examples:,}" for split in d.card.splits),
            ("registered" if d.registered else "built in") if d.available else "for planning only",
        )
        for d in found
    ]
    output.console().print(output.table(("NAME", "TYPE", "CLASSES>", "IMAGES", ""), rows))


@datasets_app.command("add")
def add_dataset(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What jobs will call it (data.source.name).")],
    path: Annotated[str, typer.Argument(help="The folder, relative to the data root: <split>/<class>/<image> in it.")],
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Register an image folder that lies under the server's data root."""
    with client_for(ctx, url, token) as client:
        made = client.add_dataset(name, path)
    if as_json:
        output.print_json(made)
        return
    splits = ", ".join(f"{split.name} {split.num_examples:,}" for split in made.card.splits)
    output.console().print(
        f"Registered [bold]{escape(made.name)}[/]: {made.card.num_classes:,} classes, {splits} images."
    )


@tokens_app.command("list")
def list_tokens(ctx: typer.Context, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """List the tokens (never their secrets)."""
    with client_for(ctx, url, token) as client:
        found = client.tokens()
    if as_json:
        output.print_json(found)
        return
    rows = [
        (
            t.id,
            escape(t.name),
            t.role,
            output.ago(t.created_at),
            "revoked" if t.revoked_at else (f"until {t.expires_at:%Y-%m-%d}" if t.expires_at else "active"),
        )
        for t in found.items
    ]
    output.console().print(output.table(("TOKEN", "NAME", "ROLE", "MADE", "STATE"), rows))


@tokens_app.command("create")
def create_token(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Whose it is; written beside every change made with it.")],
    role: Annotated[str, typer.Option("--role", help="viewer, member or admin.")] = "member",
    expires_days: Annotated[int | None, typer.Option("--expires-days", min=1, help="Left out: never.")] = None,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Make a token. It is shown this once."""
    with client_for(ctx, url, token) as client:
        made = client.create_token(name, role, None if expires_days is None else expires_days * 86_400)
    if as_json:
        output.print_json(made)
        return
    out = output.console()
    out.print(made.token, markup=False)
    output.errors().print(f"[dim]Token {made.id} ({made.role}) for {escape(made.name)}. It is not shown again.[/]")


@tokens_app.command("bootstrap")
def bootstrap_token(
    name: Annotated[str, typer.Option("--name", help="Whose it is.")] = "admin",
) -> None:
    """Make the first administrator's token, on a machine that holds the server's settings. It is shown this once."""
    try:
        from orchestrator.services.auth import new_token
        from orchestrator.services.tokens import ensure_admin_token, list_tokens
        from orchestrator.settings import load_settings
        from orchestrator.storage.db import Database
    except ModuleNotFoundError as error:
        raise PatchworkError(f"{error.name} is not installed: pip install 'patchwork-vit[server]'") from error
    database = Database(load_settings().database_url)
    try:
        database.upgrade()
        if any(t.role == "admin" and t.revoked_at is None for t in list_tokens(database).items):
            raise PatchworkError(
                "There is an administrator's token already: use it to make others, `patchwork tokens create`."
            )
        secret = new_token()
        ensure_admin_token(database, secret, name)
    finally:
        database.close()
    output.console().print(secret, markup=False)
    output.errors().print(f"[dim]An administrator's token for {escape(name)}. It is not shown again.[/]")


@tokens_app.command("revoke")
def revoke_token(
    ctx: typer.Context,
    token_id: Annotated[str, typer.Argument(metavar="TOKEN_ID", help="tok_… of `patchwork tokens list`.")],
    url: Url = None,
    token: Token = None,
) -> None:
    """Make a token useless, at once."""
    with client_for(ctx, url, token) as client:
        client.revoke_token(token_id)
    output.console().print(f"{token_id} is revoked.")


def version(ctx: typer.Context, as_json: Json = False, url: Url = None, token: Token = None) -> None:
    """Print the versions of this program and of the server, if one is known."""
    ours = importlib.metadata.version("patchwork-vit")
    try:
        with client_for(ctx, url, token) as client:
            theirs: str | None = client.health().version
            where = client.url
    except NotConfigured:
        theirs, where = None, "no server is known"
    except PatchworkError as error:
        theirs, where = None, str(error)
    if as_json:
        output.print_json({"client": ours, "server": theirs, "url": where})
        return
    out = output.console()
    out.print(f"patchwork {ours}")
    out.print(f"server    {theirs or '-'} ({escape(where)})")
