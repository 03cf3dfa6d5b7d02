"""`make pictures`: trains a small ViT and a small hybrid on real images and draws the pictures of docs/pictures.md.

Everything goes through the API, on a stack of its own. The start is a job of one step whose learning rate, at the
beginning of its warm-up, is 0: its checkpoint holds the initial weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orchestrator.cli import output
from orchestrator.cli.demo import DemoError, Record, find_images, running_stack
from orchestrator.cli.follow import follow_job
from orchestrator.client import Client
from orchestrator.embedded.data_dir import DataDir
from orchestrator.schemas import JobPublic

_SIZES: dict[str, Any] = {"embed_dim": 64, "depth": 6, "num_heads": 4, "mlp_dim": 128}
_IMAGES: dict[str, Any] = {"image_size": 28, "in_channels": 1}
VIT: dict[str, Any] = {"patch_size": 4} | _SIZES | _IMAGES
HYBRID: dict[str, Any] = {"stem": {"layers": [], "width": 32}, "patch_size": 1} | _SIZES | _IMAGES
"""As many patches of as many pixels as the ViT: the stem's stride is 4."""
EPOCHS = 3

GALLERY: dict[str, tuple[str, str]] = {
    "patch-filters": ("vit", "patch_filters"),
    "position-similarity-start": ("start", "position_similarity"),
    "position-similarity-trained": ("vit", "position_similarity"),
    "attention-distance-vit": ("vit", "attention_distance"),
    "attention-distance-hybrid": ("hybrid", "attention_distance"),
    "attention-rollout": ("vit", "attention_rollout"),
    "stem-filters": ("hybrid", "stem_filters"),
}
"""File -> whose picture, and which."""


def gallery(
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Where data sets lie; left out: found or fetched.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="The folder for the pictures.")] = Path("docs/pictures"),
    folder: Annotated[Path, typer.Option("--out", help="Where the stack and its data go; the stack is made anew.")] = (
        Path("demo-out")
    ),
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of training.")] = EPOCHS,
) -> None:
    """Train a small ViT and a small hybrid on Fashion-MNIST and draw the pictures of docs/pictures.md."""
    out, record = output.console(), Record()
    directory = DataDir(folder / "gallery")
    shutil.rmtree(directory.path, ignore_errors=True)
    root = find_images(data_root, (folder / "data").absolute(), out)
    with running_stack(directory, root, False, record, out) as client:
        trained = {name: client.jobs.create(spec) for name, spec in training(epochs).items()}
        looking = {name: client.jobs.create(inspection(name, job)) for name, job in trained.items()}
        for name, job in (*trained.items(), *looking.items()):
            out.print(f"\n[bold]-- {name}: {job.kind} --[/]")
            _succeed(client, job, out)
        write_gallery(client, looking, to)
    out.print(f"\n{len(GALLERY)} pictures in {to}.")


def training(epochs: int) -> dict[str, dict[str, Any]]:
    """The jobs whose checkpoints are looked at."""
    base: dict[str, Any] = {
        "kind": "pretrain",
        "data": {
            "source": {"type": "torchvision", "name": "FashionMNIST"},
            "augment": {"crop": "resize", "flip": True},
        },
        "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05},
        "train": {"global_batch_size": 128, "precision": "fp32", "log_every_steps": 20},
        "resources": {"workers": 1, "gpus_per_worker": 0},
        "eval": {"batch_size": 500},
    }
    once = {"total_steps": 1, "warmup_steps": 1}
    whole = {"total_epochs": epochs, "warmup_steps": 100}
    return {
        "start": base | {"name": "gallery-start", "model": VIT, "schedule": once},
        "vit": base | {"name": "gallery-vit", "model": VIT, "schedule": whole},
        "hybrid": base | {"name": "gallery-hybrid", "model": HYBRID, "schedule": whole},
    }


def inspection(name: str, job: JobPublic) -> dict[str, Any]:
    """The job that draws what the gallery shows of a training job, once that has succeeded."""
    pictures = sorted({picture for owner, picture in GALLERY.values() if owner == name})
    return {
        "kind": "inspect",
        "name": f"gallery-{name}-pictures",
        "init_from": f"{job.id}/latest",
        "queue": {"depends_on": [job.id]},
        "pictures": pictures,
        "resources": {"gpus_per_worker": 0},
    } | ({"num_rollout_images": 6} if "attention_rollout" in pictures else {})


def write_gallery(client: Client, looking: dict[str, JobPublic], folder: Path) -> None:
    """Write the pictures of these inspect jobs into `folder`, by the names of the gallery."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (owner, picture) in GALLERY.items():
        with (folder / f"{name}.png").open("wb") as file:
            client.jobs.write_picture(looking[owner].id, f"{picture}.png", file)


def _succeed(client: Client, job: JobPublic, out: Console) -> None:
    done = follow_job(client, job.id, out)
    if done.state != "SUCCEEDED":
        raise DemoError(f"{job.id} ended as {done.state}: {output.explanation(done)}")
