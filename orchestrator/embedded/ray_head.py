"""The embedded Ray head: `ray start --head --block`, loopback only, token authentication, every port given."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import httpx

from orchestrator.embedded.ports import free_ports
from orchestrator.embedded.processes import ChildProcess, ProcessFailed
from orchestrator.embedded.server import clean_environment
from orchestrator.files import write_private

OBJECT_STORE_BYTES = 200 * 1024 * 1024
_PORT_FLAGS = (
    "port",
    "dashboard-port",
    "object-manager-port",
    "node-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
)


class RayHead:
    """One Ray head on this machine.

    `address` is the dashboard's URL (Jobs and State API), `gcs_address` what `ray.init(address=...)` takes, `token` the
    bearer token. `num_cpus` is logical: left out, Ray counts the cores. Workers read `node_file` (PATCHWORK_NODE_FILE)
    and `env`. Its session directory is a short one under the system's temporary directory: socket paths end at 107
    bytes.
    """

    name = "ray-head"

    def __init__(
        self,
        log_path: Path,
        node_file: Path | None = None,
        num_cpus: int | None = None,
        num_gpus: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.log_path = log_path
        self.node_file = node_file
        self.num_cpus = num_cpus
        self.num_gpus = num_gpus
        self.token = secrets.token_hex(32)
        self._env = dict(env or {})
        # A restart in this process keeps the ports and the token: the controller holds the address.
        self._ports = dict(zip(_PORT_FLAGS, free_ports(len(_PORT_FLAGS)), strict=True))
        self.address = f"http://127.0.0.1:{self._ports['dashboard-port']}"
        self.gcs_address = f"127.0.0.1:{self._ports['port']}"
        self.temp_dir: Path | None = None
        self._process: ChildProcess | None = None

    def start(self) -> None:
        """Start the head; returns before it answers."""
        self.temp_dir = Path(tempfile.mkdtemp(prefix="pw-ray-"))
        self._process = ChildProcess(
            self.name,
            self._command(self.temp_dir),
            self.log_path,
            self.environment(),
            cwd=self.temp_dir,
            remove=[self.temp_dir],
        )

    def environment(self) -> dict[str, str]:
        """The environment of the head, its workers and drivers, and of further nodes or programs that join it."""
        assert self.temp_dir is not None, "start() first"
        token_file = self.temp_dir / "auth_token"
        if not token_file.exists():
            # A file, so that the token is in no process's environment.
            write_private(token_file, self.token)
        # Keys of MLflow and W&B are the controller's alone: jobs could read them here.
        env = {k: v for k, v in clean_environment().items() if not k.startswith(("RAY_", "MLFLOW_", "WANDB_"))}
        env |= {
            # `python` in an entrypoint has to be this interpreter.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Without it Ray replaces 127.0.0.1 by the machine's outer address and listens there.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        if self.node_file is not None:
            env["PATCHWORK_NODE_FILE"] = str(self.node_file)
        return env | self._env

    def _command(self, temp_dir: Path) -> list[str]:
        ports = [f"--{flag}={port}" for flag, port in self._ports.items()]
        counts = [] if self.num_cpus is None else [f"--num-cpus={self.num_cpus}"]
        counts += [] if self.num_gpus is None else [f"--num-gpus={self.num_gpus}"]
        return [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1",
            "--include-dashboard=true",
            "--disable-usage-stats",
            "--include-log-monitor=false",
            f"--temp-dir={temp_dir}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            # Workers take whatever the kernel gives them: Ray's default range would collide with a second head's.
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--log-style=record",
            "--log-color=false",
            *ports,
            *counts,
        ]

    @property
    def headers(self) -> dict[str, str]:
        """What a request to `address` must carry."""
        return {"Authorization": f"Bearer {self.token}"}

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Return once the Jobs API answers with a token, refuses without one, and a node is alive.

        Raises:
            ProcessFailed: the head ended, was not ready in time, or answers without a token.
        """
        process = self._process
        assert process is not None, "start() first"
        deadline = time.monotonic() + timeout_s
        problem = "no answer yet"
        with httpx.Client(base_url=self.address, timeout=5.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                process.check_alive()
                try:
                    problem = self._problem(client)
                except httpx.TransportError as error:
                    problem = str(error)
                if not problem:
                    if client.get("/api/jobs/").status_code != 401:
                        raise ProcessFailed("Ray's job API answers without a token: refusing to use it")
                    return
                time.sleep(0.1)
        raise ProcessFailed(f"{self.name} not ready after {timeout_s:.0f} s: {problem}\n{process.log_tail()}")

    def _problem(self, client: httpx.Client) -> str:
        """Why it cannot be used yet; empty if it can."""
        jobs = client.get("/api/jobs/", headers=self.headers)
        if jobs.status_code != 200:
            return f"job API: HTTP {jobs.status_code}"
        nodes = client.get("/api/v0/nodes", headers=self.headers)
        if nodes.status_code != 200:
            return f"state API: HTTP {nodes.status_code}"
        rows = nodes.json()["data"]["result"]["result"]
        return "" if any(row["state"] == "ALIVE" for row in rows) else "no node is alive"

    @property
    def exit_code(self) -> int | None:
        return self._process.exit_code if self._process else None

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() first"
        return self._process.pid

    def stop(self, grace_s: float = 5.0) -> None:
        """End the head and every worker and driver below it, and remove its session directory. Idempotent.

        An idle head ends in about 2 s; Ray would let a busy one drain for 30 s, we kill it after `grace_s`.
        """
        if self._process is not None:
            self._process.stop(grace_s)
            self._process = None
            self.temp_dir = None
