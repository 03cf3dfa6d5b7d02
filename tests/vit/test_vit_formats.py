"""Weight files of others: equal logits from random weights, round trips bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from configs.imports import ImportModel
from configs.model import StemConfig, VitConfig
from configs.wire import ModelFile, Preprocess
from vit import build
from vit.formats import Imported, read_weights, write_official
from vit.formats.npz import write_npz
from vit.formats.official import to_official
from vit.transfer import transfer_weights

HEADS = ImportModel(num_heads=2)


def logits(found: Imported, images: Tensor) -> Tensor:
    model = build(found.config).eval()
    model.load_state_dict(found.state)
    with torch.inference_mode():
        return model(images)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- timm --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"no_embed_class": True},
        {"global_pool": "avg", "class_token": False, "fc_norm": False},
        {"global_pool": "avg", "class_token": True, "fc_norm": True},
        {"init_values": 1e-6, "no_embed_class": True},
        {"global_pool": "map", "class_token": False},
        {"reg_tokens": 3, "no_embed_class": True},
        {"reg_tokens": 4, "qk_norm": True, "init_values": 1e-5},
    ],
    ids=["class token", "no_embed_class", "gap", "patch_mean", "layer_scale", "map", "registers", "stable"],
)
def test_timm_file_gives_timms_logits(tmp_path: Path, options: dict[str, object]) -> None:
    theirs = randomize(timm.create_model("vit_tiny_patch16_224", img_size=48, depth=3, num_classes=11, **options))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    found = read_weights(tmp_path / "model.safetensors")
    assert (found.format, found.config.num_heads, found.config.image_size) == ("timm", 3, (48, 48))
    assert (found.config.layer_scale is None) == ("init_values" not in options)
    assert (found.config.pool == "patch_mean") == bool(options.get("fc_norm"))
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(logits(found, images), theirs(images), rtol=0, atol=1e-5)


def test_positions_that_fit_two_images_need_the_size(tmp_path: Path) -> None:
    """9 positions: 3 x 3 patches, or 2 x 2 and five tokens more."""
    theirs = randomize(
        timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, reg_tokens=4, no_embed_class=True)
    )
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"9 positions may be .* with 5 more tokens: give model\.image_size"):
        read_weights(tmp_path / "model.safetensors")
    found = read_weights(tmp_path / "model.safetensors", ImportModel(image_size=48))
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(logits(found, images), theirs(images), rtol=0, atol=1e-5)


def test_deit3s_file_is_read(tmp_path: Path) -> None:
    """facebookresearch/deit `models_v2.py`: LayerScale is gamma_1 and gamma_2, the class token has no position."""
    theirs = randomize(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=48, depth=3, num_classes=11, init_values=1e-4, no_embed_class=True
        )
    )
    deit = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name): tensor for name, tensor in theirs.state_dict().items()}
    assert {"blocks.0.gamma_1", "blocks.2.gamma_2"} < deit.keys()
    save_file(deit, tmp_path / "deit.safetensors")
    found = read_weights(tmp_path / "deit.safetensors")
    assert (found.format, found.config.layer_scale, found.config.pool) == ("timm", 1e-4, "cls")
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(logits(found, images), theirs(images), rtol=0, atol=1e-5)


def test_maes_encoder_is_fine_tuned_by_the_mean_of_its_patches(tmp_path: Path) -> None:
    """An encoder without a classifier, imported, and given MAE's head: timm's model of the same weights agrees."""
    options = {"img_size": 48, "depth": 3, "num_classes": 11}
    encoder = randomize(timm.create_model("vit_tiny_patch16_224", **options)).state_dict()
    body = {name: tensor for name, tensor in encoder.items() if not name.startswith("head.")}
    save_file(body, tmp_path / "mae.safetensors")
    found = read_weights(tmp_path / "mae.safetensors", ImportModel(num_classes=1000))
    target = found.config.model_copy(update={"pool": "patch_mean", "num_classes": 11})
    state = build(target).state_dict() | transfer_weights(found.state, found.config, target)
    state["head.weight"] = torch.randn(11, 192)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", global_pool="avg", class_token=True, fc_norm=True, **options
    ).eval()
    missing, unexpected = theirs.load_state_dict(body, strict=False)
    assert set(missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(unexpected) == {"norm.weight", "norm.bias"}
    theirs.head.load_state_dict({"weight": state["head.weight"], "bias": state["head.bias"]})
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(logits(Imported(state, target, "timm"), images), theirs(images), rtol=0, atol=2e-5)


def test_a_width_nobody_published_needs_its_heads(tmp_path: Path, make_model) -> None:
    save_file(make_model().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"width 16 has: give model\.num_heads"):
        read_weights(tmp_path / "model.safetensors")
    assert read_weights(tmp_path / "model.safetensors", HEADS).config.num_heads == 2


def test_a_file_without_a_classifier_is_given_a_zero_one(tmp_path: Path, make_model) -> None:
    state = {name: tensor for name, tensor in make_model().state_dict().items() if not name.startswith("head.")}
    save_file(state, tmp_path / "body.safetensors")
    with pytest.raises(ValueError, match=r"no classifier \(head\): give model\.num_classes"):
        read_weights(tmp_path / "body.safetensors", HEADS)
    found = read_weights(tmp_path / "body.safetensors", ImportModel(num_heads=2, num_classes=5))
    assert found.state["head.weight"].shape == (5, 16)
    assert not found.state["head.weight"].any()


# -- Transformers ------------------------------------------------------------------------------------------------------
def test_transformers_files_of_both_styles_give_its_logits(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    theirs = randomize(ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, tmp_path / "v5.safetensors")
    saved, running = (
        read_weights(tmp_path / "model.safetensors", HEADS),
        read_weights(tmp_path / "v5.safetensors", HEADS),
    )
    assert saved.format == running.format == "transformers"
    assert equal(saved.state, running.state)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(logits(saved, images), theirs(images).logits, rtol=0, atol=1e-5)


# -- official npz ------------------------------------------------------------------------------------------------------
def test_timm_reads_our_npz_to_the_same_logits(tmp_path: Path) -> None:
    """timm's own reader of official files is the independent witness of the layout."""
    ours = randomize(build(VitConfig(**_tiny_width(), image_size=(32, 32), num_classes=11)))
    write_npz(to_official(ours.state_dict(), ours.config), tmp_path / "model.npz")
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=11, act_layer="gelu_tanh"
    ).eval()
    theirs.load_pretrained(str(tmp_path / "model.npz"))
    images = torch.randn(2, 3, 32, 32)
    found = read_weights(tmp_path / "model.npz")
    with torch.inference_mode():
        torch.testing.assert_close(logits(found, images), theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"head": "mlp"},
        {"pool": "gap"},
        {"in_channels": 1, "num_heads": 4},
        {"stem": StemConfig(layers=(1, 2), width=32), "patch_size": 1, "image_size": (16, 16)},
    ],
    ids=["plain", "pre_logits", "gap", "grey", "hybrid"],
)
def test_official_files_come_back_bit_for_bit(tmp_path: Path, make_model, fields: dict[str, object]) -> None:
    model = make_model(**fields)
    preprocess = Preprocess(
        image_size=model.config.image_size, in_channels=model.config.in_channels, mean=(0.5,), std=(0.5,)
    )
    write_official(model.state_dict(), ModelFile(model=model.config, preprocess=preprocess), tmp_path)
    found = read_weights(tmp_path / "model.npz")
    assert (found.format, found.config) == ("npz", model.config)
    assert equal(found.state, dict(model.state_dict()))


@pytest.mark.parametrize("prefix", ["opt/target/", "params/", "params/img/"])
def test_big_vision_spells_the_same_model_differently(tmp_path: Path, make_model, prefix: str) -> None:
    """Positions without the class token, which is added after them; other numbers in names; layers stacked or not."""
    model = make_model()
    state = dict(model.state_dict())
    state["pos_embed"][:, 0] = 0.0
    official = to_official(state, model.config)
    if prefix == "opt/target/":
        renamed = {f"{prefix}{name}": tensor for name, tensor in official.items()}
    else:
        renamed = {f"{prefix}{name}": tensor for name, tensor in _big_vision(official).items()}
    write_npz(renamed, tmp_path / "model.npz")
    assert equal(read_weights(tmp_path / "model.npz").state, state)
    if prefix == "params/":
        write_npz(_scanned(renamed, model.config.depth), tmp_path / "scanned.npz")
        assert equal(read_weights(tmp_path / "scanned.npz").state, state)


@pytest.mark.parametrize(("field", "value"), [("pool", "patch_mean"), ("layer_scale", 1e-4)])
def test_an_official_file_is_no_model_of_ours_alone(tmp_path: Path, make_model, field: str, value: object) -> None:
    model = make_model()
    write_npz(to_official(model.state_dict(), model.config), tmp_path / "model.npz")
    with pytest.raises(ValueError, match=rf"model\.{field}"):
        read_weights(tmp_path / "model.npz", config=model.config.model_copy(update={field: value}))


def test_bfloat16_as_jax_saves_it(tmp_path: Path, make_model) -> None:
    model = make_model()
    arrays = {}
    for name, tensor in to_official(model.state_dict(), model.config).items():
        arrays[name] = tensor.bfloat16().view(torch.int16).numpy().view("V2")
    np.savez(tmp_path / "model.npz", **arrays)
    found = read_weights(tmp_path / "model.npz").state
    assert equal(found, {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gelu": "exact"}, r"model\.gelu exact"),
        ({"pool": "patch_mean"}, r"model\.pool patch_mean: .* only cls, gap and map"),
        ({"layer_scale": 1e-4}, r"model\.layer_scale 0\.0001: .* only null"),
        ({"registers": 2}, r"model\.registers 2: .* only 0"),
        ({"qk_norm": True}, r"model\.qk_norm true: .* only false"),
    ],
)
def test_what_the_official_code_cannot_express_is_refused(make_model, fields: dict[str, object], said: str) -> None:
    model = make_model(**fields)
    with pytest.raises(ValueError, match=said):
        to_official(model.state_dict(), model.config)


def test_a_map_head_is_big_visions(tmp_path: Path) -> None:
    """Written as big_vision has it: read back to the bit, and timm's own reader of such files gives the same logits."""
    config = VitConfig(**_tiny_width(), image_size=(48, 48), num_classes=11, pool="map")
    model = randomize(build(config))
    write_npz(to_official(model.state_dict(), config), tmp_path / "model.npz")
    with np.load(tmp_path / "model.npz") as file:
        assert "params/MAPHead_0/probe" in file
        assert file["params/MAPHead_0/MultiHeadDotProductAttention_0/key/kernel"].shape == (192, 3, 64)
    found = read_weights(tmp_path / "model.npz")
    assert (found.format, found.config) == ("npz", config)
    assert equal(found.state, dict(model.state_dict()))
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=48,
        depth=2,
        num_classes=11,
        global_pool="map",
        class_token=False,
        act_layer="gelu_tanh",
    ).eval()
    theirs.load_pretrained(str(tmp_path / "model.npz"))
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(logits(found, images), theirs(images), rtol=0, atol=1e-5)


def _tiny_width() -> dict[str, int]:
    return {"patch_size": 16, "embed_dim": 192, "depth": 2, "num_heads": 3, "mlp_dim": 768}


def _big_vision(official: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in official.items():
        for old, new in (
            ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
            ("LayerNorm_2", "LayerNorm_1"),
            ("MlpBlock_3", "MlpBlock_0"),
            ("Transformer/posembed_input/pos_embedding", "pos_embedding"),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor[:, 1:] if name == "pos_embedding" else tensor
    return renamed


def _scanned(arrays: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    block = "Transformer/encoderblock"
    plain = {name: tensor for name, tensor in arrays.items() if block not in name}
    first = [name for name in arrays if f"{block}_0/" in name]
    for name in first:
        layers = [arrays[name.replace(f"{block}_0/", f"{block}_{layer}/")] for layer in range(depth)]
        plain[name.replace(f"{block}_0/", f"{block}/")] = torch.stack(layers)
    return plain
