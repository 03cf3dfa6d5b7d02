"""Photometric and geometric augmentation of single images: RandAugment in three dialects, 3-Augment, colour jitter,
random erasing. Each is a pure function of the image and of a stream of uniform numbers.

The dialects differ in operations, in what a magnitude means, and in what fills the empty corners (black; grey, 128):

    torchvision   14 operations, magnitude 0 to 30, nearest, black: torchvision.transforms.RandAugment
    big_vision    16 operations, magnitude 0 to 10 and above, nearest, grey: big_vision/pp/autoaugment.py, with Pillow's
                  contrast and solarize for its own, which are faulty (google-research/big_vision issues 109 and 110)
    timm          15 operations that grow with magnitude 0 to 10, each applied with probability 1/2, magnitude drawn
                  from a normal distribution, bilinear or bicubic, grey: timm's `rand-m9-mstd0.5-inc1`

They run in loader threads, on Pillow images, one thread each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.data import Augment, RandAugment
from workers.data.random_bits import Stream, random_bits, uniforms

Draw = Callable[[], float]
"""The next uniform number in [0, 1) of this image."""
Picture = Image.Image
GREY = 128
_MAX_DRAWS = 256


def distort(image: Tensor, config: Augment, seed: int, occurrence: int, index: int) -> Tensor:
    """uint8 (C, h, w) to a new uint8 (C, h, w): what `config` asks for beside crop and flip.

    `occurrence` numbers the times that sample `index` is seen (its epoch, unless augmentation is repeated).
    """
    numbers: Iterator[float] = iter(
        uniforms(Stream.DISTORT, seed, occurrence, index, np.arange(_MAX_DRAWS)).tolist()  # cheaper than one by one
    )
    draw: Draw = numbers.__next__
    picture = _to_picture(image)
    if config.randaugment is not None:
        picture = rand_augment(picture, config.randaugment, draw)
    if config.three_augment:
        picture = three_augment(picture, draw)
    if config.color_jitter > 0.0:
        picture = color_jitter(picture, config.color_jitter, draw)
    pixels = _to_array(picture)
    if config.random_erasing > 0.0 and draw() < config.random_erasing:
        _erase(pixels, draw, seed, occurrence, index)
    return torch.from_numpy(pixels)


def _to_picture(image: Tensor) -> Picture:
    pixels = image.numpy()
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)) if len(pixels) == 3 else pixels[0])


def _to_array(picture: Picture) -> np.ndarray:
    """uint8 (C, h, w), writable."""
    pixels = np.array(picture)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if pixels.ndim == 3 else pixels[None]


# -- RandAugment -------------------------------------------------------------------------------------------------------
def rand_augment(picture: Picture, config: RandAugment, draw: Draw) -> Picture:
    """`config.num_ops` operations of the dialect, chosen independently."""
    for _ in range(config.num_ops):
        picture = _DIALECTS[config.ops](picture, config, draw)
    return picture


TORCHVISION_OPS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
BIG_VISION_OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)
TIMM_OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)


def _torchvision(picture: Picture, config: RandAugment, draw: Draw) -> Picture:
    op = _choose(TORCHVISION_OPS, draw)
    sign = -1.0 if draw() < 0.5 else 1.0
    return torchvision_op(picture, op, config.magnitude / 30.0, sign)


def torchvision_op(picture: Picture, op: str, strength: float, sign: float) -> Picture:
    """`strength` is the share of the largest magnitude, 0 to 1."""
    width, height = picture.size
    if op == "Identity":
        return picture
    if op in ("ShearX", "ShearY"):
        degrees = math.degrees(math.atan(0.3 * strength * sign))
        shear = [degrees, 0.0] if op == "ShearX" else [0.0, degrees]
        return F.affine(picture, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0.0, 0.0])
    if op in ("TranslateX", "TranslateY"):
        pixels = int(150.0 / 331.0 * (width if op == "TranslateX" else height) * strength * sign)
        translate = [pixels, 0] if op == "TranslateX" else [0, pixels]
        return F.affine(picture, angle=0.0, translate=translate, scale=1.0, shear=[0.0, 0.0])
    if op == "Rotate":
        return F.rotate(picture, 30.0 * strength * sign)
    if op == "Posterize":
        return F.posterize(picture, 8 - round(4 * strength))
    if op == "Solarize":
        return F.solarize(picture, 255.0 * (1.0 - strength))
    return _plain_op(picture, op, 1.0 + 0.9 * strength * sign)


def _big_vision(picture: Picture, config: RandAugment, draw: Draw) -> Picture:
    op = _choose(BIG_VISION_OPS, draw)
    sign = -1.0 if draw() < 0.5 else 1.0
    if op == "Cutout":
        return _cutout(picture, int(config.magnitude / 10.0 * 40), draw(), draw())
    return big_vision_op(picture, op, config.magnitude / 10.0, sign)


def big_vision_op(picture: Picture, op: str, level: float, sign: float) -> Picture:
    """`level` is the magnitude in tenths: 1 at magnitude 10."""
    if op == "Rotate":
        return picture.rotate(30.0 * level * sign, Image.Resampling.NEAREST, fillcolor=_grey(picture))
    if op in ("ShearX", "ShearY"):
        return _shear(picture, op, 0.3 * level * sign, Image.Resampling.NEAREST)
    if op in ("TranslateX", "TranslateY"):
        return _translate(picture, op, 100.0 * level * sign, Image.Resampling.NEAREST)
    if op == "Posterize":
        return _posterize(picture, min(8, int(4 * level)))
    if op == "Solarize":
        return ImageOps.solarize(picture, int(256 * level))
    if op == "SolarizeAdd":
        return _solarize_add(picture, int(110 * level))
    return _plain_op(picture, op, 1.8 * level + 0.1)


def _timm(picture: Picture, config: RandAugment, draw: Draw) -> Picture:
    op = _choose(TIMM_OPS, draw)
    sign = -1.0 if draw() < 0.5 else 1.0
    applied = draw() < 0.5
    normal = math.sqrt(-2.0 * math.log(1.0 - draw())) * math.cos(2.0 * math.pi * draw())
    resample = Image.Resampling.BILINEAR if draw() < 0.5 else Image.Resampling.BICUBIC
    if not applied:
        return picture
    magnitude = min(max(config.magnitude + config.magnitude_std * normal, 0.0), 10.0)
    return timm_op(picture, op, magnitude / 10.0, sign, resample)


def timm_op(picture: Picture, op: str, level: float, sign: float, resample: Image.Resampling) -> Picture:
    """The increasing set; `level` is the magnitude in tenths, 0 to 1."""
    if op == "Rotate":
        return picture.rotate(30.0 * level * sign, resample, fillcolor=_grey(picture))
    if op in ("ShearX", "ShearY"):
        return _shear(picture, op, 0.3 * level * sign, resample)
    if op in ("TranslateX", "TranslateY"):
        return _translate(picture, op, 0.45 * level * sign * picture.size[op == "TranslateY"], resample)
    if op == "Posterize":
        return _posterize(picture, 4 - int(4 * level))
    if op == "Solarize":
        return ImageOps.solarize(picture, 256 - min(256, int(256 * level)))
    if op == "SolarizeAdd":
        return _solarize_add(picture, min(128, int(110 * level)))
    return _plain_op(picture, op, max(0.1, 1.0 + 0.9 * level * sign))


_DIALECTS = {"torchvision": _torchvision, "big_vision": _big_vision, "timm": _timm}


def _choose(ops: tuple[str, ...], draw: Draw) -> str:
    return ops[int(draw() * len(ops))]


def _plain_op(picture: Picture, op: str, factor: float) -> Picture:
    """Operations that all dialects share; `factor` 1 changes nothing."""
    if op == "AutoContrast":
        return ImageOps.autocontrast(picture)
    if op == "Equalize":
        return ImageOps.equalize(picture)
    if op == "Invert":
        return ImageOps.invert(picture)
    enhance = {
        "Brightness": ImageEnhance.Brightness,
        "Color": ImageEnhance.Color,
        "Contrast": ImageEnhance.Contrast,
        "Sharpness": ImageEnhance.Sharpness,
    }[op]
    return enhance(picture).enhance(factor)


def _grey(picture: Picture) -> int | tuple[int, int, int]:
    return GREY if picture.mode == "L" else (GREY, GREY, GREY)


def _affine(picture: Picture, matrix: tuple[float, ...], resample: Image.Resampling) -> Picture:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample, fillcolor=_grey(picture))


def _shear(picture: Picture, op: str, factor: float, resample: Image.Resampling) -> Picture:
    return _affine(picture, (1, factor, 0, 0, 1, 0) if op == "ShearX" else (1, 0, 0, factor, 1, 0), resample)


def _translate(picture: Picture, op: str, pixels: float, resample: Image.Resampling) -> Picture:
    return _affine(picture, (1, 0, pixels, 0, 1, 0) if op == "TranslateX" else (1, 0, 0, 0, 1, pixels), resample)


def _posterize(picture: Picture, num_bits: int) -> Picture:
    """The first `num_bits` bits of each value, 0 to 8. (Pillow's own refuses 0, which gives a black image.)"""
    mask = 256 - (1 << (8 - num_bits))
    return picture.point([value & mask for value in range(256)] * len(picture.getbands()))


def _solarize_add(picture: Picture, addition: int) -> Picture:
    table = [min(255, value + addition) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


def _cutout(picture: Picture, pad: int, y: float, x: float) -> Picture:
    """A grey square of side 2 * pad around a point, cut off at the border."""
    width, height = picture.size
    row, column = int(y * height), int(x * width)
    box = (max(column - pad, 0), max(row - pad, 0), min(column + pad, width), min(row + pad, height))
    result = picture.copy()
    result.paste(_grey(picture), box)
    return result


# -- 3-Augment, jitter, erasing ----------------------------------------------------------------------------------------
def three_augment(picture: Picture, draw: Draw) -> Picture:
    """One of greyscale, solarise and Gaussian blur of radius 0.1 to 2 (facebookresearch/deit `augment.py`)."""
    choice = int(draw() * 3)
    if choice == 0:
        return ImageOps.grayscale(picture).convert(picture.mode)
    if choice == 1:
        return ImageOps.solarize(picture)
    return picture.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * draw()))


def color_jitter(picture: Picture, strength: float, draw: Draw) -> Picture:
    """Brightness, contrast and saturation, each by a factor of 1 - strength to 1 + strength, in random order
    (torchvision's ColorJitter with three equal numbers)."""
    factors = [1.0 + strength * (2.0 * draw() - 1.0) for _ in range(3)]
    order = sorted(range(3), key=lambda _: draw())
    for number in order:
        picture = _plain_op(picture, ("Brightness", "Contrast", "Color")[number], factors[number])
    return picture


def _erase(pixels: np.ndarray, draw: Draw, seed: int, occurrence: int, index: int) -> None:
    """Overwrite a box of 2 % to a third of the area and an aspect of 0.3 to 10/3 with noise (timm's RandomErasing,
    mode pixel; its noise is normal after normalisation, ours uniform over the range of a byte)."""
    channels, height, width = pixels.shape
    low, high = math.log(0.3), math.log(1 / 0.3)
    for _ in range(10):
        area = (0.02 + (1 / 3 - 0.02) * draw()) * height * width
        aspect = math.exp(low + (high - low) * draw())
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, left = draw(), draw()
        if h < height and w < width:
            y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
            count = channels * h * w
            noise = random_bits(Stream.ERASE, seed, occurrence, index, np.arange(-(-count // 8))).view(np.uint8)
            pixels[:, y : y + h, x : x + w] = noise[:count].reshape(channels, h, w)
            return
