"""`python -m orchestrator.api.server`: the API as a process."""

from __future__ import annotations

import gc
import logging
import signal
from types import FrameType

import structlog
import uvicorn

from orchestrator.api.app import create_app
from orchestrator.dashboard import mount
from orchestrator.settings import Settings, load_settings
from orchestrator.storage.db import Database
from orchestrator.storage.store import S3Store

GRACE_S = 5
"""From SIGTERM to the end of requests still open; streams are closed at once and their clients reconnect."""


def main() -> None:
    """Bring the schema up to date and serve until SIGINT or SIGTERM."""
    configure_logs()
    # uvicorn handles these while it serves and raises them again when it is done: an orderly end, not a death.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    settings = load_settings()
    db = Database(settings.database_url)
    db.upgrade()
    try:
        config = server_config(settings, db)
        _leave_to_stay()
        uvicorn.Server(config).run()
    finally:
        db.close()


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _leave_to_stay() -> None:
    """Take what was made until now, modules and routes, out of the garbage collector's sight: it stays as long as the
    process, and each full collection would go through all of it, 50 ms in which nobody is answered."""
    gc.collect()
    gc.freeze()


def server_config(settings: Settings, db: Database) -> uvicorn.Config:
    """How the API is served: bounded in connections, header sizes and time."""
    store = S3Store.from_settings(settings)
    dashboard = mount.Dashboard(mount.Services(settings, db, store)) if settings.dashboard else None
    return uvicorn.Config(
        create_app(settings, db, store, dashboard),
        host=settings.host,
        port=settings.port,
        # h11 bounds the size of a request's head; httptools does not.
        http="h11",
        h11_max_incomplete_event_size=64 * 1024,
        limit_concurrency=1000,
        backlog=256,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        access_log=False,
        log_config=None,
        # Nothing in front of us is trusted to name the client.
        proxy_headers=False,
    )


def configure_logs() -> None:
    """JSON lines on stderr, ours and those of libraries."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="t"),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.EventRenamer("msg"),
                structlog.processors.JSONRenderer(default=str),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)


if __name__ == "__main__":
    main()
