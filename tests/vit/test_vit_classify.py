from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from configs.data import DataConfig
from configs.wire import Preprocess
from vit.classify import predict, prepare
from workers.data.augment import eval_transform
from workers.data.loader import normalise


def preprocess_of(**fields: object) -> Preprocess:
    defaults = {"image_size": (16, 16), "in_channels": 3, "mean": (0.5,), "std": (0.5,)}
    return Preprocess(**(defaults | fields))  # type: ignore[arg-type]


def random_image(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8))


def test_probabilities_are_the_models_for_any_mix_of_images(make_model) -> None:
    model = make_model().train()
    model.preprocess = preprocess_of()
    tensors = [random_image(16, 16, seed=seed) for seed in range(5)]
    mixed = [Image.fromarray(t.permute(1, 2, 0).numpy()) if i % 2 else t for i, t in enumerate(tensors)]
    probabilities = predict(model, mixed, batch_size=2)
    assert model.training
    expected = model.eval()(torch.stack(tensors).float() / 127.5 - 1).softmax(1)
    torch.testing.assert_close(probabilities, expected.detach())
    torch.testing.assert_close(predict(model, torch.stack(tensors)), expected.detach())
    assert predict(model, []).shape == (0, 7)


def test_pil_images_are_converted_to_the_models_channels() -> None:
    grey = Image.fromarray(random_image(16, 16, 1)[0].numpy())
    colour = prepare(grey, preprocess_of())
    assert colour.shape == (3, 16, 16)
    assert torch.equal(colour[0], colour[2])
    alpha = Image.fromarray(random_image(9, 5, 4).permute(1, 2, 0).numpy(), "RGBA")
    assert prepare(alpha, preprocess_of(in_channels=1)).shape == (1, 16, 16)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "antialias"), [((40, 33), True), ((7, 11), True), ((7, 11), False)])
def test_resizing_is_pillows_within_rounding(mode: str, size: tuple[int, int], antialias: bool) -> None:
    """Pillow always antialiases, which enlarging does not need."""
    pixels = random_image(*size) // 2 + 64  # cubic overshoot would be clipped at other points
    pillow = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((12, 20), getattr(Image.Resampling, mode.upper()))
    expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1).int()
    preprocess = preprocess_of(image_size=(20, 12), interpolation=mode, antialias=antialias)
    ours = ((prepare(pixels, preprocess) * 0.5 + 0.5) * 255).round().int()
    # Without antialiasing torch's cubic has a = -0.75, Pillow's -0.5.
    assert (ours - expected).abs().max() <= (1 if antialias or mode == "bilinear" else 12)


@pytest.mark.parametrize("crop", ["resize", "center"])
@pytest.mark.parametrize("size", [(37, 50), (9, 9), (28, 20), (28, 28)])
def test_pixels_are_those_of_evaluation(crop: str, size: tuple[int, int]) -> None:
    source = {"type": "synthetic"}
    data = DataConfig.model_validate({"source": source, "eval_crop": crop, "mean": [0.5, 0.4, 0.3], "std": [0.2]})
    pixels = random_image(*size)
    expected = normalise(eval_transform(pixels[None], data, (28, 20)), data.mean, data.std)[0]
    preprocess = preprocess_of(image_size=(28, 20), mean=data.mean, std=data.std, crop=crop)
    torch.testing.assert_close(prepare(pixels, preprocess), expected)


def test_center_crop_takes_the_middle_of_the_image() -> None:
    pixels = torch.zeros(1, 64, 128, dtype=torch.uint8)
    pixels[:, 8:56, 40:88] = 255
    prepared = prepare(pixels, preprocess_of(image_size=(28, 28), in_channels=1, crop="center"))
    assert prepared.shape == (1, 28, 28)
    # 64 x 128 becomes 32 x 64; the crop covers rows 2..30 and columns 18..46 of it, the bright square 4..28 and 20..44.
    assert (prepared[0, 4:24, 4:24] == 1).all()
    assert (prepared[0, 0] == -1).all()
    assert (prepared[0, :, 27] == -1).all()


def test_channel_statistics_are_applied_per_channel() -> None:
    pixels = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    prepared = prepare(pixels, preprocess_of(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25)))
    assert [prepared[c, 0, 0].item() for c in range(3)] == [1.0, 1.0, 0.0]


def test_what_is_not_an_image_is_refused(make_model) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"load it with vit\.load"):
        predict(model, [random_image(16, 16)])
    model.preprocess = preprocess_of()
    with pytest.raises(ValueError, match=r"image is torch\.float32 of shape \(3, 16, 16\), expected uint8"):
        predict(model, torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"shape \(1, 16, 16\), expected uint8 \(3, height, width\)"):
        predict(model, [random_image(16, 16, 1)])
    with pytest.raises(ValueError, match="expected a PIL image or a uint8 tensor, got str"):
        predict(model, ["cat.png"])  # type: ignore[list-item]
