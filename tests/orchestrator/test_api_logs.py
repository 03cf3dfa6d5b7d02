"""Logs as read: merged by time, filtered, paged and followed, from chunks in the object store."""

from __future__ import annotations

import base64
import zlib
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from configs.states import AttemptState, JobState
from orchestrator.services import logs
from orchestrator.storage.db import Database
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.rows import T0, add_attempt, add_log_chunk, move, submit


@pytest.fixture
def job_id(api: TestClient) -> str:
    return str(submit(api)["id"])


@pytest.fixture
def two_attempts(job_id: str, db: Database, store: MemoryStore) -> str:
    """A job that ended after two attempts, with five lines of three streams."""
    first = add_attempt(db, job_id, 1, state=AttemptState.ENDED)
    second = add_attempt(db, job_id, 2, state=AttemptState.ENDED)
    add_log_chunk(store, first, "driver", 0, [(0, "start"), (5, "error: rank 1 is gone")])
    add_log_chunk(store, first, "rank-00000", 0, [(1, "step 1")])
    add_log_chunk(store, first, "rank-00000", 1, [(2, "step 2")])
    add_log_chunk(store, second, "driver", 0, [(6, "again")])
    move(db, job_id, JobState.FAILED, at=T0)
    return job_id


def read(api: TestClient, job_id: str, **query: Any) -> dict[str, Any]:
    response = api.get(f"/v1/jobs/{job_id}/logs", params=query)
    assert response.status_code == 200, response.text
    page: dict[str, Any] = response.json()
    return page


def messages(page: dict[str, Any]) -> list[str]:
    return [line["msg"] for line in page["lines"]]


ALL = ["start", "step 1", "step 2", "error: rank 1 is gone", "again"]


def test_streams_are_merged_by_time(api: TestClient, two_attempts: str) -> None:
    page = read(api, two_attempts)
    assert messages(page) == ALL
    assert page["complete"]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6])
def test_pages_go_on_where_the_last_one_ended(api: TestClient, two_attempts: str, limit: int) -> None:
    found: list[str] = []
    page = read(api, two_attempts, limit=limit)
    while not page["complete"]:
        found += messages(page)
        page = read(api, two_attempts, limit=limit, cursor=page["cursor"])
    assert found + messages(page) == ALL
    assert messages(read(api, two_attempts, cursor=page["cursor"])) == []


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"attempt": 2}, ["again"]),
        ({"attempt": 3}, []),
        ({"stream": "rank-00000"}, ["step 1", "step 2"]),
        ({"stream": "rank-0"}, []),
        ({"level": "warning"}, ["error: rank 1 is gone"]),
        ({"q": "STEP"}, ["step 1", "step 2"]),
        ({"tail": 2}, ["error: rank 1 is gone", "again"]),
        ({"tail": 3}, ["step 2", "error: rank 1 is gone", "again"]),
        ({"tail": 100}, ALL),
        ({"tail": 1, "stream": "rank-00000"}, ["step 2"]),
        ({"tail": 1, "q": "start"}, ["start"]),
        ({"tail": 1, "attempt": 1}, ["error: rank 1 is gone"]),
    ],
)
def test_filters(api: TestClient, two_attempts: str, query: dict[str, Any], expected: list[str]) -> None:
    assert messages(read(api, two_attempts, **query)) == expected


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ({"cursor": "x"}, "/cursor"),
        ({"cursor": "eJwDAAAAAAE="}, "/cursor"),
        ({"stream": "../../manifest"}, "/stream"),
        ({"level": "loud"}, "/level"),
        ({"tail": 0}, "/tail"),
        ({"follow": "true", "cursor": "x"}, "/cursor"),
    ],
)
def test_a_wrong_query_is_named(api: TestClient, two_attempts: str, query: dict[str, Any], pointer: str) -> None:
    response = api.get(f"/v1/jobs/{two_attempts}/logs", params=query)
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]


def test_a_tail_is_followed_by_what_comes_after_it(
    api: TestClient, db: Database, store: MemoryStore, job_id: str
) -> None:
    attempt = add_attempt(db, job_id)
    add_log_chunk(store, attempt, "driver", 0, [(0, "a"), (1, "b")])
    page = read(api, job_id, tail=1)
    assert (messages(page), page["complete"]) == (["b"], False)
    assert messages(read(api, job_id, cursor=page["cursor"])) == []
    add_log_chunk(store, attempt, "driver", 1, [(2, "c")])
    add_log_chunk(store, attempt, "rank-00000", 0, [(3, "d")])
    second = add_attempt(db, job_id, 2)
    add_log_chunk(store, second, "driver", 0, [(4, "e")])
    page = read(api, job_id, cursor=page["cursor"])
    assert messages(page) == ["c", "d"], "the first attempt has not ended: more may come before attempt 2"


def test_a_chunk_after_a_gap_waits_for_the_missing_one(
    api: TestClient, db: Database, store: MemoryStore, job_id: str
) -> None:
    attempt = add_attempt(db, job_id)
    add_log_chunk(store, attempt, "driver", 0, [(0, "a")])
    add_log_chunk(store, attempt, "driver", 2, [(2, "c")])
    page = read(api, job_id)
    assert messages(page) == ["a"]
    add_log_chunk(store, attempt, "driver", 1, [(1, "b")])
    assert messages(read(api, job_id, cursor=page["cursor"])) == ["b", "c"]


def test_a_log_is_complete_only_some_seconds_after_the_end(
    api: TestClient, db: Database, store: MemoryStore, job_id: str
) -> None:
    attempt = add_attempt(db, job_id, state=AttemptState.ENDED)
    add_log_chunk(store, attempt, "driver", 0, [(0, "a")])
    move(db, job_id, JobState.FAILED, at=datetime.now(UTC))
    page = read(api, job_id)
    assert (messages(page), page["complete"]) == (["a"], False)


def test_a_page_stops_after_so_many_bytes_whatever_the_filter_finds(
    api: TestClient, db: Database, store: MemoryStore, job_id: str
) -> None:
    attempt = add_attempt(db, job_id, state=AttemptState.ENDED)
    for chunk in range(20):
        add_log_chunk(store, attempt, "driver", chunk, [(chunk, "x" * 1_000_000)])
    add_log_chunk(store, attempt, "driver", 20, [(20, "needle")])
    move(db, job_id, JobState.FAILED, at=T0)
    page = read(api, job_id, q="needle")
    assert (messages(page), page["more"], page["complete"]) == ([], True, False)
    page = read(api, job_id, q="needle", cursor=page["cursor"])
    assert (messages(page), page["complete"]) == (["needle"], True)


def test_the_whole_log_as_text_cannot_forge_lines_or_move_the_cursor(
    api: TestClient, db: Database, store: MemoryStore, job_id: str
) -> None:
    attempt = add_attempt(db, job_id, state=AttemptState.ENDED)
    forged = "one\n2026-01-01T00:00:00.000+00:00 driver     error   forged\x1b[2J\u2028é"
    add_log_chunk(store, attempt, "driver", 0, [(0, forged), (1, "two")])
    response = api.get(f"/v1/jobs/{job_id}/logs?format=text")
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Disposition"] == f'attachment; filename="{job_id}.log"'
    assert response.text.split("\n") == [
        "2026-01-01T00:00:00.000+00:00 driver     info    one",
        "    2026-01-01T00:00:00.000+00:00 driver     error   forged\\x1b[2J\\u2028é",
        "2026-01-01T00:00:01.000+00:00 driver     info    two",
        "",
    ]


def test_a_job_without_attempts_has_an_empty_log(api: TestClient, job_id: str) -> None:
    page = read(api, job_id)
    assert (page["lines"], page["complete"]) == ([], False)
    assert api.get(f"/v1/jobs/{job_id}/logs?format=text").text == ""


@given(data=st.binary(max_size=60), start=st.integers(0, 60), window=st.integers(1, 20))
def test_lines_are_whole_whatever_the_window(data: bytes, start: int, window: int) -> None:
    store = MemoryStore()
    store.put("k", data)
    found = list(logs.raw_lines(store, "k", start, len(data), window))
    assert b"".join(found) == data[start:]
    assert all(b"\n" not in line[:-1] and line for line in found)
    assert all(line.endswith(b"\n") for line in found[:-1])


def test_a_cursor_that_unpacks_to_gigabytes_is_refused() -> None:
    bomb = base64.urlsafe_b64encode(zlib.compress(b"[" * 50_000_000, 9)).decode()
    with pytest.raises(logs.Invalid):
        logs.parse_cursor(bomb)


def test_lines_are_found_by_pattern_and_by_time(api: TestClient, db: Database, store: MemoryStore) -> None:
    job = submit(api)
    attempt = add_attempt(db, job["id"])
    lines = [(0.0, "step 1 loss: 2.5"), (1.0, "step 2 LOSS: nan"), (2.0, "a nan of another kind"), (3.0, "loss: inf")]
    add_log_chunk(store, attempt, "driver", 0, lines)
    path = f"/v1/jobs/{job['id']}/logs"

    def found(**query: Any) -> list[str]:
        answer = api.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return [line["msg"] for line in answer.json()["lines"]]

    assert found(regex="loss: (nan|inf)") == ["step 2 LOSS: nan", "loss: inf"]
    assert found(regex="loss: (nan|inf)", tail=1) == ["loss: inf"]
    assert found(since="2026-01-01T00:00:01Z", until="2026-01-01T00:00:03Z") == [lines[1][1], lines[2][1]]
    assert found(regex="^a ", q="nan", since="2026-01-01T01:00:00+01:00") == ["a nan of another kind"]
    assert "loss: inf" not in api.get(path, params={"regex": "nan", "format": "text"}).text


@pytest.mark.parametrize("pattern", ["(", "[a", "(?P<x", "*", "a{99999999999}"])
def test_a_pattern_that_is_none_is_refused(api: TestClient, pattern: str) -> None:
    answer = api.get(f"/v1/jobs/{submit(api)['id']}/logs", params={"regex": pattern})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/regex"


def test_a_pattern_that_never_ends_is_given_up(api: TestClient, db: Database, store: MemoryStore) -> None:
    job = submit(api)
    add_log_chunk(store, add_attempt(db, job["id"]), "driver", 0, [(0.0, "a" * 60 + "!")])
    answer = api.get(f"/v1/jobs/{job['id']}/logs", params={"regex": "(a+)+$"})
    assert answer.status_code == 422
    assert "takes longer" in answer.json()["detail"]


def test_times_say_where_they_are(api: TestClient) -> None:
    assert api.get(f"/v1/jobs/{submit(api)['id']}/logs?since=2026-01-01T00:00:00").status_code == 422
