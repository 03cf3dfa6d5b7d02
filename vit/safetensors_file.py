"""Weights on disk: safetensors and nothing else, since the other formats can run code when they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""Several thousand times the header of the largest model here."""

_FOREIGN = {
    b"PK\x03\x04": "a zip archive (a PyTorch pickle or a NumPy .npz)",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUM": "a NumPy .npy file",
    b"\x1f\x8b": "a gzip archive",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"version": "a Git LFS pointer, not the file itself",
}


def read_safetensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, floating types as fp32. They may be backed by the file: copy them
    before it changes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, its header is too long, or a tensor is not of a floating type.
    """
    path = Path(path)
    _check_header(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{path}: {name} has type {tensor.dtype}, expected a floating type")
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write the tensors as fp32. The file appears whole or not at all."""
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_header(path: Path) -> None:
    """Refuse, before anything is parsed, what cannot be a safetensors file: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
    for magic, kind in _FOREIGN.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {kind}: only safetensors files are read, other formats can run code")
    if len(start) < 9:
        raise ValueError(f"{path} has {size} bytes, too few for a safetensors file")
    header_bytes = int.from_bytes(start[:8], "little")
    if start[8:] != b"{" or header_bytes > size - 8:
        raise ValueError(f"{path} is not a safetensors file: it does not start with a header")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"{path} has a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read")
