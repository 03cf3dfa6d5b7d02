"""Processor time of one image from its bytes to the training view, on one core: what `configs.rates.DECODED_PER_CORE`
is taken from. The opponent is Pillow's decoder alone: nothing that decodes with it takes less.

The JPEGs are made: noise of several scales, 500 x 375 pixels, which compresses about as photographs do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from configs.data import Augment
from configs.rates import DECODED_PER_CORE
from tests.benchmarks.harness import Row, arguments, interleave, report
from workers.data.augment import augment
from workers.data.files import decode

HEIGHT, WIDTH, SIDE = 375, 500, 224
NUM_FILES, NUM_IMAGES = 8, 80


def jpeg(seed: int) -> bytes:
    """A file of about 80 KB."""
    draw = np.random.default_rng(seed)
    pixels = np.full((HEIGHT, WIDTH, 3), 128.0, np.float32)
    for columns, contrast in ((4, 60), (16, 40), (64, 30), (256, 14)):
        coarse = draw.normal(size=(columns * 3 // 4, columns, 3)).astype(np.float32) * contrast
        layers = [Image.fromarray(coarse[..., c]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for c in range(3)]
        pixels += np.stack([np.asarray(layer) for layer in layers], axis=-1)
    file = BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def milliseconds(work: Callable[[int], object]) -> float:
    """This thread's processor time for one image."""
    work(0)
    started = time.thread_time()
    for number in range(NUM_IMAGES):
        work(number)
    return 1000 * (time.thread_time() - started) / NUM_IMAGES


def main(argv: list[str]) -> int:
    given = arguments(__doc__ or "", repetitions=5).parse_args(argv)
    torch.set_num_threads(1)
    files = [jpeg(seed) for seed in range(NUM_FILES)]
    view = Augment()

    def ours(number: int) -> object:
        return augment(decode(files[number % NUM_FILES], 3), view, (SIDE, SIDE), seed=0, epoch=0, index=number)

    def pillow(number: int) -> object:
        return Image.open(BytesIO(files[number % NUM_FILES])).convert("RGB")

    first, second = "decode and Inception crop", "Pillow's decoder"
    contenders = {first: lambda: milliseconds(ours), second: lambda: milliseconds(pillow)}
    values = interleave(contenders, given.repetitions)
    rows = [Row(first, "CPU ms", values[first], second), Row(second, "CPU ms", values[second])]
    notes = {"bytes": sum(map(len, files)) / NUM_FILES, "assumed_ms": 1000 / DECODED_PER_CORE["decode"]}
    size = f"{WIDTH} x {HEIGHT} pixels, {notes['bytes'] / 1000:.0f} KB"
    title = f"One JPEG of {size}; plans assume {notes['assumed_ms']:.1f} ms"
    report("decode", title, rows, given.out, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
