"""Server-sent events: polled off the event loop, resumable by id, few per token, closed when the token is revoked."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from orchestrator.services.auth import Actor
from orchestrator.services.problems import TooManyStreams, Unauthorized
from orchestrator.storage.db import is_unavailable
from orchestrator.storage.store import StoreUnavailable

log = structlog.get_logger(__name__)
KEEPALIVE_S = 15
RECHECK_S = 15.0
_THREADS = 8
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Item:
    """One event of a stream. `id` is what the client gives back to go on after it; None where it could not."""

    id: str | None
    event: str
    data: str


@dataclass(frozen=True)
class Batch:
    """What one poll found."""

    items: list[Item] = field(default_factory=list)
    more: bool = False
    """There is more to read right now."""
    done: bool = False
    """There will never be more."""


class StreamLimit:
    """Counts open streams per token, and polls for all of them on a few threads of its own: however many streams are
    open and however slow the store is, ordinary requests find a free thread."""

    def __init__(self, per_token: int = 20) -> None:
        self.per_token = per_token
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()  # routes enter on threads of the pool, streams leave on the event loop
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="stream")

    def enter(self, token_id: str) -> None:
        """Raises TooManyStreams."""
        with self._lock:
            if self._open[token_id] < self.per_token:
                self._open[token_id] += 1
                return
        raise TooManyStreams(
            f"{self.per_token} streams are open for this token already.", hint="Close one of them first."
        )

    def leave(self, token_id: str) -> None:
        with self._lock:
            self._open[token_id] -= 1
            if self._open[token_id] <= 0:
                del self._open[token_id]

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, run on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Let the threads go; a poll that is under way finishes by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class EventStream(EventSourceResponse):
    """Follows `poll` until it is done, the client leaves, or `recheck` says that the token is no good any more.

    Every stream that was served to its end closes with an `end` event; a client that sees none reconnects with
    Last-Event-ID.

    Raises:
        TooManyStreams: the actor has too many open already.
    """

    def __init__(
        self,
        limit: StreamLimit,
        actor: Actor,
        poll: Callable[[], Batch],
        recheck: Callable[[], object],
        *,
        interval_s: float,
        recheck_s: float = RECHECK_S,
    ) -> None:
        limit.enter(actor.token_id)
        self._limit = limit
        self._token_id = actor.token_id
        super().__init__(_follow(limit, poll, recheck, interval_s, recheck_s), ping=KEEPALIVE_S, sep="\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._limit.leave(self._token_id)


async def _follow(
    limit: StreamLimit, poll: Callable[[], Batch], recheck: Callable[[], object], interval_s: float, recheck_s: float
) -> AsyncIterator[ServerSentEvent]:
    checked = time.monotonic()
    while True:
        try:
            if time.monotonic() - checked >= recheck_s:
                await limit.run(recheck)
                checked = time.monotonic()
            batch = await limit.run(poll)
        except Unauthorized as error:
            yield ServerSentEvent(event="error", data=error.detail)
            return
        except (SQLAlchemyError, StoreUnavailable) as error:
            if isinstance(error, SQLAlchemyError) and not is_unavailable(error):
                raise
            log.warning("stream_poll_failed", error=str(error))
            yield ServerSentEvent(comment="the server could not read on; trying again")
            batch = Batch()
        for item in batch.items:
            yield ServerSentEvent(id=item.id, event=item.event, data=item.data)
        if batch.done:
            yield ServerSentEvent(event="end", data="{}")
            return
        if not batch.more:
            await asyncio.sleep(interval_s)
