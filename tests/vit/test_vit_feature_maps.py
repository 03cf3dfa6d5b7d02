"""The feature pyramid of docs/models.md, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.wire import ModelFile, Preprocess
from tests.vit.conftest import MakeModel
from vit.weights import save

MODELS = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_pyramid_in_the_documents(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", MODELS.read_text(), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "forward_intermediates" in block]
    model = make_model(image_size=(16, 24), registers=2)
    preprocess = Preprocess(image_size=(16, 24), in_channels=3, mean=(0.5,), std=(0.5,))
    save(model.state_dict(), ModelFile(model=model.config, preprocess=preprocess), tmp_path / "flowers-l16")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, str(MODELS), "exec"), names)
    assert [tuple(found.shape) for found in names["maps"]] == [
        (1, 256, 16, 24),
        (1, 256, 8, 12),
        (1, 256, 4, 6),
        (1, 256, 2, 3),
    ]
    images = torch.randn(2, 3, 16, 24)
    sum(found.square().mean() for found in names["pyramid"](images)).backward()  # type: ignore[union-attr]
    gradient = names["backbone"].patch_embed.proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
