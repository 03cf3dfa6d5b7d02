"""Who is looking at a page: the session cookie of a request, and the same person again while the page stays open."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from orchestrator.services.auth import Actor
from orchestrator.services.sessions import actor_of_session, open_session
from orchestrator.settings import Settings
from orchestrator.storage.db import Database

PATH = "/dashboard"
COOKIE = "patchwork_session"
_THREADS = 6
_Result = TypeVar("_Result")


class Access:
    """Opens sessions and looks them up; runs what blocks on threads of the dashboard's own, so that however many pages
    are open, requests to the API find a free one."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        secret = settings.session_secret.get_secret_value() or secrets.token_urlsafe(32)
        self._secret = secret.encode()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="dashboard")

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, run on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def actor(self, connection: HTTPConnection) -> Actor:
        """Whoever's cookie this is. Raises Unauthorized."""
        cookie = connection.cookies.get(COOKIE)
        return await self.run(lambda: self.look_up(cookie))

    def look_up(self, cookie: str | None) -> Actor:
        """Whoever's cookie this is. Raises Unauthorized."""
        with self._db.reader() as session:
            return actor_of_session(session, self._secret, cookie, datetime.now(UTC))

    async def open(self, token: str) -> str:
        """The cookie of a new session. Raises Unauthorized."""

        def work() -> str:
            with self._db.reader() as session:
                return open_session(session, self._secret, token, datetime.now(UTC))[1]

        return await self.run(work)


def is_same_origin(connection: HTTPConnection) -> bool:
    """Whether a browser sent this from one of our own pages (or no browser did)."""
    origin = connection.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == connection.headers.get("host")
