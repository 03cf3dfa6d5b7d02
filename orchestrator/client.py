"""The Python client: every call returns a model of `schemas`, every error is one of

    PatchworkError
    ├── ApiError        the server refused; holds its problem (RFC 9457): status, code, what is wrong where, what to do
    ├── Unreachable     no answer, after every retry
    └── StreamEnded     the server closed a stream for good, for example because the token was revoked

Requests that may be repeated safely are: reads, submissions (each carries an Idempotency-Key), cancellations.
"""

from __future__ import annotations

import json
import os
import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from configs.plan import Plan
from configs.wire import EvaluationReport, LogLine, Manifest
from orchestrator.embedded.data_dir import DataDir, default_data_dir
from orchestrator.schemas import (
    CheckpointPage,
    CheckpointPublic,
    ClusterPublic,
    DatasetPage,
    DatasetPublic,
    EventPage,
    EventPublic,
    ExportPage,
    Health,
    JobCard,
    JobPage,
    JobPreview,
    JobPublic,
    LogPage,
    MetricsPublic,
    PresetPage,
    PresetPublic,
    Problem,
    Readiness,
    TokenCreated,
    TokenPage,
    Whoami,
)

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
        return _parse(model, self.request("GET", path, params=params))

    def post(
        self, model: type[Model], path: str, body: object = None, params: Params | None = None, key: str | None = None
    ) -> Model:
        """POST that the server takes once only, however often it is sent (`key`, or by its nature)."""
        headers = {"Idempotency-Key": key} if key else {}
        return _parse(model, self.request("POST", path, json=body, params=params, headers=headers))

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


class Jobs:
    """Jobs: submit, look, steer."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self, spec: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, idempotency_key: str | None = None
    ) -> JobPublic:
        """Submit a job description (a dict as in a spec file, it may name a preset) with dotted overrides."""
        body = {"spec": dict(spec), "overrides": dict(overrides or {})}
        return self._connection.post(JobPublic, "/v1/jobs", body, key=idempotency_key or uuid.uuid4().hex)

    def preview(self, spec: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> JobPreview:
        """What `create` would store, without storing it."""
        body = {"spec": dict(spec), "overrides": dict(overrides or {})}
        return self._connection.post(JobPreview, "/v1/jobs", body, params={"dry_run": "true"})

    def get(self, job_id: str) -> JobPublic:
        return self._connection.get(JobPublic, f"/v1/jobs/{job_id}")

    def page(
        self,
        *,
        state: Sequence[str] = (),
        kind: str | None = None,
        project: str | None = None,
        name: str | None = None,
        label: Sequence[str] = (),
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        """A page of jobs, the newest first. `name`: a part of it; `label`: each key=value."""
        params: dict[str, Any] = {"kind": kind, "project": project, "name": name, "limit": limit, "cursor": cursor}
        params |= {"state": list(state) or None, "label": list(label) or None}
        return self._connection.get(JobPage, "/v1/jobs", params)

    def list(self, **filters: Any) -> Iterator[JobPublic]:
        """Every job, the newest first; the filters of `page`."""
        cursor: str | None = None
        while True:
            page = self.page(**filters, cursor=cursor)
            yield from page.items
            cursor = page.next_cursor
            if cursor is None:
                return

    def cancel(self, job_id: str) -> JobPublic:
        return self._connection.post(JobPublic, f"/v1/jobs/{job_id}/cancel")

    def pause(self, job_id: str) -> JobPublic:
        return self._connection.post(JobPublic, f"/v1/jobs/{job_id}/pause")

    def resume(self, job_id: str) -> JobPublic:
        return self._connection.post(JobPublic, f"/v1/jobs/{job_id}/resume")

    def retry(self, job_id: str, resume: bool = True) -> JobPublic:
        """Submit a failed or cancelled job again, from its last checkpoint or (`resume` false) from the start. Returns
        the new job."""
        params = {"resume": str(resume).lower()}
        return self._connection.post(JobPublic, f"/v1/jobs/{job_id}/retry", params=params, key=uuid.uuid4().hex)

    def events(self, job_id: str, after: int = 0) -> Iterator[EventPublic]:
        """What has happened to the job so far, after event `after`."""
        while True:
            page = self._connection.get(EventPage, f"/v1/jobs/{job_id}/events", {"after": after})
            yield from page.items
            if not page.items:
                return
            after = page.next_after

    def follow_events(self, job_id: str, after: int = 0) -> Iterator[EventPublic]:
        """Events as they happen, until the job has ended."""
        for message in self._connection.stream(f"/v1/jobs/{job_id}/events/stream", {"after": after}):
            yield EventPublic.model_validate_json(message.data)

    def metrics(self, job_id: str, names: Sequence[str] = (), max_points: int = 1000) -> MetricsPublic:
        """The job's curves, each joined into at most `max_points`; `.to_pandas()` makes a frame of them."""
        params = {"names": ",".join(names) or None, "max_points": max_points}
        return self._connection.get(MetricsPublic, f"/v1/jobs/{job_id}/metrics", params)

    def write_metrics(
        self, job_id: str, out: BinaryIO, names: Sequence[str] = (), format: Literal["csv", "parquet"] = "csv"
    ) -> int:
        """Write every point of the job's metrics into a binary file, as CSV or Parquet: columns name, step, value,
        attempt, at. Returns the number of bytes."""
        params = {"names": ",".join(names) or None, "format": format}
        return self._connection.download(f"/v1/jobs/{job_id}/metrics", params, out)

    def logs(self, job_id: str, *, tail: int | None = None, cursor: str | None = None, **filters: Any) -> LogPage:
        """A page of log lines. Filters: attempt, stream, level, q (a part of the message)."""
        return self._connection.get(LogPage, f"/v1/jobs/{job_id}/logs", {"tail": tail, "cursor": cursor} | filters)

    def log_lines(self, job_id: str, *, tail: int | None = None, **filters: Any) -> Iterator[LogLine]:
        """Every log line so far, or the last `tail` ones."""
        page = self.logs(job_id, tail=tail, **filters)
        yield from page.lines
        while page.more and tail is None:
            page = self.logs(job_id, cursor=page.cursor, **filters)
            yield from page.lines

    def follow_logs(self, job_id: str, *, tail: int | None = None, **filters: Any) -> Iterator[LogLine]:
        """Log lines as they arrive, until the job has ended."""
        params = {"follow": "true", "tail": tail} | filters
        for message in self._connection.stream(f"/v1/jobs/{job_id}/logs", params):
            yield LogLine.model_validate_json(message.data)

    def checkpoints(self, job_id: str) -> tuple[CheckpointPublic, ...]:
        return self._connection.get(CheckpointPage, f"/v1/jobs/{job_id}/checkpoints").items

    def report(self, job_id: str) -> EvaluationReport:
        """What an evaluate job found."""
        return self._connection.get(EvaluationReport, f"/v1/jobs/{job_id}/report")

    def card(self, job_id: str) -> JobCard:
        """The run on one page: description, versions, data, seeds, curves, evaluations, cost, how to reproduce it."""
        return self._connection.get(JobCard, f"/v1/jobs/{job_id}/card")

    def exports(self, job_id: str) -> ExportPage:
        return self._connection.get(ExportPage, f"/v1/jobs/{job_id}/exports")

    def wait(self, job_id: str, timeout_s: float | None = None, poll_s: float = 1.0) -> JobPublic:
        """The job once it has ended.

        Raises:
            TimeoutError: it has not, in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            job = self.get(job_id)
            if job.is_terminal:
                return job
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{job_id} is {job.state} after {timeout_s:.0f} s")
            time.sleep(poll_s)


class Checkpoints:
    """Checkpoints: what they are, and their files."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, checkpoint_id: str) -> CheckpointPublic:
        return self._connection.get(CheckpointPublic, f"/v1/checkpoints/{checkpoint_id}")

    def manifest(self, checkpoint_id: str) -> Manifest:
        return self._connection.get(Manifest, f"/v1/checkpoints/{checkpoint_id}/manifest")

    def find(self, reference: str) -> CheckpointPublic:
        """A checkpoint by id, by `job_…/best`, `job_…/latest`, or by job (its best one, else its latest).

        Raises:
            ApiError: there is no such job or checkpoint.
            LookupError: the job has no such checkpoint.
        """
        if not reference.startswith("job_"):
            return self.get(reference)
        job_id, _, wanted = reference.partition("/")
        found = self._connection.get(CheckpointPage, f"/v1/jobs/{job_id}/checkpoints").items
        aliases = {alias: c for c in found if c.available for alias in c.aliases}
        for alias in (wanted,) if wanted else ("best", "latest"):
            if alias in aliases:
                return aliases[alias]
        raise LookupError(
            f"{job_id} has no {wanted or 'finished'} checkpoint" + ("" if found else " (it has none yet)")
        )

    @contextmanager
    def read(self, checkpoint_id: str, name: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """The answer to a GET of one file, streamed; the store's own address may answer (redirect followed). The body
        is not read yet and the status is not checked."""
        path = f"/v1/checkpoints/{checkpoint_id}/files/{name}"
        with self._connection.http.stream("GET", path, headers=headers, follow_redirects=True) as response:
            yield response


class Client:
    """A Patchwork server.

        client = Client("http://127.0.0.1:8400", token)      # or connect(), which finds both
        job = client.jobs.create({"preset": "demo/pretrain"}, {"optim.lr": 3e-4})
        client.jobs.wait(job.id)

    May be used by several threads.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = Connection(url, token, timeout_s, transport)
        self.url = self._connection.url
        self.jobs = Jobs(self._connection)
        self.checkpoints = Checkpoints(self._connection)

    def plan(self, spec: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, gpu: str | None = None) -> Plan:
        """The server's plan of a job description: it knows registered data sets and checkpoints."""
        body = {"spec": dict(spec), "overrides": dict(overrides or {}), "gpu": gpu}
        return self._connection.post(Plan, "/v1/plans", body)

    def presets(self) -> tuple[PresetPublic, ...]:
        return self._connection.get(PresetPage, "/v1/presets").items

    def datasets(self) -> tuple[DatasetPublic, ...]:
        return self._connection.get(DatasetPage, "/v1/datasets").items

    def add_dataset(self, name: str, path: str) -> DatasetPublic:
        """Register the image folder `<data root>/<path>`; reading it through may take a while."""
        body = {"name": name, "path": path}
        return _parse(
            DatasetPublic, self._connection.request("POST", "/v1/datasets", json=body, retry=False, timeout=3600.0)
        )

    def cluster(self) -> ClusterPublic:
        return self._connection.get(ClusterPublic, "/v1/cluster")

    def tokens(self) -> TokenPage:
        return self._connection.get(TokenPage, "/v1/tokens")

    def create_token(self, name: str, role: str = "member", expires_in_s: int | None = None) -> TokenCreated:
        body = {"name": name, "role": role, "expires_in_s": expires_in_s}
        return _parse(TokenCreated, self._connection.request("POST", "/v1/tokens", json=body, retry=False))

    def revoke_token(self, token_id: str) -> None:
        self._connection.request("DELETE", f"/v1/tokens/{token_id}")

    def whoami(self) -> Whoami:
        return self._connection.get(Whoami, "/v1/whoami")

    def health(self) -> Health:
        return self._connection.get(Health, "/healthz")

    def readiness(self) -> Readiness:
        """Which parts of the server work (also when it is not ready)."""
        try:
            response = self._connection.http.get("/readyz")
        except httpx.TransportError as error:
            raise Unreachable(f"{self.url} does not answer: {error}") from error
        return _parse(Readiness, response)

    def close(self) -> None:
        self._connection.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NotConfigured(PatchworkError):
    """No server is known."""


def connect(
    url: str | None = None,
    token: str | None = None,
    data_dir: Path | None = None,
    transport: httpx.BaseTransport | None = None,
) -> Client:
    """A client for the server given here, or in PATCHWORK_URL and PATCHWORK_TOKEN, or that of `patchwork up` on this
    machine (the client.json of its data directory).

    Raises:
        NotConfigured: none of these.
    """
    url = url or os.environ.get("PATCHWORK_URL")
    token = token or os.environ.get("PATCHWORK_TOKEN")
    if url is None:
        directory = DataDir(data_dir or default_data_dir())
        stored = directory.read_client()
        if stored is None:
            raise NotConfigured(
                f"No server is known: start one with `patchwork up`, or give --url and --token "
                f"(or PATCHWORK_URL and PATCHWORK_TOKEN). Looked in {directory.client_file}."
            )
        url, token = stored[0], token or stored[1]
    return Client(url, token, transport=transport)


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


def _parse(model: type[Model], response: httpx.Response) -> Model:
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
