"""The safetensors file that a fetch makes, and where in it the bytes of the shards belong: they are written in place.

A byte of a shard is of a weight, and has its place in the file; or it is not (a shard's own header), and is kept beside
it, in a sparse file for each shard, because checksums are of whole blocks: what is on disk can be verified again.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from configs.wire import Manifest, ShardFile, TensorSlice
from orchestrator.connection import PatchworkError

_FP32_BYTES = 4


class FetchError(PatchworkError):
    """The checkpoint could not be fetched; what has come stays and is used by the next try."""


@dataclass(frozen=True)
class _Run:
    """Bytes [start, end) of a shard and where they belong: at `target` of the file, or (None) beside it."""

    start: int
    end: int
    target: int | None


class WeightsFile:
    """Whole fp32 tensors, by name, of the shards with this role. To be closed. Safe to use from several threads, each
    with blocks of its own.

    Raises (when made):
        FetchError: the shards do not hold every element of every tensor.
    """

    def __init__(self, manifest: Manifest, role: str, path: Path) -> None:
        header, offsets = _header(manifest)
        shards = [shard for shard in manifest.files if shard.role == role]
        self._runs = _runs(manifest, shards, offsets)
        total = len(header) + sum(_num_bytes(shape) for shape in manifest.tensors.values())
        self.is_new = not path.exists() or path.stat().st_size != total
        """Nothing of it has come before: there is nothing to verify."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._beside = {
            shard.name: os.open(path.with_name(f"{number:05d}.rest"), os.O_RDWR | os.O_CREAT, 0o666)
            for number, shard in enumerate(shards)
        }
        os.ftruncate(self._file, total)
        os.pwrite(self._file, header, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._file, *self._beside.values()):
            os.close(descriptor)

    def write(self, shard: str, start: int, data: bytes | bytearray | memoryview) -> None:
        """Put the bytes of a shard from `start` on where they belong."""
        view = memoryview(data)
        for descriptor, where, first, last in self._places(shard, start, len(data)):
            while first < last:
                num_written = os.pwrite(descriptor, view[first:last], where)
                first, where = first + num_written, where + num_written

    def sync(self) -> None:
        """Wait until the disk has what has been written of the tensors."""
        os.fdatasync(self._file)

    def read(self, shard: str, start: int, num_bytes: int) -> bytearray:
        """The bytes [start, start + num_bytes) of a shard, as far as they have come; the rest is zeros."""
        data = bytearray(num_bytes)
        view = memoryview(data)
        for descriptor, where, first, last in self._places(shard, start, num_bytes):
            while first < last and (num_read := os.preadv(descriptor, [view[first:last]], where)):
                first, where = first + num_read, where + num_read
        return data

    def _places(self, shard: str, start: int, num_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """File, offset in it, and which of the wanted bytes lie there."""
        runs = self._runs[shard]
        for run in runs[bisect_right(runs, start, key=lambda run: run.end) :]:
            first, last = max(run.start, start), min(run.end, start + num_bytes)
            if first >= last:
                return
            if run.target is None:
                yield self._beside[shard], first, first - start, last - start
            else:
                yield self._file, run.target + first - run.start, first - start, last - start


def _num_bytes(shape: tuple[int, ...]) -> int:
    return _FP32_BYTES * int(np.prod(shape))


def _header(manifest: Manifest) -> tuple[bytes, dict[str, int]]:
    """The file's head, and the offset of every tensor in the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for name, shape in sorted(manifest.tensors.items()):
        starts[name], end = position, position + _num_bytes(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _runs(manifest: Manifest, shards: list[ShardFile], offsets: dict[str, int]) -> dict[str, list[_Run]]:
    """For each shard, runs that cover it from its first byte to its last, in order."""
    pieces: dict[str, list[tuple[TensorSlice, str, int]]] = {name: [] for name in manifest.tensors}
    for shard in shards:
        for offset, piece in _slices(shard):
            pieces[piece.name].append((piece, shard.name, offset))
    placed: dict[str, list[_Run]] = {shard.name: [] for shard in shards}
    for name, shape in manifest.tensors.items():
        numel, end = int(np.prod(shape)), 0
        for piece, shard_name, offset in sorted(pieces[name], key=lambda found: found[0].start):
            stop = piece.start + piece.numel
            if piece.start > end or stop > numel:
                raise FetchError(f"the checkpoint's shards do not hold {name} without gaps: element {end} is missing")
            # Elements that an earlier piece holds too come from there.
            first = min(max(piece.start, end), stop)
            at = offset + _FP32_BYTES * (first - piece.start)
            run = _Run(at, at + _FP32_BYTES * (stop - first), offsets[name] + _FP32_BYTES * first)
            placed[shard_name].append(run)
            end = max(end, stop)
        if end != numel:
            raise FetchError(f"the checkpoint's shards hold {end} of {numel} elements of {name}")
    return {shard.name: list(_without_gaps(placed[shard.name], shard.num_bytes)) for shard in shards}


def _slices(shard: ShardFile) -> Iterator[tuple[int, TensorSlice]]:
    """Each slice with its byte offset: they lie without gaps, in the manifest's order, at the end of the file."""
    offset = shard.num_bytes - _FP32_BYTES * sum(piece.numel for piece in shard.slices)
    for piece in shard.slices:
        yield offset, piece
        offset += _FP32_BYTES * piece.numel


def _without_gaps(runs: list[_Run], num_bytes: int) -> Iterator[_Run]:
    position = 0
    for run in sorted(runs, key=lambda run: run.start):
        if run.start == run.end:
            continue
        if position < run.start:
            yield _Run(position, run.start, None)
        yield run
        position = run.end
    if position < num_bytes:
        yield _Run(position, num_bytes, None)
