"""`python -m orchestrator.api.server`: the API as a process, or as several that share a port."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from contextlib import closing
from types import FrameType
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI
from pydantic_core import to_json
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from orchestrator.api.app import create_app
from orchestrator.api.http import BoundedHttp
from orchestrator.dashboard import mount
from orchestrator.settings import Settings, load_settings
from orchestrator.storage.db import Database
from orchestrator.storage.store import S3Store

log = structlog.get_logger(__name__)
GRACE_S = 5
"""From SIGTERM to the end of requests still open; streams are closed at once and their clients reconnect."""
HUNG_S = 30
"""One of several processes that says nothing for so long is replaced, as one is that died."""


def main() -> None:
    """Bring the schema up to date and serve until SIGINT or SIGTERM, with as many processes as the settings say."""
    configure_logs()
    # uvicorn handles these while it serves and raises them again when it is done: an orderly end, not a death.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    settings = load_settings()
    db = Database(settings.database_url)
    try:
        db.upgrade()
        if settings.processes == 1:
            app = _make_app(settings, db)
            uvicorn.Server(_config(app, settings)).run()
    finally:
        db.close()
    if settings.processes > 1:
        _supervise(settings)


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _supervise(settings: Settings) -> None:
    """Keep as many processes serving one socket until SIGINT or SIGTERM; those that die are replaced. Exits with
    uvicorn's status if one cannot start."""
    config = _config("orchestrator.api.server:make_app_of_many", settings)
    # The name is prometheus_client's, which adds up the requests of all processes by files in this folder.
    with tempfile.TemporaryDirectory(prefix="patchwork-api-") as folder, closing(config.bind_socket()) as listener:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        supervisor = _Supervisor(config, sockets=[listener])
        supervisor.run()
        if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
            sys.exit(STARTUP_FAILURE)


class _Supervisor(Multiprocess):
    """uvicorn's, which notices at once when a process dies that it waits for."""

    def keep_subprocess_alive(self) -> None:
        """Replace those that have died."""
        for process in self.processes:
            # While our copy of its end is open, the pipe to a dead process is silent for HUNG_S instead of closed.
            process.child_conn.close()
        super().keep_subprocess_alive()


def make_app_of_many() -> FastAPI:
    """The API in one of several processes, which uvicorn starts and asks for it by name. Exits where it cannot be
    made: that could not be made again either, and uvicorn then ends the others instead of trying for ever."""
    configure_logs()
    _leave_with_parent()
    try:
        settings = load_settings()
        return _make_app(settings, Database(settings.database_url))
    except Exception:
        log.exception("The API cannot be started with these settings.")
        sys.exit(STARTUP_FAILURE)


def _leave_with_parent() -> None:
    """End this process in order when the one that started it is gone, even by SIGKILL: nobody would end it else."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only processes that were started for it serve by several"

    def leave() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=leave, daemon=True).start()


def _make_app(settings: Settings, db: Database) -> FastAPI:
    store = S3Store.from_settings(settings)
    dashboard = mount.Dashboard(mount.Services(settings, db, store)) if settings.dashboard else None
    app = create_app(settings, db, store, dashboard)
    # What was made until now, modules and routes, stays as long as the process: each full collection of the garbage
    # collector would go through all of it, 50 ms in which nobody is answered.
    gc.collect()
    gc.freeze()
    return app


def _config(app: FastAPI | str, settings: Settings) -> uvicorn.Config:
    """How the API is served: bounded in connections, header sizes and time."""
    return uvicorn.Config(
        app,
        factory=isinstance(app, str),
        workers=settings.processes,
        host=settings.host,
        port=settings.port,
        http=BoundedHttp,
        limit_concurrency=1000,
        backlog=256,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_S,
        timeout_worker_healthcheck=HUNG_S,
        server_header=False,
        access_log=False,
        log_config=None,
        # Nothing in front of us is trusted to name the client.
        proxy_headers=False,
    )


def configure_logs() -> None:
    """JSON lines on stderr, ours and those of libraries. Ours go past the standard library's logging, which took a
    sixteenth of the time of a submission for the one line of its request."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="t"),
    ]
    rendered: list[structlog.types.Processor] = [
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("msg"),
        structlog.processors.JSONRenderer(serializer=_to_json),
    ]
    structlog.configure(
        processors=[*shared, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *rendered,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)


def _to_json(event: Any, **_: object) -> str:
    return to_json(event, fallback=str).decode()


if __name__ == "__main__":
    main()
