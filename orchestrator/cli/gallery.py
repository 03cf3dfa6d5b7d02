"""`make pictures`: draws the pictures of docs/pictures.md of the ViT that `make demo` trained, and of a small hybrid.

Everything goes through the API, on the demo's own stack (the demo runs first where it has not yet). The start is a job
of one step whose learning rate, at the beginning of its warm-up, is 0: its checkpoint holds the initial weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orchestrator.cli import output
from orchestrator.cli.demo import PRETRAIN, DemoError, Record, demo, find_images, running_stack
from orchestrator.cli.follow import follow_job
from orchestrator.client import Client
from orchestrator.embedded.data_dir import DataDir
from orchestrator.schemas import JobPublic

HYBRID: dict[str, Any] = {"stem": {"layers": [], "width": 32}, "patch_size": 1}
"""Instead of the demo's patches of 7 x 7 pixels: features of a convolution and a pooling, one every 4 x 4 pixels."""
_OURS = "gallery-"

GALLERY: dict[str, tuple[str, str]] = {
    "patch-filters": ("vit", "patch_filters"),
    "position-similarity-start": ("start", "position_similarity"),
    "position-similarity-trained": ("vit", "position_similarity"),
    "position-similarity-hybrid": ("hybrid", "position_similarity"),
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
    folder: Annotated[Path, typer.Option("--out", help="The folder of the demo; it runs first where it has not.")] = (
        Path("demo-out")
    ),
) -> None:
    """Draw the pictures of docs/pictures.md: of the ViT of `make demo`, and of a hybrid trained in the same way."""
    out, record = output.console(), Record()
    directory = DataDir(folder / "stack")
    if not directory.path.is_dir():
        demo(data_root, folder, stay=False)
    root = find_images(data_root, (folder / "data").absolute(), out)
    with running_stack(directory, root, False, record, out) as client:
        trained = {"vit": trained_by_the_demo(client)}
        trained |= {name: client.jobs.create(spec) for name, spec in training().items()}
        looking = {name: client.jobs.create(inspection(name, job)) for name, job in trained.items()}
        for name, job in (*trained.items(), *looking.items()):
            out.print(f"\n[bold]-- {name}: {job.kind} --[/]")
            _succeed(client, job, out)
        for job in looking.values():
            for picture in client.jobs.pictures(job.id).items:
                out.print(f"{job.name}: {picture.caption}", markup=False)
        write_gallery(client, looking, to)
    out.print(f"\n{len(GALLERY)} pictures in {to}, of {trained['vit'].id} and {trained['hybrid'].id}.")


def trained_by_the_demo(client: Client) -> JobPublic:
    """The pre-training that `make demo` ran on this stack.

    Raises:
        DemoError: it has none.
    """
    for job in client.jobs.list(kind="pretrain", state=["SUCCEEDED"]):
        if job.preset == PRETRAIN and not job.name.startswith(_OURS):
            return job
    raise DemoError("The demo on this stack has trained no model: run make demo, or name its folder with --out.")


def training() -> dict[str, dict[str, Any]]:
    """The jobs whose checkpoints are looked at beside the demo's own: its initial weights, and a hybrid."""
    once = {"total_steps": 1, "warmup_steps": 1}
    return {
        "start": {"preset": PRETRAIN, "name": f"{_OURS}start", "schedule": once},
        "hybrid": {"preset": PRETRAIN, "name": f"{_OURS}hybrid", "model": HYBRID},
    }


def inspection(name: str, job: JobPublic) -> dict[str, Any]:
    """The job that draws what the gallery shows of a training job, once that has succeeded."""
    pictures = sorted({picture for owner, picture in GALLERY.values() if owner == name})
    return {
        "kind": "inspect",
        "name": f"{_OURS}{name}-pictures",
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
