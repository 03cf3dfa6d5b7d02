"""The whole service on this machine: up and down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from orchestrator.cli import output
from orchestrator.cli.options import DataDirectory
from orchestrator.cli.steps import Steps
from orchestrator.client import PatchworkError
from orchestrator.embedded.data_dir import AlreadyRunning, DataDir, default_data_dir

if TYPE_CHECKING:
    from orchestrator.embedded.stack import Stack

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0


class StackError(PatchworkError):
    """The stack could not be started or stopped."""


def up(
    data_dir: DataDirectory = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Of the API; left out: 8400; 0: any free one.")
    ] = None,
    cpus: Annotated[
        int | None, typer.Option("--cpus", min=1, help="Logical CPUs that jobs may take; left out: all of them.")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Where data sets lie; left out: data/ in the data directory.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it is ready.")] = False,
) -> None:
    """Start everything on this machine: object store, Ray, API, controller. Ctrl-C stops all of it.

    Examples:

      patchwork up

      patchwork up --detach --port 0 --data-dir ./patchwork-data
    """
    directory = DataDir(data_dir or default_data_dir())
    out = output.console()
    if detach:
        start_detached(directory, port, cpus, data_root, out)
        _print_ready(out, directory)
        return
    try:
        from orchestrator.embedded.stack import Stack
    except ModuleNotFoundError as error:
        raise StackError(f"{error.name} is not installed: pip install 'patchwork-vit[local]'") from error
    steps = Steps(out)
    stack = Stack(directory, port=port, num_cpus=cpus, data_root=data_root, on_step=steps.note)
    stop = _stop_on_signals()
    try:
        with steps:
            _start(stack, stop)
        if not stop.is_set():
            _print_ready(out, directory)
            stack.watch(lambda message: out.print(f"[yellow]{escape(message)}[/]"), stop)
        out.print("Stopping …")
    finally:
        stack.stop()
    out.print("Stopped. Nothing is left running.")


def _start(stack: Stack, stop: threading.Event) -> None:
    """Start in a thread, so that a signal can end the wait."""
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(stack.start)
        while not started.done():
            if stop.wait(0.1):
                # Makes start() fail at its next step.
                stack.stop()
        error = started.exception()
    if error is not None and not stop.is_set():
        raise _explain(error)


def _explain(error: BaseException) -> BaseException:
    if isinstance(error, AlreadyRunning):
        return StackError(
            f"{error}.\n"
            "Use it as it is, stop it with `patchwork down`, or start another one with --data-dir and --port."
        )
    return StackError(str(error)) if isinstance(error, RuntimeError) else error


def _stop_on_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set; a second signal ends us at once (the guardians end the rest)."""
    stop = threading.Event()

    def on_signal(signum: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(128 + signum)
        stop.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return stop


def _print_ready(out: Console, directory: DataDir) -> None:
    client = directory.read_client()
    assert client is not None, "written when the stack was ready"
    option = "" if directory.path == default_data_dir().expanduser().absolute() else f" --data-dir {directory.path}"
    if option:
        out.print(f"  [dim]for the commands below: export PATCHWORK_DATA_DIR={directory.path}[/]")
    out.print(f"Patchwork is ready at [bold]{client[0]}[/] (API: {client[0]}/openapi.json)")
    out.print(f"  token      in {directory.client_file}; commands on this machine find it")
    out.print("  train      patchwork submit --preset demo/fashion-mnist-pretrain --follow")
    out.print("  look       patchwork list, show, logs -f, metrics")
    out.print(f"  stop       Ctrl-C here, or patchwork down{option}")


def start_detached(
    directory: DataDir, port: int | None, cpus: int | None, data_root: Path | None, out: Console
) -> None:
    """Start the stack in a process of its own and return once it is ready.

    Raises:
        StackError: one runs there already, or it did not start; the message holds what it printed.
    """
    running = directory.running()
    if running is not None:
        raise _explain(AlreadyRunning(directory.path, running))
    directory.logs.mkdir(parents=True, exist_ok=True)
    log_path = directory.logs / "up.log"
    command = [sys.executable, "-m", "orchestrator.cli.main", "up", "--data-dir", str(directory.path)]
    for flag, value in (("--port", port), ("--cpus", cpus), ("--data-root", data_root)):
        command += [] if value is None else [flag, str(value)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _await_ready(directory, process, log_path, out)
    except KeyboardInterrupt:
        # It has a terminal of its own, so to speak: Ctrl-C did not reach it.
        out.print("Interrupted: stopping what was started …")
        _end(process)
        raise


def _await_ready(directory: DataDir, process: subprocess.Popen[bytes], log_path: Path, out: Console) -> None:
    """Show the steps of the stack that starts in `process` until it is ready. Raises StackError."""
    steps = Steps(out)
    shown: dict[str, str] = {}
    with steps:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StackError(log_path.read_text(errors="replace").strip())
            run = directory.running()
            if run is not None:
                for part, state in run.steps.items():
                    if shown.get(part) != state:
                        shown[part] = state
                        steps.note(part, state)
                if run.state == "ready":
                    break
            time.sleep(0.1)
        else:
            _end(process)
            raise StackError(f"not ready after {_START_TIMEOUT_S:.0f} s; see {log_path}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a stack that is starting; its guardians end everything below it."""
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def down(data_dir: DataDirectory = None) -> None:
    """Stop what `patchwork up` started. Jobs go on from their last checkpoint when it is started again."""
    directory = DataDir(data_dir or default_data_dir())
    run = directory.running()
    out = output.console()
    if run is None:
        out.print(f"Nothing runs on {directory.path}.")
        return
    out.print(f"Stopping patchwork (pid {run.pid}, {run.url}) …")
    os.kill(run.pid, signal.SIGTERM)
    if not _wait(lambda: directory.running() is None, _STOP_TIMEOUT_S):
        # Its guardians end everything below it.
        os.kill(run.pid, signal.SIGKILL)
        if not _wait(lambda: directory.running() is None, 10.0):
            raise StackError(f"pid {run.pid} does not end")
    out.print("Stopped.")


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False
