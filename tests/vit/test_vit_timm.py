from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from configs.model import VitConfig, variant_sizes
from configs.wire import ModelFile, Preprocess
from vit import ViT, build
from vit.timm_format import from_timm, save_timm, timm_arguments, to_timm


def timm_model(config: VitConfig, **more: object) -> VisionTransformer:
    """Written out here, so that a mistake of `timm_arguments` cannot hide itself."""
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "num_classes": config.num_classes,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_dim / config.embed_dim,
        "global_pool": {"cls": "token", "gap": "avg", "patch_mean": "avg", "map": "map"}[config.pool],
        "class_token": config.pool in ("cls", "patch_mean"),
        "reg_tokens": config.registers,
        "qk_norm": config.qk_norm,
        "fc_norm": config.pool == "patch_mean",
        "init_values": config.layer_scale,
        "act_layer": partial(nn.GELU, approximate="tanh") if config.gelu == "tanh" else nn.GELU,
    }
    return VisionTransformer(**(arguments | more)).eval()


def assert_same_logits(ours: ViT, theirs: nn.Module) -> None:
    images = torch.randn(3, ours.config.in_channels, *ours.config.image_size)
    with torch.inference_mode():
        expected = theirs(images)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)


CASES = [
    {},
    {"gelu": "exact"},
    {"pool": "gap"},
    {"pool": "gap", "gelu": "exact", "image_size": (12, 24)},
    {"image_size": (24, 8), "in_channels": 1, "num_heads": 4},
    {"layer_scale": 1e-4},
    {"layer_scale": 0.1, "pool": "gap"},
    {"pool": "patch_mean", "gelu": "exact"},
    {"pool": "patch_mean", "layer_scale": 1e-6, "image_size": (8, 24)},
    {"pool": "map", "gelu": "exact"},
    {"pool": "map", "registers": 2, "image_size": (8, 24)},
    {"registers": 4},
    {"registers": 1, "pool": "gap"},
    {"registers": 3, "pool": "patch_mean", "qk_norm": True, "layer_scale": 1e-4},
    {"qk_norm": True},
]


@pytest.mark.parametrize("fields", CASES)
def test_logits_equal_timms_both_ways(make_model, fields: dict[str, object]) -> None:
    ours = make_model(**fields)
    theirs = timm_model(ours.config)
    theirs.load_state_dict(to_timm(ours.state_dict(), ours.config))
    assert_same_logits(ours, theirs)
    back = build(ours.config).eval()
    back.load_state_dict(from_timm(theirs.state_dict(), ours.config))
    assert_same_logits(back, theirs)


def test_logits_equal_timms_at_full_width() -> None:
    config = VitConfig(**variant_sizes("S/16"), image_size=(224, 224), num_classes=1000, gelu="exact")
    theirs = timm.create_model("vit_small_patch16_224", pretrained=False).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim > 1 and "pos" not in name:
                nn.init.normal_(parameter, std=0.02)
        theirs.head.weight.mul_(10)
    ours = build(config).eval()
    ours.load_state_dict(from_timm(theirs.state_dict(), config))
    assert_same_logits(ours, theirs)


def test_mean_of_the_patches_is_timms_entry_point() -> None:
    """As MAE fine-tuning makes it: vit_base_patch16_224 with these three arguments, narrower here."""
    config = VitConfig(
        patch_size=16,
        embed_dim=24,
        depth=2,
        num_heads=3,
        mlp_dim=96,
        image_size=(48, 48),
        num_classes=9,
        pool="patch_mean",
        gelu="exact",
    )
    sizes = {"img_size": 48, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 9}
    theirs = timm.create_model(
        "vit_base_patch16_224", global_pool="avg", class_token=True, fc_norm=True, **sizes
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    ours = build(config).eval()
    ours.load_state_dict(from_timm(theirs.state_dict(), config))
    assert_same_logits(ours, theirs)
    state = to_timm(ours.state_dict(), config)
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())


def test_deits_names_of_layer_scale_are_read(make_model) -> None:
    ours = make_model(layer_scale=1e-4)
    deit = {
        name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): tensor
        for name, tensor in ours.state_dict().items()
    }
    assert "blocks.0.gamma_1" in deit
    back = from_timm(deit, ours.config)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())


def test_class_token_without_position_is_the_same_function(make_config) -> None:
    config = make_config()
    theirs = timm_model(config, no_embed_class=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ours = build(config).eval()
    ours.load_state_dict(from_timm(theirs.state_dict(), config))
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("fields", CASES)
def test_exported_folder_opens_with_one_line_of_timm(make_model, tmp_path: Path, fields: dict[str, object]) -> None:
    ours = make_model(**fields)
    config = ours.config
    preprocess = Preprocess(
        image_size=config.image_size, in_channels=config.in_channels, mean=(0.5,), std=(0.25,), crop="resize"
    )
    save_timm(ours.state_dict(), ModelFile(model=config, preprocess=preprocess), tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same_logits(ours, theirs)
    data = timm.data.resolve_model_data_config(theirs)
    assert data["input_size"] == (config.in_channels, *config.image_size)
    assert (set(data["mean"]), set(data["std"])) == ({0.5}, {0.25})
    assert (data["crop_mode"], data["crop_pct"], data["interpolation"]) == ("squash", 1.0, "bilinear")


def test_timm_computes_our_mlp_width() -> None:
    """int(embed_dim * (mlp_dim / embed_dim)) rounds below mlp_dim for some sizes."""
    rounded = 0
    for embed_dim in range(8, 400, 8):
        for mlp_dim in range(1, 1200, 7):
            config = VitConfig(
                patch_size=4,
                embed_dim=embed_dim,
                depth=1,
                num_heads=1,
                mlp_dim=mlp_dim,
                image_size=(4, 4),
                num_classes=2,
            )
            assert int(embed_dim * timm_arguments(config)["mlp_ratio"]) == mlp_dim
            rounded += int(embed_dim * (mlp_dim / embed_dim)) != mlp_dim
    assert rounded > 0


def test_mlp_heads_are_refused_with_the_reason(make_model) -> None:
    model = make_model(head="mlp")
    for convert in (to_timm, from_timm):
        with pytest.raises(ValueError, match=r"head: mlp has a hidden layer \(pre_logits\).*timm"):
            convert(model.state_dict(), model.config)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"global_pool": "avg", "class_token": False, "fc_norm": True}, "a norm after pooling"),
        ({"global_pool": "map", "class_token": False}, "attention pooling"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"init_values": 1e-5}, "LayerScale"),
        ({"qk_norm": True}, "query-key norm"),
        ({"pre_norm": True}, "a norm before the blocks"),
    ],
)
def test_what_only_timm_has_is_refused_by_name(make_config, more: dict[str, object], said: str) -> None:
    config = make_config(pool="gap" if "global_pool" in more else "cls")
    with pytest.raises(ValueError, match=f"timm's model has {said}"):
        from_timm(timm_model(config, **more).state_dict(), config)


def test_other_sizes_are_refused_with_both_shapes(make_config) -> None:
    state = timm_model(make_config(embed_dim=32)).state_dict()
    with pytest.raises(ValueError, match=r"has shape .*32.*, expected .*16"):
        from_timm(state, make_config())


@pytest.mark.parametrize("fields", [{}, {"pool": "gap", "image_size": (8, 24)}, {"layer_scale": 0.1}])
@pytest.mark.parametrize("norm", [False, True])
def test_feature_maps_equal_timms(make_model, fields: dict[str, object], norm: bool) -> None:
    ours = make_model(**fields)
    theirs = timm_model(ours.config)
    theirs.load_state_dict(to_timm(ours.state_dict(), ours.config))
    images = torch.randn(2, 3, *ours.config.image_size)
    with torch.inference_mode():
        expected = theirs.forward_intermediates(images, [0, 2], norm=norm, output_fmt="NCHW", intermediates_only=True)
        maps = ours.forward_intermediates(images, [-1, 0], norm=norm)
    rows, columns = ours.config.grid
    assert [tuple(found.shape) for found in maps] == [(2, 16, rows, columns)] * 2
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)
