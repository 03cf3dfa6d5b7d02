"""The directory of one embedded stack: everything it keeps, and who runs on it.

<data dir>/
    lock            held while a stack runs here
    run.json        the running stack: pid, address, what it is doing (RunFile)
    client.json     0600: address and administrator token, for the command line
    settings.json   0600: of the API and the controller      node.json   0600: of the Ray node
    patchwork.db    SQLite                                   store/      the object store
    data/           data sets, unless --data-root names another place
    logs/           one file per part; logs/ranks: output of the workers
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal

from pydantic import Field

from configs.base import Stored
from orchestrator.files import write_private


class RunFile(Stored):
    """What the running stack says of itself."""

    pid: int
    url: str
    state: Literal["starting", "ready", "stopping"]
    steps: dict[str, str] = Field(default_factory=dict)
    """Part -> starting, ready or failed, in the order they start."""


class AlreadyRunning(RuntimeError):
    """Another stack runs on this directory."""

    def __init__(self, path: Path, run: RunFile | None) -> None:
        self.run = run
        who = "another patchwork" if run is None else f"patchwork (pid {run.pid}, {run.url})"
        super().__init__(f"{who} is running on {path}")


class DataDir:
    """Paths below the data directory, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.run_file = self.path / "run.json"
        self.client_file = self.path / "client.json"
        self.settings_file = self.path / "settings.json"
        self.node_file = self.path / "node.json"
        self.database = self.path / "patchwork.db"
        self.store = self.path / "store"
        self.data = self.path / "data"
        self.logs = self.path / "logs"
        self._lock: IO[str] | None = None

    def lock(self) -> None:
        """Take the directory for this process, making it if missing. The kernel frees it when the process ends.

        Raises:
            AlreadyRunning: another process holds it.
            OSError: it cannot be made or written.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (self.path / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise AlreadyRunning(self.path, self._read_run()) from None
        self._lock = lock
        # A stack that was killed left its own: `down` must not signal a pid that is somebody else's by now.
        self.run_file.unlink(missing_ok=True)
        for folder in (self.data, self.logs):
            folder.mkdir(exist_ok=True)

    def unlock(self) -> None:
        """Give the directory back. Idempotent."""
        if self._lock is not None:
            self.run_file.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def running(self) -> RunFile | None:
        """The stack that runs here now; None if none does."""
        try:
            with (self.path / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._read_run()
        except FileNotFoundError:
            pass
        return None

    def write_run(self, run: RunFile) -> None:
        write_private(self.run_file, run.model_dump_json())

    def _read_run(self) -> RunFile | None:
        with suppress(FileNotFoundError):
            return RunFile.model_validate_json(self.run_file.read_text())
        return None

    def read_client(self) -> tuple[str, str] | None:
        """Address and token of the stack that runs here or ran here last."""
        with suppress(FileNotFoundError, PermissionError):
            stored = json.loads(self.client_file.read_text())
            return stored["url"], stored["token"]
        return None

    def session_secret(self) -> str:
        """What the dashboard signs its cookies with; made once, so that a restart logs nobody out."""
        path = self.path / "session-secret"
        if not path.exists():
            write_private(path, secrets.token_urlsafe(32))
        return path.read_text()

    def write_client(self, url: str, token: str) -> None:
        write_private(self.client_file, json.dumps({"url": url, "token": token}))


def default_data_dir() -> Path:
    """$PATCHWORK_DATA_DIR, or patchwork in the user's data directory (XDG)."""
    given = os.environ.get("PATCHWORK_DATA_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local/share") / "patchwork"
