"""A real Ray head and a real object store for the driver's tests, and what a controller would do with them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx

from configs.ids import attempt_id, new_job_id
from configs.layout import attempt_key, exit_key, logs_prefix
from configs.wire import AttemptFile, ExitFile, LogLine
from orchestrator.embedded.object_store import ObjectStoreServer
from orchestrator.embedded.ports import free_ports
from orchestrator.embedded.processes import ChildProcess
from orchestrator.embedded.ray_head import RayHead
from tests.fakes.control_plane import SECRET, FakeControlPlane
from workers.store import NotFound, S3Store

REPOSITORY = Path(__file__).parents[2]
T = TypeVar("T")
STANDIN = "python -m tests.workers.standin_driver"
LEAKY = "python -m tests.workers.leaky_driver"


def wait_for(look: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """What `look` returns as soon as that is true."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.05)


@dataclass
class Cluster:
    """Store, Ray and a fake control plane, all on loopback."""

    directory: Path
    control_plane: FakeControlPlane
    store_server: ObjectStoreServer
    ray: RayHead
    store: S3Store

    @classmethod
    def start(cls, directory: Path) -> Cluster:
        control_plane = FakeControlPlane()
        store_server = ObjectStoreServer(directory / "store")
        store_server.start()
        credentials: dict[str, Any] = {
            "s3_endpoint": store_server.endpoint,
            "s3_access_key": store_server.access_key,
            "s3_secret_key": store_server.secret_key,
        }
        node = {
            **credentials,
            "api_url": control_plane.url,
            "worker_secret": SECRET,
            "log_dir": str(directory / "logs"),
            "stop_grace_s": 20,
            "hang_timeout_s": 30,
            "silent_timeout_s": 8,
        }
        node_file = directory / "node.json"
        node_file.write_text(json.dumps(node))
        node_file.chmod(0o600)
        # The entrypoint says `python`, which must be this one.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {"PYTHONPATH": str(REPOSITORY), "PATH": path}
        ray = RayHead(directory / "ray.log", node_file, num_cpus=4, env=env)
        ray.start()
        store_server.wait_ready()
        ray.wait_ready()
        store = S3Store(
            endpoint=store_server.endpoint,
            region="us-east-1",
            bucket=store_server.bucket,
            prefix="",
            access_key=store_server.access_key,
            secret_key=store_server.secret_key,
        )
        return cls(directory, control_plane, store_server, ray, store)

    def stop(self) -> None:
        self.ray.stop(grace_s=2.0)
        self.store_server.stop()
        self.control_plane.go_away()

    def add_node(self, num_cpus: int) -> ChildProcess:
        """A second Ray node on this machine, once it is alive. Stopped with `stop(0)`."""
        flags = ("object-manager-port", "node-manager-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        flags += ("runtime-env-agent-port", "metrics-export-port")
        ports = [f"--{flag}={port}" for flag, port in zip(flags, free_ports(len(flags)), strict=True)]
        command = [sys.executable, "-m", "tests.workers.loopback_node", "start", "--block"]
        command += [f"--address={self.ray.gcs_address}"]
        command += ["--node-ip-address=127.0.0.1", f"--num-cpus={num_cpus}", "--object-store-memory=100000000", *ports]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
        before = len(self.alive_nodes())
        node = ChildProcess("second-node", command, self.directory / "node-2.log", self.ray.environment())
        wait_for(lambda: len(self.alive_nodes()) > before or node.check_alive(), 60.0, "second node")
        return node

    def alive_nodes(self) -> list[str]:
        rows = self.request("GET", "/api/v0/nodes").json()["data"]["result"]["result"]
        return [row["node_id"] for row in rows if row["state"] == "ALIVE"]

    # -- what a controller does ----------------------------------------------------------------------------------------
    def write_attempt(self, spec: dict[str, Any], world_size: int, **fields: Any) -> AttemptFile:
        """The attempt file of a new job, written to the store."""
        job_id = new_job_id()
        attempt = AttemptFile(
            job_id=job_id,
            attempt_id=attempt_id(job_id, 1),
            number=1,
            spec=spec,
            spec_hash="sha256:0",
            training_fingerprint="sha256:0",
            world_size=world_size,
            created_at=datetime.now(UTC),
            **fields,
        )
        self.put_attempt(attempt)
        return attempt

    def put_attempt(self, attempt: AttemptFile) -> None:
        self.store.put(attempt_key(attempt.attempt_id), attempt.model_dump_json().encode())

    def submit(self, submission_id: str, entrypoint: str, **variables: str) -> None:
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": "10", **variables}
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "runtime_env": {"env_vars": variables},
            "entrypoint_num_cpus": 0,
        }
        self.request("POST", "/api/jobs/", json=body)

    def job(self, submission_id: str) -> dict[str, Any]:
        details: dict[str, Any] = self.request("GET", f"/api/jobs/{submission_id}").json()
        return details

    def stop_job(self, attempt_id: str) -> None:
        self.request("POST", f"/api/jobs/{attempt_id}/stop")

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        with httpx.Client(base_url=self.ray.address, headers=self.ray.headers, trust_env=False, timeout=20) as client:
            response = client.request(method, path, **options)
        response.raise_for_status()
        return response

    def live(self, attempt_id: str) -> list[str]:
        """Actors and placement groups of the attempt's Ray job that are not gone."""
        job_id = self.job(attempt_id).get("job_id")
        found = []
        for what, key, gone in (("actors", "job_id", "DEAD"), ("placement_groups", "creator_job_id", "REMOVED")):
            parameters = {"filter_keys": key, "filter_predicates": "=", "filter_values": job_id, "limit": 1000}
            rows = self.request("GET", f"/api/v0/{what}", params=parameters).json()["data"]["result"]["result"]
            found += [f"{what} {row.get('class_name', '')}" for row in rows if row["state"] != gone]
        return found

    def exit_file(self, attempt: AttemptFile) -> ExitFile | None:
        try:
            return ExitFile.model_validate_json(self.store.get(exit_key(attempt.attempt_id)))
        except NotFound:
            return None

    def wait_exit(self, attempt: AttemptFile, timeout_s: float) -> ExitFile:
        """exit.json, once it is there; fails at once if the driver ended without it."""

        def look() -> ExitFile | None:
            found = self.exit_file(attempt)
            if found is None and self.job(attempt.attempt_id)["status"] in ("FAILED", "SUCCEEDED", "STOPPED"):
                found = self.exit_file(attempt)
                assert found is not None, self.job(attempt.attempt_id)["message"]
            return found

        return wait_for(look, timeout_s, "exit.json")

    def lines(self, attempt: AttemptFile, stream: str) -> list[LogLine]:
        """Everything shipped of one stream, in order; the chunks must have no gap."""
        prefix = f"{logs_prefix(attempt.attempt_id)}{stream}/"
        keys = sorted(key for key, _ in self.store.list(prefix))
        assert keys == [f"{prefix}{n:06d}.jsonl" for n in range(len(keys))]
        return [LogLine.model_validate_json(raw) for key in keys for raw in self.store.get(key).splitlines()]
