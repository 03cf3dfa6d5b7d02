"""MLflow's tracking server, from an environment of its own: the whole of mlflow does not go with our constraints."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.harness import progress


def mlflow_python() -> Path:
    """The interpreter of an environment that holds mlflow, made at the first call on this machine, beside the cached
    environment of infra/env.sh. Processes that want it at once take turns.

    Raises:
        CalledProcessError: it could not be installed.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("PATCHWORK_ENV_CACHE") or base / "patchwork")
    cache.mkdir(parents=True, exist_ok=True)
    env = cache / f"mlflow-{platform.python_version()}"
    python = env / "bin" / "python"
    with (cache / f"{env.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (env / "complete").exists():
            progress(f"installing mlflow into {env}, once")
            shutil.rmtree(env, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", env], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--prefer-binary", "mlflow"], check=True)
            (env / "complete").touch()
    return python


def mlflow_version(python: Path) -> str:
    """The version of mlflow that the interpreter imports."""
    code = "from importlib.metadata import version; print(version('mlflow'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def mlflow_command(python: Path, directory: Path, port: int) -> list[str]:
    """What serves MLflow on loopback with SQLite in `directory`, with its own number of workers. On a busy machine its
    supervisor would kill those that do not answer within 5 s; it may wait longer."""
    store = f"sqlite:///{directory}/mlflow.db"
    options = ["--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", str(directory / "artifacts")]
    patience = ["--uvicorn-opts", "--timeout-worker-healthcheck 120"]
    return [str(python), "-m", "mlflow", "server", "--backend-store-uri", store, *options, *patience]
