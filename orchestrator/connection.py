"""HTTP with retries and typed errors, and event streams that go on where they were cut: what the client works with.

PatchworkError
├── ApiError        the server refused; holds its problem (RFC 9457): status, code, what is wrong where, what to do
├── Unreachable     no answer, after every retry
└── StreamEnded     the server closed a stream for good, for example because the token was revoked
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from orchestrator.schemas import Problem

Model = TypeVar("Model", bound=BaseModel)
Params = Mapping[str, Any]
_RETRY_STATUS = (429, 502, 503, 504)
_NUM_TRIES = 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0


class PatchworkError(Exception):
    """The base of all errors of the client."""


class ApiError(PatchworkError):
    """The server refused. `problem` says what, where and what to do next; str() says all of it in lines."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        lines = [problem.detail]
        lines += [f"  {e.pointer or '/'}: {e.message}" for e in problem.errors if len(problem.errors) > 1]
        if problem.hint:
            lines.append(problem.hint)
        super().__init__("\n".join(lines))

    @property
    def status(self) -> int:
        return self.problem.status


class Unreachable(PatchworkError):
    """The server did not answer."""


class StreamEnded(PatchworkError):
    """The server ended a stream early and will not go on with it."""


@dataclass(frozen=True)
class _Message:
    id: str
    event: str
    data: str


class Connection:
    """HTTP with retries and typed errors: what the parts of the client share."""

    def __init__(self, url: str, token: str | None, timeout_s: float, transport: httpx.BaseTransport | None) -> None:
        self.url = url.rstrip("/")
        headers = {"User-Agent": "patchwork-client"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        # A proxy from the environment must not see a loopback server's token.
        local = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
        self.http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout_s, transport=transport, trust_env=not local
        )

    def get(self, model: type[Model], path: str, params: Params | None = None) -> Model:
        return parse(model, self.request("GET", path, params=params))

    def post(
        self, model: type[Model], path: str, body: object = None, params: Params | None = None, key: str | None = None
    ) -> Model:
        """POST that the server takes once only, however often it is sent (`key`, or by its nature)."""
        headers = {"Idempotency-Key": key} if key else {}
        return parse(model, self.request("POST", path, json=body, params=params, headers=headers))

    def request(self, method: str, path: str, *, retry: bool = True, **options: Any) -> httpx.Response:
        """The answer to a request, sent again while the server is away or busy.

        Raises:
            ApiError: it refused.
            Unreachable: no answer, after every try.
        """
        if options.get("params") is not None:
            options["params"] = {k: v for k, v in options["params"].items() if v is not None}
        num_tries = _NUM_TRIES if retry else 1
        for trial in range(num_tries):
            last = trial == num_tries - 1
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**trial) * random.uniform(0.5, 1.0)
            try:
                response = self.http.request(method, path, **options)
            except httpx.TransportError as error:
                if last:
                    raise Unreachable(f"{self.url} does not answer: {error}") from error
            else:
                if response.status_code not in _RETRY_STATUS or last:
                    return check(response)
                pause_s = _retry_after(response) or pause_s
            time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def download(self, path: str, params: Params, out: BinaryIO) -> int:
        """Write the answer to a GET into `out` as it comes; returns its number of bytes.

        Raises:
            ApiError: the server refused.
            Unreachable: no answer after every try, or it was cut off; `out` then holds a part.
        """
        wanted = {k: v for k, v in params.items() if v is not None}
        num_bytes = 0
        for trial in range(_NUM_TRIES):
            last = trial == _NUM_TRIES - 1
            try:
                with self.http.stream("GET", path, params=wanted) as response:
                    if response.status_code in _RETRY_STATUS and not last:
                        raise httpx.ReadError(f"status {response.status_code}")
                    if not response.is_success:
                        response.read()
                    for piece in check(response).iter_bytes():
                        num_bytes += out.write(piece)
                    return num_bytes
            except httpx.TransportError as error:
                if last or num_bytes:
                    cut = f" (cut off after {num_bytes} bytes)" if num_bytes else ""
                    raise Unreachable(f"{self.url} does not answer: {error}{cut}") from error
            time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**trial) * random.uniform(0.5, 1.0))
        raise AssertionError("the last try returns or raises")

    def stream(self, path: str, params: Params) -> Iterator[_Message]:
        """Server-sent events until the server says `end`; reconnects where it was cut.

        Raises:
            ApiError: the server refused it.
            Unreachable: it does not answer any more.
            StreamEnded: the server will not go on.
        """
        last_id, failures = "", 0
        while True:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
            wanted = {k: v for k, v in params.items() if v is not None}
            if last_id:
                wanted.pop("tail", None)
            try:
                with self.http.stream(
                    "GET", path, params=wanted, headers=headers, timeout=httpx.Timeout(10.0, read=45.0)
                ) as response:
                    if response.status_code != 200:
                        response.read()
                        check(response)
                    for message in _messages(response.iter_lines()):
                        failures = 0
                        if message.event == "end":
                            return
                        if message.event == "error":
                            raise StreamEnded(message.data)
                        last_id = message.id or last_id
                        yield message
            except httpx.TransportError as error:
                failures += 1
                if failures >= _NUM_TRIES:
                    raise Unreachable(f"{self.url} does not answer: {error}") from error
            except ApiError as error:
                failures += 1
                if error.status not in _RETRY_STATUS or failures >= _NUM_TRIES:
                    raise
            time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**failures))


def check(response: httpx.Response) -> httpx.Response:
    """The answer, if it is a success. Raises ApiError."""
    if response.is_success:
        return response
    raise ApiError(_problem(response))


def _problem(response: httpx.Response) -> Problem:
    try:
        return Problem.model_validate(response.json())
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError):
        detail = f"{response.request.url} answered {response.status_code}: {response.text[:500]}"
        return Problem(title="Error", status=response.status_code, detail=detail, code="http_error")


def parse(model: type[Model], response: httpx.Response) -> Model:
    """The answer as a model. Raises PatchworkError: it is something else."""
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise PatchworkError(
            f"{response.request.url} answered something that is no {model.__name__}: is this a Patchwork server of "
            f"this version? {error.errors()[0]['msg']}"
        ) from error


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return min(float(response.headers.get("Retry-After", "")), _LONGEST_PAUSE_S)
    except ValueError:
        return None


def _messages(lines: Iterator[str]) -> Iterator[_Message]:
    """Server-sent events (HTML standard, 9.2.6); comments are dropped."""
    id_, event = "", "message"
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield _Message(id_, event, "\n".join(data))
            id_, event, data = "", "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            event = value
        elif field == "id":
            id_ = value
