"""How requests are read: whole ones of any chunking, and none whose head has no end."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from orchestrator.api.http import MAX_HEAD_BYTES, BoundedHttp

ENDLESS = 1000 * MAX_HEAD_BYTES
"""Far more than the sockets' buffers hold."""


async def count_body(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that answers with the number of bytes of the body."""
    num_bytes = len(await Request(scope, receive).body())
    await PlainTextResponse(str(num_bytes))(scope, receive, send)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(count_body, http=BoundedHttp, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield int(listener.getsockname()[1])
    server.should_exit = True
    thread.join(10)
    listener.close()


def answers(port: int, *pieces: bytes) -> bytes:
    """All that comes back for these pieces, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):  # refused meanwhile: the answer, if it is still to be had, says so
            for piece in pieces:
                connection.sendall(piece)
        found = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                found += chunk
        return found


def head(*lines: bytes, last: bytes = b"Connection: close") -> bytes:
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: patchwork", *lines, last, b"", b""])


def test_a_head_within_the_bound_is_read(port: int) -> None:
    value = b"x" * (MAX_HEAD_BYTES - 200)
    assert answers(port, head(b"X-Long: " + value, b"Content-Length: 0")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "long",
    [
        head(b"X-Long: " + b"x" * MAX_HEAD_BYTES, b"Content-Length: 0"),
        head(*(b"X-%d: y" % number for number in range(9000)), b"Content-Length: 0"),
        b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: patchwork\r\nConnection: close\r\n\r\n",
    ],
    ids=["one header", "many headers", "path"],
)
@pytest.mark.parametrize("piece", [1000, 1_000_000], ids=["in pieces", "at once"])
def test_a_longer_head_is_refused(port: int, long: bytes, piece: int) -> None:
    found = answers(port, *(long[i : i + piece] for i in range(0, len(long), piece)))
    assert found.startswith(b"HTTP/1.1 400 ") or found == b"", found[:200]
    assert b"200 OK" not in found


@pytest.mark.parametrize("begin", [b"GET / HTTP/1.1\r\nX-Endless: ", b"GET /"], ids=["header", "path"])
def test_a_head_without_end_is_cut_off(port: int, begin: bytes) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(begin)
        with contextlib.suppress(ConnectionError):
            while sent < ENDLESS:
                sent += connection.send(b"x" * 4096)
    assert sent < ENDLESS


def test_a_body_may_be_longer_than_a_head(port: int) -> None:
    body = b"b" * (5 * MAX_HEAD_BYTES)
    request = head(b"Content-Length: %d" % len(body))
    assert answers(port, request + body).endswith(str(len(body)).encode())
    assert answers(port, request[:30], request[30:], *(body[i : i + 5000] for i in range(0, len(body), 5000))).endswith(
        str(len(body)).encode()
    )


def test_each_request_of_a_connection_is_counted_for_itself(port: int) -> None:
    value = b"X-Long: " + b"x" * (MAX_HEAD_BYTES // 2)
    kept = head(value, b"Content-Length: 0", last=b"Connection: keep-alive")
    found = answers(port, *[kept[:100], kept[100:]] * 5, head(value, b"Content-Length: 0"))
    assert found.count(b"HTTP/1.1 200 ") == 6
    # What follows a long body at once begins in the piece that the body ends in.
    body = b"b" * (3 * MAX_HEAD_BYTES)
    first = head(b"Content-Length: %d" % len(body), last=b"Connection: keep-alive") + body
    assert answers(port, first + kept[:100], kept[100:], head(b"Content-Length: 0")).count(b"HTTP/1.1 200 ") == 3


def test_what_is_no_http_is_refused(port: int) -> None:
    assert answers(port, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")
