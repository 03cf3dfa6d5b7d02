"""Shard files in memory, and verified ranged reads of them; no processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.wire import BLOCK_BYTES, Manifest, ShardFile, TensorSlice
from tests.fakes.dir_store import DirStore
from workers.shards import CheckpointCorrupt, ShardBuffer, Wanted, read_into

BLOCK = BLOCK_BYTES // 4
"""Elements in a block."""
PREFIX = "jobs/j/checkpoints/c/"


@dataclass
class CountingStore(DirStore):
    """Notes the ranges that are read."""

    root: object
    ranges: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(str(self.root))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.ranges.append((key, start, length))
        return super().get_range(key, start, length)


def write(store: DirStore, name: str, pieces: list[tuple[str, int, Tensor]]) -> ShardFile:
    """A shard of runs (weight, start, values)."""
    slices = tuple(TensorSlice(key=n, name=n, kind="weight", start=s, numel=t.numel()) for n, s, t in pieces)
    buffer = ShardBuffer(name, 0, "weights", slices, pinned=False)
    for (_, slot), (_, _, values) in zip(buffer.slots(), pieces, strict=True):
        slot.copy_(values)
    store.put(PREFIX + name, buffer.data)
    return buffer.describe()


def manifest_of(*files: ShardFile) -> Manifest:
    return Manifest.model_construct(files=files)


def wanted(name: str, start: int, numel: int) -> Wanted:
    return Wanted(name, "weight", start, torch.full((numel,), -1.0))


@pytest.fixture
def store(tmp_path: object) -> CountingStore:
    return CountingStore(tmp_path)


@pytest.fixture
def big(store: CountingStore) -> tuple[Manifest, Tensor]:
    """One weight of five and a half blocks in two shards; the second starts in the middle of a block."""
    values = torch.arange(5 * BLOCK + BLOCK // 2, dtype=torch.float32)
    cut = 2 * BLOCK + 777
    first = write(store, "one", [("small", 0, torch.ones(3)), ("w", 0, values[:cut])])
    second = write(store, "two", [("w", cut, values[cut:]), ("last", 0, torch.ones(5))])
    return manifest_of(second, first), values


@pytest.mark.parametrize(
    ("start", "numel"),
    [
        (0, 1),
        (0, 5 * BLOCK + BLOCK // 2),
        (2 * BLOCK + 700, 200),
        (BLOCK - 1, 2),
        (3 * BLOCK, 2 * BLOCK),
        (5 * BLOCK, 9),
    ],
)
def test_any_run_can_be_read(store: CountingStore, big: tuple[Manifest, Tensor], start: int, numel: int) -> None:
    manifest, values = big
    want = wanted("w", start, numel)
    read_into(store, PREFIX, manifest, [want])
    assert torch.equal(want.target, values[start : start + numel])


def test_reads_are_whole_blocks_and_no_more_than_needed(store: CountingStore, big: tuple[Manifest, Tensor]) -> None:
    manifest, _ = big
    read_into(store, PREFIX, manifest, [wanted("w", BLOCK + 5, 3), wanted("small", 0, 3)])
    assert sorted(store.ranges) == [(PREFIX + "one", 0, 2 * BLOCK_BYTES)]


def test_damage_elsewhere_does_not_matter_and_damage_here_reaches_nothing(
    store: CountingStore, big: tuple[Manifest, Tensor]
) -> None:
    manifest, values = big
    path = store_path(store, "two")
    content = bytearray(path.read_bytes())
    content[BLOCK_BYTES + 17] ^= 1
    path.write_bytes(content)
    fine = wanted("w", 0, BLOCK)
    read_into(store, PREFIX, manifest, [fine])
    assert torch.equal(fine.target, values[:BLOCK])

    hit = wanted("w", 3 * BLOCK + 900, 10)
    with pytest.raises(CheckpointCorrupt, match=r"two: bytes .* fail their checksum"):
        read_into(store, PREFIX, manifest, [hit])
    assert (hit.target == -1.0).all()


def store_path(store: DirStore, name: str) -> Path:
    return store.root / (PREFIX + name)


def test_a_short_object_is_refused(store: CountingStore, big: tuple[Manifest, Tensor]) -> None:
    manifest, values = big
    path = store_path(store, "two")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointCorrupt, match="two: the object ends at byte"):
        read_into(store, PREFIX, manifest, [wanted("w", 0, len(values))])


def test_runs_of_many_small_weights_are_found(store: CountingStore) -> None:
    torch.manual_seed(0)
    weights = {f"p{i}": torch.randn(7 * i + 1) for i in range(40)}
    shards = []
    for rank in range(3):
        pieces = []
        for name, values in weights.items():
            low, high = len(values) * rank // 3, len(values) * (rank + 1) // 3
            if low < high:
                pieces.append((name, low, values[low:high]))
        shards.append(write(store, f"s{rank}", pieces))
    wants = [wanted(name, 0, len(values)) for name, values in weights.items()]
    read_into(store, PREFIX, manifest_of(*shards), wants)
    for want in wants:
        assert torch.equal(want.target, weights[want.name])


def test_elements_that_no_shard_holds_are_named(store: CountingStore, big: tuple[Manifest, Tensor]) -> None:
    manifest, values = big
    for want, message in [
        (wanted("w", 0, len(values) + 1), f"elements {len(values)} to {len(values) + 1} of weight 'w'"),
        (wanted("nothing", 0, 1), "elements 0 to 1 of weight 'nothing'"),
        (Wanted("w", "exp_avg", 0, torch.zeros(1)), "elements 0 to 1 of exp_avg 'w'"),
    ]:
        with pytest.raises(CheckpointCorrupt, match=message):
            read_into(store, PREFIX, manifest, [want])


def test_a_shard_may_be_empty(store: CountingStore) -> None:
    shard = write(store, "empty", [])
    assert shard.num_bytes == len(store.get(PREFIX + "empty"))
    assert len(shard.crc32c) == 1
    read_into(store, PREFIX, manifest_of(shard), [])
