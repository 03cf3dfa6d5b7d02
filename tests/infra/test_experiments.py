"""What the experiments are, and that their documents say what their files of results hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.cost import macs_per_image
from configs.load import parse_spec
from configs.model import ModelConfig
from tests.experiments import claim, tuning
from tests.experiments.__main__ import load, main, programs
from tests.experiments.experiment import ExperimentError, Record, Results, report_text
from tests.experiments.summary import Spread, markdown, spreads, top1

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "experiments.md").read_text()
TOLD = sorted(path.stem for path in (DOCS / "experiments").glob("*.json"))
"""The experiments of which jobs have been run."""


@pytest.mark.parametrize("name", programs())
def test_every_run_is_a_job_of_its_own(name: str) -> None:
    experiment = load(name)
    assert experiment.name == name
    assert len({run.key for run in experiment.runs}) == len({run.fingerprint for run in experiment.runs})
    for run in experiment.runs:
        parse_spec(run.spec | ({"init_from": "job_01JZZZZZZZZZZZZZZZZZZZZZZZ/latest"} if run.after else {}))


@pytest.mark.parametrize("name", TOLD)
def test_the_documents_say_what_the_jobs_gave(name: str) -> None:
    experiment = load(name)
    results = Results.read(DOCS / "experiments" / f"{name}.json", experiment.runs)
    held = json.loads((DOCS / "experiments" / f"{name}.json").read_text())["runs"]
    assert len(results.records) == len(held), "each run as it is described today"
    table = report_text(experiment, results.of(experiment.runs))
    assert (DOCS / "experiments" / f"{name}.md").read_text() == table
    assert table in PAGE


@pytest.mark.parametrize("name", programs())
def test_the_page_tells_of_every_experiment(name: str) -> None:
    assert f"`make experiments NAME={name}`" in PAGE


def test_the_plots_can_be_drawn(tmp_path: Path) -> None:
    for name in TOLD:
        experiment = load(name)
        results = Results.read(DOCS / "experiments" / f"{name}.json", experiment.runs)
        experiment.plot(results.of(experiment.runs), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (DOCS / "experiments").glob("*.png")}


def test_the_families_of_the_claim_cost_the_same() -> None:
    macs = {
        family: macs_per_image(ModelConfig.model_validate(model | {"num_classes": 10}).network())
        for family, model in claim.MODELS.items()
    }
    assert max(macs.values()) <= 1.1 * min(macs.values()), macs


def test_the_learning_rates_of_the_claim_are_those_found_best() -> None:
    results = Results.read(DOCS / "experiments" / "tuning.json", tuning.EXPERIMENT.runs)
    assert tuning.best(tuning.accuracies(results.of(tuning.EXPERIMENT.runs))) == claim.LEARNING_RATES


def record(key: str, accuracy: float) -> Record:
    return Record(key, {}, "f", "job", 2, 256, 1, 1, 1e-9, 1.0, {"eval/top1": {"1": 0.0, "2": accuracy}})


def test_a_spread_is_of_each_group() -> None:
    records = [record("a", 0.5), record("b", 1.0), record("a", 0.7)]
    found = spreads(records, lambda r: r.key, top1)
    assert list(found) == ["a", "b"]
    assert found["a"].percent() == "60.00 ± 14.14 (2 seeds)"
    assert found["b"] == Spread(1.0, 0.0, 1)
    assert markdown(["x", "y"], [[1, "b"]]) == "| x | y |\n| --- | --- |\n| 1 | b |\n"


def test_a_file_that_holds_no_results_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    for content in ("", "[]", json.dumps({"runs": [{"key": "a"}]})):
        path.write_text(content)
        with pytest.raises(ExperimentError, match=r"claim\.json is not a file of results"):
            Results.read(path, claim.EXPERIMENT.runs)


def test_an_unknown_experiment_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"claim", "tuning", "positions", "pooling"} <= set(programs())
    assert main(["clam"]) == 2
    assert "experiment 'clam', must be one of " in capsys.readouterr().err
