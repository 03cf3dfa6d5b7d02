"""ReaL: images found by the number in their name, several right classes, images without any; files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vit
from configs.data import DataConfig
from configs.folder_index import card as card_of_index
from configs.folder_index import scan
from configs.layout import dataset_index_key, report_key
from configs.load import SpecError, parse_spec
from configs.reasons import ExitReason
from configs.resolve import SourceCheckpoint, resolve
from configs.wire import EvaluationReport
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import OTHER_JOB, make_attempt, saved_at, tiny_spec
from tests.workers.image_sets import array_source, write_image
from tests.workers.rank_jobs import Run, run_attempts
from workers.checkpoint import read_manifest, read_weights
from workers.data.augment import eval_transform
from workers.data.errors import DataError
from workers.data.loader import normalise
from workers.data.open import open_data
from workers.real_labels import read_real_labels

CLASSES = tuple(f"n{number:08d}" for number in range(6))
NUM_IMAGES = 24


def image_number(label: int, place: int) -> int:
    """Classes take turns, so that the order of folders is not that of numbers."""
    return place * len(CLASSES) + label + 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set named as ImageNet's validation images, in folders of classes."""
    root = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for place in range(NUM_IMAGES // len(CLASSES)):
            file = f"ILSVRC2012_val_{image_number(label, place):08d}.JPEG"
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            for split in ("train", "val"):
                write_image(root / "imagenet-like" / split / name / file, pixels)
    return root


def open_split(root: Path, store: DirStore) -> Any:
    index = scan(root, "imagenet-like", "imagenet-like")
    key = dataset_index_key("imagenet-like", index.fingerprint.removeprefix("sha256:"))
    store.put(key, index.model_dump_json().encode())
    card = card_of_index(index, key)
    data = DataConfig.model_validate(
        {"source": {"type": "folder", "name": "imagenet-like"}, "train": "train", "eval": "val"}
    )
    return data, card, open_data(data, card, root, store.get, in_channels=3)


def test_images_are_found_by_their_number(root: Path, tmp_path: Path) -> None:
    _, _, opened = open_split(root, DirStore(tmp_path))
    listed = [[number % 6, (number + 1) % 6] if number % 3 else [] for number in range(1, NUM_IMAGES + 1)]
    (root / "real.json").write_text(json.dumps(listed))
    labels = read_real_labels("real.json", root, opened.eval, 6)
    assert labels.shape == (NUM_IMAGES, 2)
    for index in range(NUM_IMAGES):
        number = int(opened.eval.name(index).split("_")[-1].split(".")[0])
        expected = listed[number - 1] or [-1, -1]
        assert labels[index].tolist() == expected
    assert [int(opened.eval.name(i).split("_")[-1].split(".")[0]) for i in range(3)] == [1, 7, 13], "not in their order"


def test_images_without_such_names_are_taken_in_order(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("[[0], [1, 2], []]")
    assert read_real_labels("real.json", tmp_path, array_source(3), 3).tolist() == [[0, -1], [1, 2], [-1, -1]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file"),
        ("[[0], [1]", "is not JSON"),
        ('{"0": [1]}', "expected a list with a list of classes for each image, got dict"),
        ("[[0], 1, []]", "entry 1 is '1', expected a list of classes"),
        ("[[0], [3], []]", "entry 1 names class '3', expected 0 to 2"),
        ("[[0], [-1], []]", "names class '-1'"),
        ("[[0], [true], []]", "names class 'True'"),
        ('[["cat"], [], []]', "entry 0 names class 'cat'"),
        ("[[0], [1]]", "has 2 entries, the split has 3 images"),
        ("[[], [], []]", "no image has a label"),
        (str([[0] * 1001, [], []]), "entry 0 names 1001 classes, at most 1000"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "real.json").write_text(text)
    with pytest.raises(DataError, match=r"real\.json") as caught:
        read_real_labels("real.json", tmp_path, array_source(3), 3)
    assert words in str(caught.value)


def test_files_elsewhere_are_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text("[]")
    (root / "linked.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(DataError, match="a link out of the data root"):
        read_real_labels("linked.json", root, array_source(3), 3)
    with pytest.raises(DataError, match="PATCHWORK_DATA_ROOT"):
        read_real_labels("real.json", None, array_source(3), 3)
    for path in ("/etc/passwd", "../real.json"):
        with pytest.raises(SpecError, match="path below the data root"):
            parse_spec({"kind": "evaluate", "init_from": "ckpt_x", "real_labels": path})


def test_too_few_entries_name_an_image(root: Path, tmp_path: Path) -> None:
    _, _, opened = open_split(root, DirStore(tmp_path))
    (root / "short.json").write_text(json.dumps([[0]] * 20))
    with pytest.raises(DataError, match=r"has 20 entries, none for n00000002/ILSVRC2012_val_00000021.JPEG"):
        read_real_labels("short.json", root, opened.eval, 6)


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_an_evaluate_job_counts_any_of_the_labels(root: Path, tmp_path: Path) -> None:
    store = DirStore(tmp_path)
    run_ranks(1, run_attempts, [Run(make_attempt(tiny_spec(optim={"lr": 0.1}), 1))], str(tmp_path))
    data, card, opened = open_split(root, store)
    state, manifest = read_weights(store, saved_at(6).prefix)
    model = vit.build(manifest.model).eval()
    model.load_state_dict(state)
    pixels = torch.stack([eval_transform(opened.eval.read(i)[None], data, (8, 8))[0] for i in range(NUM_IMAGES)])
    with torch.no_grad():
        first = model(normalise(pixels, data.mean, data.std)).argmax(dim=1).tolist()
    # By number: every third image has no label, every third the predicted class among others, the others it not.
    listed: list[list[int]] = [[] for _ in range(NUM_IMAGES)]
    for index in range(NUM_IMAGES):
        number = int(opened.eval.name(index).split("_")[-1].split(".")[0])
        other = (first[index] + 1) % 6
        listed[number - 1] = ([], [other, first[index]], [other])[number % 3]
    (root / "made.json").write_text(json.dumps(listed))

    manifest = read_manifest(store, saved_at(6).prefix)
    source = SourceCheckpoint(saved_at(6).checkpoint_id, saved_at(6).prefix, manifest.model, manifest.preprocess, data)
    raw = {"kind": "evaluate", "init_from": saved_at(6).checkpoint_id, "resources": {"gpus_per_worker": 0}}
    spec = resolve(parse_spec(raw | {"batch_size": 5, "real_labels": "made.json"}), card, source)
    for workers in (1, 2):
        attempt = make_attempt(spec, workers, workers, OTHER_JOB, init_from=saved_at(6), card=card)
        results = run_ranks(workers, run_attempts, [Run(attempt)], str(tmp_path), DirStore, str(root))
        assert results[0][0].outcome.reason is ExitReason.COMPLETED, results[0][0].outcome
        report = EvaluationReport.model_validate_json(store.get(report_key(OTHER_JOB)))
        assert report.metrics["eval/real_num_examples"] == 16
        assert report.metrics["eval/real_top1"] == 0.5
        assert report.metrics["eval/num_examples"] == 24
