from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from configs.train import Optim
from vit.optim import build_optimizer, freeze, param_groups, set_learning_rate
from vit.schedule import learning_rate


def test_only_kernels_decay(make_model) -> None:
    model = make_model(head="mlp", depth=1)
    decayed, kept = param_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert [names[id(p)] for p in decayed["params"]] == [
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "pre_logits.weight",
        "head.weight",
    ]
    rest = [names[id(p)] for p in kept["params"]]
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= set(rest)
    assert len(rest) + len(decayed["params"]) == len(names)


def test_frozen_parameters_are_left_out(make_model) -> None:
    model = make_model(depth=1)
    model.patch_embed.requires_grad_(False)
    trained = {id(p) for group in param_groups(model, 0.1) for p in group["params"]}
    assert not trained & {id(p) for p in model.patch_embed.parameters()}


def test_adamw_is_big_visions_update_for_20_steps(make_model) -> None:
    """big_vision: adam direction times lr, plus decay times the schedule's multiplier alone. Its `wd` at a base rate of
    1e-3 is a thousandth of torch's: 1e-4 there, 0.1 here."""
    base_lr, torch_decay, (b1, b2), eps = 1e-3, 0.1, (0.9, 0.999), 1e-8
    big_vision_decay = torch_decay * base_lr
    model = make_model(depth=1).double()
    optimizer = build_optimizer(model, Optim(lr=base_lr, weight_decay=torch_decay, betas=(b1, b2), eps=eps))
    kernels = {"patch_embed.proj.weight", "head.weight"} | {
        f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    mu = {name: torch.zeros_like(p) for name, p in expected.items()}
    nu = {name: torch.zeros_like(p) for name, p in expected.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        multiplier = learning_rate(step, 1.0, 5, 20, "linear")
        for group in optimizer.param_groups:
            group["lr"] = base_lr * multiplier
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient
            mu[name] = b1 * mu[name] + (1 - b1) * gradient
            nu[name] = b2 * nu[name] + (1 - b2) * gradient**2
            direction = (mu[name] / (1 - b1 ** (step + 1))) / (torch.sqrt(nu[name] / (1 - b2 ** (step + 1))) + eps)
            decay = big_vision_decay * expected[name] if name in kernels else torch.zeros_like(gradient)
            expected[name] = expected[name] - base_lr * multiplier * direction - multiplier * decay
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-11, atol=1e-13)


def test_sgd_is_heavy_ball_momentum() -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    optimizer = build_optimizer(layer, Optim(name="sgd", lr=0.1, momentum=0.9))
    expected, velocity = layer.weight.detach().clone(), torch.zeros(2, 3, dtype=torch.float64)
    for step in range(5):
        gradient = torch.full((2, 3), float(step + 1), dtype=torch.float64)
        layer.weight.grad = gradient
        velocity = 0.9 * velocity + gradient
        expected = expected - 0.1 * velocity
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_the_floor_of_the_decay_is_maes() -> None:
    """facebookresearch/mae `util/lr_sched.py`, with a step's share of an epoch for its fractional epoch."""
    lr, min_lr, warmup, epochs, per_epoch = 4e-3, 1e-6, 5, 50, 20

    def mae(epoch: float) -> float:
        if epoch < warmup:
            return lr * epoch / warmup
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))

    for step in range(epochs * per_epoch):
        found = learning_rate(step, lr, warmup * per_epoch, epochs * per_epoch, "cosine", min_lr)
        assert found == pytest.approx(mae(step / per_epoch), rel=1e-12, abs=1e-18)
    assert learning_rate(1000, lr, 100, 1000, "cosine", min_lr) == min_lr
    assert learning_rate(550, lr, 100, 1000, "linear", min_lr) == pytest.approx((lr + min_lr) / 2)
    assert learning_rate(1000, lr, 100, 1000, "linear", min_lr) == min_lr


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant", "steps"])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_learning_rate_is_the_closed_form_at_every_step(decay, warmup_steps: int) -> None:
    for step in range(100):
        multiplier = {
            "linear": (100 - step) / (100 - warmup_steps),
            "cosine": math.cos(math.pi / 2 * (step - warmup_steps) / (100 - warmup_steps)) ** 2,
            "constant": 1.0,
            "steps": 1.0 if step <= 30 else 0.1 if step <= 60 else 0.01 if step <= 90 else 0.001,
        }[decay]
        expected = 3e-3 * (step / warmup_steps if step < warmup_steps else multiplier)
        assert learning_rate(step, 3e-3, warmup_steps, 100, decay) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_steps_are_those_of_bits_hyperrule() -> None:
    """google-research/big_transfer `bit_hyperrule.py`, `get_lr`, for 20,000 to 500,000 examples."""

    def hyperrule(step: int) -> float:
        supports, base_lr = [500, 3000, 6000, 9000, 10_000], 0.003
        if step < supports[0]:
            return base_lr * step / supports[0]
        for support in supports[1:]:
            if support < step:
                base_lr /= 10
        return base_lr

    for step in range(0, 10_000):
        assert learning_rate(step, 0.003, 500, 10_000, "steps") == pytest.approx(hyperrule(step), rel=1e-12)


def test_learning_rate_at_the_seams() -> None:
    assert learning_rate(0, 1.0, 10, 100, "cosine") == 0.0
    assert learning_rate(10, 1.0, 10, 100, "cosine") == 1.0
    assert learning_rate(100, 1.0, 10, 100, "linear") == 0.0
    assert learning_rate(500, 1.0, 10, 100, "linear") == 0.0
    assert learning_rate(0, 1.0, 0, 100, "linear") == 1.0
    assert learning_rate(9, 1.0, 10, 10, "linear") == pytest.approx(0.9)
    assert learning_rate(10, 1.0, 10, 10, "linear") == 1.0


@pytest.mark.parametrize(("step", "warmup", "total"), [(-1, 0, 10), (0, 11, 10), (0, -1, 10), (0, 0, 0)])
def test_impossible_schedules_are_refused(step: int, warmup: int, total: int) -> None:
    with pytest.raises(ValueError, match="make no schedule"):
        learning_rate(step, 1.0, warmup, total, "linear")


def test_unknown_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown decay 'step'"):
        learning_rate(0, 1.0, 0, 10, "step")  # type: ignore[arg-type]


def test_layer_decay_is_maes(make_model) -> None:
    """facebookresearch/mae `lr_decay.py`: embeddings are layer 0, block i is i + 1, the rest is the last."""
    model = make_model(depth=3)
    groups = param_groups(model, 0.05, layer_decay=0.65)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    layer = {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0}
    layer |= {"norm.weight": 4, "norm.bias": 4, "head.weight": 4, "head.bias": 4}
    for name, parameter in model.named_parameters():
        number = layer.get(name, int(name.split(".")[1]) + 1 if name.startswith("blocks") else 4)
        decay = 0.05 if parameter.ndim > 1 and name not in ("cls_token", "pos_embed") else 0.0
        assert found[name] == (pytest.approx(0.65 ** (4 - number)), decay), name


def test_the_learning_rate_of_a_group_is_scaled(make_model) -> None:
    model = make_model(depth=2)
    optimizer = build_optimizer(model, Optim(layer_decay=0.5))
    set_learning_rate(optimizer, 0.8)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.1, 0.2, 0.4, 0.8]
    plain = build_optimizer(model, Optim())
    set_learning_rate(plain, 0.8)
    assert [group["lr"] for group in plain.param_groups] == [0.8, 0.8]


def test_layer_scale_and_the_pooled_norm_do_not_decay(make_model) -> None:
    model = make_model(depth=2, layer_scale=1e-4, pool="patch_mean")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups(model, 0.05, layer_decay=0.5)
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    assert found["blocks.0.ls1.gamma"] == found["blocks.0.ls2.gamma"] == (0.25, 0.0)
    assert found["blocks.1.ls1.gamma"] == (0.5, 0.0)
    assert found["fc_norm.weight"] == found["fc_norm.bias"] == (1.0, 0.0)


@pytest.mark.parametrize(
    ("part", "trained"),
    [
        ("head", {"pre_logits.weight", "pre_logits.bias", "head.weight", "head.bias"}),
        (
            "attention",
            {"pre_logits.weight", "pre_logits.bias", "head.weight", "head.bias", "pos_embed"}
            | {f"blocks.0.attn.{layer}.{kind}" for layer in ("qkv", "proj") for kind in ("weight", "bias")},
        ),
    ],
)
def test_only_the_part_is_trained(make_model, part, trained: set[str]) -> None:
    model = make_model(head="mlp", depth=1)
    freeze(model, part)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert sum(len(group["params"]) for group in param_groups(model, 0.1)) == len(trained)


def test_fixed_positions_are_never_trained(make_model) -> None:
    model = make_model(pos_embed="sincos2d")
    freeze(model, "all")
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
