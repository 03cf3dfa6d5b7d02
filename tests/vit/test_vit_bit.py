"""BiT ResNets: the whole model against timm's, its files, and what of a Transformer does not apply to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from configs.conv_cost import Backbone
from configs.cost import activation_bytes, num_parameters, resnet_copy_bytes, saved_bytes_by_resnet_head
from configs.imports import ImportModel
from configs.model import BitConfig, ModelConfig, network_adapter
from configs.wire import ModelFile, Preprocess
from tests.vit.test_vit_resnet import randomize
from vit import BiT, build, load, save
from vit.classify import predict
from vit.formats import read_weights, write_official
from vit.formats.npz import write_npz
from vit.losses import classification_loss
from vit.model import empty
from vit.optim import freeze, param_groups
from vit.timm_format import from_timm, save_timm, to_timm
from vit.transfer import resize_weights, transfer_weights

TINY: dict[str, Any] = {
    "resnet": {"layers": (1, 2), "width": 32},
    "image_size": (32, 48),
    "num_classes": 5,
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def config(**fields: Any) -> BitConfig:
    return BitConfig.model_validate(TINY | fields)


def random_model(made: BitConfig) -> BiT:
    model = build(made).eval()
    randomize(model)
    return model


def r50x1(numerics: str = "timm") -> BitConfig:
    resnet = {"layers": (3, 4, 6, 3), "width": 64, "numerics": numerics}
    return config(resnet=resnet, image_size=(64, 64), num_classes=9)


def model_file(made: BitConfig) -> ModelFile:
    preprocess = Preprocess(
        image_size=made.image_size, in_channels=made.in_channels, mean=(0.5,), std=(0.5,), crop="resize"
    )
    return ModelFile(model=made, preprocess=preprocess)


@torch.no_grad()
def test_an_export_opens_in_timm_with_equal_logits_and_comes_back(tmp_path: Path) -> None:
    model = random_model(r50x1())
    save_timm(model.state_dict(), model_file(model.config), tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    back = from_timm(theirs.state_dict(), model.config)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    found = read_weights(tmp_path / "model.safetensors", ImportModel(image_size=64))
    assert (found.format, found.config) == ("timm", model.config)
    assert all(torch.equal(found.state[name], tensor) for name, tensor in back.items())
    images, ours, theirs = IMAGES.double(), model.double(), theirs.double()  # where only the order of sums may differ
    expected = theirs(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-9)
    maps = theirs.forward_intermediates(images, indices=[3, 4], norm=True, intermediates_only=True)
    torch.testing.assert_close(ours.forward_intermediates(images, [2])[0], maps[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.forward_intermediates(images, [-1], norm=True)[0], maps[1], rtol=0, atol=1e-9)
    features = ours.forward_features(images)
    torch.testing.assert_close(features, theirs.forward_features(images), rtol=0, atol=1e-9)
    representation = theirs.forward_head(features, pre_logits=True).flatten(1)
    torch.testing.assert_close(ours.forward_representation(features), representation, rtol=0, atol=1e-9)
    assert torch.equal(ours(images, representation=True), ours.forward_representation(features))


@pytest.mark.parametrize("variant", ["R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4"])
def test_parameters_are_timms(variant: str) -> None:
    made = ModelConfig(variant=variant, num_classes=1000).network()
    with torch.device("meta"):
        theirs = timm.create_model(f"resnetv2_{variant[1:]}_bit", num_classes=1000)
    count = sum(p.numel() for p in theirs.parameters())
    assert count == num_parameters(made) == sum(p.numel() for p in empty(made).parameters())


@torch.no_grad()
def test_an_official_file_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = random_model(config())
    write_official(model.state_dict(), model_file(model.config), tmp_path)
    found = read_weights(tmp_path / "model.npz", ImportModel(image_size=(32, 48)))
    assert (found.format, found.config) == ("npz", model.config)
    assert all(torch.equal(found.state[name], tensor) for name, tensor in model.state_dict().items())
    with np.load(tmp_path / "model.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    assert arrays["resnet/head/conv2d/kernel"].shape == (1, 1, 256, 5)
    assert arrays["resnet/block2/unit02/c/standardized_conv2d/kernel"].shape == (1, 1, 64, 256)
    # Some files number their convolutions.
    numbered = {n.replace("standardized_conv2d/", "standardized_conv2d_7/"): a for n, a in arrays.items()}
    write_npz(numbered, tmp_path / "numbered.npz")
    again = read_weights(tmp_path / "numbered.npz").state
    assert all(torch.equal(again[name], tensor) for name, tensor in found.state.items())
    for name, said in (
        ("resnet/block2/unit01/b/group_norm/beta", "missing: resnet/block2/unit01/b/group_norm/beta"),
        ("resnet/block2/unit01/a/standardized_conv2d/kernel", "missing: resnet/block2/unit01/a"),
    ):
        write_npz({n: a for n, a in arrays.items() if n != name}, tmp_path / "part.npz")
        with pytest.raises(ValueError, match=said):
            read_weights(tmp_path / "part.npz")
    write_npz(arrays | {"resnet/block2/unit01/d": torch.zeros(1)}, tmp_path / "more.npz")
    with pytest.raises(ValueError, match="do not belong to this model: resnet/block2/unit01/d"):
        read_weights(tmp_path / "more.npz")
    body = {n: a for n, a in arrays.items() if "/head/" not in n}
    write_npz(body, tmp_path / "body.npz")
    with pytest.raises(ValueError, match=r"no classifier .*: give model\.num_classes"):
        read_weights(tmp_path / "body.npz")
    given = read_weights(tmp_path / "body.npz", ImportModel(num_classes=3)).state
    assert given["head.weight"].shape == (3, 256)
    assert not given["head.weight"].any()
    with pytest.raises(ValueError, match=r"model\.num_heads 3: the file is a ResNet"):
        read_weights(tmp_path / "model.npz", ImportModel(num_heads=3))


@torch.no_grad()
def test_timms_reader_of_official_files_agrees(tmp_path: Path) -> None:
    """Its epsilon is another, which weights of this size do not show."""
    model = random_model(r50x1("official"))
    write_official(model.state_dict(), model_file(model.config), tmp_path)
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=9).eval()
    theirs.load_pretrained(str(tmp_path / "model.npz"))
    torch.testing.assert_close(model(IMAGES), theirs(IMAGES), rtol=1e-4, atol=1e-4)


def test_other_formats_refuse_what_they_have_not() -> None:
    tiny, official, theirs = (random_model(made) for made in (config(), r50x1("official"), r50x1()))
    with pytest.raises(ValueError, match=r"model\.resnet: timm has no BiT ResNet with layers \[1, 2\] and width 32"):
        to_timm(tiny.state_dict(), tiny.config)
    with pytest.raises(ValueError, match=r"model\.resnet\.numerics official: timm's epsilon"):
        to_timm(official.state_dict(), official.config)
    with pytest.raises(ValueError, match=r"model\.resnet\.numerics timm: the official ResNets"):
        write_official(theirs.state_dict(), model_file(theirs.config), Path("unused"))


def test_a_folder_opens_in_one_line_and_classifies(tmp_path: Path) -> None:
    model = random_model(config())
    save(model.state_dict(), model_file(model.config), tmp_path)
    opened = load(tmp_path)
    assert isinstance(opened, BiT)
    assert opened.config == model.config
    pictures = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    assert predict(opened, pictures).shape == (3, 5)
    read = read_weights(tmp_path / "model.safetensors", config=model.config)
    assert read.format == "patchwork"
    assert network_adapter.validate_json(model.config.model_dump_json()) == model.config


@torch.no_grad()
def test_initialisation_is_a_function_of_the_seed_and_the_head_is_its_bias() -> None:
    first, again, other = build(config(head_bias_init=-10.0)), build(config(head_bias_init=-10.0)), build(config(), 1)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.stem.conv.weight, other.stem.conv.weight)
    assert (first(torch.randn(2, 3, 32, 48)) == -10.0).all()
    assert (first.stages[0].blocks[0].norm3.weight == 1).all()
    kernel = first.stages[1].blocks[1].conv2.weight
    assert kernel.std().item() == pytest.approx((1 / kernel[0].numel()) ** 0.5, rel=0.05)


@torch.no_grad()
def test_a_fine_tune_takes_the_body_to_any_image_size() -> None:
    source = random_model(config())
    target = config(num_classes=3, image_size=(40, 33))
    moved = transfer_weights(source.state_dict(), source.config, target)
    model = build(target).eval()
    assert set(model.state_dict()) - set(moved) == {"head.weight", "head.bias"}
    model.load_state_dict(model.state_dict() | moved)
    assert not model(torch.randn(1, 3, 40, 33)).any()
    same = resize_weights(source.state_dict(), source.config, config(image_size=(64, 64)))
    assert all(torch.equal(same[name], tensor) for name, tensor in source.state_dict().items())
    with pytest.raises(ValueError, match=r"cannot transfer weights: resnet is .* in the checkpoint"):
        transfer_weights(source.state_dict(), source.config, config(resnet={"layers": (2,), "width": 32}))
    kept = transfer_weights(source.state_dict(), source.config, config(image_size=(64, 64)), keep_head=True)
    assert torch.equal(kept["head.weight"], source.head.weight)


def test_only_kernels_decay_and_a_probe_trains_the_head() -> None:
    model = build(config())
    decaying = {id(p) for g in param_groups(model, 0.1) if g["weight_decay"] for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decaying) == (parameter.ndim > 1), name
    freeze(model, "head")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("indices", [[], [2], [-3]])
def test_feature_maps_of_unknown_stages_are_refused(indices: list[int]) -> None:
    model = build(config())
    with pytest.raises(ValueError, match="expected at least one of -2 to 1"):
        model.forward_intermediates(torch.randn(1, 3, 32, 48), indices)
    with pytest.raises(ValueError, match="norm fits stage 1 only"):
        model.forward_intermediates(torch.randn(1, 3, 32, 48), [0, 1], norm=True)
    with pytest.raises(ValueError, match=r"images have shape \(3, 32, 32\) each"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_autograd_saves(precision: Any) -> None:
    made = config(image_size=(64, 64), num_classes=50)
    model = build(made).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        classification_loss(model(torch.randn(4, 3, 64, 64)), torch.zeros(4, dtype=torch.int64), "softmax")
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    backbone = Backbone((1, 2), 32, 3, (64, 64), preact=True)
    per_image = backbone.saved_bytes(precision == "bf16") + saved_bytes_by_resnet_head(made, precision)
    assert found == pytest.approx(4 * per_image + resnet_copy_bytes(made, precision), rel=0.01)
    assert activation_bytes(made, 4, precision) > found
    assert activation_bytes(made, 4, precision, checkpointing=True) < activation_bytes(made, 4, precision)


def test_recomputed_bottlenecks_have_the_same_gradients() -> None:
    images = torch.randn(2, 3, 32, 48)
    gradients = []
    for enabled in (False, True):
        model = build(config()).train()
        randomize(model)
        model.set_activation_checkpointing(enabled)
        model(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"variant": "R50x1", "pool": "gap"}, "pool 'gap' does not apply to a ResNet"),
        ({"variant": "R50x1", "patch_size": 16}, "patch_size 16 does not apply to a ResNet"),
        ({"variant": "R50x1", "dropout": 0.1}, "dropout 0.1 does not apply to a ResNet"),
        ({"variant": "R50x1", "head": "mlp"}, "head 'mlp' does not apply to a ResNet"),
        ({"variant": "R50x1", "pos_embed": "sincos2d"}, "pos_embed 'sincos2d' does not apply to a ResNet"),
        ({"variant": "R50x1", "stem": {"layers": [3]}}, "stem .* does not apply to a ResNet"),
        ({"variant": "R50x5"}, "variant 'R50x5' is unknown.* R50, R101, R152, R200 followed by x1 to x4"),
        ({"variant": "R51x1"}, "variant 'R51x1' is unknown"),
        ({"variant": "R50x1", "resnet": {"layers": [3, 4, 6, 3], "width": 128}}, "contradicts variant 'R50x1'"),
        ({"resnet": {"layers": []}}, "layers"),
        ({"resnet": {"layers": [1], "width": 48}}, "multiple of 32"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelConfig.model_validate(fields)


def test_numbers_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    model = random_model(config())
    state = model.state_dict() | {"norm.bias": torch.full((256,), float("nan"))}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm\.bias holds NaN"):
        read_weights(tmp_path / "model.safetensors", config=model.config)
