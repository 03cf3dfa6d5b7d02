"""Masked patch prediction: what is corrupted, what is to be told, and which weights are for it only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vit
from configs.cost import macs_per_image, num_parameters
from configs.model import StemConfig
from configs.wire import ModelFile, Preprocess
from tests.vit.conftest import MakeConfig, MakeModel
from vit.classify import predict
from vit.convert import check_written, write_weights
from vit.masked import Corruption, at_chosen, draw_corruption, masked_patch_loss, mean_colours
from vit.optim import layer_numbers
from vit.transfer import transfer_weights

MASKED = {"head": "masked_patch", "num_classes": 512}


def draw(num_images: int, num_patches: int, seed: int = 0) -> Corruption:
    return draw_corruption(num_images, num_patches, generator=torch.Generator().manual_seed(seed))


def test_half_of_the_patches_are_corrupted_in_the_papers_shares() -> None:
    sources, chosen = draw(4000, 49)
    assert sources.shape == (4000, 49)
    assert chosen.shape == (4000, 24)
    assert all(len(set(row)) == 24 for row in chosen[:50].tolist())
    places = torch.arange(49).expand(4000, -1)
    untouched = torch.ones(4000, 49, dtype=torch.bool).scatter(1, chosen, False)
    assert torch.equal(sources[untouched], places[untouched])
    taken = at_chosen(sources, chosen)
    shares = [(taken == 49), (taken != 49) & (taken != chosen), (taken == chosen)]
    assert [float(share.float().mean()) for share in shares] == pytest.approx([0.8, 0.1, 0.1], abs=0.005)
    counts = torch.bincount(chosen.flatten(), minlength=49).float() / 4000
    assert counts.numpy() == pytest.approx(24 / 49, abs=0.04), "every place is chosen as often"
    is_other = (taken != 49) & (taken != chosen)
    for image in range(200):
        once = taken[image][is_other[image]].tolist()
        assert len(set(once)) == len(once), "no patch takes two places beside its own"
    others = taken[is_other]
    assert torch.bincount(others, minlength=49).min() > 0.6 * len(others) / 49


def test_corruption_is_a_function_of_its_generator() -> None:
    for left, right in zip(draw(3, 16), draw(3, 16), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(draw(3, 16)[1], draw(3, 16, seed=1)[1])
    with pytest.raises(ValueError, match="at least 2 patches, got 1"):
        draw(3, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_those_of_each_patchs_mean(channels: int) -> None:
    pixels = torch.randint(0, 256, (5, channels, 8, 12), dtype=torch.uint8)
    found = mean_colours(pixels, 4)
    assert found.shape == (5, 6)
    for image in range(5):
        for patch in range(6):
            row, column = divmod(patch, 3)
            cut = pixels[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].double()
            digits = (cut.mean(dim=(1, 2)) / 32).floor().int().tolist()
            assert found[image, patch] == int("".join(map(str, digits)), 8)
    white = torch.full((1, channels, 4, 4), 255, dtype=torch.uint8)
    assert mean_colours(white, 4).item() == 8**channels - 1
    assert mean_colours(torch.full_like(white, 32), 4).item() == sum(8**digit for digit in range(channels))
    assert mean_colours(torch.full_like(white, 31), 4).item() == 0


def test_the_loss_looks_at_corrupted_patches_only() -> None:
    logits, colours = torch.randn(3, 10, 8, requires_grad=True), torch.randint(0, 8, (3, 10))
    _, chosen = draw(3, 10)
    loss, right = masked_patch_loss(logits, colours, chosen)
    picked = [(image, place) for image in range(3) for place in chosen[image].tolist()]
    expected = torch.stack([F.cross_entropy(logits[i, p], colours[i, p]) for i, p in picked]).mean()
    torch.testing.assert_close(loss, expected)
    assert right == sum(bool(logits[i, p].argmax() == colours[i, p]) for i, p in picked) / len(picked)
    loss.backward()
    assert logits.grad is not None
    touched = {(i, p) for i, p in logits.grad.abs().sum(dim=2).nonzero().tolist()}
    assert touched == set(picked)


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_the_transformer_reads_what_stands_in_place_of_a_patch(make_model: MakeModel, pool: str) -> None:
    model = make_model(**MASKED, pool=pool, registers=2)
    images = torch.randn(2, 3, 16, 16)
    identity = torch.arange(16).expand(2, -1)
    whole = model(images)
    assert whole.shape == (2, 16, 512)
    assert torch.equal(model(images, sources=identity), whole)
    # A patch whose embedding another's takes the place of is seen no more.
    sources = identity.clone()
    sources[:, 5] = 16
    sources[:, 6] = 2
    changed = images.clone()
    changed[:, :, 4:8, 4:12] = 0.0  # the pixels of patches 5 and 6
    assert torch.equal(model(images, sources=sources), model(changed, sources=sources))
    assert not torch.allclose(model(images, sources=sources), whole)
    model(images, sources=sources).sum().backward()
    assert model.mask_token is not None
    assert model.mask_token.grad is not None
    assert model.mask_token.grad.abs().sum() > 0


def test_a_hybrids_patches_are_corrupted_behind_its_stem(make_model: MakeModel) -> None:
    model = make_model(**MASKED, patch_size=1, stem=StemConfig(layers=(1,), width=32))
    sources = torch.full((1, 16), 16)
    left, right = torch.randn(2, 1, 3, 16, 16)
    assert torch.equal(model(left, sources=sources), model(right, sources=sources)), "all is masked"


@pytest.mark.parametrize("fields", [{}, {"pool": "gap"}, {"in_channels": 1, "num_classes": 8}])
def test_costs_are_those_of_the_model(make_config: MakeConfig, fields: dict[str, object]) -> None:
    config = make_config(**(MASKED | fields))
    model = vit.build(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)
    images = torch.randn(1, config.in_channels, 16, 16)
    # Fused attention is no matrix product to the counter.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images, sources=torch.arange(16)[None])
    assert counter.get_total_flops() == 2 * macs_per_image(config)


def test_mask_and_head_are_dropped_for_other_tasks(make_config: MakeConfig) -> None:
    source, target = make_config(**MASKED), make_config()
    state = vit.build(source, seed=1).state_dict()
    body = transfer_weights(state, source, target)
    assert set(state) - set(body) == {"mask_token", "head.weight", "head.bias"}
    model = vit.build(target)
    model.load_state_dict(model.state_dict() | body)
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="num_classes is 512 in the checkpoint and 7"):
        transfer_weights(state, source, target, keep_head=True)


def test_the_mask_learns_as_the_embeddings_do(make_config: MakeConfig) -> None:
    numbers = layer_numbers(vit.build(make_config(**MASKED)))
    assert numbers["mask_token"] == numbers["cls_token"] == 0


def test_files_of_it(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(**MASKED)
    preprocess = Preprocess(image_size=(16, 16), in_channels=3, mean=(0.5,), std=(0.5,))
    file = ModelFile(model=model.config, preprocess=preprocess)
    state = model.state_dict()
    write_weights(state, file, "safetensors", tmp_path)
    check_written(tmp_path / "model.safetensors", state, model.config, "safetensors")
    loaded = vit.load(tmp_path)
    assert torch.equal(loaded(torch.ones(1, 3, 16, 16)), model(torch.ones(1, 3, 16, 16)))
    with pytest.raises(ValueError, match="has no classifier"):
        predict(loaded, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    for format_ in ("timm", "transformers", "torchvision", "npz"):
        with pytest.raises(ValueError, match=f"cannot be written as {format_}"):
            write_weights(state, file, format_, tmp_path / format_)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pool": "map"}, "pool map"),
        ({"pool": "patch_mean"}, "pool patch_mean"),
        ({"num_classes": 10}, "tells 512 colours of 3 channels"),
        ({"in_channels": 1}, "tells 8 colours of 1 channels"),
        ({"patch_size": 16}, "at least 2 patches"),
    ],
)
def test_configurations_that_make_no_sense(make_config: MakeConfig, fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_config(**(MASKED | fields))
