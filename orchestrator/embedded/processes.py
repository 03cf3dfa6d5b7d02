"""Child processes that never outlive their owner: started in sessions of their own, ended with everything below them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from orchestrator.embedded import child

_PR_SET_CHILD_SUBREAPER = 36


class ProcessFailed(RuntimeError):
    """A child ended, or did not become ready; the message holds the end of its log."""


def become_subreaper() -> None:
    """From now on orphans below this process become its children, so that they can be found and ended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class ChildProcess:
    """One program in its own session, killed by the kernel if we die, with its output appended to a log file."""

    def __init__(
        self, name: str, command: Sequence[str], log_path: Path, env: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        self.name = name
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        trampoline = [sys.executable, "-I", "-S", child.__file__, str(os.getpid())]
        with log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                [*trampoline, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        self._log_start = log_path.stat().st_size
        self._tree = {psutil.Process(self._popen.pid)}

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._popen.poll()

    def check_alive(self) -> None:
        """Raises ProcessFailed with the end of its log if it has ended."""
        code = self.exit_code
        if code is not None:
            raise ProcessFailed(f"{self.name} ended with exit code {code}\n{self.log_tail()}")

    def log_tail(self, num_lines: int = 15) -> str:
        """The last lines it wrote."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - 16_384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-num_lines:])

    def remember_tree(self) -> None:
        """Note all processes below it now: once their parents have died, nothing else ties them to it."""
        self._tree |= _below(self._tree) | _in_session(self.pid)

    def stop(self, grace_s: float) -> None:
        """SIGTERM, after `grace_s` seconds SIGKILL, then SIGKILL for everything that was below it. Idempotent."""
        self.remember_tree()
        if self.exit_code is None:
            self._popen.terminate()
            deadline = time.monotonic() + grace_s
            while self.exit_code is None and time.monotonic() < deadline:
                self.remember_tree()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._popen.wait(0.1)
        self.kill_tree()

    def kill_tree(self) -> None:
        """SIGKILL for it and everything noted below it, until none of it is left."""
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            self.remember_tree()
            alive = [p for p in self._tree if p.is_running() and not _is_zombie(p)]
            if not alive and self.exit_code is not None:
                return
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _reap(alive, self.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(0.05)


def kill_descendants() -> list[str]:
    """SIGKILL for every process still below this one; returns their names. For a subreaper about to leave."""
    left = psutil.Process().children(recursive=True)
    names = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not _is_zombie(process):
                names.append(process.name())
            process.kill()
    psutil.wait_procs(left, timeout=5.0)
    return names


def is_same_process(pid: int, create_time: float) -> bool:
    """Whether the process noted earlier still runs (pids are used again; pid and start time together are not)."""
    try:
        return abs(psutil.Process(pid).create_time() - create_time) < 0.01
    except psutil.NoSuchProcess:
        return False


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _below(roots: set[psutil.Process]) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= set(root.children(recursive=True))
    return found


def _in_session(session: int) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(pid) == session:
                found.add(psutil.Process(pid))
    return found


def _reap(processes: Sequence[psutil.Process], root_pid: int) -> None:
    """Collect orphans that became our children (subreaper); the root belongs to its Popen."""
    for process in processes:
        if process.pid != root_pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
