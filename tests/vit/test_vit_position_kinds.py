"""The kinds of position embedding of the paper's D.4, and where they are added."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from configs.cost import num_parameters
from tests.vit.test_vit_timm import timm_model
from vit import ViT, build
from vit.formats.official import to_official
from vit.optim import freeze, layer_numbers, param_groups
from vit.pos_embed import resize_pos_embed
from vit.timm_format import from_timm, to_timm
from vit.transfer import resize_weights, transfer_weights

KINDS = [
    {"pos_embed": "none"},
    {"pos_embed": "learned", "pos_embed_at": "every_layer"},
    {"pos_embed": "learned", "pos_embed_at": "every_layer_shared"},
    {"pos_embed": "learned_2d"},
    {"pos_embed": "learned_2d", "pos_embed_at": "every_layer"},
    {"pos_embed": "learned_2d", "pos_embed_at": "every_layer_shared"},
    {"pos_embed": "relative"},
]
SHAPES = [{}, {"pool": "gap", "image_size": (8, 24)}]


def reference_logits(model: ViT, images: Tensor) -> Tensor:
    """Sums and loops over positions, without our modules for them."""
    config, state = model.config, model.state_dict()
    rows, columns = config.grid
    heads, prefix = config.num_heads, config.num_prefix
    at = config.pos_embed_at

    def table(name: str) -> Tensor:
        if config.pos_embed == "learned":
            return state[name][0]
        found = torch.zeros(config.num_tokens, config.embed_dim)
        for row in range(rows):
            for column in range(columns):
                halves = [state[f"{name}.x"][0, column], state[f"{name}.y"][0, row]]
                found[prefix + row * columns + column] = torch.cat(halves)
        return found

    x = model.patch_embed(images)
    if model.cls_token is not None:
        x = torch.cat([model.cls_token.expand(len(images), -1, -1), x], dim=1)
    for number, block in enumerate(model.blocks):
        if config.pos_embed in ("learned", "learned_2d") and (number == 0 or at != "stem"):
            x = x + table(f"blocks.{number}.pos_embed" if at == "every_layer" else "pos_embed")
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        logits = q @ k.transpose(2, 3)
        if config.pos_embed == "relative":
            keys = state[f"blocks.{number}.attn.pos_embed.keys"]
            for i in range(rows * columns):
                for j in range(rows * columns):
                    offset = i - j
                    logits[:, :, prefix + i, prefix + j] += q[:, :, prefix + i] @ keys[rows * columns - 1 - offset]
        attended = (logits / math.sqrt(config.head_dim)).softmax(-1) @ v
        x = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_sums(make_model, kind: dict[str, str], shape: dict[str, object]) -> None:
    model = make_model(**kind, **shape)
    images = torch.randn(2, 3, *model.config.image_size)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), reference_logits(model, images), rtol=0, atol=2e-5)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(model.config)


@pytest.mark.parametrize("kind", [{}, *KINDS])
def test_only_positions_tell_where_a_patch_is(make_model, kind: dict[str, str]) -> None:
    model = make_model(pool="gap", **kind)
    images = torch.randn(2, 3, 16, 16)
    turned = images.roll((4, 8), (2, 3))  # whole patches
    with torch.inference_mode():
        same = torch.allclose(model(images), model(turned), rtol=0, atol=1e-5)
    assert same == (kind == {"pos_embed": "none"})


def test_one_patch_has_one_offset(make_model) -> None:
    model = make_model(pos_embed="relative", image_size=(4, 4))
    images = torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), reference_logits(model, images))


def test_recomputed_blocks_have_the_same_gradients(make_model) -> None:
    images = torch.randn(2, 3, 16, 16)
    for kind in KINDS:
        gradients = []
        for enabled in (False, True):
            model = make_model(pool="gap", **kind).train()
            model.set_activation_checkpointing(enabled)
            model(images).square().sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert all(p is not None and p.abs().max() > 0 for p in gradients[0].values())
        torch.testing.assert_close(gradients[0], gradients[1])


def test_positions_begin_normal_and_never_decay(make_config) -> None:
    for kind in KINDS[1:]:
        model = build(make_config(**kind, embed_dim=64, image_size=(64, 64)))
        names = [name for name, _ in model.named_parameters() if "pos_embed" in name]
        assert len(names) == {"every_layer": 3}.get(kind.get("pos_embed_at", ""), 1) * (
            2 if kind["pos_embed"] == "learned_2d" else 3 if kind["pos_embed"] == "relative" else 1
        )
        for name in names:
            assert model.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.1)
        rest = {id(p) for group in param_groups(model, 0.1) if not group["weight_decay"] for p in group["params"]}
        assert all(id(model.get_parameter(name)) in rest for name in names)
        blocks = {name: int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0 for name in names}
        assert {name: layer_numbers(model)[name] for name in names} == blocks
        freeze(model, "attention")
        assert all(model.get_parameter(name).requires_grad for name in names)


@pytest.mark.parametrize("at", ["stem", "every_layer", "every_layer_shared"])
@pytest.mark.parametrize("pos_embed", ["learned", "learned_2d"])
def test_each_kind_moves_to_another_grid(make_model, make_config, pos_embed: str, at: str) -> None:
    source = make_model(pos_embed=pos_embed, pos_embed_at=at)
    fields = {"pos_embed": pos_embed, "pos_embed_at": at, "pos_resize": "bicubic"}
    target = make_config(**fields, image_size=(24, 20), num_classes=3)
    moved = transfer_weights(source.state_dict(), source.config, target)
    model = build(target)
    model.load_state_dict(model.state_dict() | moved)
    names = [name for name in moved if "pos_embed" in name]
    assert names
    for name in names:
        old = source.state_dict()[name]
        if name.endswith("pos_embed"):
            assert torch.equal(moved[name], resize_pos_embed(old, (4, 4), (6, 5), 1, "bicubic"))
            continue
        length = 5 if name.endswith(".x") else 6
        line = F.interpolate(old.transpose(1, 2)[..., None], size=(length, 1), mode="bicubic")[..., 0].transpose(1, 2)
        torch.testing.assert_close(moved[name], line)


def test_a_plane_of_2d_positions_is_resized_as_its_axes(make_model, make_config) -> None:
    """Bilinear interpolation of x's half along rows changes nothing: the table is that of the resized axes."""
    source = make_model(pos_embed="learned_2d")
    target = make_config(pos_embed="learned_2d", image_size=(12, 28))
    model = build(target)
    model.load_state_dict(resize_weights(source.state_dict(), source.config, target))
    expected = resize_pos_embed(source.pos_embed().detach(), (4, 4), (3, 7), 1, "official")
    torch.testing.assert_close(model.pos_embed().detach(), expected)


def test_relative_positions_belong_to_one_grid(make_model, make_config) -> None:
    source = make_model(pos_embed="relative")
    kept = transfer_weights(source.state_dict(), source.config, make_config(pos_embed="relative", num_classes=3))
    assert torch.equal(kept["blocks.0.attn.pos_embed.keys"], source.state_dict()["blocks.0.attn.pos_embed.keys"])
    with pytest.raises(ValueError, match=r"cannot resize pos_embed relative from a grid of \(4, 4\) to \(6, 6\)"):
        resize_weights(source.state_dict(), source.config, make_config(pos_embed="relative", image_size=(24, 24)))


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_no_positions_are_timms_too(make_model, pool: str) -> None:
    ours = make_model(pos_embed="none", pool=pool)
    theirs = timm_model(ours.config, pos_embed="none")
    theirs.load_state_dict(to_timm(ours.state_dict(), ours.config))
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)
    back = from_timm(theirs.state_dict(), ours.config)
    assert back.keys() == ours.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_what_other_formats_have_not_is_refused_by_field(make_model, kind: dict[str, str]) -> None:
    model = make_model(**kind)
    field = "pos_embed_at" if kind["pos_embed"] == "learned" else "pos_embed"
    with pytest.raises(ValueError, match=rf"model\.{field} {kind[field]}: the official"):
        to_official(model.state_dict(), model.config)
    if kind["pos_embed"] != "none":
        for convert in (to_timm, from_timm):
            with pytest.raises(ValueError, match=rf"model\.{field} {kind[field]}: timm's models"):
                convert(model.state_dict(), model.config)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pos_embed": "relative", "pos_embed_at": "every_layer"}, "pos_embed_at every_layer does not apply"),
        ({"pos_embed": "none", "pos_embed_at": "every_layer_shared"}, "does not apply to pos_embed none"),
        ({"pos_embed": "sincos2d", "pos_embed_at": "every_layer"}, "does not apply to pos_embed sincos2d"),
        ({"pos_embed": "learned_2d", "embed_dim": 15, "num_heads": 3}, "learned_2d needs an even embed_dim, got 15"),
    ],
)
def test_what_does_not_apply_is_refused(make_config, fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        make_config(**fields)
