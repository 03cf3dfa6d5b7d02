"""Inspect jobs: look at a model's weights and at what it attends to, draw it, and write pictures and numbers.

pictures/<name>.png, <name>.npz     each as soon as it is drawn
pictures/index.json                 last; without it there are no pictures

n  images      L  layers      H  heads
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import vit
from configs.data import DataConfig, ImagesSource
from configs.layout import picture_index_key, pictures_prefix
from configs.model import VitConfig
from configs.reasons import ExitReason
from configs.spec import InspectJob
from configs.states import Desired
from configs.wire import AttemptFile, DatasetCard, Manifest, Picture, PictureFile, PictureIndex
from vit.attention_maps import each_attention, mean_distance, roll_out, rollout_map, uniform_distance
from vit.filters import patch_filters, principal_components, stem_filters
from vit.position_similarity import position_similarity
from workers.control import LEAVES_WITH
from workers.data.corrupt import OnCorrupt
from workers.data.errors import DataError
from workers.data.loader import Batch, EvalLoader, normalise
from workers.data.open import open_data
from workers.data.source import Selection
from workers.distributed import Ranks
from workers.drawing.attention import draw_attention_distance, draw_attention_rollout
from workers.drawing.canvas import Drawing, style, to_npz, to_png
from workers.drawing.filters import draw_patch_filters, draw_stem_filters
from workers.drawing.positions import draw_position_similarity
from workers.outcome import RankOutcome
from workers.report import Reporter
from workers.store import ObjectStore


@dataclass(frozen=True)
class Looked:
    """What a Vision Transformer attended to, of the images that could be read, in their order."""

    distances: Tensor
    """Pixels, fp32 (n, L, H)."""
    sample_ids: NDArray[np.int64]
    """Of those n images."""
    shown: dict[str, NDArray[Any]]
    """The first few of them, as `draw_attention_rollout` takes them."""


def inspect_checkpoint(
    attempt: AttemptFile,
    spec: InspectJob,
    model: vit.Network,
    manifest: Manifest,
    ranks: Ranks,
    reporter: Reporter,
    store: ObjectStore,
    data_root: Path | None,
    on_corrupt: OnCorrupt,
) -> RankOutcome:
    """Draw the pictures of `model`, the checkpoint of `manifest`, and write them to the job's folder of the store."""
    assert spec.pictures is not None, "a resolved inspection names its pictures"
    model.to(ranks.device).eval()
    looked, steps, order = None, 0, Desired.RUN

    def keep_going() -> bool:
        nonlocal steps, order
        steps += 1
        reporter.heartbeat("inspecting", steps)
        order = reporter.desired()
        return order is Desired.RUN

    reporter.heartbeat("inspecting", 0)
    if spec.data is not None:
        assert isinstance(model, vit.ViT)
        assert attempt.dataset is not None
        looked = look(model, spec, spec.data, attempt.dataset, store, data_root, on_corrupt, ranks, keep_going)
        if looked is None:
            return RankOutcome(LEAVES_WITH[order], "", steps)
    written = []
    # Drawing and encoding: settings of the style are read at both.
    with style():
        for drawing in draw(model, spec, looked, _class_names(spec, model, attempt.dataset, manifest)):
            written.append(write(store, attempt.job_id, drawing))
            reporter.event("picture.drawn", f"Drew {drawing.name}", {"name": drawing.name})
            if not keep_going():
                return RankOutcome(LEAVES_WITH[order], "", steps)
    index = PictureIndex(
        job_id=attempt.job_id,
        checkpoint_id=manifest.checkpoint_id,
        step=manifest.step,
        dataset=None if attempt.dataset is None else attempt.dataset.name,
        split=None if spec.data is None else _split(spec.data),
        sample_ids=() if looked is None else tuple(looked.sample_ids.tolist()),
        pictures=tuple(written),
        created_at=datetime.now(UTC),
    )
    store.put(picture_index_key(attempt.job_id), index.model_dump_json().encode())
    reporter.heartbeat("finishing", steps)
    return RankOutcome(ExitReason.COMPLETED, "", steps)


def _split(data: DataConfig) -> str:
    return data.eval if data.holdout is None else f"{data.train} (held out)"


# -- looking -----------------------------------------------------------------------------------------------------------
def choose_images(data: DataConfig, num_images: int, count: int, seed: int) -> NDArray[np.int64]:
    """So many of the images, in random order: fewer are the first of more. Uploaded ones as they were named."""
    if isinstance(data.source, ImagesSource):
        return np.arange(count, dtype=np.int64)
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    return order[:count].numpy()


def look(
    model: vit.ViT,
    spec: InspectJob,
    data: DataConfig,
    card: DatasetCard,
    store: ObjectStore,
    data_root: Path | None,
    on_corrupt: OnCorrupt,
    ranks: Ranks,
    keep_going: Callable[[], bool],
) -> Looked | None:
    """Show the model the chosen images of the evaluation split; None if told not to go on.

    Raises:
        DataError: none of them can be read.
    """
    config = model.config
    source = open_data(data, card, data_root, store.get, in_channels=config.in_channels, eval_only=True).eval
    wanted = spec.wanted(config)
    num_shown = spec.num_rollout_images if "attention_rollout" in wanted else 0
    count = max(num_shown, spec.num_images if "attention_distance" in wanted else 0)
    chosen = choose_images(data, len(source), count, spec.seed)
    loader = EvalLoader(
        Selection(source, chosen),
        data,
        config.image_size,
        batch_size=spec.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        on_corrupt=on_corrupt,
        pin_memory=ranks.device.type == "cuda",
    )
    distances: list[Tensor] = []
    shown: list[dict[str, Tensor]] = []
    sample_ids: list[Tensor] = []
    left = num_shown
    for batch in loader:
        found, rolled = look_at(model, batch, data, ranks.device, roll=left > 0)
        distances.append(found)
        sample_ids.append(batch.sample_ids[batch.mask])
        if left > 0:
            shown.append({name: values[:left] for name, values in rolled.items()})
            left -= len(shown[-1]["images"])
        if not keep_going():
            return None
    places = torch.cat(sample_ids).numpy()
    if places.size == 0:
        raise DataError(f"none of the {count} chosen images of split {_split(data)!r} can be read")
    together = {name: torch.cat([part[name] for part in shown]).numpy() for name in (shown[0] if shown else ())}
    if together:
        together["sample_ids"] = chosen[places[: len(together["images"])]]
    return Looked(torch.cat(distances), chosen[places], together)


def look_at(
    model: vit.ViT, batch: Batch, data: DataConfig, device: torch.device, *, roll: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Distances (b, L, H) of a batch's images, less those that could not be read, and with `roll` the images, their
    labels, what the model takes them for (-1: it has no classifier), and their rollouts, by name."""
    config = model.config
    shown = batch.images[batch.mask]
    images = normalise(shown.to(device), data.mean, data.std)
    by_layer: list[Tensor] = []
    rolled: dict[bool, Tensor | None] = {False: None, True: None}

    def see(_: int, weights: Tensor) -> None:
        by_layer.append(mean_distance(weights, config.grid, config.stride, config.num_prefix).cpu())
        if roll:
            for residual in rolled:
                rolled[residual] = roll_out(rolled[residual], weights, residual)

    with torch.inference_mode():
        features = each_attention(model, images, see)
        parts: dict[str, Tensor] = {}
        if roll:
            plain, residual = rolled[False], rolled[True]
            assert plain is not None
            assert residual is not None
            parts = {
                "images": shown,
                "labels": batch.labels[batch.mask],
                "predicted": _predicted(model, features).cpu(),
                "plain": rollout_map(model, features, plain).cpu(),
                "residual": rollout_map(model, features, residual).cpu(),
            }
    return torch.stack(by_layer, dim=1), parts


def _predicted(model: vit.ViT, features: Tensor) -> Tensor:
    """The class of each image, int64 (n,); -1 where the model has no classifier."""
    if not model.config.has_classifier:
        return torch.full((features.shape[0],), -1)
    return model.forward_head(features).argmax(dim=1)


# -- drawing -----------------------------------------------------------------------------------------------------------
def draw(
    model: vit.Network, spec: InspectJob, looked: Looked | None, names: tuple[str, ...] | None
) -> Iterator[Drawing]:
    """The pictures that the job names, one after the other; `names`: of the classes the model tells apart."""
    for name in spec.wanted(model.config):
        if name == "stem_filters":
            yield draw_stem_filters(stem_filters(model).cpu().numpy())
            continue
        assert isinstance(model, vit.ViT), "resolve has refused the others for a ResNet"
        if name == "patch_filters":
            filters = patch_filters(model).cpu()
            yield draw_patch_filters(principal_components(filters), filters.shape[0])
        elif name == "position_similarity":
            yield draw_position_similarity(position_similarity(model).cpu().numpy(), _positions(model.config))
        else:
            assert looked is not None
            if name == "attention_distance":
                yield _draw_distance(model.config, looked)
            else:
                yield draw_attention_rollout(**looked.shown, class_names=names)


def _positions(config: VitConfig) -> str:
    where = "" if config.pos_embed_at == "stem" else f", {config.pos_embed_at.replace('_', ' ')}"
    return f"{config.pos_embed}{where}"


def _draw_distance(config: VitConfig, looked: Looked) -> Drawing:
    distances = looked.distances.double()
    return draw_attention_distance(
        distances.mean(dim=0).float().numpy(),
        distances.std(dim=0, correction=0).float().numpy(),
        num_images=len(distances),
        image_hw=config.image_size,
        uniform=uniform_distance(config.grid, config.stride),
    )


def _class_names(
    spec: InspectJob, model: vit.Network, card: DatasetCard | None, manifest: Manifest
) -> tuple[str, ...] | None:
    """Of the images; of uploaded ones, which have none, those of the checkpoint. None where the model was trained to
    tell other classes apart than the images have, or none."""
    config = model.config
    if not config.has_classifier:
        return None
    if spec.data is not None and isinstance(spec.data.source, ImagesSource):
        names = manifest.preprocess.class_names
        return names if names is not None and len(names) == config.num_classes else None
    return card.class_names if card is not None and card.num_classes == config.num_classes else None


def write(store: ObjectStore, job_id: str, drawing: Drawing) -> Picture:
    """Put a picture and its numbers into the store."""
    files = {}
    for suffix, content in (("png", to_png(drawing.figure)), ("npz", to_npz(drawing.numbers))):
        name = f"{drawing.name}.{suffix}"
        store.put(pictures_prefix(job_id) + name, content)
        files[suffix] = PictureFile(name=name, num_bytes=len(content))
    return Picture(
        name=drawing.name,
        title=drawing.title,
        caption=drawing.caption,
        image=files["png"],
        numbers=files["npz"],
    )
