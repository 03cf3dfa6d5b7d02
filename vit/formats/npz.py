"""NumPy .npz archives, read without pickle and in bounded memory.

A file from a stranger may be a zip bomb, name a billion elements, or hold objects that run code when unpickled. So the
directory is bounded before it is parsed, every header before it is read, and all shapes are known, and can be judged,
before the first tensor is allocated.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

MAX_DIRECTORY_BYTES = 16 * 1024 * 1024
"""A hundred times that of the largest model here."""
MAX_HEADER_BYTES = 64 * 1024
MAX_TENSOR_BYTES = 64 * 1024**3
BOMB_BYTES, BOMB_RATIO = 256 * 1024**2, 20
"""Zeros compress a thousandfold, weights hardly at all: beyond so many bytes, so much more than the file is a bomb."""
_FLOATS = {2: np.float16, 4: np.float32, 8: np.float64}
_CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    data_start: int
    num_bytes: int


class NpzFile:
    """The arrays of an open .npz: their shapes at once, their values when asked for.

    Raises (when opened):
        FileNotFoundError: there is no such file.
        ValueError: it is no .npz of plain numbers, or larger than its size on disk can justify; says what is wrong.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        _check_directory(self._path)
        try:
            self._zip = zipfile.ZipFile(self._path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{self._path} is not a readable .npz: {error}") from error
        try:
            self._entries = self._read_headers()
        except BaseException:
            self._zip.close()
            raise

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """The array `name`, fp32.

        Raises:
            ValueError: the file is cut, fails its checksum, or holds another number of bytes than its header says.
        """
        entry = self._entries[name]
        data = np.empty(entry.num_bytes, dtype=np.uint8)
        try:
            with self._zip.open(f"{name}.npy") as file:
                _skip(file, entry.data_start)
                filled = _fill(file, data)
                surplus = file.read(1)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{self._path}: {name} cannot be read: {error}") from error
        except Exception as error:  # zlib.error has no base of its own
            raise ValueError(f"{self._path}: {name} is damaged: {error}") from error
        if filled != entry.num_bytes or surplus:
            raise ValueError(f"{self._path}: {name} does not hold the {entry.num_bytes} bytes its header names")
        array = data.view(entry.dtype)
        array = array.reshape(entry.shape, order="F" if entry.fortran_order else "C")
        if entry.dtype.kind == "V":  # bfloat16, as JAX saves it: the upper half of a float32
            words = np.ascontiguousarray(array).view(np.uint16).reshape(entry.shape).astype(np.uint32) << 16
            return torch.from_numpy(words.view(np.float32))
        with np.errstate(over="ignore"):  # a double too large becomes infinite, which is refused with its name
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    def close(self) -> None:
        self._zip.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_headers(self) -> dict[str, _Entry]:
        size = self._path.stat().st_size
        entries: dict[str, _Entry] = {}
        total = 0
        for info in self._zip.infolist():
            if "data.pkl" in info.filename:
                raise ValueError(f"{self._path} is a PyTorch pickle: such files can run code when they are read")
            name = info.filename.removesuffix(".npy")
            if name == info.filename or name in entries:
                raise ValueError(f"{self._path}: entry {info.filename!r} is not an array of its own (.npy)")
            entries[name] = entry = self._read_header(info, name)
            total += entry.num_bytes
        if not entries:
            raise ValueError(f"{self._path} holds no arrays")
        if total > MAX_TENSOR_BYTES or (total > BOMB_BYTES and total > BOMB_RATIO * size):
            raise ValueError(f"{self._path}: {size} bytes that claim to hold {total} bytes of numbers are not read")
        return entries

    def _read_header(self, info: zipfile.ZipInfo, name: str) -> _Entry:
        try:
            with self._zip.open(info) as file:
                shape, fortran_order, dtype, start = _npy_header(file)
        except ValueError as error:
            raise ValueError(f"{self._path}: {name}: {error}") from error
        except Exception as error:
            raise ValueError(f"{self._path}: {name} cannot be read: {error}") from error
        if dtype.hasobject:
            raise ValueError(f"{self._path}: {name} holds Python objects, which can run code when they are read")
        if not (dtype.kind == "f" and dtype.itemsize in _FLOATS) and dtype != np.dtype("V2"):
            raise ValueError(f"{self._path}: {name} has type {dtype}, expected a floating type")
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes + start != info.file_size:
            raise ValueError(
                f"{self._path}: {name} has shape {list(shape)}, which is {num_bytes} bytes; its entry has "
                f"{info.file_size - start}"
            )
        return _Entry(shape, dtype, fortran_order, start, num_bytes)


def write_npz(arrays: dict[str, Tensor], path: Path) -> None:
    """Write the tensors as fp32, uncompressed. The file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial.npz")
    try:
        np.savez(partial, allow_pickle=False, **{name: tensor.numpy() for name, tensor in arrays.items()})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, type and the number of bytes before the data. The length is judged before the header is read."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"unknown .npy version {version}")
    width = 2 if version == (1, 0) else 4
    length_bytes = file.read(width)
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < width or length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    header = io.BytesIO(length_bytes + file.read(length))
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(header, max_header_size=MAX_HEADER_BYTES)
    if len(shape) > 8 or any(side < 0 for side in shape):
        raise ValueError(f"shape {shape} is not one of a weight")
    return shape, fortran_order, dtype, 8 + width + length


def _check_directory(path: Path) -> None:
    """Refuse a zip whose directory would not fit: the parser reads it whole."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - 65_557))
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < 22:
            raise ValueError(f"{path} is not a readable .npz: its zip directory is missing")
        directory_bytes = struct.unpack_from("<L", tail, at + 12)[0]
        if directory_bytes == 0xFFFFFFFF and at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":
            file.seek(struct.unpack_from("<Q", tail, at - 12)[0])
            record = file.read(56)
            directory_bytes = struct.unpack_from("<Q", record, 40)[0] if len(record) == 56 else directory_bytes
    if directory_bytes > MAX_DIRECTORY_BYTES:
        raise ValueError(f"{path} has a directory of {directory_bytes} bytes, at most {MAX_DIRECTORY_BYTES} are read")


def _skip(file: IO[bytes], num_bytes: int) -> None:
    if len(file.read(num_bytes)) != num_bytes:
        raise ValueError("it ends within its header")


def _fill(file: IO[bytes], data: np.ndarray) -> int:
    view, filled = memoryview(data.data), 0
    while filled < len(view):
        chunk = file.read(min(_CHUNK_BYTES, len(view) - filled))
        if not chunk:
            break
        view[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return filled
