"""The pictures themselves, drawn of numbers of every shape: readable files, equal for equal numbers, nothing empty."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vit.filters import principal_components
from workers.drawing.attention import draw_attention_distance, draw_attention_rollout
from workers.drawing.canvas import Drawing, style, to_npz, to_png
from workers.drawing.filters import draw_patch_filters, draw_stem_filters
from workers.drawing.positions import alike, draw_position_similarity


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def patch_filters(*shape: int) -> Callable[[], Drawing]:
    return lambda: draw_patch_filters(principal_components(torch.from_numpy(random(*shape))), shape[0])


def positions(*shape: int, kind: str = "learned") -> Callable[[], Drawing]:
    return lambda: draw_position_similarity(np.tanh(random(*shape, *shape[1:])), kind)


def distance(layers: int, heads: int) -> Callable[[], Drawing]:
    values = np.abs(random(layers, heads)) * 4
    return lambda: draw_attention_distance(values, values / 10, num_images=3, image_hw=(28, 42), uniform=9.0)


def rollout(
    count: int, channels: int, names: tuple[str, ...] | None = ("trouser", "sneaker"), brightest: int = 255
) -> Callable[[], Drawing]:
    def draw() -> Drawing:
        images = np.random.default_rng(0).integers(0, brightest + 1, (count, channels, 16, 24), dtype=np.uint8)
        maps = np.abs(random(count, 2, 3)) + 0.01
        maps /= maps.sum(axis=(1, 2), keepdims=True)
        places = np.arange(count)
        return draw_attention_rollout(
            images=images,
            plain=maps,
            residual=maps[:, ::-1],
            sample_ids=places,
            labels=places % 2,
            predicted=np.zeros(count, dtype=np.int64),
            class_names=names,
        )

    return draw


CASES: dict[str, Callable[[], Drawing]] = {
    "grey filters": patch_filters(64, 1, 4, 4),
    "colour filters": patch_filters(40, 3, 8, 8),
    "two filters": patch_filters(2, 3, 4, 4),
    "grey stem": lambda: draw_stem_filters(random(32, 1, 7, 7)),
    "wide stem": lambda: draw_stem_filters(random(320, 3, 7, 7)),
    "positions": positions(1, 7, 7),
    "one patch": positions(1, 1, 1),
    "one row": positions(1, 1, 5),
    "positions of every layer": positions(5, 3, 4, kind="learned, every layer"),
    "large grid": positions(1, 33, 20),
    "relative": positions(2, 2, 2, kind="relative"),
    "distance": distance(6, 4),
    "one layer and head": distance(1, 1),
    "many layers": distance(32, 16),
    "rollout": rollout(8, 1),
    "one colour image": rollout(1, 3),
    "many images": rollout(20, 3),
    "other classes": rollout(2, 1, None),
    "a black image": rollout(1, 1, brightest=0),
}


@pytest.mark.parametrize("name", CASES)
def test_every_picture_is_drawn(name: str) -> None:
    with style():
        drawing = CASES[name]()
        content = to_png(drawing.figure)
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    assert min(image.size) > 200
    pixels = np.asarray(image.convert("L"))
    assert (pixels < 200).mean() > 0.005  # something is there
    for edge in (pixels[:, :2], pixels[:, -2:], pixels[-2:]):
        assert (edge > 200).all()  # and nothing is cut off
    assert drawing.title
    assert "nan" not in drawing.caption
    with np.load(io.BytesIO(to_npz(drawing.numbers)), allow_pickle=False) as numbers:
        assert set(numbers) == set(drawing.numbers)
        for key, value in drawing.numbers.items():
            np.testing.assert_array_equal(numbers[key], value)


def test_equal_numbers_give_equal_bytes() -> None:
    def draw() -> tuple[bytes, bytes]:
        with style():
            drawing = CASES["distance"]()
            return to_png(drawing.figure), to_npz(drawing.numbers)

    assert draw() == draw()


def test_other_numbers_give_another_picture() -> None:
    def draw(similarity: Any) -> bytes:
        with style():
            return to_png(draw_position_similarity(similarity, "learned").figure)

    near = np.tanh(random(1, 3, 3, 3, 3))
    assert draw(near) != draw(-near)


def test_rows_and_columns_are_told_apart() -> None:
    """Patches of one row are alike here, all others opposite."""
    similarity = np.full((1, 2, 3, 2, 3), -1.0, dtype=np.float32)
    for row in range(2):
        similarity[0, row, :, row, :] = 1.0
    assert list(alike(similarity).values()) == [1.0, -1.0, -1.0]
    assert list(alike(np.ones((1, 1, 3, 1, 3), dtype=np.float32))) == ["the others of its row"]
    assert alike(np.ones((1, 1, 1, 1, 1), dtype=np.float32)) == {}


def test_captions_say_the_main_numbers() -> None:
    with style():
        caption = CASES["distance"]().caption
        filters = CASES["grey filters"]().caption
    values = np.abs(random(6, 4)) * 4
    assert f"{values[0].min():.1f} to {values[0].max():.1f} pixels" in caption
    assert "9.0 pixels" in caption
    assert "64 patch-embedding filters" in filters
