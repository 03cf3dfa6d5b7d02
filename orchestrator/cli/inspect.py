"""Pictures of what a checkpoint has learned: `patchwork inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from configs.data import MAX_UPLOADED_IMAGES
from configs.load import apply_overrides
from configs.pictures import PICTURES, READ_IMAGES
from orchestrator.cli import output
from orchestrator.cli.follow import follow_job
from orchestrator.cli.options import Json, Overrides, Token, Url, client_for, find_job, parse_overrides
from orchestrator.client import Client, PatchworkError
from orchestrator.schemas import JobPublic, PicturePage


def inspect(
    ctx: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="ckpt_…, job_…/best, job_…/latest, or a job (its best one); an inspect job: only fetch its pictures.",
        ),
    ] = "last",
    picture: Annotated[
        list[str] | None,
        typer.Option("--picture", "-p", metavar="NAME", help="Only this one; may be repeated: " + ", ".join(PICTURES)),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Wait, and put pictures and numbers into this folder.")
    ] = None,
    own: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", "-i", metavar="FILE", exists=True, dir_okay=False, help="Look at this image; may be repeated."
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Over which attention distance is averaged; 128.")
    ] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option("--name", help="A name to show.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it run; Ctrl-C leaves it running.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Look into a checkpoint: the paper's pictures of it, each as a PNG with its numbers (.npz, for numpy.load).

    patch_filters        principal components of the patch-embedding filters

    position_similarity  how alike the position embeddings of patches are

    attention_distance   how far each head of each layer looks, in pixels, over 128 images

    attention_rollout    which patches of an image the output reads

    stem_filters         first convolution of a hybrid or a BiT ResNet

    Without --picture: all that the model has. Images come from the evaluation split of the checkpoint's data, or are
    your own (--image): then only what shows images is drawn.

    Examples:

      patchwork inspect job_.../best --to pictures

      patchwork inspect ckpt_... -p attention_distance --images 512 --follow

      patchwork inspect ckpt_... -i cat.jpg -i dog.jpg --to pictures

      patchwork inspect last --to pictures                 # the newest job: a checkpoint of it, or its pictures
    """
    out = output.errors() if as_json else output.console()
    with client_for(ctx, url, token) as client:
        done = _inspect_job(client, checkpoint)
        if done is not None and (picture or own or images or overrides or name):
            raise PatchworkError(f"{done.id} is an inspect job: its pictures are fetched as they are")
        if done is None:
            job = client.jobs.create(_description(client, checkpoint, picture, own, images, overrides, name))
            out.print(f"Submitted [bold]{job.id}[/] ({escape(job.name)}).")
        else:
            job = done
        if (follow or to is not None) and not job.is_terminal:
            job = follow_job(client, job.id, out)
        page = client.jobs.pictures(job.id)
        files = [] if to is None or job.state != "SUCCEEDED" else fetch_pictures(client, job.id, page, to)
    _print(job, page, files, as_json, out)
    ended_badly = job.is_terminal and job.state != "SUCCEEDED"
    raise typer.Exit(1 if ended_badly else 0)


def fetch_pictures(client: Client, job_id: str, page: PicturePage, folder: Path) -> list[Path]:
    """Write every picture of a job and its numbers into `folder`, which is made; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for item in page.items:
        for file in (item.image, item.numbers):
            path = folder / Path(file.name).name
            with path.open("wb") as out:
                client.jobs.write_picture(job_id, file.name, out)
            made.append(path)
    return made


def _inspect_job(client: Client, reference: str) -> JobPublic | None:
    """The inspect job that is meant; None: it is a checkpoint."""
    if reference != "last" and (not reference.startswith("job_") or "/" in reference):
        return None
    job = find_job(client, reference)
    return job if job.kind == "inspect" else None


def _description(
    client: Client,
    reference: str,
    pictures: list[str] | None,
    own: list[Path] | None,
    num_images: int | None,
    overrides: list[str] | None,
    name: str | None,
) -> dict[str, Any]:
    """The job, on a GPU where the cluster has one."""
    found = client.checkpoints.find(find_job(client, reference).id if reference == "last" else reference)
    has_gpus = any(node.alive and node.gpus >= 1 for node in client.cluster().nodes)
    spec: dict[str, Any] = {
        "kind": "inspect",
        "name": name or "inspect",
        "init_from": found.id,
        "resources": {"gpus_per_worker": 1 if has_gpus else 0},
    }
    if own:
        if len(own) > MAX_UPLOADED_IMAGES:
            raise PatchworkError(f"{len(own)} images: at most {MAX_UPLOADED_IMAGES} in one job")
        ids = [client.images.upload(path).id for path in own]
        spec["data"] = {"source": {"type": "images", "ids": ids}}
        pictures = pictures or [name for name in PICTURES if name in READ_IMAGES]
    if pictures:
        spec["pictures"] = pictures
    if num_images is not None:
        spec["num_images"] = num_images
    return apply_overrides(spec, parse_overrides(overrides))


def _print(job: JobPublic, page: PicturePage, files: list[Path], as_json: bool, out: Console) -> None:
    if as_json:
        output.print_json(
            {
                "job": job.model_dump(mode="json"),
                "pictures": page.model_dump(mode="json")["items"],
                "files": [str(path) for path in files],
            }
        )
        return
    for item in page.items:
        out.print(f"[bold]{item.name}[/]  {escape(item.caption)}")
    for path in files:
        out.print(f"  {path}", markup=False)
    if not job.is_terminal:
        out.print(f"  watch it:      patchwork show {job.id} --follow", markup=False)
    if not files and (not job.is_terminal or page.items):
        out.print(f"  its pictures:  patchwork inspect {job.id} --to DIR", markup=False)
