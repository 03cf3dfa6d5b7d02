"""Files that lie, bombs, and files that would run code: refused with the reason, in bounded memory."""

from __future__ import annotations

import io
import json
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs.imports import ImportModel
from vit.formats import read_weights
from vit.formats.npz import NpzFile, write_npz
from vit.formats.official import to_official

HEADS = ImportModel(num_heads=2)


def npy(shape: str, descr: str = "'<f4'", data: bytes = b"", header_bytes: int | None = None) -> bytes:
    """A .npy file whose header says what it likes."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    length = len(header) if header_bytes is None else header_bytes
    return b"\x93NUMPY\x02\x00" + struct.pack("<L", length) + header + data


def archive(path: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return path


def bomb(path: Path) -> Path:
    """Half a gigabyte of zeros, in half a megabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("a.npy", "w") as entry:
        entry.write(npy("(131072, 1024)"))
        for _ in range(512):
            entry.write(bytes(1024 * 1024))
    return path


def pickled(path: Path) -> Path:
    np.savez(path, a=np.array([{"an": "object"}], dtype=object))
    return path


def structured(path: Path) -> Path:
    np.savez(path, a=np.zeros(3, dtype=[("x", "<f4")]))
    return path


def torch_zip(path: Path) -> Path:
    torch.save({"a": torch.zeros(2)}, path)
    return path


def long_directory(path: Path) -> Path:
    path.write_bytes(b"PK\x03\x04" + bytes(64) + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 9, 9, 2**31, 0, 0))
    return path


HOSTILE: list[tuple[Callable[[Path], Path], str]] = [
    (pickled, "Python objects, which can run code"),
    (structured, "expected a floating type"),
    (torch_zip, "PyTorch pickle"),
    (bomb, "claim to hold 536870912 bytes"),
    (long_directory, "directory of 2147483648 bytes"),
    (lambda path: archive(path, a=npy("(1000000000,)")), r"a has shape \[1000000000\]"),
    (lambda path: archive(path, a=npy("(2,)", header_bytes=2**32 - 1, data=bytes(8))), "header of 4294967295 bytes"),
    (lambda path: archive(path, a=npy("(-4,)", data=bytes(8))), "is not one of a weight"),
    (lambda path: archive(path, a=npy("(2,)", descr="'<i8'", data=bytes(16))), "type int64"),
    (lambda path: archive(path, a=b"not an array"), "magic string"),
    (lambda path: archive(path, a=npy("(2,)", data=bytes(8))), "no official ViT file: there is no embedding/kernel"),
    (lambda path: (path.write_bytes(b"PK\x03\x04 and no more"), path)[1], "zip directory is missing"),
]


@pytest.mark.parametrize(("make", "message"), HOSTILE)
def test_hostile_archives_are_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path / "model.npz")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        read_weights(path)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 128


def test_a_flipped_byte_is_found(tmp_path: Path, make_model) -> None:
    model = make_model()
    path = tmp_path / "model.npz"
    write_npz(to_official(model.state_dict(), model.config), path)
    with zipfile.ZipFile(path) as file:
        at = file.getinfo("head/kernel.npy").header_offset + 250
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="head/kernel cannot be read: Bad CRC-32"):
        read_weights(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("Transformer/encoderblock_1/LayerNorm_2/scale"), "missing: .*encoderblock_1/LayerN"),
        (lambda arrays: arrays.update(extra=torch.zeros(2)), "do not belong to this model: extra"),
        (lambda arrays: arrays.update({"head/kernel": torch.zeros(3, 7)}), r"head/kernel has shape \(3, 7\)"),
        (lambda arrays: arrays["head/bias"].fill_(float("nan")), "head.bias holds NaN or infinite"),
        (lambda arrays: arrays.update({"cls": torch.zeros(1, 1, 8)}), r"cls has shape \(1, 1, 8\)"),
        (lambda arrays: arrays.update({"MAPHead_0/probe": torch.zeros(1, 1, 16)}), "missing: MAPHead_0/MultiHead"),
    ],
)
def test_wrong_official_files_name_the_array(tmp_path: Path, make_model, change, message: str) -> None:
    model = make_model()
    arrays = to_official(model.state_dict(), model.config)
    change(arrays)
    write_npz(arrays, tmp_path / "model.npz")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "model.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.norm2.weight"), "missing: blocks.1.norm2.weight"),
        (lambda state: state.update(extra=torch.zeros(2)), "do not belong to this model: extra"),
        (lambda state: state.update({"head.weight": torch.zeros(7, 3)}), r"head.weight has shape \(7, 3\)"),
        (lambda state: state["norm.bias"].fill_(float("inf")), "norm.bias holds NaN or infinite"),
        (lambda state: state.update({"head.weight": torch.zeros(7, 16, dtype=torch.int64)}), "type torch.int64"),
        (lambda state: state.update({"blocks.0.ls1.gamma": torch.ones(16)}), "ls1"),
        (lambda state: state.pop("patch_embed.proj.weight"), "patch_embed.proj.weight is missing"),
    ],
)
def test_wrong_named_files_name_the_tensor(tmp_path: Path, make_model, change, message: str) -> None:
    state = {name: tensor.clone() for name, tensor in make_model().state_dict().items()}
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "model.safetensors", HEADS)


def test_a_safetensors_header_that_claims_a_billion_elements(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_weights(path)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "pytorch_model.bin", "a.ckpt", "a.txt"])
def test_other_kinds_of_file_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"safetensors"):
        read_weights(tmp_path / name)


def test_arrays_in_fortran_order_and_double_precision(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float64).reshape(2, 3)
    buffer = io.BytesIO()
    np.savez(buffer, a=np.asfortranarray(values), b=values.astype(">f2"))
    (tmp_path / "x.npz").write_bytes(buffer.getvalue())
    with NpzFile(tmp_path / "x.npz") as file:
        assert torch.equal(file.read("a"), torch.from_numpy(values).float())
        assert torch.equal(file.read("b"), torch.from_numpy(values).float())
