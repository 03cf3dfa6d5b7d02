from __future__ import annotations

import pytest
import torch

from vit import build
from vit.pos_embed import resize_pos_embed
from vit.transfer import resize_weights, transfer_weights


def test_fine_tuning_starts_from_the_body_with_a_zero_head(make_model, make_config) -> None:
    source = make_model(head="mlp", num_classes=7)
    target = make_config(head="linear", num_classes=4, image_size=(24, 20), dropout=0.1, pos_resize="bicubic")
    moved = transfer_weights(source.state_dict(), source.config, target)
    assert not [name for name in moved if name.startswith(("head.", "pre_logits."))]
    model = build(target).eval()
    model.load_state_dict(model.state_dict() | moved)
    state = model.state_dict()
    kept = [name for name in moved if name != "pos_embed"]
    assert all(torch.equal(state[name], source.state_dict()[name]) for name in kept)
    assert len(kept) == len(state) - 3
    expected = resize_pos_embed(source.pos_embed.detach(), (4, 4), (6, 5), 1, "bicubic")
    assert torch.equal(state["pos_embed"], expected)
    assert not model(torch.randn(2, 3, 24, 20)).any()


def test_same_grid_keeps_the_features(make_model, make_config) -> None:
    source = make_model(pool="gap")
    target = make_config(pool="gap", num_classes=3)
    model = build(target).eval()
    model.load_state_dict(model.state_dict() | transfer_weights(source.state_dict(), source.config, target))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.forward_features(images), source.forward_features(images))


def test_the_source_state_is_not_changed(make_model, make_config) -> None:
    source = make_model()
    state = source.state_dict()
    moved = transfer_weights(state, source.config, make_config(image_size=(8, 8)))
    assert "head.weight" in state
    assert state["pos_embed"].shape == (1, 17, 16)
    assert moved["pos_embed"].shape == (1, 5, 16)


def test_evaluation_at_another_size_keeps_the_head(make_model, make_config) -> None:
    source = make_model(head="mlp")
    target = make_config(head="mlp", image_size=(24, 24))
    resized = resize_weights(source.state_dict(), source.config, target)
    build(target).load_state_dict(resized)
    assert torch.equal(resized["pre_logits.weight"], source.state_dict()["pre_logits.weight"])
    with pytest.raises(
        ValueError, match="cannot resize weights: num_classes is 7 in the checkpoint and 8 in the model"
    ):
        resize_weights(source.state_dict(), source.config, make_config(head="mlp", num_classes=8))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embed_dim", 32),
        ("depth", 2),
        ("num_heads", 4),
        ("mlp_dim", 32),
        ("patch_size", 8),
        ("pool", "gap"),
        ("in_channels", 1),
        ("gelu", "exact"),
        ("layer_scale", 1e-4),
        ("registers", 2),
        ("qk_norm", True),
    ],
)
def test_another_body_is_refused_by_field(make_model, make_config, field: str, value: object) -> None:
    source = make_model()
    with pytest.raises(ValueError, match=f"cannot transfer weights: {field} is .* in the checkpoint and {value!r}"):
        transfer_weights(source.state_dict(), source.config, make_config(**{field: value}))


def test_the_mean_of_the_patches_gets_a_norm_of_its_own(make_model, make_config) -> None:
    """facebookresearch/mae: of the pre-trained encoder all but `norm` is taken; `fc_norm` and the head are new."""
    source = make_model(layer_scale=1e-4)
    target = make_config(pool="patch_mean", layer_scale=1e-6, num_classes=4)
    moved = transfer_weights(source.state_dict(), source.config, target)
    model = build(target).eval()
    missing, unexpected = model.load_state_dict(moved, strict=False)
    assert (set(missing), unexpected) == ({"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}, [])
    images = torch.randn(2, 3, 16, 16)
    source.norm = torch.nn.Identity()
    torch.testing.assert_close(model.forward_features(images), source.forward_features(images))
    assert (model.fc_norm.weight == 1).all()
    assert torch.equal(moved["blocks.0.ls1.gamma"], source.blocks[0].ls1.gamma)


def test_a_model_that_reads_the_mean_keeps_its_norm(make_model, make_config) -> None:
    source = make_model(pool="patch_mean")
    moved = transfer_weights(source.state_dict(), source.config, make_config(pool="patch_mean", num_classes=4))
    assert torch.equal(moved["fc_norm.weight"], source.fc_norm.weight)
    for pool in ("cls", "gap"):
        with pytest.raises(ValueError, match=f"pool is 'patch_mean' in the checkpoint and '{pool}' in the model"):
            transfer_weights(source.state_dict(), source.config, make_config(pool=pool))
    with pytest.raises(ValueError, match="cannot resize weights: pool is 'cls'"):
        resize_weights(make_model().state_dict(), make_config(), make_config(pool="patch_mean"))


def test_registers_and_attention_pooling_go_along(make_model, make_config) -> None:
    fields = {"pool": "map", "registers": 3, "qk_norm": True}
    source = make_model(**fields)
    target = make_config(**fields, image_size=(24, 20), num_classes=4)
    moved = transfer_weights(source.state_dict(), source.config, target)
    model = build(target)
    assert set(model.state_dict()) - set(moved) == {"head.weight", "head.bias"}
    assert torch.equal(moved["reg_token"], source.reg_token)
    assert torch.equal(moved["pos_embed"][:, :3], source.pos_embed[:, :3])
    assert torch.equal(moved["attn_pool.latent"], source.attn_pool.latent)


def test_the_head_may_be_kept(make_model, make_config) -> None:
    source = make_model()
    target = make_config(image_size=(24, 24))
    moved = transfer_weights(source.state_dict(), source.config, target, keep_head=True)
    build(target).load_state_dict(moved)
    assert torch.equal(moved["head.weight"], source.head.weight)
    for field, value in (("num_classes", 4), ("head", "mlp")):
        with pytest.raises(ValueError, match=f"cannot transfer weights: {field} is"):
            transfer_weights(source.state_dict(), source.config, make_config(**{field: value}), keep_head=True)


def test_incomplete_source_is_refused(make_model) -> None:
    source = make_model()
    state = source.state_dict()
    del state["blocks.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.mlp\.fc1\.bias"):
        transfer_weights(state, source.config, source.config)
