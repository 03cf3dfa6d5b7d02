"""Taking weights away: fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from orchestrator.cli import output
from orchestrator.cli.options import Json, Token, Url, client_for, find_job


def fetch(
    ctx: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="ckpt_…, job_…/best, job_…/latest, or a job (its best one).")
    ] = "last",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to make; left out: the checkpoint's id, here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="The moving average of the weights (train.ema_decay).")] = False,
    num_threads: Annotated[int, typer.Option("--parallel", min=1, max=64, help="Ranges read at a time.")] = 8,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Fetch a checkpoint's weights: verified block by block, resumed where it was cut.

    The folder then holds model.safetensors and config.json; `vit.load(folder)` gives the model back.

    Examples:

      patchwork fetch job_.../best -o my-model

      patchwork fetch                     # the newest job's best checkpoint
    """
    from orchestrator.fetch import fetch as fetch_weights

    with client_for(ctx, url, token) as client:
        reference = find_job(client, checkpoint).id if checkpoint == "last" else checkpoint
        folder = out or Path(client.checkpoints.find(reference).id)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=output.errors(), disable=as_json) as bar:
            task = bar.add_task("fetching", total=None)
            try:
                done = fetch_weights(
                    client,
                    reference,
                    folder,
                    force=force,
                    weights="ema" if ema else "raw",
                    num_threads=num_threads,
                    on_start=lambda _, total: bar.update(task, total=total),
                    on_bytes=lambda count: bar.advance(task, count),
                )
            except KeyboardInterrupt:
                output.errors().print("Stopped. What has come stays; the same command goes on from there.")
                raise typer.Exit(130) from None
    if as_json:
        output.print_json(
            {
                "folder": str(done.folder),
                "checkpoint_id": done.checkpoint_id,
                "num_bytes": done.num_bytes,
                "num_bytes_read": done.num_bytes_read,
                "num_parameters": done.num_parameters,
                "seconds": done.seconds,
            }
        )
        return
    console = output.console()
    reused = done.num_bytes - done.num_bytes_read
    kept = f" ({output.num_bytes(reused)} were there already)" if reused else ""
    console.print(
        f"[bold]{done.folder}[/]: {done.num_parameters:,} parameters of {done.checkpoint_id}, "
        f"{output.num_bytes(done.num_bytes)} verified{kept} in {output.duration(done.seconds)}."
    )
    console.print(f"  in Python:  import vit; model = vit.load({str(done.folder)!r})", markup=False)
