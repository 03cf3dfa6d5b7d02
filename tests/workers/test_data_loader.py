"""Training and evaluation batches."""

from __future__ import annotations

import gc
import threading
import time
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import DataConfig
from tests.workers.image_sets import array_source, data_config, decoded_source
from workers.data.corrupt import CorruptImage
from workers.data.errors import DataError
from workers.data.loader import PADDING, Batch, EvalLoader, TrainLoader, normalise
from workers.data.order import batch_indices
from workers.data.source import ImageSource

HW = (12, 12)
PLAIN = {"augment": {"crop": "resize", "flip": False}}


def train_loader(source: ImageSource, data: DataConfig | None = None, **given: Any) -> TrainLoader:
    options: dict[str, Any] = {"seed": 1, "global_batch_size": 16, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    return TrainLoader(source, data or data_config(), HW, **(options | given))


def first_steps(source: ImageSource, num_steps: int, data: DataConfig | None = None, **given: Any) -> list[list[Batch]]:
    with train_loader(source, data, **given) as loader:
        return list(islice(loader, num_steps))


def same(one: Batch, other: Batch) -> bool:
    fields = ("images", "labels", "sample_ids", "mask")
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in fields)


def whole_steps(source: ImageSource, world_size: int, micro_batch_size: int, num_steps: int = 4) -> list[Batch]:
    """Each step of all ranks put together in the order of micro-batches."""
    of_rank = [
        first_steps(source, num_steps, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    steps = []
    for step in range(num_steps):
        micro = [steps[step][a] for a in range(16 // world_size // micro_batch_size) for steps in of_rank]
        steps.append(
            Batch(*(torch.cat([getattr(b, f) for b in micro]) for f in ("images", "labels", "sample_ids", "mask")))
        )
    return steps


# -- training ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 16), (1, 1), (2, 4), (4, 2), (4, 4), (8, 1), (16, 1)])
@pytest.mark.parametrize("source", [array_source(37), decoded_source(37)], ids=["array", "decoded"])
def test_a_step_holds_the_same_images_however_it_is_divided(
    source: ImageSource, world_size: int, micro_batch_size: int
) -> None:
    for step, (one, other) in enumerate(
        zip(whole_steps(source, 1, 4), whole_steps(source, world_size, micro_batch_size), strict=True)
    ):
        assert same(one, other)
        assert one.sample_ids.tolist() == batch_indices(1, 37, 16 * step, 16).tolist()


def test_a_batch_goes_on_into_the_next_epoch() -> None:
    (step,) = first_steps(array_source(10), 1, micro_batch_size=16)
    ids = step[0].sample_ids.tolist()
    assert sorted(ids[:10]) == list(range(10))
    assert ids == batch_indices(1, 10, 0, 16).tolist()


def test_a_sample_looks_different_in_the_next_epoch_within_one_batch() -> None:
    (step,) = first_steps(array_source(1), 1, micro_batch_size=16)
    assert step[0].sample_ids.tolist() == [0] * 16
    assert len({image.numpy().tobytes() for image in step[0].images}) > 8


def test_a_batch_may_hold_several_epochs() -> None:
    (step,) = first_steps(array_source(3), 1, micro_batch_size=16)
    ids = step[0].sample_ids.tolist()
    assert all(sorted(ids[start : start + 3]) == [0, 1, 2] for start in range(0, 15, 3))


@pytest.mark.parametrize("start_step", [1, 3, 7])
def test_starting_later_gives_the_same_batches(start_step: int) -> None:
    source = array_source(37)
    through = first_steps(source, 9, world_size=2, rank=1)[start_step:]
    resumed = first_steps(source, 9 - start_step, world_size=2, rank=1, start_step=start_step)
    for one, other in zip(through, resumed, strict=True):
        assert all(map(same, one, other))


@pytest.mark.parametrize("loader_workers", [0, 3])
@pytest.mark.parametrize("crop", ["inception", "resize"])
def test_decoded_and_in_memory_images_go_the_same_way(loader_workers: int, crop: str) -> None:
    data = data_config(loader_workers=loader_workers, augment={"crop": crop})
    together = first_steps(array_source(30, channels=3), 3, data)
    one_by_one = first_steps(decoded_source(30, channels=3), 3, data)
    for step, other in zip(together, one_by_one, strict=True):
        assert all(map(same, step, other))


def test_labels_belong_to_their_images() -> None:
    source = array_source(37, num_classes=5)
    for step in first_steps(source, 5, data_config(**PLAIN)):
        for batch in step:
            assert batch.labels.tolist() == source.labels[batch.sample_ids].tolist()
            assert torch.equal(batch.images, source.read_many(batch.sample_ids.numpy()))
            assert batch.mask.all()
            assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)


def test_the_step_is_a_list_of_micro_batches() -> None:
    (step,) = first_steps(array_source(37), 1, world_size=2, micro_batch_size=2)
    assert [len(batch.labels) for batch in step] == [2, 2, 2, 2]


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size 16 .* 3 workers x train.micro_batch_size 2"):
        train_loader(array_source(37), world_size=3, micro_batch_size=2)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        train_loader(array_source(0))


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_closing_ends_all_threads(loader_workers: int) -> None:
    before = threading.active_count()
    loader = train_loader(decoded_source(37), data_config(loader_workers=loader_workers))
    next(loader)
    assert threading.active_count() == before + 1 + loader_workers
    loader.close()
    assert threading.active_count() == before


def test_a_forgotten_loader_ends_its_threads() -> None:
    before = threading.active_count()
    loader = train_loader(decoded_source(37), data_config(loader_workers=2))
    next(loader)
    del loader
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(("crop", "limit_us"), [("resize", 60), ("inception", 250)])
def test_small_images_cost_little(crop: str, limit_us: int) -> None:
    """Training and loading share the cores of a laptop: an epoch of Fashion-MNIST must cost seconds. Measured here:
    1 us of processor time per image (resize) and 18 us (inception)."""
    num_steps, batch_size = 20, 256
    source = array_source(2000, side=28)
    data = data_config(augment={"crop": crop})
    start = time.process_time()
    options = {"seed": 0, "global_batch_size": batch_size, "micro_batch_size": 64, "rank": 0, "world_size": 1}
    with TrainLoader(source, data, (28, 28), **options) as loader:
        list(islice(loader, num_steps))
    assert (time.process_time() - start) / (num_steps * batch_size) * 1e6 < limit_us


# -- unreadable images -------------------------------------------------------------------------------------------------
def test_an_unreadable_image_is_replaced_by_the_next_one_and_told_once() -> None:
    source = decoded_source(10, broken=[3, 4])
    told: list[CorruptImage] = []
    data = data_config(max_corrupt=0.2, **PLAIN)
    with train_loader(source, data, micro_batch_size=16, on_corrupt=told.append) as loader:
        batches = [next(loader)[0] for _ in range(3)]
    for batch in batches:
        replaced = [5 if i in (3, 4) else i for i in batch.sample_ids.tolist()]
        assert batch.labels.tolist() == source.labels[replaced].tolist()
        assert torch.equal(batch.images, torch.stack([source.read(i) for i in replaced]))
    assert sorted(corrupt.name for corrupt in told) == ["image-3.png", "image-4.png"]
    assert [corrupt.count for corrupt in told] == [1, 2]
    assert told[0].limit == 2
    assert "truncated" in told[0].message


def test_the_last_image_is_replaced_by_the_first_readable() -> None:
    source = decoded_source(5, broken=[4, 0])
    data = data_config(max_corrupt=0.4, **PLAIN)
    (step,) = first_steps(source, 1, data, micro_batch_size=16)
    at = step[0].sample_ids.tolist().index(4)
    assert torch.equal(step[0].images[at], source.read(1))


@pytest.mark.parametrize("loader_workers", [0, 3])
def test_too_many_unreadable_images_end_the_job(loader_workers: int) -> None:
    source = decoded_source(20, broken=[2, 7, 11])
    data = data_config(max_corrupt=0.1, loader_workers=loader_workers)
    with (
        train_loader(source, data) as loader,
        pytest.raises(DataError, match=r"3 of 20 images .* data.max_corrupt allows 2; the last one was image-\d+.png"),
    ):
        list(islice(loader, 4))


@pytest.mark.parametrize("max_corrupt", [0.0, 1.0])
def test_if_nothing_can_be_read_it_says_so(max_corrupt: float) -> None:
    source = decoded_source(4, broken=[0, 1, 2, 3])
    with train_loader(source, data_config(max_corrupt=max_corrupt)) as loader, pytest.raises(DataError, match="read"):
        next(loader)


def test_substitutes_do_not_depend_on_decode_threads() -> None:
    source = decoded_source(40, broken=[1, 2, 3, 20])
    one, other = (first_steps(source, 4, data_config(max_corrupt=0.2, loader_workers=workers)) for workers in (0, 4))
    assert all(same(a, b) for step, twin in zip(one, other, strict=True) for a, b in zip(step, twin, strict=True))


# -- evaluation --------------------------------------------------------------------------------------------------------
def eval_loader(source: ImageSource, batch_size: int, rank: int, world_size: int, **fields: Any) -> EvalLoader:
    return EvalLoader(source, data_config(**fields), HW, batch_size=batch_size, rank=rank, world_size=world_size)


@settings(deadline=None, max_examples=40)
@given(num_images=st.integers(1, 60), world_size=st.sampled_from([1, 2, 3, 5]), batch_size=st.integers(1, 20))
def test_every_image_is_evaluated_once(num_images: int, world_size: int, batch_size: int) -> None:
    source = array_source(num_images)
    per_rank = [list(eval_loader(source, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in per_rank}) == 1
    assert len({batch.images.shape for batches in per_rank for batch in batches}) == 1
    seen: list[int] = []
    for batch in (batch for batches in per_rank for batch in batches):
        ids = batch.sample_ids[batch.mask]
        assert torch.equal(batch.images[batch.mask], source.read_many(ids.numpy()))
        assert batch.labels[batch.mask].tolist() == source.labels[ids.numpy()].tolist()
        assert (batch.sample_ids[~batch.mask] == PADDING).all()
        seen += ids.tolist()
    assert sorted(seen) == list(range(num_images))


def test_passes_are_alike_and_batches_no_larger_than_the_share() -> None:
    loader = eval_loader(array_source(10), 256, 0, 3)
    first, second = list(loader), list(loader)
    assert len(first) == len(loader) == 1
    assert len(first[0].labels) == 4
    assert all(map(same, first, second))


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_evaluation_masks_what_it_cannot_read(loader_workers: int) -> None:
    told: list[CorruptImage] = []
    source = decoded_source(10, broken=[6])
    data = data_config(max_corrupt=0.1, loader_workers=loader_workers)
    loader = EvalLoader(source, data, HW, batch_size=4, rank=0, world_size=1, on_corrupt=told.append)
    for _ in range(2):
        seen = [i for batch in loader for i in batch.sample_ids[batch.mask].tolist()]
        assert seen == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert [corrupt.name for corrupt in told] == ["image-6.png"]


def test_evaluation_fails_when_too_much_is_unreadable() -> None:
    with pytest.raises(DataError, match="max_corrupt"):
        list(eval_loader(decoded_source(10, broken=[1, 6]), 4, 0, 1, max_corrupt=0.1))


def test_leaving_an_evaluation_early_ends_its_threads() -> None:
    before = threading.active_count()
    batches = iter(eval_loader(decoded_source(100), 4, 0, 1, loader_workers=2))
    next(batches)
    del batches
    gc.collect()
    assert threading.active_count() == before


# -- normalising -------------------------------------------------------------------------------------------------------
def test_normalise() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    assert torch.allclose(normalise(images, (0.5,), (0.5,)).flatten(), torch.tensor([-1.0, -0.6, 1.0]))


def test_normalise_by_channel() -> None:
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    normalised = normalise(images, (0.0, 0.5, 1.0), (0.5,))
    assert normalised.dtype == torch.float32
    assert torch.allclose(normalised[0, :, 0, 0], torch.tensor([2.0, 1.0, 0.0]))
    assert (images == 255).all()
