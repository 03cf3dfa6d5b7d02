"""`patchwork convert`: weights from one format into another. The work is torch's, found by its entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from configs.cost import num_parameters
from configs.imports import ImportModel
from configs.model import Gelu, PosResize
from configs.spec import ExportFormat
from orchestrator.cli import output
from orchestrator.cli.train import load_command
from orchestrator.connection import PatchworkError


def convert(
    source: Annotated[Path, typer.Argument(help="A .safetensors or .npz file, or a folder of patchwork fetch.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[ExportFormat, typer.Option("--to", help="The format to write.")] = "safetensors",
    num_heads: Annotated[int | None, typer.Option("--num-heads", help="Where the file does not say it.")] = None,
    num_classes: Annotated[
        int | None, typer.Option("--num-classes", help="For a file without a classifier: a zero one of so many.")
    ] = None,
    gelu: Annotated[Gelu | None, typer.Option("--gelu", help="Left out: the format's usual one.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Pixels: resize the positions.")] = None,
    pos_resize: Annotated[
        PosResize, typer.Option("--pos-resize", help="Whose way of resizing (docs/models.md).")
    ] = "official",
) -> None:
    """Convert weights between our format, timm, Transformers, torchvision and the official npz. Needs no server.

    What is written is read back: the same tensors bit for bit, the same logits. Pickled files are not read.

    Examples:

      patchwork convert ViT-B_16.npz vit-b16 --to timm

      patchwork convert my-model my-model-hf --to transformers
    """
    do = load_command("convert")
    wanted = ImportModel.model_validate({"num_heads": num_heads, "num_classes": num_classes, "gelu": gelu})
    try:
        made = do(source, out, to, model=wanted, image_size=image_size, pos_resize=pos_resize)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise PatchworkError(str(error)) from error
    model, height = made.model, made.model.image_size[0]
    output.console().print(
        f"Wrote [bold]{escape(str(out))}[/] ({to}): {num_parameters(model):,} parameters, {height} px, "
        f"{model.num_classes:,} classes. Read back: equal."
    )
