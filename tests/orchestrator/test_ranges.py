"""Ranges read straight into memory, from a real server: whole, short, refused, cut off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestrator.connection import Unreachable
from orchestrator.ranges import RangeReader, is_direct

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Files(BaseHTTPRequestHandler):
    """/file answers ranges, /whole ignores them, /cut ends in the middle, everything else is refused."""

    protocol_version = "HTTP/1.1"
    connections: set[tuple[str, int]] = set()  # noqa: RUF012 - one server in these tests

    def do_GET(self) -> None:
        self.connections.add(self.client_address)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        if self.path.startswith("/file?key=a%2Fb"):
            self._answer(206, CONTENT[first : last + 1])
        elif self.path == "/whole":
            self._answer(200, CONTENT)
        elif self.path == "/cut":
            self.send_response(206)
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.write(CONTENT[first : (first + last) // 2])
            self.close_connection = True
        else:
            self._answer(403, b"<Error>no</Error>")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.daemon_threads = True
    Files.connections.clear()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def reader() -> Iterator[RangeReader]:
    reader = RangeReader(10.0)
    yield reader
    reader.close()


def test_ranges_come_over_one_connection(address: str, reader: RangeReader) -> None:
    for start, count in ((0, 1000), (5000, 300_000), (len(CONTENT) - 10, 10)):
        # The signed query goes as it is.
        assert reader.read(f"{address}/file?key=a%2Fb&sig=x%3D", start, count) == (206, CONTENT[start : start + count])
    assert len(Files.connections) == 1


def test_a_file_that_ends_before_gives_what_there_is(address: str, reader: RangeReader) -> None:
    status, data = reader.read(f"{address}/file?key=a%2Fb", len(CONTENT) - 10, 100)
    assert (status, data) == (206, CONTENT[-10:])


def test_a_server_that_ignores_ranges_is_believed_for_the_beginning_only(address: str, reader: RangeReader) -> None:
    assert reader.read(f"{address}/whole", 0, 1000) == (200, CONTENT[:1000])
    assert reader.read(f"{address}/whole", 10, 1000) == (416, b"")
    # The rest of the file was not taken for the next answer.
    assert reader.read(f"{address}/file?key=a%2Fb", 7, 20) == (206, CONTENT[7:27])


def test_a_refusal_is_a_status(address: str, reader: RangeReader) -> None:
    assert reader.read(f"{address}/other", 0, 10) == (403, b"")
    assert reader.read(f"{address}/file?key=a%2Fb", 0, 10) == (206, CONTENT[:10])


def test_what_is_cut_off_is_short_or_told(address: str, reader: RangeReader) -> None:
    status, data = reader.read(f"{address}/cut", 0, 1000)
    assert (status, len(data)) == (206, 499)
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1 does not answer"):
        reader.read("http://127.0.0.1:9/file", 0, 10)
    assert reader.read(f"{address}/file?key=a%2Fb", 0, 10)[0] == 206


def test_proxies_are_left_to_the_other_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert is_direct("https://store.example/bucket/key?sig=1")
    assert not is_direct("s3://bucket/key")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert not is_direct("https://store.example/bucket/key")
    assert is_direct("http://127.0.0.1:8333/bucket/key")
    monkeypatch.setenv("no_proxy", "store.example")
    assert is_direct("https://store.example/bucket/key")
