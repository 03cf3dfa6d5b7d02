"""Bringing weights in: import; and what a checkpoint is: checkpoints list, checkpoints show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from configs.load import apply_overrides
from configs.model import BitConfig, VitConfig
from orchestrator.cli import output
from orchestrator.cli.follow import follow_job
from orchestrator.cli.options import Json, Token, Url, client_for, find_job, parse_overrides
from orchestrator.client import Client, PatchworkError
from orchestrator.schemas import CheckpointPublic, JobPublic

checkpoints_app = typer.Typer(help="Checkpoints: list a job's, show, pin and unpin one.", no_args_is_help=True)
_Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="ckpt_…, job_…/best, job_…/latest, or a job.")]
_HELP = "What the file does not say, such as --set model.num_heads=6 or --set preprocess.mean=[0.485,0.456,0.406]."


def import_weights(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors or .npz file.")],
    name: Annotated[str | None, typer.Option("--name", help="A name to show; left out: the file's.")] = None,
    source: Annotated[str, typer.Option("--source", help="Where it came from: a URL, or text.")] = "",
    format: Annotated[
        str | None, typer.Option("--format", help="timm, transformers, npz or patchwork; left out: found out.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=_HELP)] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the import job.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Import weights from elsewhere: they become an ordinary checkpoint to fine-tune, evaluate and export.

    Reads timm's and Transformers' safetensors, the official ViT .npz files, and Patchwork's own; nothing that can run
    code. A config.json beside the file is read too. Interrupted, the same command goes on.

    Examples:

      patchwork import model.safetensors --source hf:timm/vit_small_patch16_224.augreg_in21k

      patchwork import ViT-B_16.npz --name vit-b16-in21k

      patchwork import tiny.safetensors --set model.num_heads=2
    """
    given: dict[str, Any] = {"overrides": parse_overrides(overrides), "source": source, "format": format}
    with client_for(ctx, url, token) as client:
        out = output.errors() if as_json else output.console()
        job = upload(client, file, out, name=name, as_json=as_json, **given)
        if detach:
            if as_json:
                output.print_json(job)
            else:
                out.print(f"Submitted [bold]{job.id}[/] ({escape(job.name)}).")
            return
        made = imported(client, job, out)
        if as_json:
            output.print_json(made)
            return
        print_checkpoint(made)
        out.print(f"  fine-tune it:  patchwork finetune FOLDER --from {made.id}", markup=False)


def upload(
    client: Client,
    file: Path,
    out: Console,
    *,
    name: str | None = None,
    source: str = "",
    format: str | None = None,
    overrides: dict[str, str] | None = None,
    as_json: bool = False,
) -> JobPublic:
    """Send the file with progress on standard error, and queue its import; says what was read beside it."""
    from orchestrator.sidecar import describe
    from orchestrator.upload import import_file

    if not file.is_file():
        raise PatchworkError(f"There is no file {file}.")
    described, notes = describe(file)
    for note in notes:
        out.print(f"[dim]{escape(note)}[/]")
    if format is not None:
        described["format"] = format
    described = apply_overrides(described, overrides or {})
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=output.errors(), disable=as_json) as bar:
        size = file.stat().st_size
        hashing = bar.add_task("SHA-256", total=size)
        sending = bar.add_task("uploading", total=size)
        try:
            return import_file(
                client,
                file,
                name=name,
                source=source,
                on_hash=lambda count: bar.advance(hashing, count),
                on_bytes=lambda count: bar.advance(sending, count),
                **described,
            )
        except KeyboardInterrupt:
            output.errors().print("Stopped. What was sent stays for a day; the same command goes on from there.")
            raise typer.Exit(130) from None


def imported(client: Client, job: JobPublic, out: Console) -> CheckpointPublic:
    """The checkpoint of an import job, once that has succeeded.

    Raises:
        PatchworkError: it did not; says what is wrong with the file.
    """
    job = follow_job(client, job.id, out)
    if job.state != "SUCCEEDED":
        raise PatchworkError(f"The import failed: {output.explanation(job)}")
    return client.checkpoints.find(job.id)


@checkpoints_app.command("list")
def list_checkpoints(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or `last` for the newest one.")] = "last",
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """List a job's checkpoints, the newest first."""
    with client_for(ctx, url, token) as client:
        found = client.jobs.checkpoints(find_job(client, job).id)
    if as_json:
        output.print_json(found)
        return
    rows = [(c.id, f"{c.step:,}", output.num_bytes(c.num_bytes), _also(c)) for c in found]
    output.console().print(output.table(("CHECKPOINT", "STEP>", "SIZE>", "ALSO"), rows) if rows else "No checkpoints.")


def _also(found: CheckpointPublic) -> str:
    return ", ".join([*found.aliases, *(["pinned"] if found.pinned else [])]) if found.available else "deleted"


@checkpoints_app.command("show")
def show_checkpoint(
    ctx: typer.Context,
    checkpoint: _Checkpoint,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Show a checkpoint: its model, how images are prepared for it, and where imported weights came from."""
    with client_for(ctx, url, token) as client:
        found = client.checkpoints.find(checkpoint)
    if as_json:
        output.print_json(found)
    else:
        print_checkpoint(found)


@checkpoints_app.command("pin")
def pin_checkpoint(
    ctx: typer.Context, checkpoint: _Checkpoint, as_json: Json = False, url: Url = None, token: Token = None
) -> None:
    """Keep a checkpoint, whatever the job's keep_last and keep_best say.

    Examples:

      patchwork checkpoints pin job_.../best
    """
    _pin(ctx, checkpoint, True, as_json, url, token)


@checkpoints_app.command("unpin")
def unpin_checkpoint(
    ctx: typer.Context, checkpoint: _Checkpoint, as_json: Json = False, url: Url = None, token: Token = None
) -> None:
    """Let go of a pinned checkpoint: from then on the job's retention decides."""
    _pin(ctx, checkpoint, False, as_json, url, token)


def _pin(ctx: typer.Context, checkpoint: str, pinned: bool, as_json: bool, url: str | None, token: str | None) -> None:
    with client_for(ctx, url, token) as client:
        done = client.checkpoints.pin(client.checkpoints.find(checkpoint).id, pinned)
    if as_json:
        output.print_json(done)
        return
    what = "is kept." if done.pinned else "is not pinned: the job's keep_last and keep_best decide."
    output.console().print(f"{done.id} {what}")


def _model_text(model: VitConfig | BitConfig) -> str:
    if isinstance(model, BitConfig):
        return f"BiT ResNet, bottlenecks {list(model.resnet.layers)}, width {model.resnet.width}"
    stem = "" if model.stem is None else f", stem {list(model.stem.layers)} x {model.stem.width}"
    scale = "" if model.layer_scale is None else ", LayerScale"
    return (
        f"patch {model.patch_size}, width {model.embed_dim}, depth {model.depth}, heads {model.num_heads}, MLP "
        f"{model.mlp_dim}, {model.pool}, GELU {model.gelu}, {model.head} head{scale}{stem}"
    )


def print_checkpoint(found: CheckpointPublic) -> None:
    out, model, prepared = output.console(), found.model, found.preprocess
    also = f"  ({marks})" if (marks := _also(found)) and found.available else ""
    out.print(f"[bold]{found.id}[/]{also}")
    if not found.available:
        out.print("  [red]not available[/]")
    out.print(f"  model       {_model_text(model)}", markup=False)
    height, width = model.image_size
    out.print(f"  images      {height} x {width} x {model.in_channels}, {model.num_classes:,} classes")
    mean, std = ([round(value, 4) for value in values] for values in (prepared.mean, prepared.std))
    out.print(f"  prepared    mean {mean}, std {std}, {prepared.interpolation}, {prepared.crop}", markup=False)
    out.print(f"  step        {found.step:,}; {output.num_bytes(found.num_bytes)}; job {found.job_id}")
    for name, value in sorted(found.metrics.items()):
        out.print(f"  {escape(name):<11} {output.number(value)}")
    if found.origin is not None:
        origin = found.origin
        out.print(f"  imported    {escape(origin.file)} ({origin.format}, {output.num_bytes(origin.num_bytes)})")
        if origin.source:
            out.print(f"  source      {escape(origin.source)}")
        out.print(f"  sha256      {origin.sha256}")
