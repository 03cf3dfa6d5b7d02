"""Inspect attempts on generated images: what they leave, against the model looked at directly."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vit
from configs.data import DataConfig
from configs.layout import image_key, picture_index_key, pictures_prefix
from configs.load import parse_spec
from configs.model import VitConfig
from configs.reasons import ExitReason
from configs.resolve import SourceCheckpoint, resolve
from configs.states import Desired
from configs.wire import PictureIndex
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import card_of, make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, run_attempts
from vit.attention_maps import attention_maps, mean_distance, rollout
from vit.position_similarity import position_similarity
from workers.checkpoint import read_manifest, read_weights
from workers.data.errors import DataError
from workers.data.images import UploadedImages
from workers.data.loader import normalise
from workers.data.open import open_data
from workers.data.source import UNKNOWN_LABEL
from workers.inspection import choose_images

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

HYBRID = {"stem": {"layers": [], "width": 32}, "patch_size": 1, "pool": "gap"}
VIT_SOURCE, HYBRID_SOURCE = saved_at(1, 1), saved_at(1, 2)
VIT_JOB, HYBRID_JOB, FEW_JOB, STOPPED_JOB, OWN_JOB = (f"job_01JZZZZZZZZZZZZZZZZZZZZZZ{letter}" for letter in "ABCDE")
*OWN_IMAGES, MISSING_IMAGE = (f"img_01JZZZZZZZZZZZZZZZZZZZZZZ{letter}" for letter in "CAB")
RED, BLUE = (255, 0, 0), (0, 0, 255)


def inspection(store: DirStore, source: Any, **parts: Any) -> Any:
    """An inspect job of a checkpoint, resolved as at submission."""
    raw = {"kind": "inspect", "init_from": source.checkpoint_id, "resources": {"workers": 1, "gpus_per_worker": 0}}
    manifest = read_manifest(store, source.prefix)
    data = tiny_spec().data
    assert isinstance(data, DataConfig)
    known = SourceCheckpoint(source.checkpoint_id, source.prefix, manifest.model, manifest.preprocess, data)
    spec = parse_spec(raw | parts)
    return resolve(spec, card_of(spec if "data" in parts else tiny_spec()), known)


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> tuple[DirStore, dict[str, Result]]:
    """Two trained checkpoints, of a ViT and of a hybrid, and jobs that look at them."""
    root = tmp_path_factory.mktemp("source")
    schedule = {"total_steps": 1, "warmup_steps": 0}
    hybrid = tiny_spec(model=HYBRID, schedule=schedule)
    training = [make_attempt(tiny_spec(schedule=schedule), 1, 1), make_attempt(hybrid, 1, 2)]
    trained = run_ranks(1, run_attempts, [Run(attempt) for attempt in training], str(root))[0]
    assert [result.outcome.reason for result in trained] == [ExitReason.COMPLETED] * 2, trained
    store = DirStore(root)
    jobs = {
        VIT_JOB: (VIT_SOURCE, {"num_images": 10, "num_rollout_images": 5, "batch_size": 4, "seed": 3}, {}),
        HYBRID_JOB: (HYBRID_SOURCE, {}, {}),
        FEW_JOB: (VIT_SOURCE, {"pictures": ["position_similarity"]}, {}),
        STOPPED_JOB: (VIT_SOURCE, {"batch_size": 1}, {0: (2, Desired.STOP)}),
    }
    for image_id, colour in zip(OWN_IMAGES, (RED, BLUE), strict=True):
        content = io.BytesIO()
        Image.new("RGB", (20, 12), colour).save(content, "PNG")
        store.put(image_key(image_id), content.getvalue())
    own = {"source": {"type": "images", "ids": OWN_IMAGES}}
    jobs[OWN_JOB] = (VIT_SOURCE, {"data": own, "pictures": ["attention_rollout"]}, {})
    runs = [
        Run(make_attempt(inspection(store, source, **parts), 1, 1, job_id, init_from=source), orders)
        for job_id, (source, parts, orders) in jobs.items()
    ]
    results = run_ranks(1, run_attempts, runs, str(root))[0]
    return store, dict(zip(jobs, results, strict=True))


def index_of(store: DirStore, job_id: str) -> PictureIndex:
    return PictureIndex.model_validate_json(store.get(picture_index_key(job_id)))


def numbers(store: DirStore, job_id: str, name: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(store.get(pictures_prefix(job_id) + f"{name}.npz")), allow_pickle=False) as file:
        return dict(file)


def model_and_images(store: DirStore, sample_ids: Any) -> tuple[vit.ViT, torch.Tensor]:
    weights, manifest = read_weights(store, VIT_SOURCE.prefix)
    assert isinstance(manifest.model, VitConfig)
    model = vit.build(manifest.model).eval()
    model.load_state_dict(weights)
    spec = tiny_spec()
    card = card_of(spec)
    assert card is not None
    images = open_data(spec.data, card, None, store.get, in_channels=3).eval.read_many(np.asarray(sample_ids))
    return model, normalise(images, (0.5,), (0.5,))


def test_all_pictures_of_a_model_are_written(inspected: Any) -> None:
    store, results = inspected
    for job_id, expected in (
        (VIT_JOB, ["patch_filters", "position_similarity", "attention_distance", "attention_rollout"]),
        (HYBRID_JOB, ["position_similarity", "attention_distance", "attention_rollout", "stem_filters"]),
        (FEW_JOB, ["position_similarity"]),
    ):
        assert results[job_id].outcome.reason is ExitReason.COMPLETED, results[job_id].outcome
        index = index_of(store, job_id)
        assert [picture.name for picture in index.pictures] == expected
        for picture in index.pictures:
            content = store.get(pictures_prefix(job_id) + picture.image.name)
            assert len(content) == picture.image.num_bytes
            assert Image.open(io.BytesIO(content)).format == "PNG"
            assert len(store.get(pictures_prefix(job_id) + picture.numbers.name)) == picture.numbers.num_bytes
        events = [data["name"] for type_, _, data in results[job_id].events if type_ == "picture.drawn"]
        assert events == expected
        assert results[job_id].phases == ["loading", "inspecting", "finishing"]


def test_the_index_says_what_was_looked_at(inspected: Any) -> None:
    store, _ = inspected
    index = index_of(store, VIT_JOB)
    assert (index.job_id, index.checkpoint_id, index.step) == (VIT_JOB, VIT_SOURCE.checkpoint_id, 1)
    assert (index.dataset, index.split) == ("synthetic", "test")
    assert list(index.sample_ids) == choose_images(tiny_spec().data, 21, 10, 3).tolist()
    weights_only = index_of(store, FEW_JOB)
    assert (weights_only.dataset, weights_only.split, weights_only.sample_ids) == (None, None, ())


def test_the_numbers_are_those_of_the_model(inspected: Any) -> None:
    store, _ = inspected
    sample_ids = index_of(store, VIT_JOB).sample_ids
    model, images = model_and_images(store, sample_ids)
    by_layer = [mean_distance(weights, (2, 2), 4, 1) for weights in attention_maps(model, images)]
    found = numbers(store, VIT_JOB, "attention_distance")
    assert found["distance"] == pytest.approx(torch.stack(by_layer, dim=1).mean(dim=0).numpy(), rel=1e-4)
    assert found["deviation"] == pytest.approx(torch.stack(by_layer, dim=1).std(dim=0, correction=0).numpy(), abs=1e-4)
    assert found["num_images"] == 10
    shown = numbers(store, VIT_JOB, "attention_rollout")
    assert shown["sample_ids"].tolist() == list(sample_ids[:5])
    for key, residual in (("rollout", False), ("rollout_residual", True)):
        expected = rollout(model, images[:5], residual=residual)
        assert shown[key] == pytest.approx(expected.numpy(), abs=1e-5)
    with torch.no_grad():
        assert shown["predicted"].tolist() == model(images[:5]).argmax(dim=1).tolist()
    expected_similarity = position_similarity(model).numpy()
    for job_id in (VIT_JOB, FEW_JOB):
        assert numbers(store, job_id, "position_similarity")["similarity"] == pytest.approx(expected_similarity)


def test_a_default_asks_for_no_more_images_than_there_are(inspected: Any) -> None:
    store, _ = inspected
    assert sorted(index_of(store, HYBRID_JOB).sample_ids) == list(range(21))
    assert numbers(store, HYBRID_JOB, "stem_filters")["filters"].shape == (32, 3, 7, 7)


def test_an_inspection_that_is_stopped_leaves_no_index(inspected: Any) -> None:
    store, results = inspected
    assert results[STOPPED_JOB].outcome.reason is ExitReason.USER_CANCELLED
    assert results[STOPPED_JOB].outcome.step == 2
    assert not list(store.list(pictures_prefix(STOPPED_JOB)))


def test_uploaded_images_are_shown_in_their_order_with_what_the_model_takes_them_for(inspected: Any) -> None:
    store, results = inspected
    assert results[OWN_JOB].outcome.reason is ExitReason.COMPLETED, results[OWN_JOB].outcome
    index = index_of(store, OWN_JOB)
    assert (index.dataset, index.sample_ids) == ("images", (0, 1))
    assert [picture.name for picture in index.pictures] == ["attention_rollout"]
    found = numbers(store, OWN_JOB, "attention_rollout")
    assert found["labels"].tolist() == [UNKNOWN_LABEL] * 2
    assert found["images"].shape == (2, 3, 8, 8)
    assert found["images"][:, :, 4, 4].tolist() == [list(RED), list(BLUE)]


def test_an_image_that_was_deleted_is_named(inspected: Any) -> None:
    store, _ = inspected
    source = UploadedImages([MISSING_IMAGE], store.get, 3)
    with pytest.raises(DataError, match=f"image {MISSING_IMAGE} is no longer in the object store"):
        source.read(0)
