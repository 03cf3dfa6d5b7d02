"""The client: retries, idempotency, errors as the server words them, streams that go on where they were cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from orchestrator.client import ApiError, Client, NotConfigured, StreamEnded, Unreachable, connect
from orchestrator.embedded.data_dir import DataDir

Handler = Callable[[httpx.Request], httpx.Response]
WHOAMI = {"name": "ada", "role": "member", "token_id": "tok_1"}
PROBLEM = {
    "title": "Unprocessable",
    "status": 422,
    "detail": "The job description is not valid.",
    "code": "spec_invalid",
    "errors": [
        {"pointer": "/optim/lr", "message": "expected a number above 0", "value": -1},
        {"pointer": "/model/depht", "message": "unknown field 'depht'"},
    ],
    "hint": "Correct the fields and send it again.",
}


def client_of(handler: Handler) -> Client:
    return Client("http://patchwork.test", "pw_secret", transport=httpx.MockTransport(handler))


def answers(*responses: httpx.Response | Exception) -> tuple[Handler, list[httpx.Request]]:
    """A handler that gives these answers in turn, and the requests it saw."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        answer = responses[len(seen)]
        seen.append(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return handle, seen


def test_a_read_is_repeated_while_the_server_is_away() -> None:
    handler, seen = answers(httpx.ConnectError("refused"), httpx.Response(503), httpx.Response(200, json=WHOAMI))
    assert client_of(handler).whoami().name == "ada"
    assert len(seen) == 3
    assert seen[0].headers["Authorization"] == "Bearer pw_secret"


def test_a_refusal_is_not_repeated_and_says_everything() -> None:
    handler, seen = answers(httpx.Response(422, json=PROBLEM))
    with pytest.raises(ApiError) as caught:
        client_of(handler).jobs.create({"kind": "pretrain"})
    assert len(seen) == 1
    for part in ("/optim/lr: expected a number above 0", "/model/depht: unknown field", "Correct the fields"):
        assert part in str(caught.value)
    assert caught.value.status == 422


def test_an_answer_that_is_no_problem_document_still_becomes_an_api_error() -> None:
    handler, _ = answers(httpx.Response(404, text="<html>nginx</html>"))
    with pytest.raises(ApiError, match="answered 404: <html>nginx"):
        client_of(handler).whoami()


def test_after_the_last_try_the_server_is_unreachable() -> None:
    handler, seen = answers(*[httpx.ConnectError("refused")] * 5)
    with pytest.raises(Unreachable, match="does not answer: refused"):
        client_of(handler).whoami()
    assert len(seen) == 5


def test_a_repeated_submission_carries_the_same_key() -> None:
    handler, seen = answers(httpx.ReadTimeout("no answer"), httpx.Response(409, json={**PROBLEM, "status": 409}))
    with pytest.raises(ApiError):
        client_of(handler).jobs.create({"kind": "pretrain"}, {"optim.lr": 0.1})
    first, second = seen
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"] != ""
    assert json.loads(first.content) == {"spec": {"kind": "pretrain"}, "overrides": {"optim.lr": 0.1}}


def test_a_repeated_resumption_carries_the_same_key() -> None:
    refused = httpx.Response(409, json={**PROBLEM, "status": 409})
    handler, seen = answers(httpx.ReadTimeout("no answer"), refused)
    with pytest.raises(ApiError):
        client_of(handler).jobs.resume("job_x")
    first, second = seen
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"] != ""


def test_making_a_token_is_never_repeated() -> None:
    handler, seen = answers(httpx.ReadTimeout("no answer"))
    with pytest.raises(Unreachable):
        client_of(handler).create_token("ada")
    assert len(seen) == 1


def log_event(text: str, id_: str | None = None) -> str:
    line = json.dumps({"t": "2026-01-01T00:00:00Z", "stream": "driver", "msg": text})
    return (f"id: {id_}\n" if id_ else "") + f"event: line\ndata: {line}\n\n"


def sse(*parts: str) -> httpx.Response:
    return httpx.Response(200, text="".join(parts), headers={"Content-Type": "text/event-stream"})


def test_a_cut_stream_goes_on_after_the_last_id_and_ends_when_the_server_says_so() -> None:
    handler, seen = answers(
        sse(": hello\n\n", log_event("one"), log_event("two", "cursor-2")),
        httpx.ConnectError("cut"),
        sse(log_event("three", "cursor-3"), "event: end\ndata: {}\n\n"),
    )
    lines = client_of(handler).jobs.follow_logs("job_x", tail=10)
    assert [line.msg for line in lines] == ["one", "two", "three"]
    assert "Last-Event-ID" not in seen[0].headers
    assert seen[0].url.params["tail"] == "10"
    assert seen[2].headers["Last-Event-ID"] == "cursor-2"
    assert "tail" not in seen[2].url.params


def test_a_stream_the_server_gives_up_is_an_error() -> None:
    handler, _ = answers(sse(log_event("one", "1"), "event: error\ndata: The token was revoked.\n\n"))
    lines = client_of(handler).jobs.follow_logs("job_x")
    assert next(lines).msg == "one"
    with pytest.raises(StreamEnded, match="revoked"):
        next(lines)


def test_the_token_is_not_sent_to_the_object_store() -> None:
    redirect = httpx.Response(307, headers={"Location": "http://store.test:8333/bucket/key?signature=1"})
    handler, seen = answers(redirect, httpx.Response(206, content=b"bytes"))
    with client_of(handler).checkpoints.read("ckpt_1", "shards/w", {"Range": "bytes=0-4"}) as response:
        assert response.read() == b"bytes"
    assert seen[1].url.host == "store.test"
    assert seen[1].headers["Range"] == "bytes=0-4"
    assert "Authorization" not in seen[1].headers


def test_pages_are_walked_to_the_end() -> None:
    handler, seen = answers(
        httpx.Response(200, json={"items": [], "next_cursor": "c2"}),
        httpx.Response(200, json={"items": [], "next_cursor": None}),
    )
    assert list(client_of(handler).jobs.list(state=["RUNNING", "QUEUED"])) == []
    assert seen[0].url.params.get_list("state") == ["RUNNING", "QUEUED"]
    assert seen[1].url.params["cursor"] == "c2"


def test_connect_takes_what_is_given_then_the_environment_then_the_running_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PATCHWORK_URL", "PATCHWORK_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    directory = DataDir(tmp_path)
    with pytest.raises(NotConfigured, match="patchwork up"):
        connect(data_dir=tmp_path)
    directory.write_client("http://127.0.0.1:1", "pw_stack")
    assert directory.client_file.stat().st_mode & 0o777 == 0o600

    def token(client: Client) -> tuple[str, str]:
        handler, seen = answers(httpx.Response(200, json=WHOAMI))
        connected = connect(client.url, data_dir=tmp_path, transport=httpx.MockTransport(handler))
        connected.whoami()
        return connected.url, seen[0].headers.get("Authorization", "")

    assert connect(data_dir=tmp_path).url == "http://127.0.0.1:1"
    monkeypatch.setenv("PATCHWORK_URL", "http://env.test")
    monkeypatch.setenv("PATCHWORK_TOKEN", "pw_env")
    assert connect(data_dir=tmp_path).url == "http://env.test"
    assert token(connect("http://given.test", data_dir=tmp_path)) == ("http://given.test", "Bearer pw_env")


def test_the_stacks_token_is_not_sent_to_another_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATCHWORK_URL", "PATCHWORK_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    DataDir(tmp_path).write_client("http://127.0.0.1:1", "pw_stack")
    handler, seen = answers(httpx.Response(200, json=WHOAMI))
    connect("http://elsewhere.test", data_dir=tmp_path, transport=httpx.MockTransport(handler)).whoami()
    assert "Authorization" not in seen[0].headers


def test_log_lines_go_on_over_an_empty_page_while_there_is_more() -> None:
    """With a filter a page may end before it has found anything."""
    line = {"t": "2026-01-01T00:00:00Z", "stream": "driver", "level": "info", "msg": "found"}
    handler, seen = answers(
        httpx.Response(200, json={"lines": [], "cursor": "a", "more": True, "complete": False}),
        httpx.Response(200, json={"lines": [line], "cursor": "b", "more": False, "complete": False}),
    )
    assert [found.msg for found in client_of(handler).jobs.log_lines("job_1", q="found")] == ["found"]
    assert seen[1].url.params["cursor"] == "a"


def test_a_server_that_is_away_is_unreachable_for_readiness_too() -> None:
    handler, _ = answers(httpx.ConnectError("refused"))
    with pytest.raises(Unreachable, match="does not answer: refused"):
        client_of(handler).readiness()
