"""The whole service on one machine: object store, Ray head, API and controller, started, watched and stopped."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from orchestrator.embedded.data_dir import DataDir, RunFile
from orchestrator.embedded.object_store import ObjectStoreServer
from orchestrator.embedded.ports import free_ports, is_free
from orchestrator.embedded.processes import ProcessFailed
from orchestrator.embedded.ray_head import RayHead
from orchestrator.embedded.server import ServerProcess, sink_settings
from orchestrator.files import write_private
from orchestrator.services.auth import new_token
from orchestrator.services.tokens import ensure_admin_token
from orchestrator.storage.db import Database

DEFAULT_PORT = 8400
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 1.0, 30.0
_STEADY_S = 60.0  # a part that ran so long starts its back-off anew


class Part(Protocol):
    """A part of the stack: something that is started, may end by itself, and is stopped."""

    @property
    def name(self) -> str: ...
    @property
    def exit_code(self) -> int | None: ...
    @property
    def pid(self) -> int: ...
    def start(self) -> None: ...
    def wait_ready(self) -> None: ...
    def stop(self) -> None: ...


@dataclass
class _Watched:
    part: Part
    started_at: float = field(default_factory=time.monotonic)
    backoff_s: float = _FIRST_BACKOFF_S
    restart_at: float | None = None


class Stack:
    """One stack on one data directory.

    `port` None: 8400; 0: any free one. `num_cpus` None: as many as the machine has. `data_root`: where data sets lie;
    None: in the data directory. `on_step(part, state)` hears of every change: starting, ready, failed.

    `settings` and `node_settings` go over those the stack finds out for the control plane and for the workers.
    `front(part, url)` says where a part ("object store", "Ray") is reached instead of at its own URL: behind a proxy.
    """

    def __init__(
        self,
        data_dir: DataDir,
        *,
        port: int | None = None,
        num_cpus: int | None = None,
        data_root: Path | None = None,
        on_step: Callable[[str, str], None] | None = None,
        settings: Mapping[str, Any] | None = None,
        node_settings: Mapping[str, Any] | None = None,
        front: Callable[[str, str], str] | None = None,
    ) -> None:
        self.dir = data_dir
        self._settings = dict(settings or {})
        self._node_settings = dict(node_settings or {})
        self._front = front or (lambda _, url: url)
        self.url = ""
        self.token = ""
        self._wanted_port = DEFAULT_PORT if port is None else port
        self._num_cpus = num_cpus
        self._data_root = (data_root or data_dir.data).expanduser().absolute()
        self._on_step = on_step
        self._steps: dict[str, str] = {}
        self._steps_lock = threading.Lock()
        self._watched: list[_Watched] = []
        self._lifecycle = threading.Lock()
        self._stopped = False

    # -- start ---------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start every part and return once jobs can be submitted. On failure nothing is left running.

        Raises:
            AlreadyRunning: a stack runs on this directory.
            ProcessFailed: a part did not start; the message holds the end of its log.
            RuntimeError: the port is taken, or a package is missing.
        """
        self.dir.lock()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        port = self._wanted_port or free_ports(1)[0]
        if not is_free(port):
            raise RuntimeError(f"port {port} is taken by another program: give --port with a free one, or 0 for any")
        self.url = f"http://127.0.0.1:{port}"
        store = ObjectStoreServer(self.dir.store, self.dir.logs / "object-store.log")
        ray = RayHead(self.dir.logs / "ray.log", self.dir.node_file, num_cpus=self._num_cpus)
        self._launch("object store", store)
        self._write_settings(port, store, ray)
        self._launch("Ray", ray)
        # Ray takes longest: the rest goes on beside it. Not waited for where the rest fails; stop() ends it.
        pool = ThreadPoolExecutor(1)
        ray_is_ready = pool.submit(self._ready, "Ray", ray.wait_ready)
        pool.shutdown(wait=False)
        self._ready("database", self._prepare_database)
        self._ready("object store", store.wait_ready)
        for part, module in (("API", "orchestrator.api.server"), ("controller", "orchestrator.control.controller")):
            # The API, which sees the controller's traces in the database, says when that one is ready too.
            path = {"API": "/healthz", "controller": "/readyz"}[part]
            log = self.dir.logs / f"{part.lower()}.log"
            server = ServerProcess(part, module, self.dir.settings_file, log, self.url + path)
            self._launch(part, server)
            self._ready(part, server.wait_ready)
        ray_is_ready.result()
        self._ready("cluster", self._wait_for_cluster)
        self.dir.write_client(self.url, self.token)
        self._write_run("ready")

    def _launch(self, name: str, part: Part) -> None:
        self._note(name, "starting")
        with self._lifecycle:
            if self._stopped:
                raise ProcessFailed("the stack was stopped while it started")
            # Noted first: a part whose start fails half-way is stopped with the others.
            self._watched.append(_Watched(part))
            part.start()

    def _ready(self, name: str, wait: Callable[[], None]) -> None:
        self._note(name, "starting")
        try:
            wait()
        except Exception:
            self._note(name, "failed")
            raise
        self._note(name, "ready")

    def _note(self, name: str, state: str) -> None:
        with self._steps_lock:
            if self._steps.get(name) == state:
                return
            self._steps[name] = state
            self._write_run("starting")
        if self._on_step is not None:
            self._on_step(name, state)

    def _write_run(self, state: str) -> None:
        run = {"pid": os.getpid(), "url": self.url, "state": state, "steps": self._steps}
        self.dir.write_run(RunFile.model_validate(run))

    def _write_settings(self, port: int, store: ObjectStoreServer, ray: RayHead) -> None:
        shared = {
            "s3_endpoint": self._front("object store", store.endpoint),
            "s3_region": store.region,
            "s3_bucket": store.bucket,
            "s3_access_key": store.access_key,
            "s3_secret_key": store.secret_key,
            "worker_secret": secrets.token_urlsafe(32),
            "data_root": str(self._data_root),
        }
        control_plane = shared | {
            "database_url": f"sqlite:///{self.dir.database}",
            "s3_public": True,
            "ray_address": self._front("Ray", ray.address),
            "ray_token": ray.token,
            "session_secret": self.dir.session_secret(),
            "host": "127.0.0.1",
            "port": port,
        }
        control_plane |= {"public_url": self.url, **sink_settings(), **self._settings}
        node = shared | {"api_url": self.url, "log_dir": str(self.dir.logs / "ranks")} | self._node_settings
        write_private(self.dir.settings_file, json.dumps(control_plane, indent=2))
        write_private(self.dir.node_file, json.dumps(node, indent=2))

    def _prepare_database(self) -> None:
        database = Database(f"sqlite:///{self.dir.database}")
        try:
            database.upgrade()
            known = self.dir.read_client()
            self.token = known[1] if known else new_token()
            ensure_admin_token(database, self.token, "patchwork up")
        finally:
            database.close()

    def _wait_for_cluster(self) -> None:
        """Until the controller has seen a node of Ray: only then does a submitted job start at once."""
        headers = {"Authorization": f"Bearer {self.token}"}
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline:
            answer = httpx.get(f"{self.url}/v1/cluster", headers=headers, timeout=5.0, trust_env=False)
            answer.raise_for_status()
            cluster = answer.json()
            if cluster["reachable"] and any(node["alive"] for node in cluster["nodes"]):
                return
            time.sleep(0.1)
        raise ProcessFailed(f"the controller does not see the Ray cluster: {cluster['message']}")

    def pid(self, part: str) -> int:
        """The guardian of a part ("object-store", "ray-head", "API", "controller"); the server is its child.

        Raises:
            KeyError: there is no such part.
        """
        return {watched.part.name: watched.part for watched in self._watched}[part].pid

    # -- watch ---------------------------------------------------------------------------------------------------------
    def watch(self, on_event: Callable[[str], None], stop: threading.Event) -> None:
        """Until `stop` is set: start parts that ended by themselves again, with growing pauses. Says so to `on_event`.

        A new Ray head is another cluster: the controller starts the attempts that ran on the old one again.
        """
        while not stop.wait(0.5):
            for watched in self._watched:
                self._look_at(watched, on_event)

    def _look_at(self, watched: _Watched, on_event: Callable[[str], None]) -> None:
        part, now = watched.part, time.monotonic()
        if watched.restart_at is None:
            if part.exit_code is None:
                return
            if now - watched.started_at > _STEADY_S:
                watched.backoff_s = _FIRST_BACKOFF_S
            on_event(f"{part.name} ended (exit code {part.exit_code}); starting it again in {watched.backoff_s:.0f} s")
            part.stop()
            watched.restart_at = now + watched.backoff_s
            watched.backoff_s = min(2 * watched.backoff_s, _LONGEST_BACKOFF_S)
        elif now >= watched.restart_at:
            watched.started_at, watched.restart_at = now, None
            part.start()
            on_event(f"{part.name} started again")

    # -- stop ----------------------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """Stop every part, the last started first, and give the directory back. Idempotent; final."""
        with self._lifecycle:
            self._stopped = True
            if self._watched:
                self._write_run("stopping")
            for watched in reversed(self._watched):
                watched.part.stop()
            self._watched.clear()
            self.dir.unlock()
