from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import auto_augment as timm_ops
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from configs.data import Augment
from configs.data import RandAugment as RandAugmentConfig
from workers.data import photometric
from workers.data.augment import augment, augment_batch
from workers.data.photometric import BIG_VISION_OPS, TIMM_OPS, TORCHVISION_OPS

HW = (24, 32)
CONFIGS = [
    Augment(crop="resize", randaugment=RandAugmentConfig(ops=ops, magnitude=9), random_erasing=0.5)
    for ops in ("torchvision", "big_vision", "timm")
] + [Augment(three_augment=True, color_jitter=0.3)]


def picture(channels: int = 3, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*HW, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))
    return smooth if channels == 3 else smooth.convert("L")


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.mode == right.mode and np.array_equal(np.array(left), np.array(right))


def draws(*values: float) -> Any:
    numbers: Iterator[float] = iter(values)
    return numbers.__next__


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 9, 15, 30])
@pytest.mark.parametrize("op", TORCHVISION_OPS)
def test_torchvisions_operations(op: str, magnitude: int, channels: int) -> None:
    reference = RandAugment(magnitude=magnitude)
    space = reference._augmentation_space(31, HW)
    assert tuple(space) == TORCHVISION_OPS
    magnitudes, signed = space[op]
    amount = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
    image = picture(channels)
    for sign in (1.0, -1.0) if signed else (1.0,):
        expected = _apply_op(image, op, amount * sign, InterpolationMode.NEAREST, None)
        assert same(photometric.torchvision_op(image, op, magnitude / 30.0, sign), expected)


@pytest.mark.parametrize("level", [0.0, 0.9, 0.55, 0.99])
@pytest.mark.parametrize("op", TIMM_OPS)
def test_timms_operations(op: str, level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    increasing = [name.replace("Increasing", "").replace("Rel", "") for name in timm_ops._RAND_INCREASING_TRANSFORMS]
    assert tuple(increasing) == TIMM_OPS
    name = timm_ops._RAND_INCREASING_TRANSFORMS[increasing.index(op)]
    for sign in (1.0, -1.0):
        monkeypatch.setattr(timm_ops, "_randomly_negate", lambda value, sign=sign: value * sign)
        hparams = {"img_mean": (128, 128, 128), "interpolation": Image.Resampling.BICUBIC}
        reference = timm_ops.AugmentOp(name, prob=1.0, magnitude=10 * level, hparams=hparams)
        found = photometric.timm_op(picture(), op, level, sign, Image.Resampling.BICUBIC)
        assert same(found, reference(picture()))


@pytest.mark.parametrize(
    ("op", "level", "expected"),
    [
        # big_vision/pp/autoaugment.py, level_to_arg: int(4 level) bits are kept, values from 256 level inverted.
        ("Posterize", 1.0, ImageOps.posterize(picture(), 4)),
        ("Posterize", 1.5, ImageOps.posterize(picture(), 6)),
        ("Posterize", 2.0, picture()),
        ("Posterize", 0.2, Image.new("RGB", (HW[1], HW[0]))),
        ("Solarize", 0.5, ImageOps.solarize(picture(), 128)),
        ("Solarize", 1.0, picture()),
        ("Invert", 1.0, ImageOps.invert(picture())),
        ("AutoContrast", 1.0, ImageOps.autocontrast(picture())),
        ("Equalize", 1.0, ImageOps.equalize(picture())),
        ("Brightness", 0.5, picture()),
        ("Color", 0.5, picture()),
        ("Contrast", 0.5, picture()),
        ("Sharpness", 0.5, picture()),
    ],
)
def test_big_visions_operations(op: str, level: float, expected: Image.Image) -> None:
    assert same(photometric.big_vision_op(picture(), op, level, 1.0), expected)


def test_big_vision_fills_with_grey() -> None:
    moved = np.array(photometric.big_vision_op(picture(), "TranslateX", 0.1, 1.0))
    assert (moved[:, -10:] == 128).all()
    assert np.array_equal(moved[:, :-10], np.array(picture())[:, 10:])
    cut = np.array(photometric._cutout(picture(), 4, 0.5, 0.0))
    assert (cut[8:16, :4] == 128).all()
    assert np.array_equal(cut[:, 4:], np.array(picture())[:, 4:])
    added = np.array(photometric.big_vision_op(picture(), "SolarizeAdd", 1.0, 1.0)).astype(int)
    before = np.array(picture()).astype(int)
    assert np.array_equal(added, np.where(before < 128, np.minimum(before + 110, 255), before))


@pytest.mark.parametrize("ops", ["torchvision", "big_vision", "timm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_of_a_dialect_is_drawn_and_runs(ops: Any, channels: int) -> None:
    names = {"torchvision": TORCHVISION_OPS, "big_vision": BIG_VISION_OPS, "timm": TIMM_OPS}[ops]
    config = RandAugmentConfig(ops=ops, num_ops=1, magnitude=9)
    results = set()
    for number in range(len(names)):
        result = photometric.rand_augment(
            picture(channels), config, draws((number + 0.5) / len(names), 0.3, 0.3, 0.3, 0.3, 0.3)
        )
        assert result.size == (HW[1], HW[0])
        results.add(result.tobytes())
    assert len(results) >= len(names) - 3  # some change nothing here, colour not a grey image


def test_three_augment_chooses_among_three() -> None:
    assert same(photometric.three_augment(picture(), draws(0.0)), picture().convert("L").convert("RGB"))
    assert same(photometric.three_augment(picture(), draws(0.5)), ImageOps.solarize(picture()))
    blurred = picture().filter(ImageFilter.GaussianBlur(0.1 + 1.9 * 0.4))
    assert same(photometric.three_augment(picture(), draws(0.99, 0.4)), blurred)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_view_depends_on_seed_occurrence_and_index_only(config: Augment, channels: int) -> None:
    images = torch.randint(0, 256, (6, channels, *HW), dtype=torch.uint8)
    epochs, indices = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 7, 8])
    views = augment_batch(images, config, (16, 16), 5, epochs, indices)
    for i in range(6):
        one = augment(images[i], config, (16, 16), 5, int(epochs[i]), int(indices[i]))
        assert torch.equal(views[i], one)
    again = augment_batch(images, config, (16, 16), 6, epochs, indices)
    assert sum(not torch.equal(a, b) for a, b in zip(views, again, strict=True)) >= 4
    assert views.shape == (6, channels, 16, 16)


def test_erasing_is_as_often_and_as_large_as_asked() -> None:
    config, blank = Augment(crop="resize", flip=False, random_erasing=0.25), torch.zeros(3, 32, 32, dtype=torch.uint8)
    shares = np.array(
        [(augment(blank, config, (32, 32), 0, 0, i) != 0).any(dim=0).float().mean().item() for i in range(800)]
    )
    assert (shares > 0).mean() == pytest.approx(0.25, abs=0.04)
    assert shares.max() < 0.37
    assert shares[shares > 0].min() > 0.015
    assert shares[shares > 0].mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
