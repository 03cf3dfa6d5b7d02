"""What the recipes' presets make of parameters and steps, against the formulas of the code they come from."""

from __future__ import annotations

import math
import re

import pytest

from configs.datasets import PLANNING_CARDS, card_for
from configs.load import load_preset, parse_spec
from configs.resolve import resolve
from configs.spec import TrainingJob
from vit.model import drop_path_rates, empty
from vit.optim import build_optimizer, param_groups, set_learning_rate
from vit.schedule import learning_rate

NUM_TRAIN = 1_281_167


def resolved(name: str) -> TrainingJob:
    raw = {"preset": name} | ({"init_from": "ckpt_x"} if load_preset(name).kind == "finetune" else {})
    spec = parse_spec(raw)
    assert isinstance(spec, TrainingJob)
    return resolve(spec, card_for(spec.data.source, PLANNING_CARDS), None)


def rate_at(spec: TrainingJob, step: int) -> float:
    schedule = spec.schedule
    assert schedule.total_steps is not None
    assert schedule.warmup_steps is not None
    return learning_rate(
        step, spec.optim.lr, schedule.warmup_steps, schedule.total_steps, schedule.decay, schedule.min_lr
    )


# -- parameter groups --------------------------------------------------------------------------------------------------
def groups_of(name: str) -> dict[str, tuple[float, float]]:
    """Weight decay and learning rate's scale of each weight."""
    spec = resolved(name)
    model = empty(spec.model.vit())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups(model, spec.optim.weight_decay, spec.optim.layer_decay)
    return {names[id(p)]: (g["weight_decay"], g.get("lr_scale", 1.0)) for g in groups for p in g["params"]}


@pytest.mark.parametrize(("size", "depth", "decay"), [("b16", 12, 0.65), ("l16", 24, 0.75), ("h14", 32, 0.75)])
def test_maes_layers_learn_at_its_rates(size: str, depth: int, decay: float) -> None:
    """facebookresearch/mae `util/lr_decay.py`: scale decay ** (num_layers - id), no weight decay for one dimension,
    class token and positions."""
    found = groups_of(f"mae-finetune/{size}")
    num_layers = depth + 1
    model = empty(resolved(f"mae-finetune/{size}").model.vit())
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            layer_id = 0
        elif name.startswith("blocks"):
            layer_id = int(name.split(".")[1]) + 1
        else:
            layer_id = num_layers
        weight_decay = 0.0 if parameter.ndim == 1 or name in ("cls_token", "pos_embed") else 0.05
        assert found[name] == (weight_decay, pytest.approx(decay ** (num_layers - layer_id))), name
    assert found["fc_norm.weight"] == found["head.bias"] == (0.0, 1.0)
    assert found["head.weight"] == (0.05, 1.0)
    assert found["patch_embed.proj.weight"][1] == pytest.approx(decay**num_layers)


@pytest.mark.parametrize(("name", "decay"), [("deit3/imagenet-b16", 0.05), ("deit3/imagenet-b16-finetune", 0.1)])
def test_deit3_decays_all_but_vectors(name: str, decay: float) -> None:
    """timm's `add_weight_decay`, which DeiT calls with `no_weight_decay` of models_v2.py."""
    found = groups_of(name)
    model = empty(resolved(name).model.vit())
    for weight, parameter in model.named_parameters():
        kept = parameter.ndim == 1 or weight.endswith(".bias") or weight in ("pos_embed", "cls_token")
        assert found[weight] == (0.0 if kept else decay, 1.0), weight
    assert found["blocks.3.ls1.gamma"] == found["blocks.11.ls2.gamma"] == (0.0, 1.0)


@pytest.mark.parametrize("name", ["augreg/imagenet-b16", "augreg/imagenet21k-s16", "plain/s16-90ep"])
def test_big_vision_decays_kernels(name: str) -> None:
    """Its mask is `.*/kernel$`: dense layers and the patch projection, the heads included."""
    kernel = re.compile(r"^(patch_embed\.proj|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|pre_logits|head)\.weight$")
    for weight, (weight_decay, scale) in groups_of(name).items():
        assert (weight_decay, scale) == (0.1 if kernel.match(weight) else 0.0, 1.0), weight


def test_stochastic_depth_is_each_sources() -> None:
    """facebookresearch/deit `models_v2.py`: the same in all blocks. timm, which MAE uses: linspace(0, rate, depth)."""
    deit, mae = resolved("deit3/imagenet-l16").model.vit(), resolved("mae-finetune/l16").model.vit()
    assert drop_path_rates(deit.drop_path, deit.depth, deit.drop_path_rule) == [0.45] * 24
    assert drop_path_rates(mae.drop_path, mae.depth, mae.drop_path_rule) == pytest.approx(
        [0.2 * i / 23 for i in range(24)]
    )


# -- learning rates ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "lr", "epochs"), [("b16", 2e-3, 100), ("l16", 4e-3, 50), ("h14", 4e-3, 50)])
def test_maes_learning_rate(size: str, lr: float, epochs: int) -> None:
    """facebookresearch/mae `util/lr_sched.py`, at a fractional epoch."""
    spec, min_lr, warmup = resolved(f"mae-finetune/{size}"), 1e-6, 5

    def mae(epoch: float) -> float:
        if epoch < warmup:
            return lr * epoch / warmup
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))

    assert spec.schedule.total_steps is not None
    for step in range(0, spec.schedule.total_steps, 997):
        # Steps of the warm-up and of the whole are rounded: less than one step's change.
        assert rate_at(spec, step) == pytest.approx(mae(step * 1024 / NUM_TRAIN), abs=2e-4 * lr)
    assert rate_at(spec, spec.schedule.total_steps) == min_lr


# epochs, batch, learning rate, images; at most how far timm's schedule is from ours, as a share of the learning rate.
DEIT3: dict[str, tuple[int, int, float, int, float]] = {
    "imagenet-s16": (800, 2048, 4e-3, NUM_TRAIN, 0.006),
    "imagenet-b16": (800, 2048, 3e-3, NUM_TRAIN, 0.006),
    "imagenet-b16-finetune": (20, 512, 1e-5, NUM_TRAIN, 0.1),
    "imagenet21k-b16": (240, 2048, 1e-3, 14_146_012, 0.02),
    "imagenet21k-h14": (90, 2048, 1e-3, 14_146_012, 0.06),
    "imagenet21k-b16-finetune": (50, 2048, 3e-4, NUM_TRAIN, 0.1),
}


@pytest.mark.parametrize("name", DEIT3)
def test_deit3s_learning_rate(name: str) -> None:
    """timm's CosineLRScheduler as DeiT makes it (lr_min 1e-5, warmup_lr_init 1e-6, warmup_t 5, no warmup_prefix), at
    whole epochs: its cosine starts at epoch 0, ours after the warm-up, where the two are furthest apart."""
    epochs, batch, lr, num_images, apart = DEIT3[name]
    spec = resolved(f"deit3/{name}")

    def timm(epoch: int) -> float:
        if epoch < 5:
            return 1e-6 + epoch * (lr - 1e-6) / 5
        return 1e-5 + 0.5 * (lr - 1e-5) * (1.0 + math.cos(math.pi * epoch / epochs))

    differences = [
        abs(rate_at(spec, round(epoch * num_images / batch)) - timm(epoch)) / lr for epoch in range(epochs + 1)
    ]
    assert max(differences) < apart
    assert differences[-1] < 1e-9
    if spec.optim.lr == spec.schedule.min_lr:
        assert max(differences[5:]) == 0.0, "constant after the warm-up, in both"


@pytest.mark.parametrize(
    ("name", "total"), [("augreg/imagenet-b16", 93_835), ("plain/s16-90ep", 112_603), ("plain/s16-300ep", 375_342)]
)
def test_big_visions_learning_rate(name: str, total: int) -> None:
    """google-research/big_vision `utils.py`, `create_learning_rate_schedule`, decay_type cosine."""
    spec = resolved(name)

    def big_vision(step: int) -> float:
        progress = min(max((step - 10_000) / float(total - 10_000), 0.0), 1.0)
        return 1e-3 * 0.5 * (1.0 + math.cos(math.pi * progress)) * min(1.0, step / 10_000)

    for step in (0, 1, 5_000, 9_999, 10_000, 10_001, total // 2, total - 1, total):
        assert rate_at(spec, step) == pytest.approx(big_vision(step), rel=1e-12, abs=1e-18)


def test_what_a_rate_is_multiplied_by_includes_the_floor() -> None:
    """MAE scales what `lr_sched.py` gives: the lowest layer of B/16 ends at 1e-6 x 0.65 ** 13."""
    spec = resolved("mae-finetune/b16")
    optimizer = build_optimizer(empty(spec.model.vit()), spec.optim)
    assert spec.schedule.total_steps is not None
    set_learning_rate(optimizer, rate_at(spec, spec.schedule.total_steps))
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([1e-6 * 0.65**n for n in range(13, -1, -1)])
