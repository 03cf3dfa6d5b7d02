"""Hybrids: a Vision Transformer on the feature map of a residual network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError

from configs.model import ModelConfig, VitConfig
from configs.wire import ModelFile, Preprocess
from tests.vit.test_vit_resnet import randomize
from vit import build
from vit.optim import layer_numbers, param_groups
from vit.timm_format import from_timm, save_timm, to_timm
from vit.transfer import resize_weights, transfer_weights

TINY: dict[str, Any] = {
    "patch_size": 1,
    "stem": {"layers": (1, 2), "width": 32},
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 48,
    "image_size": (32, 48),
    "num_classes": 5,
}


def config(**fields: Any) -> VitConfig:
    return VitConfig.model_validate(TINY | fields)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("vit_base_r50_s16_224", "R50+B/16"),
        ("vit_small_r26_s32_224", "R26+S/32"),
        ("vit_tiny_r_s16_p8_224", "R+Ti/16"),
    ],
)
def test_logits_are_timms(name: str, variant: str) -> None:
    theirs = timm.create_model(name, num_classes=9, img_size=64, depth=2, act_layer="gelu_tanh").eval()
    randomize(theirs)
    fields = ModelConfig(variant=variant, num_classes=9, image_size=64).vit().model_dump()
    fields |= {"depth": 2, "stem": fields["stem"] | {"numerics": "timm"}}
    ours = build(VitConfig.model_validate(fields)).eval()
    state = theirs.state_dict()
    if variant == "R+Ti/16":  # timm's stem alone has no folder of its own
        state = {n.replace("patch_embed.backbone.", "patch_embed.backbone.stem."): t for n, t in state.items()}
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    torch.testing.assert_close(ours.double()(images), theirs.double()(images), rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["R26+S/32", "R+Ti/16"])
def test_an_export_opens_in_timm_and_comes_back(variant: str, tmp_path: Path) -> None:
    fields = ModelConfig(variant=variant, num_classes=9, image_size=64, in_channels=1).vit().model_dump()
    fields |= {"depth": 2, "stem": fields["stem"] | {"numerics": "timm"}}
    exported = VitConfig.model_validate(fields)
    model = build(exported).eval()
    randomize(model)
    preprocess = Preprocess(image_size=(64, 64), in_channels=1, mean=(0.5,), std=(0.5,), crop="resize")
    save_timm(model.state_dict(), ModelFile(model=exported, preprocess=preprocess), tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 1, 64, 64, dtype=torch.float64)

    back = from_timm(theirs.state_dict(), exported)

    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model.double()(images), theirs.double()(images), rtol=0, atol=1e-9)


@pytest.mark.parametrize("stem", [{"layers": (1, 2), "numerics": "timm"}, {"layers": (3, 4, 9)}])
def test_a_stem_timm_has_not_is_not_exported(stem: dict[str, Any]) -> None:
    unlike = config(stem=stem, image_size=(64, 64))
    with pytest.raises(ValueError, match="timm"):
        to_timm(build(unlike).state_dict(), unlike)


@pytest.mark.parametrize(
    ("variant", "tokens"), [("R50+B/16", 196), ("R50+B/32", 49), ("R26+S/32", 49), ("R+Ti/16", 49)]
)
def test_tokens_at_224(variant: str, tokens: int) -> None:
    # Paper, 4.1: stage 4 left out gives a sequence four times as long.
    model = ModelConfig(variant=variant, num_classes=3).vit()
    assert model.grid[0] * model.grid[1] == tokens


def test_a_stored_variant_with_its_sizes_is_read_back() -> None:
    model = ModelConfig(variant="R50+L/16", num_classes=3)
    assert ModelConfig.model_validate_json(model.model_dump_json()) == model
    assert ModelConfig.model_validate(model.model_dump(mode="json")) == model


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 40}, "image_size 40 is not a multiple of 16"),
        ({"variant": "R50+H/14"}, "one of the hybrids R50"),
        ({"variant": "R50+B/16", "stem": {"layers": [3, 4, 6, 3]}}, "contradicts variant 'R50"),
        ({"variant": "B/1", "image_size": 64, "stem": {"layers": [1] * 5}}, "at most 4"),
        ({"variant": "B/1", "image_size": 64, "stem": {"layers": [1], "width": 40}}, "multiple of 32"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelConfig.model_validate({"variant": "R50+B/16", "num_classes": 3} | fields)


def test_decay_falls_on_the_stems_kernels_and_its_layer_is_the_first() -> None:
    model = build(config())
    decayed, others = (group["params"] for group in param_groups(model, 0.1))
    stem = dict(model.patch_embed.named_parameters())
    assert all(any(p is q for q in (decayed if p.ndim == 4 else others)) for p in stem.values())
    assert {layer_numbers(model)[f"patch_embed.{name}"] for name in stem} == {0}


def test_other_resolution_and_other_classes() -> None:
    source, target = config(), config(image_size=(48, 64), num_classes=7)
    model = build(source)
    randomize(model)
    made = build(target)
    made.load_state_dict(made.state_dict() | transfer_weights(model.state_dict(), source, target))
    logits = made(torch.randn(2, 3, 48, 64))
    assert logits.shape == (2, 7)
    assert not logits.any()  # the head is new and zero
    resized = resize_weights(model.state_dict(), source, config(image_size=(48, 64)))
    assert resized["pos_embed"].shape == (1, 1 + 6 * 8, 32)


def test_another_stem_is_refused() -> None:
    other = config(stem={"layers": (1, 1), "width": 32})
    with pytest.raises(ValueError, match="stem is"):
        transfer_weights(build(config()).state_dict(), config(), other)


@pytest.mark.parametrize("is_bf16", [False, True])
def test_it_learns(is_bf16: bool) -> None:
    torch.manual_seed(0)
    model = build(config()).train()
    optimizer = torch.optim.AdamW(param_groups(model, 0.0), lr=3e-3)
    images, labels = torch.randn(10, 3, 32, 48), torch.arange(10) % 5
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
