"""Evaluation counts every sample once, whatever the batches and workers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.data import DataConfig, SyntheticSource
from tests.ranks import run_ranks
from workers.data.loader import Batch
from workers.distributed import Ranks
from workers.evaluate import evaluate

pytestmark = pytest.mark.ranks

DATA = DataConfig(source=SyntheticSource(type="synthetic"), mean=(0.0,), std=(1.0,))
NUM_CLASSES = 7


def samples(count: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """One-row uint8 images that carry their own logits, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 1, num_classes), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, num_classes, (count,), generator=generator)


def forward(images: Tensor) -> Tensor:
    return images[:, 0, 0] * 3.0


def batches(count: int, num_classes: int, size: int, ranks: Ranks) -> list[Batch]:
    """Batch k of rank r is the (k * world_size + r)-th; padded with rows that must not count."""
    images, labels = samples(count, num_classes)
    made = []
    for k in range(math.ceil(count / (size * ranks.world_size))):
        start = (k * ranks.world_size + ranks.rank) * size
        part, own = images[start : start + size], labels[start : start + size]
        padding = size - len(part)
        made.append(
            Batch(
                F.pad(part, (0, 0, 0, 0, 0, 0, 0, padding), value=255),
                F.pad(own, (0, padding)),
                torch.zeros(size, dtype=torch.int64),
                torch.arange(size) < len(part),
            )
        )
    return made


def evaluate_cases(ranks: Ranks) -> list[Any]:
    def run(count: int, size: int, num_classes: int = NUM_CLASSES, **options: Any) -> dict[str, float] | None:
        loss = options.pop("loss", "softmax")
        model = options.pop("forward", forward)
        return evaluate(model, batches(count, num_classes, size, ranks), DATA, loss, ranks, **options)

    return [
        run(23, 4),
        run(23, 23),
        run(23, 4, loss="sigmoid"),
        run(9, 4, num_classes=3),
        run(23, 4, forward=lambda images: forward(images) * (float("nan") if ranks.rank == 0 else 1.0)),
        run(23, 4, keep_going=lambda: False),
        run(23, 4, forward=lambda images: forward(images) * 1e7),
    ]


@pytest.fixture(scope="module")
def by_world_size() -> dict[int, list[Any]]:
    results = {}
    for world_size in (1, 2, 3):
        ranks = run_ranks(world_size, evaluate_cases)
        assert all(repr(result) == repr(ranks[0]) for result in ranks)
        results[world_size] = ranks[0]
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_metrics_are_those_of_the_whole_split(by_world_size: dict[int, list[Any]], world_size: int) -> None:
    images, labels = samples(23, NUM_CLASSES)
    logits = forward(images.float() / 255)
    ranking = logits.argsort(dim=1, descending=True, stable=True)
    found = by_world_size[world_size][0]
    assert found["eval/num_examples"] == 23
    assert found["eval/top1"] == (ranking[:, :1] == labels[:, None]).sum().item() / 23
    assert found["eval/top5"] == (ranking[:, :5] == labels[:, None]).any(dim=1).sum().item() / 23
    assert found["eval/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
    assert 0 < found["eval/top1"] < found["eval/top5"] < 1
    sigmoid = by_world_size[world_size][2]
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, NUM_CLASSES).float(), reduction="sum") / 23
    assert sigmoid["eval/loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_workers_changes_no_digit(by_world_size: dict[int, list[Any]], world_size: int) -> None:
    for case in (0, 1, 2, 3):
        assert by_world_size[world_size][case] == by_world_size[1][case]
    assert by_world_size[1][0] == by_world_size[1][1]  # nor does the batch size


def test_top5_of_three_classes_is_all_of_them(by_world_size: dict[int, list[Any]]) -> None:
    assert by_world_size[2][3]["eval/top5"] == 1.0
    assert by_world_size[2][3]["eval/top1"] < 1.0


def test_a_broken_model_does_not_score(by_world_size: dict[int, list[Any]]) -> None:
    assert math.isnan(by_world_size[1][4]["eval/loss"])
    assert by_world_size[1][4]["eval/top1"] == 0.0
    assert math.isnan(by_world_size[2][4]["eval/loss"])


def test_an_interrupted_evaluation_has_no_result(by_world_size: dict[int, list[Any]]) -> None:
    assert by_world_size[1][5] is by_world_size[2][5] is None


def test_huge_losses_do_not_overflow(by_world_size: dict[int, list[Any]]) -> None:
    assert 1000 < by_world_size[2][6]["eval/loss"] <= 1e4
