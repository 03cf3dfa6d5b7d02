"""Fine-tuning on a folder of photos, the rest guessed: `patchwork finetune`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from configs.load import apply_overrides, load_preset
from configs.model import VitConfig
from orchestrator.cli import imports, output
from orchestrator.cli.follow import follow_job
from orchestrator.cli.options import Json, Overrides, Token, Url, client_for, parse_overrides
from orchestrator.client import Client, PatchworkError
from orchestrator.embedded.data_dir import DataDir, default_data_dir
from orchestrator.photos import Photos, PhotosError, bring_under, look
from orchestrator.schemas import CheckpointPublic

HOLDOUT = 0.1
_EPOCHS, _FEWEST_STEPS, _MOST_STEPS = 20, 100, 20_000
_LARGEST_BATCH = {"gpu": 512, "cpu": 64}


@dataclass
class Guess:
    """A fine-tuning job, and why it is as it is: field -> reason."""

    spec: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)


def finetune(
    ctx: typer.Context,
    photos: Annotated[
        str, typer.Argument(metavar="FOLDER", help="FOLDER/<class>/<image>, or a registered data set's name.")
    ],
    from_: Annotated[
        str,
        typer.Option("--from", metavar="CHECKPOINT", help="ckpt_…, job_…/best, or a weights file (imported first)."),
    ],
    preset: Annotated[str | None, typer.Option("--preset", help="Recipe and image size from this preset.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option("--name", help="A name to show.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch it run; Ctrl-C leaves it running.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job description; nothing is stored.")] = False,
    as_json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Fine-tune a checkpoint on a folder of photos, one sub-folder per class. What you do not say is guessed, and the
    guess is printed with its reasons.

    Examples:

      patchwork finetune ./photos --from job_.../best --follow

      patchwork finetune ./photos --from vit_small.safetensors --steps 500 --set train.global_batch_size=128

      patchwork finetune ./photos --from ckpt_... --dry-run > job.yaml
    """
    out = output.errors() if as_json or dry_run else output.console()
    wanted = parse_overrides(overrides)
    with client_for(ctx, url, token) as client:
        data = _look(client, photos)
        if dry_run and Path(from_).is_file():
            raise PatchworkError(
                f"--dry-run stores nothing: first `patchwork import {from_}`, then --from its checkpoint"
            )
        source = _checkpoint(client, from_, out)
        guess = guess_job(data, source, _hardware(client), preset=preset, steps=steps, lr=lr)
        guess.spec["name"] = name or f"finetune-{data.label}"
        spec = apply_overrides(guess.spec, wanted)
        _print_guess(guess, out)
        if dry_run:
            typer.echo(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), nl=False)
            return
        if data.photos is not None:
            _register(client, data)
        preview = client.jobs.preview(spec)
        if not as_json:
            from orchestrator.cli.plan import print_plan

            print_plan(preview.plan)
        job = client.jobs.create(spec)
        out.print(f"Submitted [bold]{job.id}[/] ({escape(job.name)}).")
        if follow:
            job = follow_job(client, job.id, out)
    if as_json:
        output.print_json(job)
    elif not follow:
        out.print(f"  watch it:   patchwork show {job.id} --follow", markup=False)
    raise typer.Exit(0 if not follow or job.state == "SUCCEEDED" else 1)


# -- what there is -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Data:
    """The images to train on."""

    label: str
    """The name it is, or will be, registered under."""
    num_train: int
    num_classes: int
    train: str
    validation: str | None
    photos: Photos | None
    """Not registered yet."""


@dataclass(frozen=True)
class Hardware:
    gpus: int
    cpus: int


def _look(client: Client, given: str) -> Data:
    if Path(given).is_dir():
        found = look(Path(given))
        num_train = found.num_images(found.train)
        return Data(found.name, num_train, len(found.classes), found.train, found.validation, found)
    for item in client.datasets():
        if item.name == given and item.registered:
            splits = {split.name: split.num_examples for split in item.card.splits}
            train = next((name for name in splits if name.startswith("train")), next(iter(splits)))
            validation = next((name for name in ("val", "valid", "validation") if name in splits), None)
            return Data(given, splits[train], item.card.num_classes, train, validation, None)
    raise PhotosError(f"{given} is neither a folder here nor a registered data set (patchwork datasets list)")


def _checkpoint(client: Client, reference: str, out: Console) -> CheckpointPublic:
    """The checkpoint to start from; a weights file is imported first."""
    path = Path(reference)
    if path.is_file():
        out.print(f"{reference} is a file: importing it first.", markup=False)
        return imports.imported(client, imports.upload(client, path, out), out)
    return client.checkpoints.find(reference)


def _hardware(client: Client) -> Hardware:
    nodes = [node for node in client.cluster().nodes if node.alive]
    return Hardware(gpus=int(sum(node.gpus for node in nodes)), cpus=int(sum(node.cpus for node in nodes)))


def _register(client: Client, data: Data) -> None:
    assert data.photos is not None
    client.add_dataset(data.label, bring_under(data.photos, _data_root(client, data.photos)))


def _data_root(client: Client, photos: Photos) -> Path:
    """The data root of the stack on this machine that the client speaks to.

    Raises:
        PhotosError: it is another server; says what to do.
    """
    directory = DataDir(default_data_dir())
    stored = directory.read_client()
    if stored is not None and stored[0].rstrip("/") == client.url and directory.settings_file.is_file():
        root = json.loads(directory.settings_file.read_text()).get("data_root")
        if root:
            return Path(root)
    raise PhotosError(
        f"{client.url} is not the stack of `patchwork up` on this machine ({directory.path}): its nodes read images "
        f"below their data root only. Copy {photos.folder} there as <data root>/NAME/<split>/<class>/<image>, then\n"
        "  patchwork datasets add NAME NAME\n"
        "  patchwork finetune NAME --from …\n"
        "(or set PATCHWORK_DATA_DIR if it is a stack of this machine in another directory)."
    )


# -- the guess ---------------------------------------------------------------------------------------------------------
def guess_job(
    data: Data,
    source: CheckpointPublic,
    hardware: Hardware,
    *,
    preset: str | None = None,
    steps: int | None = None,
    lr: float | None = None,
) -> Guess:
    """A fine-tuning job for this data, checkpoint and cluster; with a preset its recipe, and guesses for the data only.

    Raises:
        PhotosError: there are too few images.
        SpecError: there is no such preset.
    """
    reasons: dict[str, str] = {}
    spec: dict[str, Any] = {"kind": "finetune", "init_from": source.id}
    spec["data"], num_train = _guess_data(data, reasons)
    if preset is not None:
        spec = {"preset": preset} | spec
        _fit_preset(spec, preset, source, steps, reasons)
    else:
        _guess_recipe(spec, source, hardware, num_train, steps, reasons)
    if lr is not None:
        spec.setdefault("optim", {})["lr"] = lr
        reasons["optim.lr"] = "as you said"
    return Guess(spec, reasons)


def _guess_data(data: Data, reasons: dict[str, str]) -> tuple[dict[str, Any], int]:
    guessed: dict[str, Any] = {"source": {"type": "folder", "name": data.label}, "train": data.train}
    if data.validation is not None:
        reasons["data.eval"] = f"{data.validation}, which is there"
        return guessed | {"eval": data.validation}, data.num_train
    held_out = max(1, round(data.num_train * HOLDOUT))
    if data.num_train - held_out < 2:
        raise PhotosError(f"{data.num_train} images are too few to train on and to hold some out")
    reasons["data.holdout"] = f"{held_out} of {data.num_train} images: there is no split val to evaluate on"
    return guessed | {"holdout": {"fraction": HOLDOUT}}, data.num_train - held_out


def _fit_preset(
    spec: dict[str, Any], preset: str, source: CheckpointPublic, steps: int | None, reasons: dict[str, str]
) -> None:
    base = load_preset(preset)
    spec["model"] = {"in_channels": source.model.in_channels, "num_classes": None}
    reasons["preset"] = f"{preset}: recipe and image size are its own"
    if "holdout" not in spec["data"]:
        spec["data"]["holdout"] = None
    if (base.spec.get("data") or {}).get("subset") is not None:
        spec["data"]["subset"] = None
    if steps is not None:
        totals = {f"total_{unit}": None for unit in ("epochs", "examples")}
        warmups = {f"warmup_{unit}": None for unit in ("epochs", "examples")}
        spec["schedule"] = totals | warmups | {"total_steps": steps, "warmup_steps": steps // 10}
        reasons["schedule.total_steps"] = "as you said"


def _guess_recipe(
    spec: dict[str, Any],
    source: CheckpointPublic,
    hardware: Hardware,
    num_train: int,
    steps: int | None,
    reasons: dict[str, str],
) -> None:
    device = "gpu" if hardware.gpus else "cpu"
    workers = _power_of_two(min(hardware.gpus, 8) if hardware.gpus else min(max(hardware.cpus, 1), 2))
    batch = _power_of_two(max(min(_LARGEST_BATCH[device], num_train // 8), workers))
    total = steps or min(max(_EPOCHS * num_train // batch, _FEWEST_STEPS), _MOST_STEPS)
    every = max(1, total // 5)
    lr = float(f"{1e-3 * (batch / 256) ** 0.5:.2g}")
    height, width = source.model.image_size
    spec["model"] = {"image_size": height if height == width else [height, width]}
    spec["model"] |= {"in_channels": source.model.in_channels}
    spec["data"]["augment"] = {"crop": "inception", "crop_area": [0.35, 1.0], "flip": True}
    spec["optim"] = {"name": "adamw", "lr": lr, "weight_decay": 0.05, "clip_grad_norm": 1.0}
    slower = ""
    if isinstance(source.model, VitConfig):
        spec["optim"]["layer_decay"] = 0.75
        slower = ", layers below the head slower (layer_decay 0.75)"
    spec["schedule"] = {"total_steps": total, "warmup_steps": total // 10, "decay": "cosine"}
    spec["train"] = {"global_batch_size": batch, "precision": "bf16" if hardware.gpus else "fp32"}
    spec["resources"] = {"workers": workers, "gpus_per_worker": 1 if hardware.gpus else 0}
    spec["checkpoint"] = {"every_steps": every}
    spec["eval"] = {"every_steps": every}
    reasons |= {
        "model.image_size": f"{height} x {width} and {source.model.in_channels} channels, as the checkpoint",
        "resources.workers": f"{workers} on {hardware.gpus} GPUs" if hardware.gpus else f"{workers}, on CPUs",
        "train.global_batch_size": f"{batch}: at most {_LARGEST_BATCH[device]} on a {device.upper()}, and an eighth of "
        f"the {num_train} training images",
        "schedule.total_steps": "as you said"
        if steps
        else f"{total}: {_EPOCHS} epochs, at least {_FEWEST_STEPS} and at most {_MOST_STEPS:,} steps",
        "optim": f"AdamW, lr {lr:g} = 1e-3 x sqrt(batch / 256){slower}",
    }


def _power_of_two(limit: int) -> int:
    """The largest power of two up to `limit`, which is 1 at least."""
    return 1 << (limit.bit_length() - 1)


def _print_guess(guess: Guess, out: Console) -> None:
    out.print("Guessed (change with --set):")
    for name, reason in guess.reasons.items():
        out.print(f"  {name:<26}{reason}", markup=False)
