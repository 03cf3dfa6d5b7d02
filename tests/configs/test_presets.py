from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

import configs
from configs.cost import GPUS
from configs.datasets import PLANNING_CARDS, card_for
from configs.load import PresetInfo, SpecError, list_presets, load_preset, parse_spec
from configs.plan import Plan, plan
from configs.resolve import SourceCheckpoint, canonical_json, load_resolved, resolve
from configs.spec import TrainingJob
from configs.wire import Preprocess

PRESETS = [preset for preset in list_presets() if preset.kind != "search"]
"""Those of searches: see test_search.py."""


def parsed(preset: PresetInfo) -> TrainingJob:
    raw = {"preset": preset.name} | ({"init_from": "ckpt_x"} if preset.kind == "finetune" else {})
    spec = parse_spec(raw)
    assert isinstance(spec, TrainingJob)
    return spec


def demo_source() -> SourceCheckpoint:
    spec = parsed(load_preset("demo/fashion-mnist-pretrain"))
    model = resolve(spec, card_for(spec.data.source, {}), None).model.vit()
    preprocess = Preprocess(image_size=(28, 28), in_channels=1, mean=(0.5,), std=(0.5,))
    return SourceCheckpoint("ckpt_x", "", model, preprocess, spec.data)


def planned(preset: PresetInfo, **resources: int) -> Plan:
    spec = parsed(preset)
    spec = spec.model_copy(update={"resources": spec.resources.model_copy(update=resources)})
    source = demo_source() if preset.name == "demo/fashion-mnist-finetune" else None
    gpu = "H100:8" if spec.resources.gpus_per_worker else None
    return plan(spec, card_for(spec.data.source, PLANNING_CARDS), gpu, source)


def test_the_presets_of_the_paper_are_all_there() -> None:
    names = {preset.name for preset in PRESETS if preset.name.startswith(("paper/", "demo/"))}
    pretrain = {f"jft300m-{m}" for m in ("b16", "b32", "l32", "l16-7ep", "l16-14ep", "h14")}
    pretrain |= {f"jft300m-r50-{m}" for m in ("b16", "b32", "l32", "l16-7ep", "l16-14ep")}
    pretrain |= {f"jft300m-{m}" for m in ("r50x1", "r50x2", "r101x1", "r152x1", "r152x2-7ep", "r152x2-14ep")}
    pretrain |= {"jft300m-r50x1-sgd", "jft300m-r152x2-sgd"}
    pretrain |= {f"imagenet21k-{m}" for m in ("b16", "b32", "l16-30ep", "l16-90ep", "l32-30ep", "l32-90ep")}
    pretrain |= {f"imagenet-{m}" for m in ("b16", "b32", "l16", "l32")}
    pretrain |= {"jft300m-masked-b16", "imagenet-masked-b16"}
    sets = ("imagenet", "cifar10", "cifar100", "pets", "flowers")
    finetune = {f"{s}-{m}" for s in sets for m in ("b16", "b32", "l16", "l32", "h14", "r50x1", "r152x2")}
    finetune |= {"imagenet-l16-512", "imagenet-h14-518"}
    expected = {"demo/fashion-mnist-pretrain", "demo/fashion-mnist-finetune"}
    expected |= {f"paper/pretrain/{name}" for name in pretrain} | {f"paper/finetune/{name}" for name in finetune}
    assert names == expected
    hyperrule = {preset.name for preset in PRESETS if preset.name.startswith("bit/")}
    assert hyperrule == {f"bit/{s}-{m}" for s in sets for m in ("r50x1", "r152x2")}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_a_preset_says_what_it_is_validates_resolves_and_plans(preset: PresetInfo) -> None:
    assert preset.title
    assert preset.command.startswith(f"patchwork submit --preset {preset.name}")
    assert ("init_from=" in preset.command) == (preset.kind == "finetune")
    assert preset.source
    assert preset.cost
    assert "%" in preset.accuracy or "checkpoint" in preset.accuracy
    assert preset.shown.startswith(("no", "yes"))
    assert "preset" not in preset.spec

    spec = parsed(preset)
    source = demo_source() if preset.name == "demo/fashion-mnist-finetune" else None
    resolved = resolve(spec, card_for(spec.data.source, PLANNING_CARDS), source)
    assert load_resolved(canonical_json(resolved)) == resolved
    assert resolved.preset == preset.name
    assert planned(preset).fits in (True, None)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_the_cost_in_the_header_is_the_cost_models(preset: PresetInfo) -> None:
    found = re.match(r"([0-9.,e-]+) exaFLOPs", preset.cost)
    assert found is not None
    assert planned(preset).exaflops == pytest.approx(float(found[1].replace(",", "")), rel=0.01)
    hours = re.search(r"about ([0-9.]+) (h|min|s) on 8 H100", preset.cost)
    if not preset.name.startswith("demo/"):
        assert hours is not None
        seconds = float(hours[1]) * {"h": 3600, "min": 60, "s": 1}[hours[2]]
        # The header is about the GPUs: as if there were cores enough to decode for them.
        found_hours = planned(preset, cpus_per_worker=256).hours or 0
        assert found_hours * 3600 == pytest.approx(seconds, rel=0.05)
        assert "never run by us" in preset.cost


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_the_heads_bias_starts_low_where_the_loss_is_sigmoid(preset: PresetInfo) -> None:
    """-10 for ImageNet-21k and JFT, -6.9 for AugReg on ImageNet: about the logarithm of one class's share."""
    spec = parsed(preset)
    large = ("paper/pretrain/jft300m-", "paper/pretrain/imagenet21k-", "augreg/imagenet21k-")
    start = -10.0 if preset.name.startswith(large) else -6.9 if preset.name.startswith("augreg/imagenet-") else 0.0
    if spec.train.objective == "masked_patch":
        start = 0.0
    assert spec.model.head_bias_init == start
    assert (spec.train.loss == "sigmoid") == (start != 0.0)


@pytest.mark.parametrize("preset", [p for p in PRESETS if p.kind == "finetune"], ids=lambda p: p.name)
def test_a_finetune_preset_asks_for_a_checkpoint(preset: PresetInfo) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({"preset": preset.name})
    assert [e.pointer for e in caught.value.errors] == ["/init_from"]


# epochs, base lr, decay, weight decay, dropout, clip, loss: Table 3.
TABLE_3 = {
    "jft300m-b16": (7, 8e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-b32": (7, 8e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-l32": (7, 6e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-l16-7ep": (7, 4e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-l16-14ep": (14, 4e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-h14": (14, 3e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r50x1": (7, 1e-3, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r50x2": (7, 1e-3, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r101x1": (7, 8e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r152x1": (7, 6e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r152x2-7ep": (7, 6e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r152x2-14ep": (14, 6e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r50-b16": (7, 8e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r50-b32": (7, 8e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r50-l32": (7, 2e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r50-l16-7ep": (7, 4e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "jft300m-r50-l16-14ep": (14, 4e-4, "linear", 0.1, 0.0, None, "sigmoid"),
    "imagenet21k-b16": (90, 1e-3, "linear", 0.03, 0.1, None, "sigmoid"),
    "imagenet21k-b32": (90, 1e-3, "linear", 0.03, 0.1, None, "sigmoid"),
    "imagenet21k-l16-30ep": (30, 1e-3, "linear", 0.03, 0.1, None, "sigmoid"),
    "imagenet21k-l16-90ep": (90, 1e-3, "linear", 0.03, 0.1, None, "sigmoid"),
    "imagenet21k-l32-30ep": (30, 1e-3, "linear", 0.03, 0.1, None, "sigmoid"),
    "imagenet21k-l32-90ep": (90, 1e-3, "linear", 0.03, 0.1, None, "sigmoid"),
    "imagenet-b16": (300, 3e-3, "cosine", 0.3, 0.1, 1.0, "softmax"),
    "imagenet-b32": (300, 3e-3, "cosine", 0.3, 0.1, 1.0, "softmax"),
    "imagenet-l16": (300, 3e-3, "cosine", 0.3, 0.1, 1.0, "softmax"),
    "imagenet-l32": (300, 3e-3, "cosine", 0.3, 0.1, 1.0, "softmax"),
}


@pytest.mark.parametrize("name", TABLE_3)
def test_pretraining_follows_table_3(name: str) -> None:
    spec = parsed(load_preset(f"paper/pretrain/{name}"))
    found = (
        spec.schedule.total_epochs,
        spec.optim.lr,
        spec.schedule.decay,
        spec.optim.weight_decay,
        spec.model.dropout,
        spec.optim.clip_grad_norm,
        spec.train.loss,
    )
    assert found == TABLE_3[name]
    assert (spec.optim.name, spec.optim.betas) == ("adamw", (0.9, 0.999))
    assert (spec.train.global_batch_size, spec.schedule.warmup_steps) == (4096, 10_000)
    head = "mlp" if spec.model.resnet is None else "linear"
    assert (spec.model.head, spec.model.image_size) == (head, 224)
    parts = name.split("-")
    variant = parts[2] if parts[1] == "r50" else parts[1]
    sized = variant.upper().replace("X", "x") if "x" in variant else f"{variant[0].upper()}/{variant[1:]}"
    assert spec.model.variant == (f"R50+{sized}" if parts[1] == "r50" else sized)


@pytest.mark.parametrize(("data", "steps"), [("jft300m", 1_000_000), ("imagenet", 100_000)])
def test_masked_patch_prediction_follows_the_appendix(data: str, steps: int) -> None:
    """B.1.2: "1M steps (ca. 14 epochs) with batch size 4096 on JFT. We use Adam, with a base learning rate of 2e-4,
    warmup of 10k steps and cosine learning rate decay"; little is gained after 100k steps."""
    preset = load_preset(f"paper/pretrain/{data}-masked-b16")
    spec = parsed(preset)
    assert (spec.train.objective, spec.model.variant, spec.model.image_size) == ("masked_patch", "B/16", 224)
    assert (spec.schedule.total_steps, spec.schedule.warmup_steps, spec.schedule.decay) == (steps, 10_000, "cosine")
    assert (spec.optim.name, spec.optim.lr, spec.train.global_batch_size) == ("adamw", 2e-4, 4096)
    if data == "jft300m":
        assert planned(preset).epochs == pytest.approx(14, abs=0.5)


@pytest.mark.parametrize("variant", ["r50x1", "r152x2"])
def test_resnets_are_pretrained_with_sgd_too(variant: str) -> None:
    """Table 7; SGD's settings are BiT's."""
    spec = parsed(load_preset(f"paper/pretrain/jft300m-{variant}-sgd"))
    assert spec.model.variant == variant.upper().replace("X", "x")
    assert (spec.optim.name, spec.optim.momentum, spec.optim.weight_decay) == ("sgd", 0.9, 1e-4)
    assert spec.optim.lr == pytest.approx(0.03 * spec.train.global_batch_size / 256)
    assert (spec.schedule.total_epochs, spec.schedule.warmup_steps) == (7, 5000)


@pytest.mark.parametrize("preset", [p for p in PRESETS if p.name.startswith("bit/")], ids=lambda p: p.name)
def test_bits_hyperrule(preset: PresetInfo) -> None:
    """google-research/big_transfer `bit_hyperrule.py`."""
    spec = parsed(preset)
    card = card_for(spec.data.source, PLANNING_CARDS)
    images = card.num_examples(spec.data.train)
    total = 500 if images < 20_000 else 10_000 if images < 500_000 else 20_000
    assert (spec.schedule.total_steps, spec.schedule.decay) == (total, "steps")
    assert spec.schedule.warmup_steps == (100 if total == 500 else 500)
    assert (spec.optim.name, spec.optim.lr, spec.optim.momentum, spec.optim.weight_decay) == ("sgd", 0.003, 0.9, 0.0)
    assert (spec.train.global_batch_size, spec.optim.clip_grad_norm) == (512, None)
    assert (spec.data.mix is not None) == (images >= 20_000)
    assert spec.data.mix is None or (spec.data.mix.mixup, spec.data.mix.cutmix) == (0.1, 0.0)
    assert spec.model.image_size == (128 if "cifar" in preset.name else 480)


@pytest.mark.parametrize("preset", [p for p in PRESETS if p.name.startswith("paper/finetune")], ids=lambda p: p.name)
def test_finetuning_follows_table_4(preset: PresetInfo) -> None:
    spec = parsed(preset)
    data = preset.name.split("/")[-1].split("-")[0]
    steps = {"imagenet": 20_000, "cifar10": 10_000, "cifar100": 10_000, "pets": 500, "flowers": 500}[data]
    grid = (0.003, 0.01, 0.03, 0.06) if data == "imagenet" else (0.001, 0.003, 0.01, 0.03)
    assert spec.schedule.total_steps == steps
    assert spec.optim.lr in grid[1:3]
    assert f"({', '.join(map(str, grid))})" in preset.source
    assert (spec.optim.name, spec.optim.momentum, spec.optim.weight_decay) == ("sgd", 0.9, 0.0)
    assert (spec.train.global_batch_size, spec.optim.clip_grad_norm, spec.schedule.decay) == (512, 1.0, "cosine")
    assert spec.model.head == "linear"
    if "Table 2" in preset.source:
        assert "Polyak" in preset.source
        assert spec.model.image_size in (512, 518)
    else:
        # The grid of 384 px: with patches of 14, 27 x 27, which is 378 px.
        assert spec.model.image_size == (378 if spec.model.patch_size == 14 else 384)


def test_planning_a_preset_takes_less_than_a_second() -> None:
    start = time.perf_counter()
    planned(load_preset("paper/pretrain/jft300m-h14"))
    assert time.perf_counter() - start < 1.0


def test_presets_are_files_of_the_package() -> None:
    folder = Path(configs.__file__).parent / "presets"
    public = [p for p in folder.rglob("*.yaml") if not p.name.startswith("_")]
    assert len(public) == len(list_presets())


def test_data_that_is_not_public_says_so() -> None:
    assert "not public" in load_preset("paper/pretrain/jft300m-h14").source
    assert any("not public" in note for note in planned(load_preset("paper/pretrain/jft300m-h14")).notes)


def test_the_gpus_are_named_as_resources_accept_them() -> None:
    for name in GPUS:
        spec = parse_spec({"preset": "paper/pretrain/imagenet-b16", "resources": {"accelerator": name}})
        assert isinstance(spec, TrainingJob)
        assert spec.resources.accelerator == name
