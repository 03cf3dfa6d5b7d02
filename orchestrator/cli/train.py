"""`patchwork train`: a job in this process. The work is the worker extra's, found by its entry point."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli import output
from orchestrator.cli.jobs import Preset, SpecFile, read_spec
from orchestrator.cli.options import Overrides, parse_overrides
from orchestrator.connection import PatchworkError


def train(
    spec: SpecFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints, metrics and weights.")] = Path(
        "train-out"
    ),
    data_root: Annotated[
        Path | None, typer.Option("--data-root", envvar="PATCHWORK_DATA_ROOT", help="Where data sets lie.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option("--init", help="Weights a finetune starts from: a file, or a fetched folder.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what --out holds and start anew.")] = False,
) -> None:
    """Train in this process, for debugging: the same loop, no server, no Ray. One worker, on the GPU if there is one.

    Run again it goes on from the last checkpoint. Ctrl-C saves and leaves.

    Examples:

      patchwork train --preset demo/fashion-mnist-pretrain --data-root ./data --set schedule.total_epochs=1

      patchwork train my-finetune.yaml --init my-model -o runs/first
    """
    train_here = load_command("train")
    code = train_here(
        read_spec(spec, preset),
        parse_overrides(overrides),
        out=out,
        data_root=data_root,
        init=init,
        fresh=fresh,
        console=output.console(),
    )
    raise typer.Exit(code)


def load_command(name: str, extra: str = "worker") -> Any:
    """The function behind a command that needs more than the base install.

    Raises:
        PatchworkError: the extra is not installed.
    """
    (found,) = entry_points(group="patchwork.commands", name=name)
    try:
        return found.load()
    except ModuleNotFoundError as error:
        missing = f"`patchwork {name}` needs the {extra} extra ({error.name} is missing)"
        raise PatchworkError(f"{missing}: pip install 'patchwork-vit[{extra}]'") from error
