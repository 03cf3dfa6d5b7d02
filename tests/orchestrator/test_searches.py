"""Searches in the control plane: submission, what the driver asks, what users see and steer. On both databases."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from starlette.testclient import TestClient

from configs.ids import parse_attempt_id
from configs.reasons import ExitReason
from configs.search_wire import SearchState, TrialBegun, TrialEnded, TrialRecord
from configs.states import AttemptState, JobState
from configs.wire import AttemptFile, Heartbeat, MetricPoint, ReportBatch
from orchestrator.control.launcher import ClusterStatus, LaunchState, NodeInfo
from orchestrator.control.queue_view import load_reservations, load_view, schedule_queue, store_cluster
from orchestrator.control.reconciler import Reconciler
from orchestrator.control.trials import release_trials
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, JobRow
from tests.factories import NOW, make_exit, put_checkpoint
from tests.fakes.launcher import FakeLauncher
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.rows import PRETRAIN, add_attempt, move

pytestmark = pytest.mark.db
LR = {"type": "log_uniform", "low": 1e-4, "high": 1e-1}


def search_spec(**fields: Any) -> dict[str, Any]:
    base = PRETRAIN | {"eval": {"every_steps": 10}, "checkpoint": {"every_steps": 10}}
    return {"kind": "search", "name": "lr", "base": base, "space": {"optim.lr": LR}, "budget": {"trials": 3}, **fields}


class Driven:
    """A search that runs, and its driver's calls."""

    def __init__(
        self, api: TestClient, db: Database, store: MemoryStore, driver: dict[str, str], **fields: Any
    ) -> None:
        self.api, self.db, self.store, self.headers = api, db, store, driver
        response = api.post("/v1/jobs", json={"spec": search_spec(**fields)})
        assert response.status_code == 201, response.text
        self.id: str = response.json()["id"]
        move(db, self.id, JobState.PREPARING, JobState.RUNNING)
        self.attempt = add_attempt(db, self.id, cluster_id="session_1", world_size=6)
        self._seq: dict[str, int] = {}

    def ask(self, method: str, path: str, body: Any = None, attempt: str | None = None) -> Any:
        url = f"/internal/v1/attempts/{attempt or self.attempt}/{path}"
        content = b"" if body is None else json.dumps(body)
        return self.api.request(method, url, content=content, headers=self.headers)

    def state(self) -> SearchState:
        return SearchState.model_validate(self.ask("GET", "search").json())

    def create(self, number: int, lr: float = 0.01, **fields: Any) -> TrialRecord:
        body = {"number": number, "setting": number - 1, "params": {"optim.lr": lr}, **fields}
        response = self.ask("POST", "trials", body)
        assert response.status_code == 200, response.text
        return TrialRecord.model_validate(response.json())

    def begin(self, number: int) -> TrialBegun:
        response = self.ask("POST", f"trials/{number}/begin")
        assert response.status_code == 200, response.text
        return TrialBegun.model_validate(response.json())

    def begun(self, number: int, **fields: Any) -> AttemptFile:
        self.create(number, **fields)
        file = self.begin(number).attempt
        assert file is not None
        return file

    def report(self, file: AttemptFile, values: dict[int, float | None], step: int = 0) -> str:
        """What the trial's forwarder sends; returns the order that comes back."""
        self._seq[file.attempt_id] = self._seq.get(file.attempt_id, 0) + 1
        now = datetime.now(UTC)
        beats = [
            Heartbeat(rank=rank, node="n", pid=1, phase="training", step=step, at=now)
            for rank in range(file.world_size)
        ]
        points = [MetricPoint(name="eval/top1", step=s, value=v, at=now) for s, v in values.items()]
        batch = ReportBatch(seq=self._seq[file.attempt_id], heartbeats=tuple(beats), metrics=tuple(points))
        response = self.api.post(
            f"/internal/v1/attempts/{file.attempt_id}/reports", content=batch.model_dump_json(), headers=self.headers
        )
        assert response.status_code == 200, response.text
        order: str = response.json()["desired"]
        return order

    def end(self, number: int, file: AttemptFile, reason: ExitReason, **fields: Any) -> TrialEnded:
        said = make_exit(file.attempt_id, reason, **fields).model_dump(mode="json")
        response = self.ask("POST", f"trials/{number}/end", {"exit": said})
        assert response.status_code == 200, response.text
        return TrialEnded.model_validate(response.json())

    def complete(self, number: int, value: float, lr: float = 0.01) -> TrialRecord:
        """A whole trial."""
        file = self.begun(number, lr=lr)
        self.report(file, {10: value / 2, 100: value}, step=100)
        with self.db.reader() as session:
            job = session.get_one(JobRow, file.job_id)
        put_checkpoint(self.store, job, 1, 100)
        return self.end(number, file, ExitReason.COMPLETED, last_step=100).trial

    def job(self, job_id: str) -> JobRow:
        with self.db.reader() as session:
            return session.get_one(JobRow, job_id)


@pytest.fixture
def driven(api: TestClient, db: Database, store: MemoryStore, driver: dict[str, str]) -> Driven:
    return Driven(api, db, store, driver)


# -- submission --------------------------------------------------------------------------------------------------------
def test_a_bad_space_is_refused_and_nothing_is_stored(api: TestClient) -> None:
    spec = search_spec(space={"optim.lrr": LR, "model.dropout": {"type": "uniform", "low": 0.0, "high": 2.0}})
    response = api.post("/v1/jobs", json={"spec": spec})
    assert response.status_code == 422
    assert {e["pointer"] for e in response.json()["errors"]} == {"/space/optim.lrr", "/space/model.dropout"}
    assert api.get("/v1/jobs").json()["items"] == []


def test_a_search_is_planned_as_its_trial_and_waits_for_whole_trials(api: TestClient, db: Database) -> None:
    spec = search_spec(concurrency={"min": 1, "max": 2})
    plan = api.post("/v1/plans", json={"spec": spec}).json()
    assert plan["steps"] == 100
    assert plan["notes"][0] == "Of one trial; the search makes 3 trials."
    assert api.post("/v1/jobs", json={"spec": spec}).status_code == 201
    with db.reader() as session:
        (waiting,) = load_view(session, datetime.now(UTC)).waiting
    assert waiting.world_sizes == (2, 4)


# -- what the driver asks ----------------------------------------------------------------------------------------------
def test_a_trial_is_a_job_of_its_own_that_the_queue_leaves_alone(driven: Driven, api: TestClient) -> None:
    made = driven.create(1, lr=0.02)
    assert (made.state, made.params) == ("QUEUED", {"optim.lr": 0.02})
    job = api.get(f"/v1/jobs/{made.job_id}").json()
    assert job["spec"]["optim"]["lr"] == 0.02
    assert job["name"] == "lr #1"
    assert job["allowed_actions"] == ["cancel"]
    assert job["queue"] is None
    assert [j["id"] for j in api.get("/v1/jobs").json()["items"]] == [driven.id]
    assert [j["id"] for j in api.get("/v1/jobs", params={"search": driven.id}).json()["items"]] == [made.job_id]
    with driven.db.reader() as session:
        view = load_view(session, datetime.now(UTC))
    assert view.waiting == ()
    assert [r.job_id for r in view.reserved] == [driven.id]


def test_the_same_trial_again_changes_nothing_and_another_one_is_refused(driven: Driven) -> None:
    first = driven.create(1)
    assert driven.create(1).job_id == first.job_id
    body = {"number": 1, "setting": 0, "params": {"optim.lr": 0.5}}
    assert driven.ask("POST", "trials", body).status_code == 409
    assert len(driven.state().trials) == 1


def test_a_trial_from_its_beginning_to_its_end(driven: Driven, api: TestClient) -> None:
    file = driven.begun(1)
    assert driven.begin(1).attempt == file, "the reply was lost: the same attempt"
    assert driven.report(file, {10: 0.3}, step=10) == "run"
    assert driven.job(file.job_id).state == "RUNNING"
    assert driven.state().trials[0].curve == ((10, 0.3),)
    driven.report(file, {100: 0.8}, step=100)
    put_checkpoint(driven.store, driven.job(file.job_id), 1, 100)
    ended = driven.end(1, file, ExitReason.COMPLETED, last_step=100).trial
    assert (ended.state, ended.value, ended.told) == ("SUCCEEDED", 0.8, 1)
    assert driven.end(1, file, ExitReason.COMPLETED).trial == ended, "again: nothing changes"
    best = api.get(f"/v1/searches/{driven.id}/best").json()
    assert (best["number"], best["value"]) == (1, 0.8)
    checkpoint = api.get(f"/v1/checkpoints/{best['checkpoint']}").json()
    assert checkpoint["job_id"] == file.job_id
    assert checkpoint["available"]


def test_a_trial_without_its_last_checkpoint_has_not_succeeded(driven: Driven) -> None:
    file = driven.begun(1)
    driven.report(file, {100: 0.8}, step=100)
    ended = driven.end(1, file, ExitReason.COMPLETED, last_step=100)
    assert ended.trial.state == "RECOVERING"
    assert ended.trial.told is None


def test_a_lost_worker_is_retried_from_the_last_checkpoint(driven: Driven) -> None:
    file = driven.begun(1)
    driven.report(file, {10: 0.3, 20: 0.4}, step=25)
    checkpoint = put_checkpoint(driven.store, driven.job(file.job_id), 1, 20)
    ended = driven.end(1, file, ExitReason.WORKER_LOST, last_step=25)
    assert (ended.trial.state, ended.trial.told) == ("RECOVERING", None)
    assert ended.delay_s > 0.0
    again = driven.begin(1).attempt
    assert again is not None
    assert again.number == 2
    assert again.resume_from is not None
    assert again.resume_from.checkpoint_id == checkpoint
    assert driven.job(file.job_id).wasted_steps == 5


def test_a_failed_trial_says_why_and_the_search_goes_on(driven: Driven, api: TestClient) -> None:
    file = driven.begun(1)
    ended = driven.end(1, file, ExitReason.NAN_LOSS, message="the loss is not finite").trial
    assert (ended.state, ended.reason, ended.value) == ("FAILED", "NAN_LOSS", None)
    assert driven.complete(2, 0.4).told == 2
    trials = api.get(f"/v1/searches/{driven.id}/trials").json()["items"]
    assert [(t["state"], t["value"]) for t in trials] == [("FAILED", None), ("SUCCEEDED", 0.4)]
    assert trials[0]["message"] == "the loss is not finite"


def test_a_stopped_trial_says_by_which_rule(driven: Driven) -> None:
    file = driven.begun(1)
    driven.report(file, {10: 0.1}, step=10)
    ended = driven.end(1, file, ExitReason.STOPPED_EARLY, message="asha: at rung 10 …").trial
    assert (ended.state, ended.reason, ended.message) == ("CANCELLED", "STOPPED_EARLY", "asha: at rung 10 …")
    assert ended.value == 0.1


def test_values_that_are_not_finite_are_no_values(driven: Driven) -> None:
    file = driven.begun(1)
    driven.report(file, {10: None, 20: float("nan")}, step=20)
    (trial,) = driven.state().trials
    assert (trial.curve, trial.has_metric) == ((), True)


def test_a_setting_whose_job_is_not_valid_is_a_failed_trial(driven: Driven) -> None:
    made = driven.create(1, lr=1000.0)
    assert (made.state, made.reason, made.told) == ("FAILED", "SPEC_INVALID", 1)
    assert "/optim/lr" in made.message
    begun = driven.begin(1)
    assert begun.attempt is None


def test_a_user_stops_one_trial(driven: Driven, api: TestClient) -> None:
    running, waiting = driven.begun(1), driven.create(2)
    assert api.post(f"/v1/jobs/{running.job_id}/cancel").status_code == 202
    assert driven.report(running, {}, step=5) == "stop"
    assert driven.end(1, running, ExitReason.USER_CANCELLED).trial.state == "CANCELLED"
    # One that waits is ended by the reconciler, which looks at nothing else of a trial.
    assert api.post(f"/v1/jobs/{waiting.job_id}/cancel").status_code == 202
    reconciler = Reconciler(driven.db, FakeLauncher(), driven.store, Settings())
    claim = reconciler.claim()
    while claim is not None and claim.job_id != waiting.job_id:
        claim = reconciler.claim()
    assert claim is not None
    reconciler.look_at(claim)
    begun = driven.begin(2)
    assert begun.attempt is None
    assert (begun.trial.state, begun.trial.told) == ("CANCELLED", 2)


def test_an_order_to_the_search_is_one_to_its_trials(driven: Driven, api: TestClient) -> None:
    file = driven.begun(1)
    assert api.post(f"/v1/jobs/{driven.id}/pause").status_code == 202
    assert driven.report(file, {10: 0.2}, step=12) == "pause"
    put_checkpoint(driven.store, driven.job(file.job_id), 1, 12)
    ended = driven.end(1, file, ExitReason.PAUSED, last_step=12).trial
    assert (ended.state, ended.told) == ("QUEUED", None), "it goes on with its search"
    assert api.post(f"/v1/jobs/{driven.id}/cancel").status_code == 202
    assert driven.report(driven.begun(2), {}) == "stop"


def test_a_driver_that_was_succeeded_may_do_nothing(driven: Driven) -> None:
    driven.create(1)
    with driven.db.session() as session:
        session.get_one(AttemptRow, driven.attempt).state = AttemptState.ENDED
    old, driven.attempt = driven.attempt, add_attempt(driven.db, driven.id, 2, cluster_id="session_1")
    for method, path, body in (
        ("GET", "search", None),
        ("GET", "search/limits", None),
        ("POST", "trials", {"number": 2, "setting": 1, "params": {"optim.lr": 0.1}}),
        ("POST", "trials/1/begin", None),
    ):
        assert driven.ask(method, path, body, attempt=old).status_code == 409, path
    assert len(driven.state().trials) == 1
    assert driven.ask("POST", "trials/7/begin").status_code == 404
    assert driven.ask("GET", "search", attempt="att_nonsense").status_code == 404


def test_trials_of_a_lost_driver_go_on_with_the_next_one(driven: Driven) -> None:
    file = driven.begun(1)
    driven.report(file, {10: 0.3}, step=15)
    checkpoint = put_checkpoint(driven.store, driven.job(file.job_id), 1, 10)
    with driven.db.session() as session:
        search = session.get_one(JobRow, driven.id)
        session.get_one(AttemptRow, driven.attempt).state = AttemptState.ENDED
        assert release_trials(session, search, datetime.now(UTC)) == 1
    # Its device time is that of its trials.
    assert driven.job(driven.id).gpu_seconds == driven.job(file.job_id).gpu_seconds > 0.0
    driven.attempt = add_attempt(driven.db, driven.id, 2, cluster_id="session_2")
    (trial,) = driven.state().trials
    assert (trial.state, trial.reason) == ("QUEUED", None)
    again = driven.begin(1).attempt
    assert again is not None
    assert parse_attempt_id(again.attempt_id) == (file.job_id, 2)
    assert again.resume_from is not None
    assert again.resume_from.checkpoint_id == checkpoint


def test_what_has_not_ended_is_cancelled_with_its_search(driven: Driven) -> None:
    running, waiting = driven.begun(1), driven.create(2)
    driven.report(running, {}, step=1)
    move(driven.db, driven.id, JobState.STOPPING, JobState.CANCELLED)
    with driven.db.session() as session:
        assert release_trials(session, session.get_one(JobRow, driven.id), datetime.now(UTC)) == 2
    for job_id in (running.job_id, waiting.job_id):
        job = driven.job(job_id)
        assert (job.state, job.reason) == ("CANCELLED", "SEARCH_ENDED")


def test_the_reconciler_watches_the_search_and_ends_what_its_driver_left(driven: Driven, api: TestClient) -> None:
    """The driver of the search reports for all; checkpoints of running trials are registered on the way."""
    launcher = FakeLauncher()
    launcher.submit(driven.attempt)
    reconciler = Reconciler(driven.db, launcher, driven.store, Settings())

    def look() -> None:
        with driven.db.session() as session:
            session.get_one(JobRow, driven.id).next_look_at = None
        while reconciler.run_once():
            pass

    file = driven.begun(1)
    driven.report(file, {10: 0.3}, step=15)
    checkpoint = put_checkpoint(driven.store, driven.job(file.job_id), 1, 10)
    look()
    assert driven.job(driven.id).state == "RUNNING"
    (trial,) = api.get(f"/v1/searches/{driven.id}/trials").json()["items"]
    assert trial["checkpoint"] == checkpoint
    launcher.end(driven.attempt, LaunchState.FAILED, "killed")
    look()
    assert driven.job(driven.id).state == "RECOVERING"
    (trial,) = api.get(f"/v1/searches/{driven.id}/trials").json()["items"]
    assert (trial["state"], trial["message"]) == ("QUEUED", "Goes on with its search.")


# -- population-based training -----------------------------------------------------------------------------------------
def test_a_replacing_trial_goes_on_from_the_better_ones_checkpoint(driven: Driven) -> None:
    better = driven.begun(1, lr=0.02)
    driven.report(better, {10: 0.9}, step=14)
    checkpoint = put_checkpoint(driven.store, driven.job(better.job_id), 1, 10)
    driven.begun(2, lr=0.03)
    body = {"number": 3, "lr": 0.024, "setting": 1, "parent": 1, "parent_step": 10, "replaces": 2}
    assert driven.ask("POST", "trials", {**body, "params": {"optim.lr": 0.024}, "parent_step": 5}).status_code == 409
    with driven.db.reader() as session:
        assert session.query(JobRow).filter(JobRow.search_id == driven.id).count() == 2, "nothing was left of it"
    made = driven.create(3, lr=0.024, setting=1, parent=1, parent_step=10, replaces=2)
    assert (made.parent, made.replaces, made.step) == (1, 2, 10)
    file = driven.begin(3).attempt
    assert file is not None
    assert file.resume_from is not None
    assert file.resume_from.checkpoint_id == checkpoint
    assert file.resume_fingerprint == better.training_fingerprint
    assert file.training_fingerprint != better.training_fingerprint
    assert better.resume_fingerprint is None


# -- users -------------------------------------------------------------------------------------------------------------
def test_how_a_search_stands(driven: Driven, api: TestClient) -> None:
    empty = api.get(f"/v1/searches/{driven.id}").json()
    assert (empty["num_trials"], empty["num_ended"], empty["best"]) == (3, 0, None)
    assert api.get(f"/v1/searches/{driven.id}/best").status_code == 404
    assert api.get(f"/v1/searches/{driven.id}/report").status_code == 404
    assert api.get(f"/v1/searches/{driven.id}/report.png").status_code == 404
    driven.complete(1, 0.4)
    driven.complete(2, 0.7, lr=0.05)
    found = api.get(f"/v1/searches/{driven.id}").json()
    assert (found["num_ended"], found["best"]["number"], found["best"]["value"]) == (2, 2, 0.7)
    assert found["states"] == {"SUCCEEDED": 2}
    trials = api.get(f"/v1/searches/{driven.id}/trials", params={"curves": True}).json()["items"]
    assert trials[1]["curve"] == [[10, 0.35], [100, 0.7]]
    other = api.post("/v1/jobs", json={"spec": PRETRAIN}).json()["id"]
    assert api.get(f"/v1/searches/{other}").status_code == 404


def test_more_trials_for_a_search_that_runs(driven: Driven, api: TestClient) -> None:
    key = {"Idempotency-Key": "once"}
    for _ in range(2):
        response = api.post(f"/v1/searches/{driven.id}/trials", json={"trials": 4}, headers=key)
        assert response.status_code == 202
    assert driven.ask("GET", "search/limits").json() == {"num_trials": 7, "slots": None, "places": None}
    assert api.post(f"/v1/searches/{driven.id}/slots", json={"slots": 1}).json()["slots"] == 1
    assert driven.ask("GET", "search/limits").json() == {"num_trials": 7, "slots": 1, "places": None}
    response = api.post(f"/v1/searches/{driven.id}/trials", json={"trials": 20_000})
    assert response.status_code == 422


def test_a_search_takes_what_is_free_and_gives_it_back(driven: Driven, api: TestClient) -> None:
    db = driven.db
    nodes = ClusterStatus(cluster_id="session_1", nodes=(NodeInfo(id="n1", host="h1", cpus=6),))
    store_cluster(db, nodes, "", NOW)

    def places() -> int | None:
        schedule_queue(db, NOW)
        found: int | None = driven.ask("GET", "search/limits").json()["places"]
        return found

    def reserved() -> int:
        with db.reader() as session:
            return next(r.world_size for r in load_reservations(session) if r.job_id == driven.id)

    with db.session() as session:
        session.get_one(AttemptRow, driven.attempt).world_size = 2
    # It began with one trial of two workers; nobody waits, and its spec allows three.
    assert (places(), reserved()) == (3, 6)
    files = [driven.begun(number, lr=number / 100) for number in (1, 2, 3)]
    assert (places(), api.get(f"/v1/searches/{driven.id}").json()["places"]) == (3, 3)

    # Somebody waits: no more trials than it began with; those under way keep their workers until they end, and no
    # other begins, whatever its driver has heard of it.
    driven.create(4, lr=0.04)
    waiting = str(api.post("/v1/jobs", json={"spec": PRETRAIN}).json()["id"])
    assert (places(), reserved()) == (1, 6)
    refused = driven.ask("POST", "trials/4/begin")
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    driven.end(1, files[0], ExitReason.NAN_LOSS)
    assert (reserved(), driven.job(waiting).start_workers) == (4, None)
    assert places() == 1
    assert driven.job(waiting).start_workers == 2

    # What is free again is taken again.
    driven.end(2, files[1], ExitReason.NAN_LOSS)
    assert (places(), reserved()) == (2, 4)


def test_more_trials_for_a_search_that_has_ended(driven: Driven, api: TestClient) -> None:
    ended = driven.complete(1, 0.4)
    move(driven.db, driven.id, JobState.SUCCEEDED)
    response = api.post(f"/v1/searches/{driven.id}/trials", json={"trials": 2})
    assert response.status_code == 201
    new = response.json()
    assert new["state"] == "QUEUED"
    assert api.get(f"/v1/searches/{new['id']}").json()["num_trials"] == 5
    (trial,) = api.get(f"/v1/searches/{new['id']}/trials").json()["items"]
    assert (trial["job_id"], trial["value"]) == (ended.job_id, 0.4)
    move(driven.db, new["id"], JobState.PREPARING, JobState.RUNNING)
    driven.attempt = add_attempt(driven.db, new["id"], cluster_id="session_1")
    assert driven.state().trials[0].told == 1
    assert driven.complete(2, 0.6).told == 2


def test_a_cancelled_search_is_retried_without_what_was_cancelled_with_it(driven: Driven, api: TestClient) -> None:
    ended, cut_off = driven.complete(1, 0.4), driven.begun(2)
    move(driven.db, driven.id, JobState.STOPPING, JobState.CANCELLED)
    with driven.db.session() as session:
        release_trials(session, session.get_one(JobRow, driven.id), datetime.now(UTC))
    new = api.post(f"/v1/jobs/{driven.id}/retry").json()
    jobs = [t["job_id"] for t in api.get(f"/v1/searches/{new['id']}/trials").json()["items"]]
    assert jobs == [ended.job_id]
    assert cut_off.job_id not in jobs


def test_a_grid_has_no_more_trials(api: TestClient, db: Database, store: MemoryStore, driver: dict[str, str]) -> None:
    grid = {"optim.lr": {"type": "grid", "values": [0.1, 0.01]}}
    driven = Driven(api, db, store, driver, space=grid, algorithm="grid")
    response = api.post(f"/v1/searches/{driven.id}/trials", json={"trials": 1})
    assert response.status_code == 422
    assert "no more settings" in response.json()["errors"][0]["message"]
