"""The presets of later recipes against the tables and commands they come from, written out here."""

from __future__ import annotations

from typing import Any

import pytest

from configs.datasets import PLANNING_CARDS, card_for
from configs.load import list_presets, load_preset, parse_spec
from configs.resolve import SourceCheckpoint, resolve
from configs.spec import FinetuneJob, TrainingJob
from configs.wire import Preprocess

SIZES = ("s16", "b16", "l16", "h14")
IMAGENET_MEAN = (0.485, 0.456, 0.406)


def resolved(name: str) -> TrainingJob:
    raw = {"preset": name} | ({"init_from": "ckpt_x"} if load_preset(name).kind == "finetune" else {})
    spec = parse_spec(raw)
    assert isinstance(spec, TrainingJob)
    return resolve(spec, card_for(spec.data.source, PLANNING_CARDS), None)


def augmentation(spec: TrainingJob) -> tuple[Any, ...]:
    """RandAugment (dialect, operations, magnitude, its deviation), mixup, cutmix."""
    chosen, mix = spec.data.augment.randaugment, spec.data.mix
    rand = None if chosen is None else (chosen.ops, chosen.num_ops, chosen.magnitude, chosen.magnitude_std)
    return rand, 0.0 if mix is None else mix.mixup, 0.0 if mix is None else mix.cutmix


def steps(spec: TrainingJob) -> tuple[int | None, int | None]:
    return spec.schedule.warmup_steps, spec.schedule.total_steps


def test_the_presets_of_later_recipes_are_all_there() -> None:
    names = {
        preset.name for preset in list_presets() if not preset.name.startswith(("paper/", "demo/", "bit/", "search/"))
    }
    expected = {f"augreg/{data}-{m}" for data in ("imagenet", "imagenet21k") for m in AUGREG_VARIANTS}
    expected |= {"stable/imagenet-l16", "plain/s16-90ep", "plain/s16-300ep"} | {
        f"mae-finetune/{m}" for m in ("b16", "l16", "h14")
    }
    expected |= {f"deit3/{data}-{m}{end}" for data in ("imagenet", "imagenet21k") for m in SIZES for end in ENDS}
    assert names == expected


ENDS = ("", "-finetune")
AUGREG_VARIANTS = {"ti16": "Ti/16", "s32": "S/32", "s16": "S/16", "b32": "B/32", "b16": "B/16", "l16": "L/16"}
# RandAugment's magnitude (2 operations) and mixup: big_vision configs/vit_i1k.py, RANDAUG_DEF and MIXUP_DEF.
STRENGTHS = {"none": (None, 0.0), "light1": (0, 0.0), "light2": (10, 0.2), "medium1": (15, 0.2), "medium2": (15, 0.5)}
AUGREG = {
    "imagenet-ti16": "light1",
    "imagenet-s32": "medium1",
    "imagenet-s16": "medium2",
    "imagenet-b32": "medium2",
    "imagenet-b16": "medium2",
    "imagenet-l16": "medium2",
    "imagenet21k-ti16": "none",
    "imagenet21k-s32": "none",
    "imagenet21k-s16": "light1",
    "imagenet21k-b32": "light2",
    "imagenet21k-b16": "light2",
    "imagenet21k-l16": "medium2",
}


@pytest.mark.parametrize("name", AUGREG)
def test_augreg_follows_big_vision(name: str) -> None:
    spec = resolved(f"augreg/{name}")
    magnitude, mixup = STRENGTHS[AUGREG[name]]
    rand = None if magnitude is None else ("big_vision", 2, magnitude, 0.0)
    assert augmentation(spec) == (rand, mixup, 0.0)
    assert (spec.optim.name, spec.optim.lr, spec.optim.clip_grad_norm) == ("adamw", 1e-3, 1.0)
    assert spec.optim.betas == (0.9, 0.999)
    # big_vision's decay is not multiplied by the learning rate: 1e-4 there is 1e-4 / 1e-3 here.
    assert spec.optim.weight_decay == pytest.approx(1e-4 / spec.optim.lr)
    assert (spec.train.global_batch_size, spec.train.loss, spec.train.label_smoothing) == (4096, "sigmoid", 0.0)
    assert (spec.schedule.decay, spec.schedule.min_lr) == ("cosine", 0.0)
    assert (spec.model.dropout, spec.model.drop_path, spec.model.image_size) == (0.0, 0.0, 224)
    assert (spec.data.augment.crop, spec.data.augment.crop_area) == ("inception", (0.05, 1.0))
    assert spec.model.variant == AUGREG_VARIANTS[name.split("-")[1]]
    if name.startswith("imagenet-"):
        assert (spec.model.pool, spec.model.head, spec.model.head_bias_init) == ("cls", "mlp", -6.9)
        assert steps(spec) == (10_000, round(300 * 1_281_167 / 4096))
    else:
        assert (spec.model.pool, spec.model.head, spec.model.head_bias_init) == ("gap", "linear", -10.0)
        num_train = 14_197_122 - round(0.0036 * 14_197_122)
        assert steps(spec) == (10_000, round(300 * num_train / 4096))


@pytest.mark.parametrize(("epochs", "total"), [(90, 112_603), (300, 375_342)])
def test_plain_follows_big_vision(epochs: int, total: int) -> None:
    spec = resolved(f"plain/s16-{epochs}ep")
    assert steps(spec) == (10_000, total)
    assert augmentation(spec) == (("big_vision", 2, 10, 0.0), 0.2, 0.0)
    model = spec.model
    assert (model.variant, model.pool, model.pos_embed, model.head) == ("S/16", "gap", "sincos2d", "mlp")
    assert (model.dropout, model.drop_path, model.image_size) == (0.0, 0.0, 224)
    assert (spec.optim.name, spec.optim.lr, spec.optim.weight_decay) == ("adamw", 1e-3, pytest.approx(1e-4 / 1e-3))
    assert spec.optim.clip_grad_norm == 1.0
    assert (spec.train.global_batch_size, spec.train.loss) == (1024, "softmax")


# Size in pixels and drop path; learning rate: README_revenge.md. H/14's 160 and 128 hold 11 x 11 and 9 x 9 patches.
DEIT3_IMAGENET = {
    "s16": (224, 0.05, 4e-3),
    "b16": (192, 0.2, 3e-3),
    "l16": (192, 0.45, 3e-3),
    "h14": (154, 0.6, 3e-3),
}
DEIT3_IMAGENET_FINETUNE = {"s16": (384, 0.0), "b16": (224, 0.2), "l16": (224, 0.45), "h14": (224, 0.55)}
# Size, drop path, epochs, drop path of the fine-tuning.
DEIT3_IMAGENET21K = {
    "s16": (224, 0.05, 240, 0.05),
    "b16": (224, 0.1, 240, 0.15),
    "l16": (224, 0.3, 240, 0.4),
    "h14": (126, 0.5, 90, 0.45),
}


def assert_is_deit3(spec: TrainingJob, size: str) -> None:
    model = spec.model
    assert model.variant == f"{size[0].upper()}/{size[1:]}"
    assert (model.layer_scale, model.drop_path_rule, model.gelu) == (1e-4, "uniform", "exact")
    assert (model.head, model.pool, model.dropout) == ("linear", "cls", 0.0)
    assert (spec.schedule.decay, spec.schedule.min_lr, spec.train.ema_decay) == ("cosine", 1e-5, 0.99996)
    assert (spec.data.mean, spec.data.eval_crop, spec.data.augment.random_erasing) == (IMAGENET_MEAN, "center", 0.0)


@pytest.mark.parametrize("size", SIZES)
def test_deit3_on_imagenet_follows_its_commands(size: str) -> None:
    spec = resolved(f"deit3/imagenet-{size}")
    assert_is_deit3(spec, size)
    assert (spec.model.image_size, spec.model.drop_path, spec.optim.lr) == DEIT3_IMAGENET[size]
    assert (spec.optim.name, spec.optim.weight_decay, spec.optim.clip_grad_norm) == ("lamb", 0.05, 1.0)
    assert (spec.train.global_batch_size, spec.train.loss, spec.train.label_smoothing) == (2048, "bce", 0.0)
    assert augmentation(spec) == (None, 0.8, 1.0)
    augment = spec.data.augment
    assert (augment.three_augment, augment.color_jitter, augment.repeats) == (True, 0.3, 3)
    assert (augment.crop, augment.crop_area) == ("inception", (0.08, 1.0))
    assert steps(spec) == (round(5 * 1_281_167 / 2048), round(800 * 1_281_167 / 2048))


@pytest.mark.parametrize("size", SIZES)
def test_deit3s_second_stage_follows_its_commands(size: str) -> None:
    spec = resolved(f"deit3/imagenet-{size}-finetune")
    assert_is_deit3(spec, size)
    assert isinstance(spec, FinetuneJob)
    assert spec.keep_head
    assert (spec.model.image_size, spec.model.drop_path) == DEIT3_IMAGENET_FINETUNE[size]
    assert (spec.optim.name, spec.optim.lr, spec.optim.weight_decay) == ("adamw", 1e-5, 0.1)
    assert spec.optim.clip_grad_norm is None
    assert (spec.train.global_batch_size, spec.train.loss, spec.train.label_smoothing) == (512, "softmax", 0.1)
    assert augmentation(spec) == (("timm", 2, 9, 0.5), 0.8, 1.0)
    augment = spec.data.augment
    assert (augment.three_augment, augment.color_jitter, augment.repeats) == (False, 0.0, 1)
    assert steps(spec) == (round(5 * 1_281_167 / 512), round(20 * 1_281_167 / 512))


@pytest.mark.parametrize("size", SIZES)
def test_deit3_from_imagenet21k_follows_its_commands(size: str) -> None:
    pixels, drop_path, epochs, finetune_drop_path = DEIT3_IMAGENET21K[size]
    first, second = resolved(f"deit3/imagenet21k-{size}"), resolved(f"deit3/imagenet21k-{size}-finetune")
    for spec in (first, second):
        assert_is_deit3(spec, size)
        assert (spec.optim.name, spec.optim.weight_decay, spec.optim.clip_grad_norm) == ("lamb", 0.02, 1.0)
        assert (spec.train.global_batch_size, spec.train.loss, spec.train.label_smoothing) == (2048, "softmax", 0.1)
        assert augmentation(spec) == (None, 0.0, 1.0)
        augment = spec.data.augment
        assert (augment.crop, augment.three_augment, augment.color_jitter, augment.repeats) == ("simple", True, 0.3, 1)
    assert isinstance(second, FinetuneJob)
    assert not second.keep_head
    assert (first.model.image_size, first.model.drop_path, first.optim.lr) == (pixels, drop_path, 1e-3)
    assert (second.model.image_size, second.model.drop_path, second.optim.lr) == (224, finetune_drop_path, 3e-4)
    num_train = 14_197_122 - round(0.0036 * 14_197_122)
    assert steps(first) == (round(5 * num_train / 2048), round(epochs * num_train / 2048))
    assert steps(second) == (round(5 * 1_281_167 / 2048), round(50 * 1_281_167 / 2048))


# blr, layer decay, drop path, epochs: FINETUNE.md.
MAE = {"b16": (5e-4, 0.65, 0.1, 100), "l16": (1e-3, 0.75, 0.2, 50), "h14": (1e-3, 0.75, 0.3, 50)}


@pytest.mark.parametrize("size", MAE)
def test_mae_finetuning_follows_its_commands(size: str) -> None:
    blr, layer_decay, drop_path, epochs = MAE[size]
    spec = resolved(f"mae-finetune/{size}")
    model, optim = spec.model, spec.optim
    assert (model.pool, model.head, model.gelu, model.layer_scale) == ("patch_mean", "linear", "exact", None)
    assert (model.drop_path, model.drop_path_rule, model.image_size) == (drop_path, "linear", 224)
    assert optim.lr == pytest.approx(blr * 1024 / 256)
    assert (optim.name, optim.betas, optim.weight_decay) == ("adamw", (0.9, 0.999), 0.05)
    assert (optim.layer_decay, optim.clip_grad_norm) == (layer_decay, None)
    assert (spec.train.global_batch_size, spec.train.loss, spec.train.label_smoothing) == (1024, "softmax", 0.1)
    assert (spec.train.ema_decay, spec.schedule.decay, spec.schedule.min_lr) == (None, "cosine", 1e-6)
    assert augmentation(spec) == (("timm", 2, 9, 0.5), 0.8, 1.0)
    assert (spec.data.augment.random_erasing, spec.data.augment.repeats) == (0.25, 1)
    assert (spec.data.augment.crop_area, spec.data.mean, spec.data.eval_crop) == ((0.08, 1.0), IMAGENET_MEAN, "center")
    assert steps(spec) == (round(5 * 1_281_167 / 1024), round(epochs * 1_281_167 / 1024))


def test_a_second_stage_starts_from_the_first() -> None:
    """And MAE's from an imported encoder with a class token."""
    for size in SIZES:
        model = resolved(f"deit3/imagenet-{size}").model.vit()
        assert finetuned(f"deit3/imagenet-{size}-finetune", model).model.layer_scale == 1e-4
    encoder = model.model_copy(update={"layer_scale": None, "image_size": (224, 224)})
    assert finetuned("mae-finetune/h14", encoder).model.pool == "patch_mean"


def finetuned(name: str, origin: Any) -> TrainingJob:
    spec = parse_spec({"preset": name, "init_from": "ckpt_x"})
    assert isinstance(spec, TrainingJob)
    preprocess = Preprocess(image_size=origin.image_size, in_channels=3, mean=IMAGENET_MEAN, std=IMAGENET_MEAN)
    return resolve(spec, card_for(spec.data.source, {}), SourceCheckpoint("ckpt_x", "", origin, preprocess, None))
