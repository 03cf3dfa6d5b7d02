"""Fields of recipes: what does not apply is refused, and jobs stored before they existed mean what they meant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from configs.cost import num_parameters
from configs.load import SpecError
from configs.model import BitConfig, ModelConfig
from configs.plan import plan
from configs.resolve import SourceCheckpoint, canonical_json, load_resolved, resolve, training_fingerprint
from tests.configs.specs import CARD, EVALUATE, FINETUNE, PRETRAIN, job, source

# The canonical JSON of a job resolved before recipes had fields of their own.
OLD = (
    b'{"checkpoint":{"every_epochs":null,"every_examples":null,"every_steps":null,"keep_best":1,"keep_last":2,'
    b'"metric":"eval/top1"},"data":{"augment":{"crop":"inception","crop_area":[0.05,1.0],"flip":true},"eval":"val",'
    b'"eval_crop":"resize","holdout":null,"loader_workers":0,"max_corrupt":0.001,"mean":[0.5],"source":{"name":'
    b'"pictures","type":"folder"},"std":[0.5],"subset":null,"train":"train"},"eval":{"at_end":true,"batch_size":256,'
    b'"every_epochs":null,"every_examples":null,"every_steps":null,"few_shot":[]},"kind":"pretrain","labels":{},'
    b'"model":{"depth":2,"drop_path":0.0,"dropout":0.0,"embed_dim":32,"gelu":"tanh","head":"linear","image_size":16,'
    b'"in_channels":3,"mlp_dim":64,"num_classes":5,"num_heads":2,"patch_size":4,"pool":"cls","pos_embed":"learned",'
    b'"pos_resize":"official","variant":null},"name":"unnamed","optim":{"betas":[0.9,0.999],"clip_grad_norm":1.0,'
    b'"eps":1e-08,"lr":0.001,"momentum":0.9,"name":"adamw","weight_decay":0.0},"preset":null,"queue":{},"resources":'
    b'{"gpus_per_worker":0,"workers":2},"retry":{},"schedule":{"decay":"cosine","total_epochs":null,"total_examples":'
    b'null,"total_steps":47,"warmup_epochs":null,"warmup_examples":null,"warmup_steps":0},"schema_version":1,"train":'
    b'{"activation_checkpointing":false,"compile":false,"ema_decay":null,"global_batch_size":64,"label_smoothing":0.0,'
    b'"log_every_steps":10,"loss":"softmax","max_nonfinite_steps":3,"micro_batch_size":32,"precision":"bf16","seed":0},'
    b'"zero":{"stage":1}}'
)


def test_an_old_job_loads_and_is_the_job_of_today() -> None:
    assert load_resolved(OLD) == resolve(job(PRETRAIN), CARD, None)
    assert canonical_json(load_resolved(canonical_json(load_resolved(OLD)))) == canonical_json(load_resolved(OLD))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"optim__name": "lamb", "optim__momentum": 0.8}, "momentum does not apply to lamb"),
        ({"optim__layer_decay": 0.7, "optim__train": "head"}, "layer_decay does not apply"),
        ({"optim__layer_decay": 1.5}, "layer_decay"),
        ({"train__loss": "bce", "train__label_smoothing": 0.1}, "label_smoothing does not apply to loss: bce"),
        ({"data__augment": {"randaugment": {}, "three_augment": True}}, "exclude one another"),
        ({"data__augment": {"randaugment": {"ops": "timm", "magnitude": 15}}}, "ops timm takes at most 10"),
        ({"data__augment": {"randaugment": {"magnitude_std": 0.5}}}, "does not apply to ops torchvision"),
        ({"data__augment": {"randaugment": {"ops": "imgaug"}}}, "imgaug"),
        ({"eval__weights": "ema"}, "eval.weights ema needs train.ema_decay"),
        ({"train__ema_decay": 1.0}, "ema_decay"),
        ({"data__mix": {}}, "give mixup or cutmix"),
        ({"data__mix": {"mixup": 0.2, "cutmix_share": 0.3}}, "cutmix_share applies where both"),
        ({"data__mix": {"mixup": 0.2}, "train__micro_batch_size": 1}, "micro_batch_size 1 must be even"),
        ({"data__mix": {"mixup": 0.2}, "train__global_batch_size": 62}, "each of 2 workers an odd number"),
        ({"schedule__decay": "constant", "schedule__min_lr": 1e-5}, "min_lr 1e-05 does not apply to decay: constant"),
        ({"schedule__decay": "steps", "schedule__min_lr": 1e-5}, "min_lr 1e-05 does not apply to decay: steps"),
        ({"schedule__min_lr": 1e-2}, r"schedule.min_lr 0.01 is above optim.lr 0.001"),
        ({"schedule__min_lr": -1e-6}, "min_lr"),
        ({"data__augment": {"crop": "simple", "crop_area": [0.1, 1.0]}}, "crop_area applies to crop: inception only"),
        ({"model__layer_scale": 0.0}, "layer_scale"),
        ({"model__pool": "mean"}, "pool"),
        ({"model__registers": 17}, "registers"),
        ({"model__drop_path_rule": "constant"}, "drop_path_rule"),
        ({"model__pos_embed": "sincos2d", "model__embed_dim": 30}, "multiple of 4"),
        (
            {"model__pos_embed": "relative", "model__pos_embed_at": "every_layer"},
            "does not apply to pos_embed relative",
        ),
    ],
)
def test_what_does_not_apply_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        job(PRETRAIN, **overrides)


def test_mixing_pins_an_even_micro_batch() -> None:
    for batch in (4, 12, 100, 1000):
        micro = resolve(job(PRETRAIN, train__global_batch_size=batch, data__mix={"mixup": 0.2}), CARD, None)
        assert isinstance(micro.train.micro_batch_size, int)
        assert micro.train.micro_batch_size % 2 == 0
    # Not even one image fits; the plan says so.
    raw = PRETRAIN | {
        "model": {"variant": "H/14", "image_size": 518},
        "resources": {"workers": 2, "gpus_per_worker": 1, "accelerator": "T4"},
    }
    assert resolve(job(raw), CARD, None).train.micro_batch_size == 1
    assert resolve(job(raw, data__mix={"mixup": 0.2}), CARD, None).train.micro_batch_size == 2


def test_a_finetune_takes_over_the_kind_of_positions() -> None:
    origin = source(pos_embed="sincos2d")
    resolved = resolve(job(FINETUNE), CARD, origin)
    assert resolved.model.pos_embed == "sincos2d"
    with pytest.raises(SpecError, match="pos_embed 'learned' contradicts checkpoint ckpt_x"):
        resolve(job(FINETUNE, model__pos_embed="learned"), CARD, origin)


def test_relative_positions_keep_their_image_size() -> None:
    origin = source(pos_embed="relative")
    assert resolve(job(FINETUNE, model__image_size=16), CARD, origin).model.pos_embed == "relative"
    with pytest.raises(SpecError, match=r"model\.image_size 24 x 24: the checkpoint's pos_embed relative cannot"):
        resolve(job(FINETUNE), CARD, origin)
    data = job(FINETUNE).data
    at_home = source(pos_embed="relative", data=data)
    assert resolve(job(EVALUATE, image_size=16), CARD, at_home).image_size == 16
    with pytest.raises(SpecError, match="image_size 24 x 24: the checkpoint's pos_embed relative cannot"):
        resolve(job(EVALUATE, image_size=24), CARD, at_home)
    layered = source(pos_embed="learned_2d", pos_embed_at="every_layer")
    assert resolve(job(FINETUNE), CARD, layered).model.pos_embed_at == "every_layer"
    with pytest.raises(SpecError, match="pos_embed_at 'stem' contradicts checkpoint ckpt_x"):
        resolve(job(FINETUNE, model__pos_embed_at="stem"), CARD, layered)


def test_a_finetune_may_read_the_mean_of_the_patches() -> None:
    resolved = resolve(job(FINETUNE, model__pool="patch_mean"), CARD, source())
    assert resolved.model.pool == "patch_mean"
    assert resolve(job(FINETUNE), CARD, source(pool="patch_mean")).model.pool == "patch_mean"
    with pytest.raises(SpecError, match="pool 'patch_mean' contradicts checkpoint ckpt_x"):
        resolve(job(FINETUNE, model__pool="patch_mean"), CARD, source(pool="gap"))
    with pytest.raises(SpecError, match="pool 'cls' contradicts checkpoint ckpt_x"):
        resolve(job(FINETUNE, model__pool="cls"), CARD, source(pool="patch_mean"))


@pytest.mark.parametrize(("field", "value"), [("registers", 4), ("qk_norm", True), ("pool", "map")])
def test_a_finetune_takes_over_the_body(field: str, value: object) -> None:
    assert getattr(resolve(job(FINETUNE), CARD, source(**{field: value})).model, field) == value
    with pytest.raises(SpecError, match=f"model.{field} .* contradicts checkpoint ckpt_x, whose {field} is"):
        resolve(job(FINETUNE, **{f"model__{field}": value}), CARD, source())


RESNET = {"layers": [1, 2], "width": 32}
OF_RESNET = {"model": {"resnet": RESNET, "image_size": 24}}


def resnet_source() -> SourceCheckpoint:
    config = BitConfig.model_validate({"resnet": RESNET, "image_size": (16, 16), "num_classes": 5})
    return replace(source(data=job(FINETUNE).data), model=config)


def test_a_resnet_resolves_stores_and_plans() -> None:
    spec = job(PRETRAIN | OF_RESNET)
    resolved = resolve(spec, CARD, None)
    assert load_resolved(canonical_json(resolved)) == resolved
    assert isinstance(resolved.model.network(), BitConfig)
    assert training_fingerprint(resolved, "x") != training_fingerprint(resolve(job(PRETRAIN), CARD, None), "x")
    deeper = job(PRETRAIN | {"model": {"resnet": RESNET | {"layers": [2, 2]}, "image_size": 24}})
    assert training_fingerprint(resolved, "x") != training_fingerprint(resolve(deeper, CARD, None), "x")
    planned = plan(spec, CARD, "H100:2")
    assert planned.parameters == num_parameters(resolved.model.network())
    assert planned.fits


def test_a_finetune_of_a_resnet_takes_it_over_at_any_size() -> None:
    origin = resnet_source()
    resolved = resolve(job(FINETUNE, model__image_size=33), CARD, origin)
    assert resolved.model.resnet == origin.model.resnet
    assert load_resolved(canonical_json(resolved)) == resolved
    assert resolve(job(EVALUATE, image_size=33), CARD, origin).image_size == 33
    assert plan(job(EVALUATE, image_size=33), CARD, source=origin).parameters == num_parameters(origin.model)
    named = replace(origin, model=ModelConfig(variant="R50x1", num_classes=5).network())
    assert resolve(job(FINETUNE), CARD, named).model.variant == "R50x1"
    assert resolve(job(FINETUNE, model__variant="R50x1"), CARD, named).model.variant == "R50x1"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model__variant": "B/8"}, "model.variant 'B/8' is a Vision Transformer, checkpoint ckpt_x is a ResNet"),
        ({"model__dropout": 0.1}, "model.dropout 0.1 does not apply: checkpoint ckpt_x is a ResNet"),
        ({"model__pool": "gap"}, "model.pool 'gap' does not apply: checkpoint ckpt_x is a ResNet"),
        ({"model__variant": "R50x1"}, "variant 'R50x1' has resnet .* checkpoint ckpt_x has"),
    ],
)
def test_a_finetune_of_a_resnet_refuses_a_transformers_fields(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        resolve(job(FINETUNE, **overrides), CARD, resnet_source())


def test_a_transformer_is_no_resnet() -> None:
    with pytest.raises(SpecError, match=r"model.variant 'R50x1' has resnet .* checkpoint ckpt_x has None"):
        resolve(job(FINETUNE, model__variant="R50x1"), CARD, source())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"optim__layer_decay": 0.75}, "optim.layer_decay 0.75 does not apply to a ResNet"),
        ({"optim__train": "attention"}, "optim.train attention does not apply to a ResNet"),
        ({"model__qk_norm": True}, "qk_norm True does not apply to a ResNet"),
    ],
)
def test_what_does_not_apply_to_a_resnet_is_refused(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        job(PRETRAIN | OF_RESNET, **overrides)


def test_layer_scale_is_the_checkpoints() -> None:
    origin = source(layer_scale=1e-6)
    assert resolve(job(FINETUNE), CARD, origin).model.layer_scale == 1e-6
    assert resolve(job(FINETUNE, model__layer_scale=1e-4), CARD, origin).model.layer_scale == 1e-6
    with pytest.raises(
        SpecError, match=r"layer_scale 0\.0001 contradicts checkpoint ckpt_x, whose layer_scale is None"
    ):
        resolve(job(FINETUNE, model__layer_scale=1e-4), CARD, source())


def test_a_kept_head_needs_the_same_classes_and_kind() -> None:
    kept = job(FINETUNE, keep_head=True)
    assert resolve(kept, CARD, source(head="mlp")).model.head == "mlp"
    assert resolve(job(FINETUNE), CARD, source(head="mlp")).model.head == "linear"
    with pytest.raises(SpecError, match="keep_head: checkpoint ckpt_x tells 7 classes apart, data set pictures has 5"):
        resolve(kept, CARD, source(num_classes=7))
    with pytest.raises(SpecError, match="head 'linear' contradicts checkpoint"):
        resolve(job(FINETUNE, keep_head=True, model__head="linear"), CARD, source(head="mlp"))


@pytest.mark.parametrize(
    "change",
    [
        {"model__layer_scale": 1e-4},
        {"model__pool": "patch_mean"},
        {"model__drop_path_rule": "uniform"},
        {"schedule__min_lr": 1e-5},
        {"data__augment": {"crop": "simple"}},
    ],
)
def test_what_changes_training_is_in_its_fingerprint(change: dict[str, Any]) -> None:
    plain, changed = (resolve(job(PRETRAIN, **fields), CARD, None) for fields in ({}, change))
    assert training_fingerprint(plain, "x") != training_fingerprint(changed, "x")
    assert load_resolved(canonical_json(changed)) == changed


def test_whether_the_head_is_kept_is_in_the_fingerprint() -> None:
    plain, kept = (resolve(job(FINETUNE, keep_head=keep), CARD, source()) for keep in (False, True))
    assert training_fingerprint(plain, "x") != training_fingerprint(kept, "x")
