"""A proxy that does to HTTP requests what networks and services do to them: refuse, hang, lose answers, change bytes.

It forwards everything as it came, the Host header included, so that S3 signatures made for the proxy's address stay
valid. Rules are added and removed while it runs; the first that matches a request decides.
"""

from __future__ import annotations

import http.client
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Action = Literal["answer", "hang", "lose", "hold", "change"]


@dataclass
class Rule:
    """What happens to requests whose method and path (with its query) match.

    answer  `status` with `body`, without asking the service
    hang    nothing, until the rule is removed; then the connection is closed
    lose    the service does it, the connection is closed without its answer
    hold    as hang, after `after_bytes` of the request's body were read: the client dies or waits in the middle
    change  the answer's body goes through `change`
    """

    action: Action
    method: str
    path: str
    status: int = 503
    body: bytes = b""
    after_bytes: int = 0
    change: Callable[[bytes], bytes] = bytes
    times: int | None = None
    """How often; None: always."""
    probability: float = 1.0
    hits: int = 0
    hit: threading.Event = field(default_factory=threading.Event)
    removed: threading.Event = field(default_factory=threading.Event)

    def matches(self, method: str, path: str) -> bool:
        return re.fullmatch(self.method, method) is not None and re.search(self.path, path) is not None


class FaultProxy:
    """Listens on a free loopback port; `target` is the URL it forwards to."""

    def __init__(self, seed: int = 0) -> None:
        self.target = ""
        self.requests: list[tuple[str, str]] = []
        """Every request: method, path."""
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def front(self, url: str) -> str:
        """Forward to `url`; returns the proxy's own."""
        self.target = url
        return self.url

    @contextmanager
    def rule(self, action: Action, method: str, path: str, **options: Any) -> Iterator[Rule]:
        """The rule holds within the block."""
        rule = Rule(action, method, path, **options)
        with self._lock:
            self._rules.append(rule)
        try:
            yield rule
        finally:
            with self._lock:
                self._rules.remove(rule)
            rule.removed.set()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def decide(self, method: str, path: str) -> Rule | None:
        with self._lock:
            self.requests.append((method, path))
            for rule in self._rules:
                if not rule.matches(method, path) or (rule.times is not None and rule.hits >= rule.times):
                    continue
                if self._random.random() < rule.probability:
                    rule.hits += 1
                    rule.hit.set()
                    return rule
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        rule = self.owner.decide(self.command, unquote(self.path))
        length = int(self.headers.get("Content-Length") or 0)
        if rule is not None and rule.action in ("hang", "hold"):
            self.rfile.read(min(length, rule.after_bytes))
            rule.removed.wait()
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if rule is not None and rule.action == "answer":
            self._answer(rule.status, {}, rule.body)
            return
        try:
            status, headers, answer = self._forward(body)
        except OSError:  # the service is down: so are we
            self.close_connection = True
            return
        if rule is not None and rule.action == "lose":
            self.close_connection = True
            return
        if rule is not None and rule.action == "change":
            answer = rule.change(answer)
        self._answer(status, headers, answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_OPTIONS = _handle

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        target = urlsplit(self.owner.target)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            headers = {
                name: value
                for name, value in response.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "keep-alive")
            }
            if self.command == "HEAD" and (size := response.getheader("Content-Length")):
                headers["Content-Length"] = size
            return response.status, headers, response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers and status not in (204, 304):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
