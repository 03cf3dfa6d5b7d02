from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import event

from configs.ids import attempt_id
from configs.states import JobState
from orchestrator.control.controller import IDLE_S, Controller
from orchestrator.control.launcher import LaunchState
from orchestrator.control.reconciler import utc_now
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.tables import ClusterRow, JobRow, LeaseRow
from tests.factories import add_job
from tests.fakes.launcher import FakeLauncher
from tests.fakes.memory_store import MemoryStore

REPOSITORY = Path(__file__).parents[2]
SETTINGS = Settings(poll_s=0.1, lease_s=5)


def until(true: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Look until `true()` holds."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.02)


@contextmanager
def running(controller: Controller) -> Iterator[Controller]:
    thread = threading.Thread(target=controller.run)
    thread.start()
    try:
        yield controller
    finally:
        controller.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.db
def test_a_controller_schedules_and_starts_jobs(db: Database) -> None:
    launcher = FakeLauncher()
    jobs = [add_job(db) for _ in range(3)]
    with running(Controller(db, launcher, MemoryStore(), SETTINGS)) as controller:
        until(lambda: len(launcher.states) == 2, "two jobs of two workers start on four CPUs")
        assert controller.leads
        with db.reader() as session:
            row = session.get_one(ClusterRow, 1)
            states = [session.get_one(JobRow, job.id).state for job in jobs]
        assert row.reachable
        assert row.controller_at is not None
        assert utc_now() - row.controller_at < timedelta(seconds=10)
        assert states[2] == JobState.QUEUED
    assert sorted(launcher.submissions) == sorted(attempt_id(job.id, 1) for job in jobs[:2])
    assert not controller.leads
    with db.reader() as session:
        lease = session.get_one(LeaseRow, "leader")
    assert lease.token is None


@pytest.mark.db
def test_of_two_controllers_one_leads_and_the_other_takes_over_at_once(db: Database) -> None:
    launcher, store = FakeLauncher(), MemoryStore()
    first, second = (Controller(db, launcher, store, SETTINGS) for _ in range(2))
    with running(second):
        until(lambda: second.leads, "the only one leads")
        with running(first):
            until(lambda: first.leads or second.leads, "one leads")
            job = add_job(db)
            until(lambda: launcher.states, "the job is started")
            assert [first.leads, second.leads] == [False, True]
            second.stop()
            until(lambda: first.leads, "the other one takes over", timeout_s=SETTINGS.lease_s)
    assert launcher.submissions == [attempt_id(job.id, 1)]


def test_a_cluster_that_is_away_is_said_and_survived(db: Database) -> None:
    launcher = FakeLauncher()
    launcher.is_away = True
    job = add_job(db)

    def row() -> JobRow:
        with db.reader() as session:
            return session.get_one(JobRow, job.id)

    with running(Controller(db, launcher, MemoryStore(), SETTINGS)):
        until(lambda: row().reason == "CLUSTER_UNREACHABLE", "the reason is shown")
        launcher.is_away = False
        until(lambda: launcher.states, "the job starts once the cluster is back")
    assert launcher.states[attempt_id(job.id, 1)] is LaunchState.RUNNING


def test_idle_reconcilers_do_not_all_ask_the_database(db: Database) -> None:
    statements = []

    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "lease_expires_at" in statement:
            statements.append(statement)

    with running(Controller(db, FakeLauncher(), MemoryStore(), SETTINGS, num_reconcilers=8)) as controller:
        until(lambda: controller.leads, "the only one leads")
        event.listen(db.engine, "before_cursor_execute", count)
        began = time.monotonic()
        until(lambda: len(statements) >= 5, "somebody looks out")
        assert time.monotonic() - began > 4 * IDLE_S


def test_the_process_starts_degraded_and_leaves_on_sigterm(database_url: str, tmp_path: Path) -> None:
    """Neither store nor cluster is there: it waits for them, and goes when told to."""
    settings = Settings(
        database_url=database_url, s3_endpoint="http://127.0.0.1:9", ray_address="http://127.0.0.1:9", s3_access_key="a"
    )
    file = tmp_path / "settings.json"
    values = settings.model_dump(mode="json") | {"s3_access_key": "a", "s3_secret_key": "s"}
    file.write_text(Settings.model_validate(values).model_dump_json(exclude={"s3_access_key", "s3_secret_key"}))
    environment = {
        **os.environ,
        "PATCHWORK_SETTINGS_FILE": str(file),
        "PATCHWORK_S3_ACCESS_KEY": "a",
        "PATCHWORK_S3_SECRET_KEY": "s",
        "PYTHONPATH": str(REPOSITORY),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.control.controller"], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert "not ready" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
