"""One reader of each view for however many pages show it: a page follows a feed, and hears of what has changed.

A feed that nobody follows reads nothing. Each look happens on a thread; pages hear of it on the event loop, at most
once a second, and only of what differs from what they heard before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.dashboard.access import Access
from orchestrator.services.problems import ApiError
from orchestrator.storage.db import is_unavailable
from orchestrator.storage.store import StoreError

log = structlog.get_logger(__name__)
EVERY_S = 1.0
SELDOM_S = 15.0
"""For what does not change by itself any more, such as a job that has ended."""
_View = TypeVar("_View")


@dataclass(frozen=True)
class Look(Generic[_View]):
    """What a feed's reader found, and when it wants to look again."""

    view: _View
    again_s: float = EVERY_S


@dataclass(frozen=True)
class Trouble:
    """A look that failed: what to tell the person who waits for it. The feed goes on trying."""

    message: str


class Feed(Generic[_View]):
    """A view of the database, read again and again while somebody follows it."""

    def __init__(self, access: Access, read: Callable[[], Look[_View]]) -> None:
        self._access = access
        self._read = read
        self._followers: dict[int, Callable[[_View | Trouble], None]] = {}
        self._next = 0
        self._last: _View | Trouble | None = None
        self._poke = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_followed(self) -> bool:
        return bool(self._followers)

    def follow(self, on_change: Callable[[_View | Trouble], None]) -> Callable[[], None]:
        """Tell `on_change` of every view from now on, the last one known first. Returns how to stop that."""
        number, self._next = self._next, self._next + 1
        self._followers[number] = on_change
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        elif self._last is not None:
            on_change(self._last)
        return lambda: self._leave(number)

    def look_now(self) -> None:
        """Do not wait for the next second: something was changed from here."""
        self._poke.set()

    def _leave(self, number: int) -> None:
        self._followers.pop(number, None)
        if not self._followers and self._task is not None:
            self._task.cancel()
            self._task, self._last = None, None

    async def _run(self) -> None:
        while self._followers:
            self._poke.clear()
            look = await self._look()
            found: _View | Trouble = look if isinstance(look, Trouble) else look.view
            if found != self._last:
                self._last = found
                for on_change in list(self._followers.values()):
                    on_change(found)
            again_s = EVERY_S if isinstance(look, Trouble) else look.again_s
            # Poked or not, not more than once a second.
            await asyncio.sleep(min(again_s, EVERY_S) / 2)
            try:
                await asyncio.wait_for(self._poke.wait(), max(again_s - EVERY_S / 2, 0.01))
            except TimeoutError:
                continue

    async def _look(self) -> Look[_View] | Trouble:
        try:
            return await self._access.run(self._read)
        except ApiError as error:
            return Trouble(error.detail)
        except (SQLAlchemyError, StoreError) as error:
            if isinstance(error, SQLAlchemyError) and not is_unavailable(error):
                log.exception("feed_failed")
                return Trouble("This could not be read. The server's log says why.")
            return Trouble("The server cannot read its data at the moment. It is trying again.")
        except Exception:
            log.exception("feed_failed")
            return Trouble("This could not be read. The server's log says why.")


class Feeds:
    """The feeds of this process, by what they show."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._feeds: dict[Hashable, Feed[Any]] = {}

    def feed(self, key: Hashable, read: Callable[[], Look[_View]]) -> Feed[_View]:
        """The feed of `key`; the first who asks says how it is read."""
        for stale in [k for k, feed in self._feeds.items() if k != key and not feed.is_followed]:
            del self._feeds[stale]
        return self._feeds.setdefault(key, Feed(self._access, read))

    def look_now(self) -> None:
        """Something was changed from here: let every feed look."""
        for feed in self._feeds.values():
            feed.look_now()
