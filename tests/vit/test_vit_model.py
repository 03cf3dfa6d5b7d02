from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from configs.model import VitConfig, variant_sizes
from vit import ViT, build
from vit.blocks import Block, DropPath
from vit.losses import classification_loss, count_topk_correct
from vit.model import drop_path_rates, empty


def config_of(variant: str, image_size: int = 224, num_classes: int = 1000, **fields: object) -> VitConfig:
    return VitConfig(**variant_sizes(variant), image_size=(image_size, image_size), num_classes=num_classes, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "num_parameters", "num_tokens"),
    [
        (config_of("B/16"), 86_567_656, 197),
        (config_of("B/32"), 88_224_232, 50),
        (config_of("L/16"), 304_326_632, 197),
        (config_of("L/32"), 306_535_400, 50),
        (config_of("H/14"), 632_045_800, 257),
        (config_of("Ti/16"), 5_717_416, 197),
        (config_of("S/16"), 22_050_664, 197),
        (config_of("S/32"), 22_878_952, 50),
        (config_of("B/16", 384), 86_859_496, 577),
        (config_of("H/14", 518), 633_470_440, 1370),
        (config_of("B/16", num_classes=21_843, head="mlp"), 103_186_515, 197),
        (config_of("L/16", num_classes=21_843, head="mlp"), 326_740_307, 197),
        (config_of("H/14", num_classes=21_843, head="mlp"), 660_385_363, 257),
    ],
)
def test_parameter_counts_are_the_published_ones(config: VitConfig, num_parameters: int, num_tokens: int) -> None:
    model = empty(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert model.pos_embed.shape == (1, num_tokens, config.embed_dim)
    assert config.num_tokens == num_tokens


def reference_logits(model: ViT, images: Tensor) -> Tensor:
    """The paper's equations 1 to 4 written with einsum, without our modules' forward functions."""
    config, w = model.config, {name: p.double() for name, p in model.state_dict().items()}
    size, dim, heads = config.patch_size, config.embed_dim, config.num_heads
    rows, columns = config.grid

    def dense(x: Tensor, name: str) -> Tensor:
        return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        if config.gelu == "exact":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    patches = images.double().reshape(len(images), config.in_channels, rows, size, columns, size)
    x = torch.einsum("bcrhsw,dchw->brsd", patches, w["patch_embed.proj.weight"]) + w["patch_embed.proj.bias"]
    x = x.flatten(1, 2)
    if config.pool != "gap":
        x = torch.cat([w["cls_token"].repeat(len(images), 1, 1), x], dim=1)
    x = x + w["pos_embed"]
    for i in range(config.depth):
        scaled = config.layer_scale is not None
        first, second = (w[f"blocks.{i}.ls{n}.gamma"] if scaled else 1.0 for n in (1, 2))
        q, k, v = dense(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(dim, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, dim // heads)) for t in (q, k, v))
        attention = torch.einsum("bqhk,bnhk->bhqn", q, k).div(math.sqrt(dim // heads)).softmax(-1)
        attended = torch.einsum("bhqn,bnhk->bqhk", attention, v).flatten(2)
        x = x + first * dense(attended, f"blocks.{i}.attn.proj")
        hidden = gelu(dense(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + second * dense(hidden, f"blocks.{i}.mlp.fc2")
    if config.pool == "patch_mean":
        x = norm(x[:, 1:].mean(1), "fc_norm")
    else:
        x = norm(x, "norm")
        x = x[:, 0] if config.pool == "cls" else x.mean(1)
    if config.head == "mlp":
        x = torch.tanh(dense(x, "pre_logits"))
    return dense(x, "head")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pool": "gap"},
        {"head": "mlp"},
        {"gelu": "exact"},
        {"image_size": (8, 20), "in_channels": 1},
        {"pool": "gap", "head": "mlp", "image_size": (20, 8), "num_heads": 4},
        {"layer_scale": 1e-4},
        {"pool": "patch_mean"},
        {"pool": "patch_mean", "head": "mlp", "layer_scale": 0.1, "image_size": (20, 8)},
    ],
)
def test_logits_equal_the_papers_equations(make_model, fields: dict[str, object]) -> None:
    model = make_model(**fields).double()
    images = torch.randn(3, model.config.in_channels, *model.config.image_size, dtype=torch.float64)
    torch.testing.assert_close(model(images), reference_logits(model, images), rtol=1e-10, atol=1e-10)


def test_the_two_gelus_differ(make_model) -> None:
    tanh, exact = make_model(gelu="tanh"), make_model(gelu="exact")
    exact.load_state_dict(tanh.state_dict())
    images = torch.randn(2, 3, 16, 16)
    difference = (tanh(images) - exact(images)).abs().max()
    assert 1e-6 < difference < 0.1


def test_features_hold_the_class_token_first_then_the_patches(make_model) -> None:
    model, images = make_model(), torch.randn(2, 3, 16, 16)
    features = model.forward_features(images)
    assert features.shape == (2, 17, 16)
    torch.testing.assert_close(model.head(features[:, 0]), model(images))
    assert make_model(pool="gap").forward_features(images).shape == (2, 16, 16)
    assert make_model(pool="gap").cls_token is None


def test_parameter_names_are_the_contract(make_config) -> None:
    names = set(empty(make_config(head="mlp", depth=1)).state_dict())
    layers = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.0.norm1"]
    layers += ["blocks.0.norm2", "patch_embed.proj", "norm", "pre_logits", "head"]
    assert names == {"cls_token", "pos_embed"} | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_layer_scale_and_the_pooled_norm_have_names_of_their_own(make_config) -> None:
    plain = set(empty(make_config(depth=1)).state_dict())
    assert set(empty(make_config(depth=1, layer_scale=1e-4)).state_dict()) - plain == {
        "blocks.0.ls1.gamma",
        "blocks.0.ls2.gamma",
    }
    pooled = set(empty(make_config(depth=1, pool="patch_mean")).state_dict())
    assert pooled - plain == {"fc_norm.weight", "fc_norm.bias"}
    assert plain - pooled == {"norm.weight", "norm.bias"}


# -- initialisation ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fresh() -> ViT:
    """Large enough for statistics."""
    sizes = {"patch_size": 8, "embed_dim": 256, "depth": 2, "num_heads": 4, "mlp_dim": 512}
    return build(VitConfig(**sizes, image_size=(64, 64), num_classes=10, head="mlp"), seed=3)


def assert_uniform(kernel: Tensor, bound: float) -> None:
    assert kernel.abs().max() <= bound
    assert kernel.abs().max() > 0.999 * bound
    assert kernel.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_q_k_v_are_each_xavier_uniform_as_square_kernels(fresh: ViT) -> None:
    for block in fresh.blocks:
        for kernel in block.attn.qkv.weight.chunk(3):
            assert_uniform(kernel, math.sqrt(6 / (256 + 256)))
        assert_uniform(block.attn.proj.weight, math.sqrt(6 / (256 + 256)))
        assert_uniform(block.mlp.fc1.weight, math.sqrt(6 / (256 + 512)))
        assert_uniform(block.mlp.fc2.weight, math.sqrt(6 / (256 + 512)))


def test_convolution_and_pre_logits_are_lecun_normal_with_the_corrected_width(fresh: ViT) -> None:
    for kernel, fan_in in ((fresh.patch_embed.proj.weight, 8 * 8 * 3), (fresh.pre_logits.weight, 256)):
        assert kernel.std().item() == pytest.approx(math.sqrt(1 / fan_in), rel=0.01)
        cut = 2 * math.sqrt(1 / fan_in) / 0.87962566
        assert 0.95 * cut < kernel.abs().max() <= cut


def test_the_heads_bias_starts_where_the_configuration_says(make_config) -> None:
    head = build(make_config(head="mlp", head_bias_init=-10.0)).head
    assert (head.weight == 0.0).all()
    assert (head.bias == -10.0).all()


def test_positions_biases_norms_token_and_head(fresh: ViT) -> None:
    assert fresh.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert fresh.cls_token is not None
    assert fresh.blocks[0].mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.1)
    assert fresh.blocks[1].mlp.fc2.bias.std().item() == pytest.approx(1e-6, rel=0.15)
    zeros = [fresh.cls_token, fresh.head.weight, fresh.head.bias, fresh.pre_logits.bias, fresh.patch_embed.proj.bias]
    zeros += [fresh.blocks[0].attn.qkv.bias, fresh.blocks[0].attn.proj.bias, fresh.norm.bias]
    assert all(not tensor.any() for tensor in zeros)
    norms = [module for module in fresh.modules() if isinstance(module, nn.LayerNorm)]
    assert all((norm.weight == 1).all() and norm.eps == 1e-6 for norm in norms)
    assert not fresh(torch.randn(2, 3, 64, 64)).any()


def test_layer_scale_starts_where_the_configuration_says(make_config) -> None:
    model = build(make_config(layer_scale=1e-4, pool="patch_mean"))
    for block in model.blocks:
        assert (block.ls1.gamma == 1e-4).all()
        assert (block.ls2.gamma == 1e-4).all()
    assert (model.fc_norm.weight == 1).all()
    assert not model.fc_norm.bias.any()


def test_weights_are_a_function_of_the_seed_alone(make_config) -> None:
    torch.manual_seed(1)
    first = build(make_config(), seed=5).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build(make_config(), seed=5).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build(make_config(), seed=6).state_dict()
    assert not torch.equal(first["pos_embed"], other["pos_embed"])


def test_blocks_do_not_share_their_initial_weights(make_config) -> None:
    blocks = build(make_config()).blocks
    assert not torch.equal(blocks[0].mlp.fc1.weight, blocks[1].mlp.fc1.weight)


# -- dropout and stochastic depth --------------------------------------------------------------------------------------
def test_dropout_follows_every_dense_layer_but_qkv(make_model) -> None:
    model = make_model(dropout=0.5, depth=2).train()
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.append((name, tuple(out.shape[1:]))))
    model(torch.randn(2, 3, 16, 16))
    per_block = [("attn.dropout", (17, 16)), ("mlp.dropout", (17, 24)), ("mlp.dropout", (17, 16))]
    expected = [("dropout", (17, 16))] + [(f"blocks.{i}.{name}", shape) for i in range(2) for name, shape in per_block]
    assert seen == expected


def test_dropout_acts_in_training_only(make_model) -> None:
    model, images = make_model(dropout=0.5, drop_path=0.5), torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_drop_path_grows_linearly_to_the_rate(make_config) -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0.0]
    blocks = empty(make_config(drop_path=0.2)).blocks
    assert [block.drop_path.rate for block in blocks] == pytest.approx([0.0, 0.1, 0.2])


def test_drop_path_may_be_the_same_in_every_block(make_config) -> None:
    blocks = empty(make_config(drop_path=0.2, drop_path_rule="uniform")).blocks
    assert [block.drop_path.rate for block in blocks] == [0.2, 0.2, 0.2]


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 3, 5))
    per_sample = out.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert sorted(set(per_sample[:, 0].tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(out), out)
    assert drop.train()(out.bfloat16()).dtype == torch.bfloat16


# -- how it runs -------------------------------------------------------------------------------------------------------
def test_activation_checkpointing_changes_no_gradient_and_recomputes(make_model) -> None:
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])

    def run(enabled: bool) -> tuple[Tensor, dict[str, Tensor], int]:
        model = make_model(dropout=0.3, drop_path=0.3).train()
        model.set_activation_checkpointing(enabled)
        calls: list[int] = []
        model.blocks[1].mlp.fc1.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(11)
        loss = classification_loss(model(images), labels, "softmax")
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters()}, len(calls)

    plain_loss, plain, plain_calls = run(False)
    loss, gradients, calls = run(True)
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    assert (plain_calls, calls) == (1, 2)


def test_nothing_is_read_back_from_the_device(make_config) -> None:
    """Meta tensors have no values: a single `.item()` or data-dependent branch would raise."""
    model = empty(make_config(dropout=0.1, drop_path=0.1, head="mlp")).train()
    model.set_activation_checkpointing(True)
    logits = model(torch.empty(4, 3, 16, 16, device="meta"))
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    classification_loss(logits, labels, "sigmoid", 0.1).backward()
    mask = torch.empty(4, dtype=torch.bool, device="meta")
    assert count_topk_correct(logits, labels, mask, 5).shape == ()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_to_one_graph(make_model, checkpointing: bool) -> None:
    torch._dynamo.reset()
    model = make_model(drop_path=0.5, dropout=0.1, head="mlp").train()
    model.set_activation_checkpointing(checkpointing)
    images = torch.randn(2, 3, 16, 16)
    explained = torch._dynamo.explain(model)(images)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    model.eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


def test_bfloat16_autocast_keeps_parameters_and_stays_close(make_model) -> None:
    model, images = make_model(), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.float32
    torch.testing.assert_close(logits.float(), model(images), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 16, 12), (2, 3, 32, 32)])
def test_other_images_are_refused_with_both_shapes(make_model, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images have shape .* each, this model takes \(3, 16, 16\)"):
        make_model()(torch.randn(shape))


def test_sizes_that_do_not_fit_are_refused(make_config) -> None:
    with pytest.raises(ValueError, match="embed_dim 16 is not a multiple of num_heads 3"):
        ViT(make_config(num_heads=3))
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of patch_size 4"):
        ViT(make_config(image_size=(16, 18)))


def test_block_takes_any_number_of_tokens(make_config) -> None:
    block = Block(make_config(embed_dim=8, num_heads=2, mlp_dim=16), drop_path=0.0)
    assert block(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    assert block(torch.randn(1, 1, 8)).shape == (1, 1, 8)


@pytest.mark.parametrize("fields", [{}, {"pool": "gap", "head": "mlp"}, {"pool": "patch_mean"}, {"head": "mlp"}])
def test_the_classifier_reads_the_representation(make_model, fields: dict[str, object]) -> None:
    model = make_model(**fields)
    images = torch.randn(2, 3, 16, 16)
    representation = model.forward_representation(model.forward_features(images))
    assert representation.shape == (2, 16)
    assert torch.equal(torch.nn.functional.linear(representation, model.head.weight, model.head.bias), model(images))
    assert (representation.abs().max() <= 1.0) == (fields.get("head") == "mlp")


@pytest.mark.parametrize("indices", [[], [3], [0, -4]])
def test_feature_maps_of_unknown_blocks_are_refused(make_model, indices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"indices .*: expected at least one of -3 to 2"):
        make_model().forward_intermediates(torch.randn(1, 3, 16, 16), indices)
