from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vit
from configs.wire import ModelFile, Preprocess
from vit.safetensors_file import MAX_HEADER_BYTES, read_safetensors
from vit.weights import save


def model_file_of(model: vit.ViT, **fields: object) -> ModelFile:
    config = model.config
    preprocess = Preprocess(image_size=config.image_size, in_channels=config.in_channels, mean=(0.5,), std=(0.5,))
    return ModelFile(model=config, preprocess=preprocess, **fields)  # type: ignore[arg-type]


@pytest.fixture
def saved(make_model, tmp_path: Path) -> tuple[vit.ViT, Path]:
    model = make_model(head="mlp", image_size=(16, 8))
    save(model.state_dict(), model_file_of(model, step=12, metrics={"eval/top1": 0.5}), tmp_path / "model")
    return model, tmp_path / "model"


def test_one_line_gives_the_model_back(saved) -> None:
    model, folder = saved
    loaded = vit.load(folder)
    images = torch.randn(2, 3, 16, 8)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.preprocess is not None
    assert loaded.preprocess.image_size == (16, 8)
    assert torch.equal(vit.load(folder / "model.safetensors")(images), model(images))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_model_does_not_depend_on_the_file_afterwards(saved) -> None:
    _, folder = saved
    loaded, images = vit.load(str(folder)), torch.randn(1, 3, 16, 8)
    before = loaded(images)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert torch.equal(loaded(images), before)


def test_saving_over_an_older_model_replaces_it(saved, make_model) -> None:
    _, folder = saved
    newer = make_model(num_classes=3)
    save(newer.state_dict(), model_file_of(newer), folder)
    assert vit.load(folder).config.num_classes == 3


def test_half_precision_files_are_read_as_fp32(saved) -> None:
    model, folder = saved
    halves = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_file(halves, folder / "model.safetensors")
    assert torch.equal(vit.load(folder).head.weight, model.head.weight.bfloat16().float())


def test_wrong_weights_are_refused_naming_key_and_shapes(saved) -> None:
    model, folder = saved

    def refuse(change: dict[str, torch.Tensor], drop: str | None, match: str) -> None:
        state = {name: tensor for name, tensor in (model.state_dict() | change).items() if name != drop}
        with pytest.raises(ValueError, match=match):
            save(state, model_file_of(model), folder.with_name("other"))
        assert not folder.with_name("other").exists()
        save_file(state, folder / "model.safetensors")
        with pytest.raises(ValueError, match=match):
            vit.load(folder)

    refuse({}, "norm.bias", r"weights are incomplete, missing: norm\.bias")
    refuse({"ls1.gamma": torch.ones(3)}, None, r"weights do not belong to this model: ls1\.gamma")
    refuse({"head.bias": torch.ones(8)}, None, r"head\.bias has shape \(8,\), expected \(7,\)")
    refuse({"norm.bias": torch.full((16,), float("nan"))}, None, r"norm\.bias holds NaN or infinite values")
    refuse({"cls_token": torch.full((1, 1, 16), float("-inf"))}, None, r"cls_token holds NaN or infinite values")


def test_integers_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a has type torch\.int8, expected a floating type"):
        read_safetensors(tmp_path / "model.safetensors")


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code ran')",))


def write_foreign(kind: str, path: Path) -> None:
    if kind == "torch":
        torch.save({"a": Bomb()}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, a=np.ones(2))
    elif kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("kind", "said"),
    [("torch", "PyTorch pickle"), ("pickle", "Python pickle"), ("npz", r"NumPy \.npz"), ("pointer", "Git LFS pointer")],
)
def test_other_formats_are_refused_by_name_and_never_run(tmp_path: Path, kind: str, said: str) -> None:
    path = tmp_path / "model.safetensors"
    write_foreign(kind, path)
    with pytest.raises(ValueError, match=f"{said}.*only safetensors files are read"):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 bytes, too few"),
        (b"12345678", "has 8 bytes, too few"),
        (b"just some text, not weights", "does not start with a header"),
        (struct.pack("<Q", 2**62) + b"{}", "does not start with a header"),
        (struct.pack("<Q", 20) + b'{"a": not json at all', "not a readable safetensors file"),
        (
            struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(64),
            "not a readable",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_safetensors(path)


def test_truncated_file_is_refused(saved) -> None:
    _, folder = saved
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        vit.load(folder)


def test_long_headers_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
        file.truncate(8 + MAX_HEADER_BYTES + 1)
    with pytest.raises(ValueError, match=f"header of {MAX_HEADER_BYTES + 1} bytes, at most {MAX_HEADER_BYTES}"):
        read_safetensors(path)


def test_missing_files_are_named(tmp_path: Path, saved) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        vit.load(tmp_path)
    _, folder = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        vit.load(folder)


def test_wrong_configurations_are_refused_with_the_field(saved) -> None:
    _, folder = saved
    config = folder / "config.json"
    good = json.loads(config.read_text())

    def refuse(content: str, match: str) -> None:
        config.write_text(content)
        with pytest.raises(ValueError, match=match):
            vit.load(folder)

    refuse("{", "does not describe a model of ours")
    refuse(json.dumps(good | {"model": good["model"] | {"depth": "many"}}), r"model\.depth")
    refuse(json.dumps(good | {"model": good["model"] | {"surprise": 1}}), r"model\.surprise")
    resnet = {"resnet": {"layers": [1], "width": 48}, "image_size": [16, 8], "num_classes": 2}
    refuse(json.dumps(good | {"model": resnet}), r"model\.resnet\.width: .*multiple of 32")
    other = good["preprocess"] | {"image_size": [16, 16]}
    refuse(json.dumps(good | {"preprocess": other}), r"prepared as 3 x \(16, 16\), the model takes 3 x \(16, 8\)")
    config.write_text(json.dumps(good | {"added_by_a_newer_version": 1}))
    vit.load(folder)


def test_a_failed_write_leaves_nothing(saved, make_model) -> None:
    model, folder = saved
    before = (folder / "model.safetensors").read_bytes()
    broken = dict(model.state_dict()) | {"norm.bias": torch.full((16,), float("nan"))}
    with pytest.raises(ValueError, match="NaN"):
        save(broken, model_file_of(model), folder)
    assert (folder / "model.safetensors").read_bytes() == before
