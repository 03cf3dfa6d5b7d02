"""Server-sent events, from a real server: resumable, kept alive, ended when the job has ended, bounded per token."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from configs.states import AttemptState, JobState
from orchestrator.services.auth import Actor
from orchestrator.services.problems import TooManyStreams, Unauthorized
from orchestrator.services.streams import Batch, EventStream, Item, StreamLimit
from orchestrator.storage.db import Database
from orchestrator.storage.events import record
from orchestrator.storage.store import StoreUnavailable
from orchestrator.storage.tables import AttemptRow
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.conftest import ADMIN_TOKEN
from tests.orchestrator.rows import T0, add_attempt, add_log_chunk, move, submit

HEADERS = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


@pytest.fixture
def live(app: FastAPI) -> Iterator[httpx.Client]:
    """A client of the app served on loopback by uvicorn, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, headers=HEADERS, timeout=20, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()


@dataclass
class Received:
    """One event as a client sees it."""

    id: str | None = None
    event: str = "message"
    data: list[str] = field(default_factory=list)


@contextmanager
def following(client: httpx.Client, path: str, **headers: str) -> Iterator[Iterator[Received]]:
    with client.stream("GET", path, headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["Content-Type"].startswith("text/event-stream")
        yield _parse(response.iter_lines())


def _parse(lines: Iterator[str]) -> Iterator[Received]:
    current = Received()
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if current.data:
                yield current
            current = Received()
        elif name == "data":
            current.data.append(value)
        elif name == "event":
            current.event = value
        elif name == "id":
            current.id = value


def note(db: Database, job_id: str, type_: str) -> None:
    with db.session() as session:
        record(session, job_id, type_, "said", "test")


@pytest.mark.db
def test_events_arrive_as_they_happen_until_the_job_has_ended(
    api: TestClient, live: httpx.Client, db: Database
) -> None:
    job_id = submit(api)["id"]
    with following(live, f"/v1/jobs/{job_id}/events/stream") as events:
        assert next(events).event == "job.queued"
        note(db, job_id, "first.fact")
        received = next(events)
        assert received.event == "first.fact"
        move(db, job_id, JobState.FAILED)
        assert [event.event for event in events] == ["job.failed", "end"]


def test_a_broken_stream_goes_on_after_the_last_event_seen(api: TestClient, live: httpx.Client, db: Database) -> None:
    job_id = submit(api)["id"]
    for name in ("a", "b", "c"):
        note(db, job_id, name)
    move(db, job_id, JobState.FAILED)
    path = f"/v1/jobs/{job_id}/events/stream"
    with following(live, path) as events:
        whole = list(events)
    assert [event.event for event in whole] == ["job.queued", "a", "b", "c", "job.failed", "end"]
    seen = whole[2].id
    assert seen is not None
    with following(live, path, **{"Last-Event-ID": seen}) as events:
        assert [event.event for event in events] == ["c", "job.failed", "end"]
    with following(live, f"{path}?after={seen}") as events:
        assert [event.event for event in events] == ["c", "job.failed", "end"]


def test_log_lines_arrive_and_resume_exactly(
    api: TestClient, live: httpx.Client, db: Database, store: MemoryStore
) -> None:
    job_id = submit(api)["id"]
    attempt = add_attempt(db, job_id)
    add_log_chunk(store, attempt, "driver", 0, [(0, "a"), (1, "b")])
    path = f"/v1/jobs/{job_id}/logs?follow=true"
    with following(live, path) as lines:
        first = [next(lines), next(lines)]
        assert ['"msg":"a"' in first[0].data[0], '"msg":"b"' in first[1].data[0]] == [True, True]
        assert first[0].id is None, "an id in the middle of a batch would skip what follows"
    cursor = first[1].id
    assert cursor is not None
    add_log_chunk(store, attempt, "driver", 1, [(2, "c")])
    add_log_chunk(store, attempt, "rank-00000", 0, [(3, "d")])
    with db.session() as session:
        session.get_one(AttemptRow, attempt).state = AttemptState.ENDED
    move(db, job_id, JobState.FAILED, at=T0)
    with following(live, path, **{"Last-Event-ID": cursor}) as lines:
        assert [line.event for line in lines] == ["line", "line", "end"]
    with following(live, f"{path}&tail=1") as lines:
        received = list(lines)
    assert [line.event for line in received] == ["line", "end"]
    assert '"msg":"d"' in received[0].data[0]


def test_a_stream_in_progress_does_not_hold_up_other_requests_or_the_shutdown(
    api: TestClient, live: httpx.Client
) -> None:
    job_id = submit(api)["id"]
    with following(live, f"/v1/jobs/{job_id}/events/stream") as events:
        next(events)
        assert live.get(f"/v1/jobs/{job_id}").status_code == 200


# -- the stream itself -------------------------------------------------------------------------------------------------
ACTOR = Actor("tok_1", "a", "viewer")


async def _collect(stream: EventStream) -> list[str]:
    return [f"{event.event or ''}{event.comment or ''}" async for event in stream.body_iterator]  # type: ignore[union-attr]


def test_streams_are_counted_per_token_and_given_back() -> None:
    limit = StreamLimit(per_token=1)
    stream = EventStream(limit, ACTOR, lambda: Batch(done=True), lambda: None, interval_s=0)
    with pytest.raises(TooManyStreams):
        EventStream(limit, ACTOR, lambda: Batch(done=True), lambda: None, interval_s=0)
    EventStream(limit, Actor("tok_2", "b", "viewer"), lambda: Batch(done=True), lambda: None, interval_s=0)

    sent: list[bytes] = []

    async def receive() -> dict[str, str]:
        await asyncio.sleep(3600)
        raise AssertionError("the stream ends first")

    async def send(message: dict[str, bytes]) -> None:
        sent.append(message.get("body", b""))

    asyncio.run(stream({"type": "http", "method": "GET"}, receive, send))  # type: ignore[arg-type]
    assert b"event: end" in b"".join(sent)
    EventStream(limit, ACTOR, lambda: Batch(done=True), lambda: None, interval_s=0)
    limit.close()


def test_too_many_streams_is_a_problem(api: TestClient, app: FastAPI) -> None:
    job_id = submit(api)["id"]
    limit: StreamLimit = app.state.services.streams
    token_id = api.get("/v1/whoami").json()["token_id"]
    for _ in range(limit.per_token):
        limit.enter(token_id)
    response = api.get(f"/v1/jobs/{job_id}/events/stream")
    assert (response.status_code, response.json()["code"]) == (429, "too_many_streams")


def test_a_store_that_is_away_interrupts_but_does_not_end_a_stream() -> None:
    answers: Iterator[Batch | Exception] = iter(
        [
            Batch([Item("1", "line", "a")]),
            StoreUnavailable("away"),
            Batch([Item("2", "line", "b")], done=True),
        ]
    )

    def poll() -> Batch:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    limit = StreamLimit()
    found = asyncio.run(_collect(EventStream(limit, ACTOR, poll, lambda: None, interval_s=0)))
    assert found == ["line", "the server could not read on; trying again", "line", "end"]
    limit.close()


def test_a_revoked_token_ends_its_streams() -> None:
    def revoked() -> None:
        raise Unauthorized("This token was revoked.")

    limit = StreamLimit()
    found = asyncio.run(_collect(EventStream(limit, ACTOR, Batch, revoked, interval_s=0, recheck_s=0)))
    assert found == ["error"]
    limit.close()
