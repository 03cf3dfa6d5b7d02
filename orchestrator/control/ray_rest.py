"""Ray through its Jobs and State REST APIs, with timeouts (Ray's own SDK has none) and without importing ray.

The job API runs arbitrary commands: its address is loopback or the cluster's network, and every request carries the
cluster's token. Nothing secret travels in a submission: Ray gives environment variables back in clear.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import httpx

from orchestrator.control.launcher import ClusterStatus, JobStatus, LaunchState, NodeInfo, Refused, Unreachable
from orchestrator.settings import Settings

TIMEOUT = httpx.Timeout(20.0, connect=5.0)
DRIVER_STOP_WAIT_S = 10
"""From SIGTERM to SIGKILL of a driver that is stopped; Ray's default of 3 s is short for writing exit.json."""
_MAX_ROWS = 10_000
_ACCELERATOR = "accelerator_type:"


class RayLauncher:
    """A Ray cluster by the address of its dashboard. Safe to use from several threads."""

    def __init__(self, address: str, token: str, entrypoint: str, reap_entrypoint: str) -> None:
        self._entrypoint = entrypoint
        self._reap_entrypoint = reap_entrypoint
        # trust_env off: a proxy meant for the internet must not see the cluster's token.
        self._client = httpx.Client(
            base_url=address,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=TIMEOUT,
            trust_env=False,
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(
            settings.ray_address,
            settings.ray_token.get_secret_value(),
            settings.entrypoint,
            settings.reap_entrypoint,
        )

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def cluster(self) -> ClusterStatus:
        version = _json(self._get("/api/version"))
        nodes = tuple(_node(row) for row in self._list("nodes"))
        return ClusterStatus(cluster_id=str(version["session_name"]), nodes=nodes)

    def submit(self, attempt_id: str) -> None:
        self._submit(attempt_id, self._entrypoint, {"PATCHWORK_ATTEMPT_ID": attempt_id})

    def status(self, attempt_id: str) -> JobStatus:
        details = self._details(attempt_id)
        if details is None:
            return JobStatus(LaunchState.MISSING)
        return JobStatus(LaunchState(details["status"]), str(details.get("message") or ""))

    def stop(self, attempt_id: str) -> None:
        response = self._request("POST", f"/api/jobs/{attempt_id}/stop")
        if response.status_code != httpx.codes.NOT_FOUND:
            _check(response)

    def leftovers(self, attempt_id: str) -> list[str]:
        ray_job_id = self._ray_job_id(attempt_id)
        if ray_job_id is None:
            return []
        actors = self._list("actors", ("job_id", "=", ray_job_id), ("state", "!=", "DEAD"))
        groups = self._list("placement_groups", ("creator_job_id", "=", ray_job_id), ("state", "!=", "REMOVED"))
        return [
            *(f"actor {row['actor_id']} {row.get('class_name', '')}" for row in actors),
            *(f"placement group {row['placement_group_id']} {row.get('name', '')}".rstrip() for row in groups),
        ]

    def reap(self, attempt_id: str) -> None:
        ray_job_id = self._ray_job_id(attempt_id)
        if ray_job_id is None:
            return
        # One at a time; a submission id is used once, so the next one takes the next number.
        for number in range(1000):
            reaper = f"reap_{attempt_id}_{number:03d}"
            state = self.status(reaper).state
            if state.is_terminal:
                continue
            if state is LaunchState.MISSING:
                variables = {"PATCHWORK_ATTEMPT_ID": attempt_id, "PATCHWORK_RAY_JOB_ID": ray_job_id}
                self._submit(reaper, self._reap_entrypoint, variables)
            return

    def _submit(self, submission_id: str, entrypoint: str, variables: dict[str, str]) -> None:
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "runtime_env": {"env_vars": {**variables, "RAY_JOB_STOP_WAIT_TIME_S": str(DRIVER_STOP_WAIT_S)}},
            "metadata": {"patchwork": "1", "attempt_id": variables["PATCHWORK_ATTEMPT_ID"]},
            # A driver holds nothing: with resources it could wait in line behind the workers of other attempts.
            "entrypoint_num_cpus": 0,
            "entrypoint_num_gpus": 0,
            "entrypoint_memory": 0,
        }
        response = self._request("POST", "/api/jobs/", json=body)
        # The reply to an earlier submission was lost: a submission id is a once-only key.
        if response.status_code == httpx.codes.INTERNAL_SERVER_ERROR and "already exists" in response.text:
            return
        _check(response)

    def _details(self, submission_id: str) -> dict[str, Any] | None:
        response = self._get(f"/api/jobs/{submission_id}")
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        return dict(_json(response))

    def _ray_job_id(self, attempt_id: str) -> str | None:
        """Ray's id of the job that the driver opened; None if it never did, so nothing can be left of it."""
        details = self._details(attempt_id)
        if details is None:
            return None
        job_id = details.get("job_id") or (details.get("driver_info") or {}).get("id")
        return str(job_id) if job_id else None

    def _list(self, what: str, *filters: tuple[str, str, str]) -> list[dict[str, Any]]:
        parameters: list[tuple[str, str | int]] = [("limit", _MAX_ROWS), ("timeout", 15)]
        for key, predicate, value in filters:
            parameters += [("filter_keys", key), ("filter_predicates", predicate), ("filter_values", value)]
        answer = _json(self._get(f"/api/v0/{what}", params=parameters))
        listing = answer["data"]["result"]
        # Half an answer is none: it would be taken as proof that the rest is gone.
        if listing.get("partial_failure_warning"):
            raise Unreachable(f"Ray listed {what} only in part: {listing['partial_failure_warning']}")
        return list(listing["result"])

    def _get(self, path: str, **options: Any) -> httpx.Response:
        return self._request("GET", path, **options)

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise Unreachable(f"Ray at {self._client.base_url}: {type(error).__name__}: {error}") from error


def _json(response: httpx.Response) -> Any:
    _check(response)
    try:
        return response.json()
    except ValueError as error:
        raise Unreachable(f"Ray answered {response.request.url.path} with something else than JSON") from error


def _check(response: httpx.Response) -> None:
    """Raises Refused for 4xx, Unreachable for 5xx: a head that is starting or losing its GCS answers 500."""
    if response.is_success:
        return
    last_line = (response.text.strip().splitlines() or [""])[-1][:300]
    message = f"Ray answered {response.request.url.path} with {response.status_code}: {last_line}"
    if response.status_code < 500:
        raise Refused(message)
    raise Unreachable(message)


def _node(row: dict[str, Any]) -> NodeInfo:
    resources = row.get("resources_total") or {}
    labels = row.get("labels") or {}
    types = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
    return NodeInfo(
        id=row["node_id"],
        alive=row["state"] == "ALIVE",
        host=row.get("node_name") or row.get("node_ip") or "",
        cpus=float(resources.get("CPU", 0.0)),
        gpus=float(resources.get("GPU", 0.0)),
        accelerator=types[0] if types else labels.get("ray.io/accelerator-type") or None,
        is_head=bool(row.get("is_head_node", False)),
    )
