"""Inspect jobs: which pictures a model has, and what is refused at submission."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from configs.data import DataConfig
from configs.datasets import card_for
from configs.errors import FieldError, SpecError
from configs.model import BitConfig, ResNetConfig, VitConfig
from configs.pictures import PICTURES, PictureName, pictures_of, why_not
from configs.plan import plan
from configs.resolve import SourceCheckpoint, canonical_json, data_of, load_resolved, resolve
from configs.spec import InspectJob
from configs.wire import DatasetCard, Preprocess
from tests.configs.specs import CARD, PRETRAIN, job, source

INSPECT: dict[str, Any] = {"kind": "inspect", "init_from": "ckpt_x", "resources": {"gpus_per_worker": 0}}
DATA = DataConfig.model_validate(PRETRAIN["data"] | {"augment": {"flip": False}, "subset": {"fraction": 0.5}})
STEM = {"layers": ()}


def bit() -> SourceCheckpoint:
    model = BitConfig(resnet=ResNetConfig(layers=(1,)), image_size=(16, 16), num_classes=5)
    prepared = Preprocess(image_size=(16, 16), in_channels=3, mean=(0.5,), std=(0.5,))
    return SourceCheckpoint("ckpt_x", "jobs/x/", model, prepared, DATA)


def resolved(src: SourceCheckpoint, card: DatasetCard | None = CARD, **overrides: Any) -> InspectJob:
    found = resolve(job(INSPECT, **overrides), card, src)
    assert isinstance(found, InspectJob)
    return found


def faults(src: SourceCheckpoint | None, card: DatasetCard | None = CARD, **overrides: Any) -> dict[str, FieldError]:
    with pytest.raises(SpecError) as caught:
        resolve(job(INSPECT, **overrides), card, src)
    return {error.pointer: error for error in caught.value.errors}


def test_every_model_has_its_pictures() -> None:
    vit = source().model
    assert isinstance(vit, VitConfig)
    assert pictures_of(vit) == ("patch_filters", "position_similarity", "attention_distance", "attention_rollout")
    hybrid = source(stem=STEM, patch_size=1).model
    assert pictures_of(hybrid) == PICTURES[1:]
    assert pictures_of(bit().model) == ("stem_filters",)
    assert "position_similarity" not in pictures_of(source(pos_embed="none").model)
    assert get_args(PictureName) == PICTURES
    for model in (vit, hybrid, bit().model):
        assert {name for name in PICTURES if why_not(name, model)} == set(PICTURES) - set(pictures_of(model))


def test_an_inspection_resolves_to_all_pictures_of_the_model_on_its_data() -> None:
    found = resolved(source(data=DATA))
    assert found.pictures == ("patch_filters", "position_similarity", "attention_distance", "attention_rollout")
    assert found.data is not None
    assert (found.data.eval, found.data.subset) == ("val", None)
    assert (found.num_images, found.num_rollout_images, found.seed) == (128, 8, 0)
    assert load_resolved(canonical_json(found)) == found
    assert resolve(found, CARD, source(data=DATA)) == found


def test_pictures_of_weights_need_no_data() -> None:
    found = resolved(source(data=DATA), None, pictures=["position_similarity", "patch_filters"])
    assert found.pictures == ("patch_filters", "position_similarity")
    assert found.data is None
    assert data_of(found, source(data=DATA)) is None
    of_a_resnet = resolved(bit(), None)
    assert (of_a_resnet.pictures, of_a_resnet.data) == (("stem_filters",), None)


def test_images_of_other_data_are_prepared_as_the_checkpoint_wants_them() -> None:
    found = resolved(source(mean=(0.1, 0.2, 0.3), num_classes=9), data=PRETRAIN["data"])
    assert found.data is not None
    assert found.data.mean == (0.1, 0.2, 0.3)


def test_no_more_images_are_looked_at_than_there_are() -> None:
    few = CARD.model_copy(update={"splits": (CARD.splits[0], CARD.splits[1].model_copy(update={"num_examples": 5}))})
    found = resolved(source(data=DATA), few)
    assert (found.num_images, found.num_rollout_images) == (5, 5)
    error = faults(source(data=DATA), few, num_images=6)["/num_images"]
    assert (error.value, error.allowed) == (6, "at most 5")


@pytest.mark.parametrize(
    ("src", "picture", "words"),
    [
        (bit(), "attention_distance", "ResNet"),
        (bit(), "position_similarity", "ResNet"),
        (source(data=DATA), "stem_filters", "no convolutional stem"),
        (source(data=DATA, stem=STEM, patch_size=1), "patch_filters", "hybrid"),
        (source(data=DATA, pos_embed="none"), "position_similarity", "pos_embed none"),
    ],
)
def test_a_picture_that_does_not_exist_is_refused(src: SourceCheckpoint, picture: str, words: str) -> None:
    error = faults(src, pictures=[pictures_of(src.model)[0], picture])["/pictures/1"]
    assert words in error.message
    assert picture in error.message
    assert error.value == picture
    assert error.allowed == ", ".join(pictures_of(src.model))


@pytest.mark.parametrize(
    ("src", "overrides", "pointer"),
    [
        (None, {}, "/init_from"),
        (source(), {}, "/data"),
        (bit(), {"data": PRETRAIN["data"]}, "/data"),
        (source(data=DATA), {"pictures": ["patch_filters"], "data": PRETRAIN["data"]}, "/data"),
        (source(data=DATA), {"data": PRETRAIN["data"] | {"eval": "x"}}, "/data/eval"),
        (source(data=DATA, in_channels=1), {"data": PRETRAIN["data"] | {"mean": [1, 2, 3]}}, "/data/mean"),
    ],
)
def test_inspections_that_contradict_are_refused(
    src: SourceCheckpoint | None, overrides: dict[str, Any], pointer: str
) -> None:
    assert set(faults(src, **overrides)) == {pointer}


@pytest.mark.parametrize(
    ("overrides", "pointer", "words"),
    [
        ({"pictures": []}, "/pictures", "at least 1"),
        ({"pictures": ["attention"]}, "/pictures/0", "attention_rollout"),
        ({"pictures": ["patch_filters", "patch_filters"]}, "/pictures", "twice"),
        ({"resources__workers": 2}, "/resources/workers", "one worker"),
        ({"num_images": 0}, "/num_images", "at least 1"),
        ({"num_rollout_images": 65}, "/num_rollout_images", "at most 64"),
        ({"pictures": ["patch_filters"], "num_images": 9}, "/num_images", "no effect"),
        ({"pictures": ["attention_distance"], "num_rollout_images": 9}, "/num_rollout_images", "no effect"),
        ({"pictures": ["patch_filters"], "seed": 1}, "/seed", "no effect"),
        ({"data": PRETRAIN["data"] | {"mix": {"mixup": 0.1}}}, "/data/mix", "an inspect job"),
        ({"num_imagess": 1}, "/num_imagess", "num_images"),
    ],
)
def test_what_is_wrong_with_an_inspection_is_named(overrides: dict[str, Any], pointer: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(INSPECT, **overrides)
    (error,) = caught.value.errors
    assert error.pointer == pointer
    assert words in error.message


def test_an_inspection_is_planned() -> None:
    found = plan(job(INSPECT), CARD, None, source(data=DATA))
    assert (found.kind, found.num_examples, found.world_size) == ("inspect", 128, 1)
    assert found.macs is not None
    assert found.exaflops == pytest.approx(2 * found.macs * 128 / 1e18)
    assert plan(job(INSPECT), None, None, bit()).num_examples == 0
    assert plan(job(INSPECT, pictures=["attention_rollout"]), CARD, None, source(data=DATA)).num_examples == 8


IMAGES = [f"img_01ARZ3NDEKTSV4RRFFQ69G5FA{letter}" for letter in "ABC"]
OWN = {"source": {"type": "images", "ids": IMAGES}}


def test_uploaded_images_are_all_looked_at_prepared_as_the_checkpoint_wants_them() -> None:
    spec = job(INSPECT, data=OWN)
    assert isinstance(spec, InspectJob)
    assert spec.data is not None
    card = card_for(spec.data.source, {})
    src = source()  # says nothing of its data: weights that were imported
    found = resolve(spec, card, src)
    assert found.data is not None
    assert (found.num_images, found.num_rollout_images) == (3, 3)
    assert (found.data.mean, found.data.std) == (src.preprocess.mean, src.preprocess.std)
    assert resolved(src, card, data=OWN, num_rollout_images=2).num_rollout_images == 2
    assert "at most 3" in str(faults(src, card, data=OWN, num_images=4)["/num_images"].allowed)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], "at least 1"),
        (IMAGES[:1] * 2, "named twice"),
        (["../../secret"], "text matching"),
        ([f"img_01ARZ3NDEKTSV4RRFFQ69G5{n:03d}" for n in range(17)], "at most 16"),
    ],
)
def test_images_are_named_by_their_ids_each_once(ids: list[str], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        job(INSPECT, data={"source": {"type": "images", "ids": ids}})


def test_jobs_that_need_labels_refuse_uploaded_images() -> None:
    data = DataConfig.model_validate(OWN)
    card = card_for(data.source, {})
    for spec in (job(PRETRAIN, data=OWN), job(INSPECT, kind="evaluate", data=OWN)):
        with pytest.raises(SpecError, match="have no labels") as caught:
            resolve(spec, card, source())
        assert caught.value.errors[0].pointer == "/data/source/type"
