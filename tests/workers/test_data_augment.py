"""Augmentation and evaluation preprocessing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pad as torchvision_pad

from configs.data import Augment
from tests.workers.image_sets import data_config, random_images
from workers.data.augment import ASPECT_RANGE, augment, augment_batch, crop_windows, eval_transform, resize

AREA = (0.05, 1.0)
CONFIGS = [Augment(crop=crop, flip=flip) for crop in ("inception", "resize", "simple") for flip in (True, False)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.crop}-flip={config.flip}")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_hw", [(28, 28), (40, 24)])
def test_one_by_one_and_together_are_the_same(config: Augment, channels: int, image_hw: tuple[int, int]) -> None:
    images = torch.from_numpy(random_images(32, channels, 28, 28))
    epochs, indices = np.arange(32) % 3, np.arange(100, 132)
    together = augment_batch(images, config, image_hw, 5, epochs, indices)
    for i, image in enumerate(images):
        assert torch.equal(augment(image, config, image_hw, 5, int(epochs[i]), int(indices[i])), together[i])
    assert together.shape == (32, channels, *image_hw)
    assert together.dtype == torch.uint8


@pytest.mark.parametrize("config", CONFIGS[::2], ids=["inception", "resize", "simple"])
def test_views_do_not_depend_on_their_neighbours(config: Augment) -> None:
    images = torch.from_numpy(random_images(40, 1, 28, 28))
    epochs, indices = np.full(40, 2), np.arange(40)
    order = np.random.default_rng(1).permutation(40)
    straight = augment_batch(images, config, (28, 28), 0, epochs, indices)
    shuffled = augment_batch(images[order], config, (28, 28), 0, epochs, indices[order])
    assert torch.equal(shuffled, straight[order])


def test_views_differ_between_seeds_epochs_and_samples() -> None:
    image = torch.from_numpy(random_images(1, 3, 64, 64)[0])
    views = {
        augment(image, Augment(), (16, 16), seed, epoch, index).numpy().tobytes()
        for seed in range(3)
        for epoch in range(3)
        for index in range(3)
    }
    assert len(views) == 27


def test_the_input_is_left_alone() -> None:
    images = torch.from_numpy(random_images(16, 1, 28, 28))
    before = images.clone()
    views = augment_batch(images, Augment(crop="resize"), (28, 28), 0, np.zeros(16, dtype=np.int64), np.arange(16))
    views.fill_(0)
    assert torch.equal(images, before)


def test_half_of_the_images_are_flipped_and_only_left_to_right() -> None:
    image = torch.tensor([[[0, 50], [100, 150]]], dtype=torch.uint8)
    views = augment_batch(
        image.expand(10_000, 1, 2, 2),
        Augment(crop="resize"),
        (2, 2),
        0,
        np.zeros(10_000, dtype=np.int64),
        np.arange(10_000),
    )
    flipped = (views == image.flip(-1)).all(dim=(1, 2, 3))
    assert (flipped | (views == image).all(dim=(1, 2, 3))).all()
    assert abs(flipped.float().mean() - 0.5) < 0.02  # four standard deviations


def test_no_flip_when_told_so() -> None:
    images = torch.from_numpy(random_images(64, 1, 28, 28))
    config = Augment(crop="resize", flip=False)
    assert torch.equal(augment_batch(images, config, (28, 28), 0, np.zeros(64, dtype=np.int64), np.arange(64)), images)


# -- the Inception crop ------------------------------------------------------------------------------------------------
def _windows(height: int, width: int, area: tuple[float, float], count: int = 400) -> np.ndarray:
    return crop_windows(
        np.full(count, height), np.full(count, width), area, 1, np.zeros(count, dtype=np.int64), np.arange(count)
    )


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 600), width=st.integers(1, 600), low=st.floats(0.01, 1.0), high=st.floats(0.01, 1.0))
def test_windows_keep_to_the_limits(height: int, width: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    for top, left, h, w in _windows(height, width, (low, high), 40).tolist():
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        if (h, w) != (height, width):
            assert low * height * width <= h * w <= high * height * width
            assert abs(w - np.clip(w, h * ASPECT_RANGE[0], h * ASPECT_RANGE[1])) <= 0.5


def test_height_is_uniform_between_its_limits() -> None:
    """TensorFlow draws the height, not the area: small crops are more frequent than torchvision's RandomResizedCrop
    makes them."""
    height, width = 3000, 4500
    _, _, h, w = _windows(height, width, AREA, 4000).T
    aspect = w / h
    low = np.sqrt(AREA[0] * height * width / aspect)
    high = np.minimum(np.sqrt(height * width / aspect), height)
    share = (h - low) / (high - low)
    quarters = np.histogram(share, bins=[-0.01, 0.25, 0.5, 0.75, 1.01])[0]
    assert quarters.sum() == 4000
    assert (abs(quarters - 1000) < 120).all()  # four standard deviations


def test_aspect_is_uniform_and_offsets_reach_both_ends() -> None:
    top, left, h, w = _windows(3000, 4500, AREA, 4000).T
    quarters = np.histogram(w / h, bins=np.linspace(*ASPECT_RANGE, 5))[0]
    assert (abs(quarters - 1000) < 120).all()
    for offset, room in ((top, 3000 - h), (left, 4500 - w)):
        share = offset[room > 100] / room[room > 100]
        assert share.min() < 0.01
        assert 0.99 < share.max() <= 1
        assert abs(share.mean() - 0.5) < 0.025


def test_an_image_that_no_window_fits_is_taken_whole() -> None:
    """10 x 1000: the largest window of aspect 1.33 has 13 x 10 pixels, 1.3 % of the image."""
    assert (_windows(10, 1000, AREA, 20) == [0, 0, 10, 1000]).all()


def test_the_window_never_changes() -> None:
    windows = crop_windows(
        np.array([224, 28, 300]), np.array([224, 28, 500]), AREA, 3, np.array([0, 1, 2]), np.array([5, 6, 7])
    )
    assert windows.tolist() == [[2, 12, 197, 160], [7, 7, 7, 6], [101, 113, 116, 127]]


def test_the_view_is_the_window_resized() -> None:
    image = torch.from_numpy(random_images(1, 3, 60, 80)[0])
    top, left, h, w = crop_windows(np.array([60]), np.array([80]), AREA, 9, np.array([4]), np.array([2]))[0]
    view = augment(image, Augment(flip=False), (20, 30), 9, 4, 2)
    assert torch.equal(view, resize(image[:, top : top + h, left : left + w], (20, 30)))


# -- the simple random crop --------------------------------------------------------------------------------------------
def test_the_simple_crop_is_a_window_of_the_padded_image() -> None:
    """The image's own resolution: nothing is resized, so each view is cut out of torchvision's reflection."""
    images = torch.from_numpy(random_images(200, 3, 12, 20))
    padded = torchvision_pad(images, [4, 4, 4, 4], padding_mode="reflect")
    config = Augment(crop="simple", flip=False)
    views = augment_batch(images, config, (12, 12), 3, np.full(200, 1), np.arange(200))
    offsets = []
    for view, whole in zip(views, padded, strict=True):
        windows = whole.unfold(1, 12, 1).unfold(2, 12, 1)  # (C, 9, 17, 12, 12)
        found = (windows == view[:, None, None]).all(dim=(0, 3, 4)).nonzero().tolist()
        assert len(found) == 1
        offsets.append(found[0])
    top, left = np.array(offsets).T
    assert set(top) == set(range(9))
    assert set(left) == set(range(17))
    assert abs(top.mean() - 4) < 0.8  # four standard deviations
    assert abs(left.mean() - 8) < 1.5


@pytest.mark.parametrize(("size", "resized"), [((60, 90), (24, 36)), ((90, 60), (36, 24)), ((6, 6), (24, 24))])
def test_the_simple_crop_makes_the_shorter_side_the_models(size: tuple[int, int], resized: tuple[int, int]) -> None:
    image = torch.from_numpy(random_images(1, 1, *size)[0])
    view = augment(image, Augment(crop="simple", flip=False), (24, 24), 5, 2, 7)
    padded = torchvision_pad(resize(image, resized), [4, 4, 4, 4], padding_mode="reflect")
    windows = padded.unfold(1, 24, 1).unfold(2, 24, 1)
    assert (windows == view[:, None, None]).all(dim=(0, 3, 4)).any()


def test_the_simple_crop_covers_an_oblong_model() -> None:
    image = torch.from_numpy(random_images(1, 3, 40, 40)[0])
    assert augment(image, Augment(crop="simple"), (16, 30), 0, 0, 0).shape == (3, 16, 30)
    assert augment(image[:, :1, :3], Augment(crop="simple"), (2, 2), 0, 0, 0).shape == (3, 2, 2)


# -- resizing ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("channels", "size", "target"), [(1, (28, 28), (40, 40)), (3, (90, 70), (32, 48)), (3, (5, 9), (64, 64))]
)
def test_resizing_is_bilinear_without_antialiasing(
    channels: int, size: tuple[int, int], target: tuple[int, int]
) -> None:
    images = torch.from_numpy(random_images(4, channels, *size))
    exact = F.interpolate(images.double(), size=target, mode="bilinear", align_corners=False, antialias=False)
    difference = resize(images, target).double() - exact
    assert difference.abs().max() <= 1.0 + 1e-6
    assert abs(difference.mean()) < 0.1


def test_evaluation_resizes_directly() -> None:
    image = torch.from_numpy(random_images(1, 3, 50, 90)[0])
    assert torch.equal(eval_transform(image, data_config(), (32, 32)), resize(image, (32, 32)))
    assert torch.equal(eval_transform(image[None], data_config(), (32, 32))[0], resize(image, (32, 32)))


def test_evaluation_can_crop_the_centre() -> None:
    """224 of 256: an image of 256 x 300 is not resized, and its central 224 x 224 are taken."""
    image = torch.from_numpy(random_images(1, 3, 256, 300)[0])
    view = eval_transform(image, data_config(eval_crop="center"), (224, 224))
    assert torch.equal(view, image[:, 16:240, 38:262])


@given(height=st.integers(1, 80), width=st.integers(1, 80), target=st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_evaluation_gives_the_size_asked_for(height: int, width: int, target: int) -> None:
    image = torch.zeros((1, height, width), dtype=torch.uint8)
    for crop in ("resize", "center"):
        assert eval_transform(image, data_config(eval_crop=crop), (target, target)).shape == (1, target, target)
