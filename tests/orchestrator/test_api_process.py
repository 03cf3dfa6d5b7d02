"""The API as a process: starts fast, logs JSON without secrets, and goes down with streams open."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.schemas import TokenCreate
from orchestrator.services.auth import Actor
from orchestrator.services.tokens import create_token
from orchestrator.storage.db import Database
from tests.orchestrator.rows import spec_with

CANARIES = ("canary-worker-secret", "canary-s3-secret")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(db: Database, directory: Path, **others: Any) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """`python -m orchestrator.api.server` on a free port: the process, its address and its log."""
    port = free_port()
    settings = {
        "database_url": db.url.render_as_string(hide_password=False),
        "s3_endpoint": "http://127.0.0.1:1",
        "s3_access_key": "key",
        "s3_secret_key": CANARIES[1],
        "worker_secret": CANARIES[0],
        "port": port,
        **others,
    }
    path = directory / "settings.json"
    path.write_text(json.dumps(settings))
    log = directory / "api.log"
    env = {**os.environ, "PATCHWORK_SETTINGS_FILE": str(path)}
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "orchestrator.api.server"], env=env, stderr=output)
    try:
        yield process, f"http://127.0.0.1:{port}", log
    finally:
        process.kill()
        process.wait(10)


def wait_until_up(url: str, deadline_s: float = 30.0) -> float:
    """Seconds until /healthz answered."""
    started = time.monotonic()
    while time.monotonic() - started < deadline_s:
        try:
            if httpx.get(f"{url}/healthz", trust_env=False).status_code == 200:
                return time.monotonic() - started
        except httpx.TransportError:
            time.sleep(0.02)
    pytest.fail(f"the API did not answer within {deadline_s} s")


def test_the_process_serves_and_ends_with_a_stream_open(db: Database, tmp_path: Path) -> None:
    token = create_token(db, Actor("tok_test", "root", "admin"), TokenCreate(name="root", role="admin")).token
    with running(db, tmp_path) as (process, url, log):
        wait_until_up(url)
        with httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=20, trust_env=False
        ) as client:
            job = client.post("/v1/jobs", json={"spec": spec_with()}).json()
            assert client.get("/readyz").status_code == 503, "there is no store"
            assert client.get("/v1/jobs?limit=0&name=canary-in-the-query").status_code == 422
            with client.stream("GET", f"/v1/jobs/{job['id']}/events/stream") as response:
                lines = response.iter_lines()
                assert next(line for line in lines if line.startswith("event:")) == "event: job.queued"
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
        text = log.read_text()
    logged = [json.loads(line) for line in text.splitlines()]
    assert all({"msg", "level", "t"} <= set(line) for line in logged), text
    requests = [(line["method"], line["path"], line["status"]) for line in logged if line["msg"] == "request"]
    assert {("POST", "/v1/jobs", 201), ("GET", "/v1/jobs", 422)} <= set(requests)
    assert "Traceback" not in text
    for secret in (*CANARIES, token, "canary-in-the-query"):
        assert secret not in text


def test_importing_the_api_pulls_in_neither_torch_nor_ray() -> None:
    code = "import sys, orchestrator.api.server; print([m for m in ('torch', 'ray', 'deepspeed') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
