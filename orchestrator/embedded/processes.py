"""Child processes that never outlive their owner, with everything below them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.embedded import guardian


class ProcessFailed(RuntimeError):
    """A child ended, or did not become ready; the message holds the end of its log."""


class ChildProcess:
    """One command under a guardian (see guardian.py), in a session of its own, its output appended to a log file.

    Nothing it started survives it, nor survives us, not even when we are killed. `remove` names files and directories
    that go with it.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_path: Path,
        env: Mapping[str, str],
        cwd: Path | None = None,
        remove: Sequence[Path] = (),
    ) -> None:
        self.name = name
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        removals = [part for path in remove for part in ("--remove", str(path))]
        with log_path.open("ab") as log:
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, *removals, "--", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the guardian."""
        return self._guardian.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._guardian.poll()

    def check_alive(self) -> None:
        """Raises ProcessFailed with the end of its log if it has ended."""
        code = self.exit_code
        if code is not None:
            raise ProcessFailed(f"{self.name} ended with exit code {code}\n{self.log_tail()}")

    def log_tail(self, num_lines: int = 15) -> str:
        """The last lines it wrote."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 16_384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-num_lines:])

    def stop(self, grace_s: float) -> None:
        """SIGTERM, after `grace_s` seconds SIGKILL, and SIGKILL for everything below it. Idempotent."""
        assert self._guardian.stdin is not None
        if self.exit_code is None:
            self._guardian.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guardian.wait(grace_s)
        self._guardian.stdin.close()
        self._guardian.wait(20.0)


def wait_until_ended(pid: int, timeout_s: float) -> bool:
    """Whether process `pid`, not ours, ended in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
