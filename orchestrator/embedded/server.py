"""The API and the controller as children: `python -m orchestrator.…` with the stack's settings file."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import httpx

from orchestrator.embedded.processes import ChildProcess, ProcessFailed

SINK_SETTINGS = (
    "sink_every_s",
    "tensorboard",
    "mlflow_tracking_uri",
    "mlflow_experiment",
    "wandb_project",
    "wandb_entity",
    "wandb_mode",
    "wandb_dir",
)


def clean_environment() -> dict[str, str]:
    """Our environment without PATCHWORK_… variables: they would override the files the stack writes."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PATCHWORK_")}


def sink_settings() -> dict[str, str]:
    """Settings of ours that say where metrics go: of these there is nothing that the stack finds out itself."""
    names = {name.lower(): value for name, value in os.environ.items()}
    return {name: names[f"patchwork_{name}"] for name in SINK_SETTINGS if f"patchwork_{name}" in names}


class ServerProcess:
    """One process of the control plane. `ready_url` is asked until it answers 200; None: running is ready."""

    def __init__(self, name: str, module: str, settings_file: Path, log_path: Path, ready_url: str | None) -> None:
        self.name = name
        self.log_path = log_path
        self._module = module
        self._settings_file = settings_file
        self._ready_url = ready_url
        self._process: ChildProcess | None = None

    def start(self) -> None:
        env = clean_environment() | {"PATCHWORK_SETTINGS_FILE": str(self._settings_file)}
        command = [sys.executable, "-m", self._module]
        self._process = ChildProcess(self.name, command, self.log_path, env, cwd=self._settings_file.parent)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return once it answers.

        Raises:
            ProcessFailed: it ended, or did not answer in time; with the end of its log.
        """
        assert self._process is not None, "start() first"
        deadline = time.monotonic() + timeout_s
        problem = ""
        while True:
            self._process.check_alive()
            if self._ready_url is None:
                return
            try:
                response = httpx.get(self._ready_url, timeout=5.0, trust_env=False)
                if response.status_code == 200:
                    return
                problem = response.text[:500]
            except httpx.TransportError as error:
                problem = str(error)
            if time.monotonic() > deadline:
                raise ProcessFailed(
                    f"{self.name} not ready after {timeout_s:.0f} s: {problem}\n{self._process.log_tail()}"
                )
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() first"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.exit_code if self._process else None

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM, after `grace_s` SIGKILL. Idempotent."""
        if self._process is not None:
            self._process.stop(grace_s)
            self._process = None
