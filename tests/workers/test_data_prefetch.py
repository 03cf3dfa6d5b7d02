"""The background thread of the loaders."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from workers.data.prefetch import Prefetcher


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "condition not met in 10 s"
        time.sleep(0.001)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_and_end() -> None:
    assert list(Prefetcher(iter(range(100)), depth=3)) == list(range(100))


def test_it_works_ahead_but_not_further_than_told() -> None:
    taken, furthest = 0, 0

    def items() -> Iterator[int]:
        nonlocal furthest
        for item in count():
            furthest = max(furthest, item - taken)
            yield item

    prefetcher = Prefetcher(items(), depth=3)
    wait_until(lambda: furthest == 3)
    for _ in range(50):
        taken += 1  # Before taking: the thread may go on as soon as there is room.
        next(prefetcher)
    prefetcher.close()
    assert furthest == 3


def test_an_error_reaches_the_consumer_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("damaged")

    prefetcher = Prefetcher(items(), depth=3)
    assert [next(prefetcher), next(prefetcher)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            next(prefetcher)


def test_close_ends_the_thread_and_closes_the_generator_in_it() -> None:
    closed_in: list[str] = []

    def items() -> Iterator[int]:
        try:
            yield from count()
        finally:
            closed_in.append(threading.current_thread().name)

    prefetcher = Prefetcher(items(), depth=2)
    next(prefetcher)
    prefetcher.close()
    prefetcher.close()
    assert closed_in == ["prefetch"]
    assert list(prefetcher) == []
    assert not prefetch_threads()


def test_a_forgotten_prefetcher_ends_its_thread() -> None:
    prefetcher = Prefetcher(count(), depth=2)
    next(prefetcher)
    assert prefetch_threads()
    del prefetcher
    gc.collect()
    wait_until(lambda: not prefetch_threads())


def test_the_time_waited_is_counted() -> None:
    released = threading.Event()

    def items() -> Iterator[int]:
        released.wait(10)
        yield 1

    prefetcher = Prefetcher(items(), depth=1)
    timer = threading.Timer(0.05, released.set)
    timer.start()
    start = time.perf_counter()
    next(prefetcher)
    elapsed = time.perf_counter() - start
    assert 0.5 * elapsed < prefetcher.wait_s <= elapsed
    timer.join()
