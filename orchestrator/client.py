"""The Python client: every call returns a model of `schemas`, every error is a PatchworkError (`connection`).

Requests that may be repeated safely are: reads, submissions, retries and resumptions (each carries an
Idempotency-Key), cancellations, pauses.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import httpx

from configs.plan import Plan
from configs.search_wire import SearchReport
from configs.wire import EvaluationReport, LogLine, Manifest
from orchestrator.connection import ApiError, Connection, PatchworkError, StreamEnded, Unreachable, check, parse
from orchestrator.embedded.data_dir import DataDir, default_data_dir
from orchestrator.schemas import (
    CheckpointEdit,
    CheckpointPage,
    CheckpointPublic,
    ClusterPublic,
    DatasetPage,
    DatasetPublic,
    EventFilePage,
    EventPage,
    EventPublic,
    ExportPage,
    FilePublic,
    Health,
    ImagePublic,
    ImportCreate,
    JobCard,
    JobEdit,
    JobFork,
    JobPage,
    JobPreview,
    JobPublic,
    LogPage,
    MetricsPublic,
    PartUrl,
    PartUrls,
    PicturePage,
    PresetPage,
    PresetPublic,
    Readiness,
    TokenCreated,
    TokenPage,
    UploadPublic,
    Whoami,
)
from orchestrator.search_schemas import SearchPublic, TrialPage, TrialPublic
from orchestrator.view_schemas import ComparisonPublic, LineagePublic, OverviewPublic
from orchestrator.vtab_schemas import VtabReport

__all__ = [
    "ApiError",
    "Checkpoints",
    "Client",
    "Jobs",
    "NotConfigured",
    "PatchworkError",
    "StreamEnded",
    "Unreachable",
    "Vtab",
    "check",
    "connect",
]


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
        search: str | None = None,
        sort: str | None = None,
        count: bool = False,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        """A page of jobs, the newest first or by `sort` (created, priority, name; with - in front the largest first).
        `name`: a part of it; `label`: each key=value; `search`: the trials of that search, which are listed in no other
        way; `count`: say how many match."""
        params: dict[str, Any] = {"kind": kind, "project": project, "name": name, "limit": limit, "cursor": cursor}
        params |= {"search": search, "sort": sort, "count": "true" if count else None}
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
        return self._connection.post(JobPublic, f"/v1/jobs/{job_id}/resume", key=uuid.uuid4().hex)

    def retry(self, job_id: str, resume: bool = True) -> JobPublic:
        """Submit a failed or cancelled job again, from its last checkpoint or (`resume` false) from the start. Returns
        the new job."""
        params = {"resume": str(resume).lower()}
        return self._connection.post(JobPublic, f"/v1/jobs/{job_id}/retry", params=params, key=uuid.uuid4().hex)

    def edit(
        self,
        job_id: str,
        *,
        priority: int | None = None,
        labels: Mapping[str, str] | None = None,
        if_match: str | None = None,
    ) -> JobPublic:
        """Change a job's priority or all of its labels; with `if_match` (an etag) only that version of it."""
        body = JobEdit(priority=priority, labels=None if labels is None else dict(labels))
        headers = {"If-Match": if_match} if if_match else {}
        path, json = f"/v1/jobs/{job_id}", body.model_dump(exclude_none=True)
        # Sent twice with an etag, the second try would find its own change.
        response = self._connection.request("PATCH", path, json=json, headers=headers, retry=if_match is None)
        return parse(JobPublic, response)

    def lineage(self, job_id: str) -> LineagePublic:
        """What the job came of and what came of it: retries, forks, weights."""
        return self._connection.get(LineagePublic, f"/v1/jobs/{job_id}/lineage")

    def fork(
        self,
        job_id: str,
        overrides: Mapping[str, Any] | None = None,
        *,
        checkpoint: str | None = None,
        name: str | None = None,
    ) -> JobPublic:
        """Submit a job made of this one: its description with dotted overrides, anew or from a checkpoint (`ckpt_…`,
        `latest`, `best`). Returns the new job."""
        body = JobFork(checkpoint=checkpoint, overrides=dict(overrides or {}), name=name).model_dump(mode="json")
        return self._connection.post(JobPublic, f"/v1/jobs/{job_id}/fork", body, key=uuid.uuid4().hex)

    def compare(self, job_ids: Sequence[str], names: Sequence[str] = (), max_points: int = 500) -> ComparisonPublic:
        """Up to 20 jobs side by side: curves of the metrics `names`, and where their descriptions differ."""
        params = {"job": list(job_ids), "name": list(names) or None, "max_points": max_points}
        return self._connection.get(ComparisonPublic, "/v1/compare", params)

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

    def event_files(self, job_id: str) -> tuple[FilePublic, ...]:
        """The job's event files for TensorBoard."""
        return self._connection.get(EventFilePage, f"/v1/jobs/{job_id}/tensorboard").items

    def write_event_file(self, job_id: str, name: str, out: BinaryIO) -> int:
        """Write one of `event_files` into a binary file. Returns the number of bytes."""
        return self._connection.download(f"/v1/jobs/{job_id}/tensorboard/{name}", {}, out)

    def logs(self, job_id: str, *, tail: int | None = None, cursor: str | None = None, **filters: Any) -> LogPage:
        """A page of log lines. Filters: attempt, stream, level, q (a part of the message), regex, since, until."""
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

    def pictures(self, job_id: str) -> PicturePage:
        """What an inspect job drew: titles, captions, and the names of the files."""
        return self._connection.get(PicturePage, f"/v1/jobs/{job_id}/pictures")

    def write_picture(self, job_id: str, name: str, out: BinaryIO) -> int:
        """Write a file of `pictures`, a PNG or the arrays behind it, into `out`. Returns the number of bytes."""
        return self._connection.download(f"/v1/jobs/{job_id}/pictures/{name}", {}, out)

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


class Vtab:
    """VTAB suites: fine-tunes of one checkpoint on many data sets."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, suite: Mapping[str, Any], idempotency_key: str | None = None) -> VtabReport:
        """Queue a suite's jobs (a dict with the fields of `VtabCreate`)."""
        return self._connection.post(VtabReport, "/v1/vtab", dict(suite), key=idempotency_key or uuid.uuid4().hex)

    def get(self, name: str) -> VtabReport:
        return self._connection.get(VtabReport, f"/v1/vtab/{name}")


class Searches:
    """Searches: their trials, what they found, more trials. They are submitted by `jobs.create`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, job_id: str) -> SearchPublic:
        return self._connection.get(SearchPublic, f"/v1/searches/{job_id}")

    def trials(self, job_id: str, curves: bool = False) -> tuple[TrialPublic, ...]:
        """The search's trials by number; with `curves` each has its curve of the metric."""
        return self._connection.get(
            TrialPage, f"/v1/searches/{job_id}/trials", {"curves": "true" if curves else None}
        ).items

    def best(self, job_id: str) -> TrialPublic:
        """The best trial so far; its `checkpoint` is an ordinary one."""
        return self._connection.get(TrialPublic, f"/v1/searches/{job_id}/best")

    def report(self, job_id: str) -> SearchReport:
        """What a search that has succeeded found."""
        return self._connection.get(SearchReport, f"/v1/searches/{job_id}/report")

    def write_picture(self, job_id: str, out: BinaryIO) -> int:
        """Write the report's picture, a PNG, into a binary file. Returns the number of bytes."""
        return self._connection.download(f"/v1/searches/{job_id}/report.png", {}, out)

    def add(self, job_id: str, trials: int) -> JobPublic:
        """Let the search make more trials. Returns its job, or, if it had ended, the new job that goes on with it."""
        path = f"/v1/searches/{job_id}/trials"
        return self._connection.post(JobPublic, path, {"trials": trials}, key=uuid.uuid4().hex)

    def set_slots(self, job_id: str, slots: int | None) -> SearchPublic:
        """How many trials may run side by side from now on; None: as many as there are workers."""
        return self._connection.post(SearchPublic, f"/v1/searches/{job_id}/slots", {"slots": slots})


class Images:
    """Images to look at, for inspect jobs."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def upload(self, image: Path | bytes) -> ImagePublic:
        """Upload an image, a file or its bytes; the server keeps it for a week if it is not told otherwise."""
        content = image if isinstance(image, bytes) else image.read_bytes()
        headers = {"Content-Type": "application/octet-stream"}
        return parse(ImagePublic, self._connection.request("POST", "/v1/images", content=content, headers=headers))


class Checkpoints:
    """Checkpoints: what they are, and their files."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, checkpoint_id: str) -> CheckpointPublic:
        return self._connection.get(CheckpointPublic, f"/v1/checkpoints/{checkpoint_id}")

    def pin(self, checkpoint_id: str, pinned: bool = True) -> CheckpointPublic:
        """Keep a checkpoint whatever the job's retention says; with False let go of it."""
        path, body = f"/v1/checkpoints/{checkpoint_id}", CheckpointEdit(pinned=pinned).model_dump()
        return parse(CheckpointPublic, self._connection.request("PATCH", path, json=body, retry=True))

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

    def begin_import(self, request: ImportCreate) -> UploadPublic:
        """An upload for a weights file: a new one, or the open one of the same content."""
        body = request.model_dump(mode="json")
        return parse(UploadPublic, self._connection.request("POST", "/v1/checkpoints:import", json=body, retry=True))

    def part_urls(self, upload_id: str, parts: Sequence[int]) -> tuple[PartUrl, ...]:
        """Where to PUT parts of an upload; good for an hour."""
        path, body = f"/v1/uploads/{upload_id}/urls", {"parts": list(parts)}
        return parse(PartUrls, self._connection.request("POST", path, json=body, retry=True)).items

    def complete_import(self, upload_id: str) -> JobPublic:
        """Queue the import of an upload whose parts are all there. Returns its job; again: the same one."""
        return parse(JobPublic, self._connection.request("POST", f"/v1/uploads/{upload_id}/complete", retry=True))

    def abort_import(self, upload_id: str) -> None:
        """Give an upload up and delete its parts."""
        self._connection.request("DELETE", f"/v1/uploads/{upload_id}")

    @contextmanager
    def read(
        self, checkpoint_id: str, name: str, headers: Mapping[str, str], address: str | None = None
    ) -> Iterator[httpx.Response]:
        """The answer to a GET of one file, streamed; the store's own address may answer (redirect followed). The body
        is not read yet and the status is not checked. With `address`, where such a redirect led before, the store is
        asked at once, and never told our token."""
        http = self._connection.http
        request = http.build_request(
            "GET", address or f"/v1/checkpoints/{checkpoint_id}/files/{name}", headers=dict(headers)
        )
        if address is not None:
            request.headers.pop("Authorization", None)
        response = http.send(request, stream=True, follow_redirects=True)
        try:
            yield response
        finally:
            response.close()


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
        self.is_direct = transport is None
        """Whether requests go over the network, and not through a transport that the caller brought."""
        self.jobs = Jobs(self._connection)
        self.searches = Searches(self._connection)
        self.checkpoints = Checkpoints(self._connection)
        self.images = Images(self._connection)
        self.vtab = Vtab(self._connection)

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
        return parse(
            DatasetPublic, self._connection.request("POST", "/v1/datasets", json=body, retry=False, timeout=3600.0)
        )

    def cluster(self) -> ClusterPublic:
        return self._connection.get(ClusterPublic, "/v1/cluster")

    def overview(self) -> OverviewPublic:
        """The service at a glance: what runs, who waits, what failed lately, what is used."""
        return self._connection.get(OverviewPublic, "/v1/overview")

    def tokens(self) -> TokenPage:
        return self._connection.get(TokenPage, "/v1/tokens")

    def create_token(self, name: str, role: str = "member", expires_in_s: int | None = None) -> TokenCreated:
        body = {"name": name, "role": role, "expires_in_s": expires_in_s}
        return parse(TokenCreated, self._connection.request("POST", "/v1/tokens", json=body, retry=False))

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
        return parse(Readiness, response)

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
