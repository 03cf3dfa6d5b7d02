"""Shard files: what one rank writes of a checkpoint, and verified ranged reads of any part of it.

A shard is a safetensors file of 1-D fp32 runs. Its data lie without gaps in the order of `ShardFile.slices`, at the end
of the file, so their byte offsets follow from the manifest alone and a reader never needs the header:

    [8 bytes: header length][JSON header, padded with spaces][slice 0][slice 1]…

The manifest keeps a CRC32C for each block of BLOCK_BYTES. A read is widened to whole blocks, each block is verified,
and only then is anything copied: no unverified byte reaches a weight.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from configs.wire import BLOCK_BYTES, Manifest, ShardFile, TensorSlice
from workers.store import NotFound, ObjectStore

ShardRole = Literal["weights", "optimizer", "ema"]
_FP32_BYTES = 4
_RUN_BLOCKS = 4
"""Neighbouring blocks are fetched together, up to this many (32 MiB)."""
_READERS = 8


class CheckpointCorrupt(Exception):
    """An object of a checkpoint is missing, torn or altered."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key


class ShardBuffer:
    """A shard file in memory, allocated and touched once: its header never changes, its slots are filled each time."""

    def __init__(self, name: str, rank: int, role: ShardRole, slices: tuple[TensorSlice, ...], pinned: bool) -> None:
        self.name = name
        self._rank = rank
        self._role: ShardRole = role
        self._slices = slices
        header = _header(slices)
        num_bytes = len(header) + _FP32_BYTES * sum(s.numel for s in slices)
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned).zero_()
        self._bytes[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._values = self._bytes[len(header) :].view(torch.float32)

    def slots(self) -> Iterator[tuple[TensorSlice, Tensor]]:
        """Each slice with its place in the buffer, 1-D fp32, to be copied into."""
        start = 0
        for piece in self._slices:
            yield piece, self._values[start : start + piece.numel]
            start += piece.numel

    @property
    def data(self) -> memoryview:
        """The whole file."""
        return self._bytes.numpy().data

    def describe(self) -> ShardFile:
        """The file's entry in the manifest, with checksums of what the buffer holds now."""
        return ShardFile(
            name=self.name,
            rank=self._rank,
            role=self._role,
            num_bytes=self._bytes.numel(),
            crc32c=block_checksums(self._bytes.numpy()),
            slices=self._slices,
        )


def _header(slices: tuple[TensorSlice, ...]) -> bytes:
    entries, start = {}, 0
    for piece in slices:
        end = start + _FP32_BYTES * piece.numel
        entries[piece.key] = {"dtype": "F32", "shape": [piece.numel], "data_offsets": [start, end]}
        start = end
    assert len(entries) == len(slices), "slice keys are not unique"
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def block_checksums(data: np.ndarray) -> tuple[int, ...]:
    """CRC32C of each block of a uint8 array; the last block may be short."""
    return tuple(google_crc32c.value(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES))


@dataclass(frozen=True)
class Wanted:
    """Elements [start, start + target.numel()) of a weight or moment, to be read into `target`."""

    name: str
    kind: str
    start: int
    target: Tensor
    """1-D, fp32, contiguous, on any device."""


@dataclass(frozen=True)
class _Piece:
    """Bytes [start, start + target.numel()) of a shard file go to `target`."""

    start: int
    target: Tensor
    """1-D, uint8: a view of the wanted tensor."""


def read_into(store: ObjectStore, prefix: str, manifest: Manifest, wanted: Iterable[Wanted]) -> None:
    """Fill every target from the checkpoint under `prefix`.

    Raises:
        CheckpointCorrupt: an object is missing, short or fails its checksum, or the manifest's slices leave a gap.
    """
    pieces = _locate(prefix, manifest, wanted)
    files = {shard.name: shard for shard in manifest.files}
    runs = [(files[name], run, of_file) for name, of_file in pieces.items() for run in _runs(of_file)]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="checkpoint-read") as pool:
        for _ in pool.map(lambda task: _read_run(store, prefix, *task), runs):
            pass


def _locate(prefix: str, manifest: Manifest, wanted: Iterable[Wanted]) -> dict[str, list[_Piece]]:
    """Which bytes of which shard files go where; each file's pieces in ascending order."""
    places: dict[tuple[str, str], list[tuple[int, int, str, int]]] = defaultdict(list)
    for shard in manifest.files:
        position = shard.num_bytes - _FP32_BYTES * sum(s.numel for s in shard.slices)
        for s in shard.slices:
            places[s.kind, s.name].append((s.start, s.start + s.numel, shard.name, position))
            position += _FP32_BYTES * s.numel
    for runs in places.values():
        runs.sort()
    pieces: dict[str, list[_Piece]] = defaultdict(list)
    for want in wanted:
        target = want.target.detach().view(torch.uint8)
        reached, last = want.start, want.start + want.target.numel()
        runs = places[want.kind, want.name]
        for start, end, name, position in runs[max(bisect_right(runs, (want.start, 1 << 62)) - 1, 0) :]:
            low, high = max(start, want.start), min(end, last)
            if low >= high:
                if start >= last:
                    break
                continue
            if low != reached:
                break
            into = target[_FP32_BYTES * (low - want.start) : _FP32_BYTES * (high - want.start)]
            pieces[name].append(_Piece(position + _FP32_BYTES * (low - start), into))
            reached = high
        if reached != last:
            raise CheckpointCorrupt(
                f"{prefix}manifest.json", f"no shard holds elements {reached} to {last} of {want.kind} {want.name!r}"
            )
    for of_file in pieces.values():
        of_file.sort(key=lambda piece: piece.start)
    return pieces


def _runs(pieces: list[_Piece]) -> Iterator[range]:
    """Block numbers that the pieces touch, as runs of neighbours of at most _RUN_BLOCKS."""
    blocks = sorted(
        {
            block
            for piece in pieces
            for block in range(piece.start // BLOCK_BYTES, (piece.start + piece.target.numel() - 1) // BLOCK_BYTES + 1)
        }
    )
    first = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1 or i - first == _RUN_BLOCKS:
            yield range(blocks[first], blocks[i - 1] + 1)
            first = i


def _read_run(store: ObjectStore, prefix: str, shard: ShardFile, blocks: range, pieces: list[_Piece]) -> None:
    key = prefix + shard.name
    start = blocks.start * BLOCK_BYTES
    end = min(blocks.stop * BLOCK_BYTES, shard.num_bytes)
    try:
        data = np.frombuffer(bytearray(store.get_range(key, start, end - start)), dtype=np.uint8)
    except NotFound as error:
        raise CheckpointCorrupt(key, "the object is missing") from error
    if len(data) != end - start:
        raise CheckpointCorrupt(key, f"the object ends at byte {start + len(data)} of {shard.num_bytes}")
    if block_checksums(data) != shard.crc32c[blocks.start : blocks.stop]:
        raise CheckpointCorrupt(key, f"bytes {start} to {end} fail their checksum")
    verified = torch.from_numpy(data)
    for piece in pieces:
        low, high = max(piece.start, start), min(piece.start + piece.target.numel(), end)
        if low < high:
            piece.target[low - piece.start : high - piece.start].copy_(verified[low - start : high - start])
