"""Weights from elsewhere on real parts: a file of timm's, sent in parts, becomes a checkpoint that is fine-tuned and
exported."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import vit
from orchestrator.cli.main import run
from orchestrator.client import ApiError, Client
from orchestrator.embedded.stack import Stack
from orchestrator.fetch import fetch
from orchestrator.upload import UploadError, import_file
from tests.stack.jobs import fashion_mnist_folder, finished

pytestmark = pytest.mark.stack
CLASSES = 300_000
"""So many that the file has two parts."""


class Cut(Exception):
    pass


@pytest.fixture(scope="module")
def theirs() -> VisionTransformer:
    torch.manual_seed(3)
    model = VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=CLASSES, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def file(theirs: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(theirs.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(client: Client, stack: Stack, file: Path) -> str:
    """The file imported by the command line, after a first try that was cut off behind its first part."""

    def cut(_: int) -> None:
        raise Cut

    with pytest.raises(Cut):
        import_file(client, file, num_threads=1, on_bytes=cut, model={"num_heads": 2})
    arrived: list[int] = []
    again = import_file(
        client, file, num_threads=1, on_bytes=arrived.append, model={"num_heads": 2}, source="a test", name="tiny"
    )
    size = file.stat().st_size
    assert arrived[0] == 32 * 1024**2, "the part that had arrived is not sent again"
    assert sum(arrived) == size
    finished(client, again.id)
    return client.checkpoints.find(again.id).id


def test_it_is_an_ordinary_checkpoint_that_says_where_it_came_from(
    client: Client, checkpoint: str, file: Path, theirs: VisionTransformer, tmp_path: Path
) -> None:
    found = client.checkpoints.get(checkpoint)
    assert found.origin is not None
    assert (found.origin.file, found.origin.format, found.origin.source) == ("tiny.safetensors", "timm", "a test")
    assert found.origin.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    fetch(client, checkpoint, tmp_path / "model")
    model = vit.load(tmp_path / "model")
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=0, atol=1e-5)


def test_the_command_line_imports_shows_and_refuses(
    stack: Stack, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ["--url", stack.url, "--token", stack.token]
    small = tmp_path / "small.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, depth=1)
    save_file(model.state_dict(), small)
    assert run(["import", str(small), "--json", *server]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["model"]["num_heads"] == 3, "the width of a known size tells"
    assert run(["checkpoints", "show", made["id"], *server]) == 0
    assert "small.safetensors" in capsys.readouterr().out

    (tmp_path / "model.pth").write_bytes(b"\x80\x04")
    assert run(["import", str(tmp_path / "model.pth"), *server]) != 0
    assert "can run code" in " ".join(capsys.readouterr().err.split())

    state = model.state_dict()
    state["norm.weight"] = torch.full_like(state["norm.weight"], torch.nan)
    save_file(state, tmp_path / "nan.safetensors")
    assert run(["import", str(tmp_path / "nan.safetensors"), *server]) != 0
    assert "norm.weight" in capsys.readouterr().err


def test_an_upload_is_not_completed_before_its_parts_are_there_and_can_be_given_up(
    client: Client, stack: Stack
) -> None:
    asked = {"file": "a.npz", "num_bytes": 40 * 1024**2, "sha256": "0" * 64}
    headers = {"Authorization": f"Bearer {stack.token}"}
    with httpx.Client(base_url=stack.url, headers=headers, trust_env=False) as http:
        upload = http.post("/v1/checkpoints:import", json=asked).json()
        refused = http.post(f"/v1/uploads/{upload['id']}/complete")
        assert refused.status_code == 409
        assert "2 of 2 parts are missing" in refused.text
        assert http.delete(f"/v1/uploads/{upload['id']}").status_code == 204
        assert http.delete(f"/v1/uploads/{upload['id']}").status_code == 204
        assert http.post(f"/v1/uploads/{upload['id']}/complete").status_code == 409
        wrong = http.post("/v1/checkpoints:import", json=asked | {"num_bytes": 10**15})
        assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (422, "/num_bytes")


def test_a_job_of_kind_import_is_not_submitted_by_hand(client: Client) -> None:
    with pytest.raises(ApiError) as refused:
        client.jobs.create({"kind": "import", "name": "x"})
    assert refused.value.status == 422


def test_finetune_on_a_folder_of_photos_guesses_the_rest(
    stack: Stack,
    client: Client,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    with gzip.open(fashion_mnist_folder() / "train-images-idx3-ubyte.gz") as data:
        images = np.frombuffer(data.read(16 + 2000 * 784)[16:], dtype=np.uint8).reshape(-1, 28, 28)
    with gzip.open(fashion_mnist_folder() / "train-labels-idx1-ubyte.gz") as data:
        labels = np.frombuffer(data.read(8 + 2000)[8:], dtype=np.uint8)
    for number, name in enumerate(("shirt", "trouser", "pullover")):
        (photos / name).mkdir(parents=True)
        for index in np.flatnonzero(labels == number)[:60]:
            Image.fromarray(images[index]).save(photos / name / f"{index}.png")
    monkeypatch.setenv("PATCHWORK_DATA_DIR", str(stack.dir.path))
    server = ["--url", stack.url, "--token", stack.token]

    assert run(["finetune", str(photos), "--from", checkpoint, "--dry-run", *server]) == 0
    assert f"init_from: {checkpoint}" in capsys.readouterr().out

    assert run(["finetune", str(photos), "--from", checkpoint, "--steps", "30", "--json", "--follow", *server]) == 0
    job = json.loads(capsys.readouterr().out)
    assert job["state"] == "SUCCEEDED"
    assert (job["spec"]["model"]["num_classes"], job["spec"]["model"]["embed_dim"]) == (3, 32)
    assert job["last_metrics"]["eval/num_examples"] == 18, "a tenth was held out"


def test_a_folder_that_is_none_is_refused(stack: Stack, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    server = ["--url", stack.url, "--token", stack.token]
    assert run(["finetune", "no-such-folder", "--from", checkpoint, *server]) != 0
    assert "no-such-folder" in capsys.readouterr().err


def test_an_import_of_another_content_than_announced_is_refused(client: Client, file: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.npz"
    empty.touch()
    with pytest.raises(UploadError, match="empty"):
        import_file(client, empty)
