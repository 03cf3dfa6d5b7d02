"""Several API processes on one port: each of them answers, one that dies is replaced, none stays behind."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import func, select

from orchestrator.services.tokens import ensure_admin_token
from orchestrator.storage.db import Database, is_unavailable
from orchestrator.storage.tables import ClusterRow, JobRow
from tests.orchestrator.conftest import ADMIN_TOKEN
from tests.orchestrator.rows import T0, spec_with
from tests.orchestrator.test_api_process import running, wait_until_up

HEADERS = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


class Served:
    """`python -m orchestrator.api.server` with two processes."""

    def __init__(self, supervisor: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.supervisor, self.url, self.log = supervisor, url, log

    def workers(self) -> list[psutil.Process]:
        """The processes that serve."""
        return [process for process in psutil.Process(self.supervisor.pid).children() if _serves(process)]

    def get(self, path: str) -> httpx.Response:
        """The answer on a new connection."""
        return httpx.get(f"{self.url}{path}", headers=HEADERS, timeout=20, trust_env=False)


def _serves(process: psutil.Process) -> bool:
    try:
        # multiprocessing has another one below the first.
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def served(db: Database, tmp_path: Path) -> Iterator[Served]:
    ensure_admin_token(db, ADMIN_TOKEN, "root")
    with running(db, tmp_path, processes=2, dashboard=False) as (process, url, log):
        wait_until_up(url)
        made = Served(process, url, log)
        wait_for(lambda: len(made.workers()) == 2 and log.read_text().count("startup complete") == 2, "two processes")
        yield made
        workers = made.workers() if process.poll() is None else []
        process.terminate()
        process.wait(30)
        _, left = psutil.wait_procs(workers, 30)
        assert left == []


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = 60.0) -> None:
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, f"no {what} within {deadline_s} s"
        time.sleep(0.02)


def test_each_process_answers_and_one_that_dies_is_replaced(served: Served) -> None:
    for silent, _ in (served.workers(), served.workers()[::-1]):
        # The other one answers alone.
        silent.suspend()
        assert served.get("/v1/jobs").status_code == 200
        silent.resume()
    dead, other = served.workers()
    dead.kill()
    wait_for(lambda: len({p.pid for p in served.workers()} - {dead.pid}) == 2, "replacement")
    assert other in served.workers()
    wait_for(lambda: served.log.read_text().count("startup complete") == 3, "start of the replacement")
    other.suspend()
    assert served.get("/v1/jobs").status_code == 200
    other.resume()


def test_sigterm_ends_all_with_a_stream_open(served: Served) -> None:
    workers = served.workers()
    with httpx.Client(base_url=served.url, headers=HEADERS, timeout=20, trust_env=False) as client:
        job = client.post("/v1/jobs", json={"spec": spec_with()}).json()
        with client.stream("GET", f"/v1/jobs/{job['id']}/events/stream") as response:
            assert next(line for line in response.iter_lines() if line.startswith("event:")) == "event: job.queued"
            served.supervisor.send_signal(signal.SIGTERM)
            assert served.supervisor.wait(30) == 0
    _, left = psutil.wait_procs(workers, 10)
    assert left == []
    assert "Traceback" not in served.log.read_text()
    with pytest.raises(httpx.ConnectError):
        served.get("/healthz")


def test_none_stays_when_the_first_process_is_killed(served: Served) -> None:
    workers = served.workers()
    served.supervisor.kill()
    _, left = psutil.wait_procs(workers, 30)
    assert left == []


def test_an_api_that_cannot_start_is_not_tried_for_ever(db: Database, tmp_path: Path) -> None:
    with running(db, tmp_path, processes=2, dashboard=False, s3_endpoint="no address") as (process, _, log):
        assert process.wait(60) == 3
        assert "cannot be started with these settings" in log.read_text()


@pytest.mark.db
def test_many_clients_create_through_several_processes_and_are_counted_together(served: Served, db: Database) -> None:
    def create(number: int) -> tuple[int, str]:
        headers = {**HEADERS, "Idempotency-Key": f"key-{number % 60}"}
        response = httpx.post(
            f"{served.url}/v1/jobs", json={"spec": spec_with()}, headers=headers, timeout=60, trust_env=False
        )
        return response.status_code, response.json()["id"]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(create, range(120)))
    assert {status for status, _ in answers} == {201}
    assert [job_id for _, job_id in answers[:60]] == [job_id for _, job_id in answers[60:]]
    with db.reader() as session:
        assert session.scalar(select(func.count(JobRow.id))) == 60
    # Whichever process is asked says what both have done.
    for silent in served.workers():
        silent.suspend()
        families = {family.name: family for family in text_string_to_metric_families(served.get("/metrics").text)}
        silent.resume()
        counted = [
            sample.value
            for sample in families["patchwork_http_request_duration_seconds"].samples
            if sample.name.endswith("_count") and sample.labels["route"] == "/v1/jobs"
        ]
        assert counted == [120.0]
        assert "patchwork_jobs" in families


def test_writers_of_two_processes_take_turns_on_sqlite(database_url: str) -> None:
    """Each `Database` knows of its own writers only, as a process does."""
    ours, theirs = Database(database_url), Database(database_url)

    def write() -> None:
        with theirs.session() as session:
            session.add(ClusterRow(id=1, seen_at=T0, message="second"))

    with ThreadPoolExecutor(1) as pool:
        with ours.session() as session:
            session.connection()
            waiting = pool.submit(write)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
        waiting.result(20)
        with ours.session() as session:
            session.connection()
            refused = pool.submit(write)
            # It waits as long as SQLite would, and then says so in a way that callers know.
            error = refused.exception(60)
        assert error is not None
        assert is_unavailable(error)
    with theirs.session() as session:
        session.get_one(ClusterRow, 1).message = "third"
    for database in (ours, theirs):
        database.close()
