"""The card of a run: what it says, and that following it leads to the same job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from starlette.testclient import TestClient

from configs.cost import train_flops_per_image
from configs.layout import checkpoint_prefix, manifest_key, report_key
from configs.spec import PretrainJob
from configs.states import JobState
from configs.wire import EvaluationReport
from orchestrator.cli.main import run
from orchestrator.cli.report import to_markdown
from orchestrator.schemas import JobCard
from orchestrator.services.cards import find_seeds
from orchestrator.storage.db import Database
from orchestrator.storage.tables import JobRow
from tests.factories import make_manifest
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.rows import T0, add_attempt, add_checkpoint, move, submit
from tests.orchestrator.test_api_metrics import add_points
from tests.orchestrator.test_metric_files import over

VERSIONS = {"python": "3.12.1", "patchwork-vit": "0.1.0", "torch": "2.9.0", "deepspeed": "0.19.8", "ray": "2.60.0"}


@pytest.fixture
def job_id(api: TestClient, db: Database, store: MemoryStore) -> str:
    """A run of two attempts: 60 steps, then from 40 to the end, 20 steps done twice."""
    made = str(submit(api, train__seed=7)["id"])
    add_attempt(
        db, made, 1, exit_reason="NODE_LOST", exit={"message": "node | b went away"}, to_step=60, wasted_steps=20
    )
    add_attempt(db, made, 2, from_step=40, to_step=100)
    add_points(db, made, 1, {20: 2.0, 40: 1.5, 60: 9.0})
    add_points(db, made, 2, {60: 1.0, 80: None, 100: 0.5})
    add_points(db, made, 1, {20: 1.0}, "perf/step_time_s/rank-00000")
    with db.session() as session:
        row = session.get_one(JobRow, made)
        row.step, row.wasted_steps, row.gpu_seconds, row.wasted_gpu_s, row.overhead_s = 100, 20, 120.0, 20.0, 3.5
        manifest = make_manifest(row, 2, 100, versions=VERSIONS, data_fingerprint="sha256:as-trained")
    store.put(manifest_key(checkpoint_prefix(made, 100, 2)), manifest.model_dump_json().encode())
    add_checkpoint(db, made, 40, 1)
    add_checkpoint(db, made, 100, 2)
    return made


def card_of(api: TestClient, job_id: str) -> JobCard:
    response = api.get(f"/v1/jobs/{job_id}/card")
    assert response.status_code == 200, response.text
    return JobCard.model_validate_json(response.content)


def finish(db: Database, job_id: str) -> None:
    states = (JobState.PREPARING, JobState.RUNNING, JobState.SUCCEEDED)
    move(db, job_id, *states, reason="COMPLETED")


@pytest.mark.db
def test_a_card_says_versions_data_seeds_and_curves(api: TestClient, job_id: str) -> None:
    card = card_of(api, job_id)
    assert card.job.id == job_id
    assert card.versions == VERSIONS
    assert card.manifest_of == f"{card.checkpoints[0].id}"
    assert card.trained_data_fingerprint == "sha256:as-trained"
    assert card.seeds["train.seed"] == 7
    (loss,) = card.curves
    assert (loss.name, loss.steps, loss.attempts) == ("train/loss", (20, 40, 60, 80, 100), (1, 1, 2, 2, 2))
    assert [c.step for c in card.checkpoints] == [100, 40]


def test_work_is_counted_by_the_cost_model(api: TestClient, job_id: str) -> None:
    card = card_of(api, job_id)
    spec = PretrainJob.model_validate(card.job.spec)
    per_step = train_flops_per_image(spec.model.vit()) * 64 / 1e18
    assert card.work.planned == pytest.approx(100 * per_step)
    assert card.work.done == pytest.approx(100 * per_step)
    assert card.work.repeated == pytest.approx(20 * per_step)


def test_the_spec_of_a_card_is_the_same_job_again(api: TestClient, job_id: str) -> None:
    """The Markdown page alone is enough: its YAML block submits to the same hash."""
    card = card_of(api, job_id)
    block = re.search(r"^```yaml\n(.*?)^```$", to_markdown(card), re.DOTALL | re.MULTILINE)
    assert block is not None
    preview = api.post("/v1/jobs?dry_run=true", json={"spec": yaml.safe_load(block[1])}).json()
    assert preview["spec_hash"] == card.job.spec_hash
    assert any(card.job.spec_hash in line for line in card.reproduce)
    assert "patchwork-vit==0.1.0, torch==2.9.0, deepspeed==0.19.8, ray==2.60.0" in card.reproduce[0]


def evaluation(job_id: str, checkpoint: str) -> EvaluationReport:
    return EvaluationReport(
        job_id=job_id,
        checkpoint_id=checkpoint,
        dataset="synthetic",
        split="test",
        num_examples=256,
        metrics={"eval/top1": 0.75},
        created_at=T0,
    )


def test_evaluations_of_its_checkpoints_are_on_it(
    api: TestClient, db: Database, store: MemoryStore, job_id: str
) -> None:
    checkpoint = card_of(api, job_id).checkpoints[0].id
    body = {"kind": "evaluate", "name": "check", "init_from": checkpoint, "resources": {"gpus_per_worker": 0}}
    answer = api.post("/v1/jobs", json={"spec": body})
    assert answer.status_code == 201, answer.text
    evaluate_job = answer.json()["id"]
    assert card_of(api, job_id).evaluations == ()
    finish(db, evaluate_job)
    # It has succeeded, and its report is not there (any more): the card goes without.
    assert card_of(api, job_id).evaluations == ()
    found = evaluation(evaluate_job, checkpoint)
    store.put(report_key(evaluate_job), found.model_dump_json().encode())
    assert card_of(api, job_id).evaluations == (found,)
    own = card_of(api, evaluate_job)
    assert own.evaluations == (found,)
    assert own.work.done == own.work.planned
    assert "0.75" in to_markdown(own)


def test_a_job_that_left_nothing_has_a_card(api: TestClient) -> None:
    card = card_of(api, str(submit(api)["id"]))
    assert (card.versions, card.manifest_of, card.curves, card.checkpoints) == ({}, None, (), ())
    page = to_markdown(card)
    assert "not recorded" in page
    assert "No metrics." in page


def test_an_older_checkpoint_serves_where_the_newest_manifest_is_gone(
    api: TestClient, db: Database, store: MemoryStore, job_id: str
) -> None:
    add_checkpoint(db, job_id, 110, 2)
    card = card_of(api, job_id)
    assert card.manifest_of == card.checkpoints[1].id
    assert card.versions == VERSIONS


def test_an_unknown_job_is_404(api: TestClient) -> None:
    assert api.get("/v1/jobs/job_01ARZ3NDEKTSV4RRFFQ69G5FAV/card").status_code == 404


def test_the_page_shows_cost_attempts_and_loss(api: TestClient, job_id: str) -> None:
    page = to_markdown(card_of(api, job_id))
    assert page.startswith("# small\n")
    assert "| Device-seconds | 120 |" in page
    assert "| Steps done again | 20 |" in page
    assert "| 1 | 2 | 0 to 60 | NODE_LOST | 20 | node \\| b went away |" in page
    assert "| `train/loss` | 2 | 0.5 | 100 | 0.5 | 2 |" in page
    assert re.search(r"`[▁▂▃▄▅▆▇█ ]+`", page)


NASTY = "<script>alert(1)</script> | [x](http://evil) `code` *b* ```"


def test_users_text_stays_text(api: TestClient) -> None:
    card = card_of(api, str(submit(api, name=NASTY, labels={"why": NASTY})["id"]))
    page = to_markdown(card)
    above, _, block = page.partition("## How to reproduce")
    assert "<script>" not in above
    assert "[x](" not in above
    assert above.splitlines()[0].count("\\|") == 1
    # The block is fenced by more than any text in it holds.
    fence = re.search(r"^(`{3,})yaml$", block, re.MULTILINE)
    assert fence is not None
    assert block.rstrip().endswith(fence[1])
    assert block.count(fence[1]) == 2


def test_every_table_has_as_many_cells_as_columns(api: TestClient, job_id: str) -> None:
    columns = 0
    for line in to_markdown(card_of(api, job_id)).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert cells in (0, columns) or columns == 0, line
        columns = cells


def test_the_command_writes_both_forms(
    api: TestClient, job_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ("--url", "http://patchwork.test", "--token", "t")
    assert run(["report", job_id, "-o", str(tmp_path / "run.md"), *server], over(api)) == 0
    assert (tmp_path / "run.md").read_text().startswith("# small\n")
    assert run(["report", "last", "--json", "-o", str(tmp_path / "run.json"), *server], over(api)) == 0
    assert JobCard.model_validate_json((tmp_path / "run.json").read_text()).job.id == job_id
    assert run(["report", job_id, *server], over(api)) == 0
    assert (tmp_path / "run.md").read_text() in capsys.readouterr().out
    assert run(["report", "last", "-o", str(tmp_path / "no" / "run.md"), *server], over(api)) == 2


def test_seeds_are_found_wherever_they_are() -> None:
    spec = {"seed": 1, "train": {"seed": 2, "x": 3}, "data": {"subset": {"seed": 4}, "holdout": None}}
    assert dict(find_seeds(spec)) == {"seed": 1, "train.seed": 2, "data.subset.seed": 4}
