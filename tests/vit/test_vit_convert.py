"""Weights into and out of Transformers' and torchvision's files: equal logits there, bit for bit back here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import VisionTransformer
from transformers import AutoImageProcessor, ViTForImageClassification

import vit
from configs.imports import ImportModel
from configs.model import BitConfig, ResNetConfig, StemConfig, VitConfig
from configs.wire import ModelFile, Preprocess
from orchestrator.cli.main import run
from tests.vit.test_vit_formats import equal, randomize
from vit.convert import AlteredWeights, check_written, convert, write_weights
from vit.formats import read_weights
from vit.safetensors_file import read_safetensors, write_safetensors

SIZES: dict[str, Any] = {
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 2,
    "mlp_dim": 80,
    "image_size": (32, 32),
    "num_classes": 7,
}


def model_of(**parts: Any) -> tuple[dict[str, Tensor], ModelFile]:
    config = VitConfig.model_validate(SIZES | parts)
    state = {name: tensor.clone() for name, tensor in randomize(vit.build(config)).state_dict().items()}
    preprocess = Preprocess(
        image_size=config.image_size, in_channels=config.in_channels, mean=(0.4,), std=(0.3,), interpolation="bicubic"
    )
    return state, ModelFile(model=config, preprocess=preprocess)


def our_logits(state: dict[str, Tensor], config: VitConfig, images: Tensor) -> Tensor:
    model = vit.build(config).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(images)


@pytest.mark.parametrize("parts", [{}, {"gelu": "exact", "in_channels": 1}], ids=["tanh", "exact, grey"])
def test_transformers_opens_it_with_the_same_logits(tmp_path: Path, parts: dict[str, Any]) -> None:
    state, made = model_of(**parts)
    write_weights(state, made, "transformers", tmp_path)
    theirs, loading = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = torch.randn(3, made.model.in_channels, 32, 32)
    with torch.inference_mode():
        logits = theirs.eval()(pixel_values=images).logits
    assert torch.allclose(logits, our_logits(state, made.model, images), atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.size["height"], list(processor.image_mean), int(processor.resample)) == (
        32,
        [0.4] * made.model.in_channels,
        3,
    )
    # What Transformers itself saves of it is read as the same weights.
    theirs.save_pretrained(tmp_path / "again")
    wanted = ImportModel(num_heads=2, gelu=made.model.gelu)
    for folder in (tmp_path, tmp_path / "again"):
        found = read_weights(folder / "model.safetensors", wanted)
        assert found.format == "transformers"
        assert equal(found.state, state)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_torchvision_opens_it_with_the_same_logits(tmp_path: Path, head: str) -> None:
    state, made = model_of(gelu="exact", head=head)
    write_weights(state, made, "torchvision", tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())["arguments"]
    theirs = VisionTransformer(**arguments).eval()
    theirs.load_state_dict(read_safetensors(tmp_path / "model.safetensors"))
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(theirs(images), our_logits(state, made.model, images), atol=1e-5)
    found = read_weights(tmp_path / "model.safetensors", ImportModel(num_heads=2))
    assert (found.format, found.config.gelu, found.config.head) == ("torchvision", "exact", head)
    assert equal(found.state, state)


def test_torchvisions_own_weights_come_in(tmp_path: Path) -> None:
    theirs = randomize(VisionTransformer(32, 8, 2, 2, 48, 96, num_classes=5))
    assert isinstance(theirs, VisionTransformer)
    old_names = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    images = torch.randn(2, 3, 32, 32)
    for number, state in enumerate((theirs.state_dict(), old_names)):
        write_safetensors(state, tmp_path / f"{number}.safetensors")
        found = read_weights(tmp_path / f"{number}.safetensors", ImportModel(num_heads=2))
        with torch.inference_mode():
            assert torch.allclose(our_logits(found.state, found.config, images), theirs(images), atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "to", "field"),
    [
        ({"pool": "gap"}, "transformers", "model.pool is gap"),
        ({"head": "mlp"}, "transformers", "model.head is mlp"),
        ({"layer_scale": 1e-4}, "torchvision", "model.layer_scale is 0.0001"),
        ({"stem": StemConfig(layers=(1,)), "patch_size": 1}, "transformers", "model.stem is set"),
        ({"registers": 2}, "transformers", "model.registers is 2"),
        ({"pos_embed": "none"}, "torchvision", "model.pos_embed is none"),
        ({"gelu": "tanh"}, "torchvision", "model.gelu is tanh"),
        ({"gelu": "exact", "in_channels": 1}, "torchvision", "model.in_channels is 1"),
        ({"gelu": "exact", "image_size": (32, 16)}, "torchvision", "model.image_size is"),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_field(
    tmp_path: Path, parts: dict[str, Any], to: Any, field: str
) -> None:
    state, made = model_of(**parts)
    with pytest.raises(ValueError, match=field):
        write_weights(state, made, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["safetensors", "timm", "transformers", "torchvision", "npz"])
def test_every_format_leads_back_to_the_same_weights(tmp_path: Path, to: Any) -> None:
    gelu: Any = "tanh" if to == "npz" else "exact"
    state, made = model_of(gelu=gelu)
    vit.save(state, made, tmp_path / "source")
    written = convert(tmp_path / "source", tmp_path / "there", to)
    assert written.preprocess == made.preprocess
    file = tmp_path / "there" / ("model.npz" if to == "npz" else "model.safetensors")
    back = convert(file, tmp_path / "back", "safetensors", model=ImportModel(num_heads=2, gelu=gelu))
    assert equal(vit.load(tmp_path / "back").state_dict(), state)
    assert back.model.model_copy(update={"head_bias_init": made.model.head_bias_init}) == made.model


def test_a_resnet_goes_where_resnets_are_known(tmp_path: Path) -> None:
    config = BitConfig(resnet=ResNetConfig(layers=(1, 1), width=64), image_size=(32, 32), num_classes=4)
    state = {name: tensor.clone() for name, tensor in randomize(vit.build(config)).state_dict().items()}
    made = ModelFile(model=config, preprocess=Preprocess(image_size=(32, 32), in_channels=3, mean=(0.5,), std=(0.5,)))
    vit.save(state, made, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "npz", "npz")
    back = convert(tmp_path / "npz" / "model.npz", tmp_path / "back", "safetensors", image_size=48)
    assert equal(vit.load(tmp_path / "back").state_dict(), state)
    assert back.model.image_size == (48, 48)
    for to in ("transformers", "torchvision"):
        with pytest.raises(ValueError, match=r"model\.resnet"):
            convert(tmp_path / "source", tmp_path / to, to)


def test_positions_are_resized_by_the_convention_asked_for(tmp_path: Path) -> None:
    state, made = model_of()
    vit.save(state, made, tmp_path / "source")
    official = convert(tmp_path / "source", tmp_path / "a", "safetensors", image_size=48)
    assert (official.model.image_size, official.preprocess.image_size) == ((48, 48), (48, 48))
    convert(tmp_path / "source", tmp_path / "b", "safetensors", image_size=48, pos_resize="bicubic_antialias")
    a, b = (vit.load(tmp_path / name).state_dict()["pos_embed"] for name in "ab")
    assert a.shape == b.shape == (1, 37, 48)
    assert not torch.equal(a, b)


def test_what_comes_back_otherwise_is_told(tmp_path: Path) -> None:
    state, made = model_of()
    write_weights(state, made, "timm", tmp_path)
    changed = {**state, "norm.bias": state["norm.bias"] + 1}
    with pytest.raises(AlteredWeights, match=r"norm\.bias"):
        check_written(tmp_path / "model.safetensors", changed, made.model, "timm")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, made = model_of()
    vit.save(state, made, tmp_path / "source")
    assert run(["convert", str(tmp_path / "source"), str(tmp_path / "hf"), "--to", "transformers"]) == 0
    assert "Read back: equal." in capsys.readouterr().out
    assert run(["convert", str(tmp_path / "source"), str(tmp_path / "hf")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert run(["convert", str(tmp_path / "source"), str(tmp_path / "tv"), "--to", "torchvision"]) == 1
    assert "model.gelu is tanh" in capsys.readouterr().err
    (tmp_path / "old.pth").write_bytes(b"\x80\x02")
    assert run(["convert", str(tmp_path / "old.pth"), str(tmp_path / "x")]) == 1
    assert "can run code when they are read" in capsys.readouterr().err
    assert run(["convert", str(tmp_path / "nothing.npz"), str(tmp_path / "x")]) == 1
