"""Few-shot and nearest-neighbour accuracy in evaluate jobs and within training: one number, however it is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vit
from configs.data import DataConfig
from configs.datasets import card_for
from configs.folder_index import card as card_of_index
from configs.folder_index import scan
from configs.layout import dataset_index_key
from configs.load import parse_spec
from configs.probe_cards import fill_probes
from configs.reasons import ExitReason
from configs.resolve import SourceCheckpoint, resolve
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import OTHER_JOB, card_of, make_attempt, saved_at, tiny_spec
from tests.workers.image_sets import write_folder
from tests.workers.rank_jobs import Result, Run, run_attempts
from vit.few_shot import choose_shots, few_shot_accuracy, knn_accuracy
from workers.checkpoint import read_manifest, read_weights
from workers.data.augment import eval_transform
from workers.data.loader import normalise
from workers.data.open import open_data

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]
DATA = {"source": {"type": "synthetic", "num_train": 70, "num_eval": 21, "num_classes": 6, "image_size": 8}}
PROBES = {"few_shot": {"shots": [1, 3], "num_seeds": 2, "l2": 4.0}, "neighbours": {"k": 5, "max_examples": 50}}


def training(stage: int) -> Any:
    return tiny_spec(zero={"stage": stage}, eval={"at_end": True, "few_shot": PROBES["few_shot"]})


def evaluation(store: DirStore, source: Any, **parts: Any) -> Any:
    manifest = read_manifest(store, source.prefix)
    found = SourceCheckpoint(
        source.checkpoint_id, source.prefix, manifest.model, manifest.preprocess, DataConfig.model_validate(DATA)
    )
    raw = {"kind": "evaluate", "init_from": source.checkpoint_id, "resources": {"workers": 1, "gpus_per_worker": 0}}
    return resolve(parse_spec(raw | {"batch_size": 4} | parts), card_of(tiny_spec()), found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DirStore, dict[int, Result]]:
    root = tmp_path_factory.mktemp("probed")
    runs = [Run(make_attempt(training(stage), 2, stage + 1)) for stage in (1, 3)]
    results = run_ranks(2, run_attempts, runs, str(root))[0]
    return DirStore(root), dict(zip((1, 3), results, strict=True))


@pytest.fixture(scope="module")
def evaluated(trained: Any) -> dict[int, dict[str, float]]:
    store, _ = trained
    found = {}
    for world_size in (1, 2):
        spec = evaluation(store, saved_at(6, 2), **PROBES)
        attempt = make_attempt(spec, world_size, world_size, OTHER_JOB, init_from=saved_at(6, 2))
        result = run_ranks(world_size, run_attempts, [Run(attempt)], str(store.root))[0][0]
        assert result.outcome.reason is ExitReason.COMPLETED, result.outcome
        found[world_size] = {name: points[6] for name, points in result.metrics.items()}
    return found


def by_hand(store: DirStore, source: Any) -> dict[str, float]:
    """The same numbers from the checkpoint's weights, on all images at once."""
    state, manifest = read_weights(store, source.prefix)
    model = vit.build(manifest.model).eval()
    model.load_state_dict(state)
    data = DataConfig.model_validate(DATA)
    opened = open_data(data, card_for(data.source, {}), None, store.get, in_channels=3)
    assert opened.train is not None

    def features(images: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.read_many(np.arange(len(images)))
        batch = normalise(eval_transform(pixels, data, (8, 8)), data.mean, data.std)
        with torch.no_grad():
            return model(batch, representation=True), torch.from_numpy(images.labels)

    (pool, labels), (test, test_labels) = features(opened.train), features(opened.eval)
    expected = {}
    for shots in (1, 3):
        scores = [
            few_shot_accuracy(pool[chosen], labels[chosen], test, test_labels, 6, 4.0)
            for chosen in (choose_shots(labels, 6, shots, seed) for seed in (0, 1))
        ]
        expected[f"eval/few_shot/{shots}"] = float(np.mean(scores))
        expected[f"eval/few_shot/{shots}_std"] = float(np.std(scores))
    bank = torch.randperm(70, generator=torch.Generator().manual_seed(0))[:50]
    expected["eval/knn"] = knn_accuracy(pool[bank], labels[bank], test, test_labels, 6, 5)
    return expected


def test_an_evaluate_job_measures_what_the_formulas_say(trained: Any, evaluated: dict[int, dict[str, float]]) -> None:
    store, _ = trained
    expected = by_hand(store, saved_at(6, 2))
    assert {name: evaluated[1][name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert evaluated[1]["eval/top1"] == evaluated[2]["eval/top1"]


def test_it_does_not_depend_on_the_number_of_workers(evaluated: dict[int, dict[str, float]]) -> None:
    for name, value in evaluated[1].items():
        assert evaluated[2][name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("stage", [1, 3])
def test_training_measures_what_an_evaluate_job_does(trained: Any, stage: int) -> None:
    store, results = trained
    assert results[stage].outcome.reason is ExitReason.COMPLETED, results[stage].outcome
    expected = by_hand(store, saved_at(6, stage + 1))
    found = {name: points[6] for name, points in results[stage].metrics.items() if "few_shot" in name}
    assert found.keys() == {name for name in expected if "few_shot" in name}
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-9)
    assert read_manifest(store, saved_at(6, stage + 1).prefix).metrics.items() >= found.items()


def test_other_data_sets_are_probed_by_their_names(trained: Any, tmp_path: Any) -> None:
    """The job's own data under another name gives the job's own numbers; a folder is what it was at submission."""
    store, _ = trained
    write_folder(tmp_path / "pets", {"train": 6, "test": 5}, classes=("cat", "dog", "newt"))
    index = scan(tmp_path, "pets", "pets")
    key = dataset_index_key("pets", index.fingerprint.removeprefix("sha256:"))
    store.put(key, index.model_dump_json().encode())
    datasets = [{"name": "same", **DATA}, {"source": {"type": "folder", "name": "pets"}}]
    asked = {
        "few_shot": PROBES["few_shot"] | {"datasets": datasets},
        "neighbours": PROBES["neighbours"] | {"datasets": datasets[1:]},
    }
    spec = fill_probes(evaluation(store, saved_at(6, 2), **asked), {"pets": card_of_index(index, key)})
    attempt = make_attempt(spec, 2, 7, OTHER_JOB, init_from=saved_at(6, 2))
    result = run_ranks(2, run_attempts, [Run(attempt)], str(store.root), DirStore, str(tmp_path))[0][0]
    assert result.outcome.reason is ExitReason.COMPLETED, result.outcome
    found = {name: points[6] for name, points in result.metrics.items()}
    expected = by_hand(store, saved_at(6, 2))
    for shots in ("1", "1_std", "3", "3_std"):
        assert found[f"eval/few_shot/same/{shots}"] == pytest.approx(expected[f"eval/few_shot/{shots}"], abs=1e-9)
        assert 0.0 <= found[f"eval/few_shot/pets/{shots}"] <= 1.0
    assert found["eval/knn/pets"] in [count / 15 for count in range(16)]
    probed = {name for name in found if "few_shot" in name or "knn" in name}
    assert len(probed) == 9, "the job's own data is not probed, which is not named"
    assert found["eval/num_examples"] == 21


def test_a_folder_that_is_gone_ends_the_job(trained: Any, tmp_path: Any) -> None:
    store, _ = trained
    lost = {"source": {"type": "folder", "name": "lost"}, "fingerprint": "sha256:1234"}
    spec = evaluation(store, saved_at(6, 2), few_shot={"shots": [1], "datasets": [lost]})
    attempt = make_attempt(spec, 1, 8, OTHER_JOB, init_from=saved_at(6, 2))
    outcome = run_ranks(1, run_attempts, [Run(attempt)], str(store.root))[0][0].outcome
    assert outcome.reason is ExitReason.DATA_ERROR
    assert "the index of data set lost" in outcome.message
