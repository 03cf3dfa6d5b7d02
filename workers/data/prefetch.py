"""One background thread that stays a few items ahead of its consumer."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Buffer(Generic[T]):
    """A bounded queue that can be closed from either end. The thread holds this and not the Prefetcher, so that a
    Prefetcher nobody holds any more is collected and ends its thread."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._ended = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Wait for room and add `item`; False if the consumer is gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def end(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def take(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items) or self._ended or self._closed)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _fill(items: Iterator[T], buffer: _Buffer[T]) -> None:
    error: BaseException | None = None
    try:
        for item in items:
            if not buffer.put(item):
                break
        close = getattr(items, "close", None)
        if close is not None:
            close()
    except BaseException as raised:  # noqa: BLE001 - raised again in the consumer, by take()
        error = raised
    buffer.end(error)


class Prefetcher(Generic[T]):
    """Iterates over `items`, made `depth` ahead in a thread. What the thread raises, the consumer gets, after the items
    before it. `close` (or garbage collection) ends the thread; the generator is closed in it."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self.wait_s = 0.0
        """Seconds the consumer has waited for items so far."""
        self._buffer: _Buffer[T] = _Buffer(depth)
        self._finalize = weakref.finalize(self, self._buffer.close)
        self._thread = threading.Thread(target=_fill, args=(items, self._buffer), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            return self._buffer.take()
        finally:
            self.wait_s += time.perf_counter() - start

    def close(self) -> None:
        """Drop what was made ahead and wait until the thread has ended."""
        self._finalize()
        self._thread.join()
