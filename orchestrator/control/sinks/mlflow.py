"""A run in MLflow for each job, through MLflow's own client: any tracking store it knows.

The run is found by its tags (job and generation), so that one that was created a moment before the process died is
found again. MLflow holds a metric once for each (key, step, timestamp, value), so that writing it again adds nothing.
It cannot take a metric back: where steps were rolled back, the job's run is made anew from the points that count, and
the one before is deleted (MLflow keeps deleted runs until its garbage collection).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from configs.states import JobState
from orchestrator.control.sinks.sink import Delivery, SinkJob, SinkRefused, SinkUnavailable, missing_package

JOB_TAG, GENERATION_TAG, STATE_TAG = "patchwork.job_id", "patchwork.generation", "patchwork.state"
# What MLflow's API allows (mlflow/utils/validation.py).
_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_CHARS, _MAX_KEY_CHARS, _MAX_TAG_CHARS = 1000, 100, 6000, 250, 5000
_STATUS = {JobState.SUCCEEDED: "FINISHED", JobState.FAILED: "FAILED", JobState.CANCELLED: "KILLED"}
_ENVIRONMENT = {
    # A server that is away is tried again by us, later; not here for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MlflowSink:
    """Writes runs into the tracking store at `uri`."""

    name = "mlflow"
    takes_back = False

    def __init__(self, uri: str, experiment: str, every_s: float, public_url: str | None = None) -> None:
        self.every_s = every_s
        self._uri, self._experiment, self._public_url = uri, experiment, public_url
        self._client: Any = None
        self._experiment_id = ""
        self.secrets = _secrets(uri)

    def prepare(self) -> None:
        if self._client is not None:
            return
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise missing_package(self.name, "mlflow-skinny", "sinks") from None
        with _translated(unfit_is_refused=False):
            client = MlflowClient(tracking_uri=self._uri)
            self._experiment_id = _find_experiment(client, self._experiment)
        self._client = client

    def write(self, delivery: Delivery) -> dict[str, Any]:
        """Memory: the run's id."""
        with _translated():
            run_id = delivery.memory.get("run_id") or self._find_run(delivery)
            self._log_metrics(run_id, delivery)
            self._client.set_tag(run_id, STATE_TAG, str(delivery.job.state))
            if delivery.final:
                ended_at = delivery.job.ended_at
                end_ms = None if ended_at is None else int(ended_at.timestamp() * 1000)
                self._client.set_terminated(run_id, _STATUS.get(delivery.job.state, "FINISHED"), end_ms)
        return {"run_id": run_id}

    def _find_run(self, delivery: Delivery) -> str:
        """The job's run of this generation, created if there is none; those of earlier generations are deleted."""
        tagged = f"tags.`{JOB_TAG}` = '{delivery.job.id}'"
        runs = self._client.search_runs([self._experiment_id], filter_string=tagged, max_results=1000)
        generation = str(delivery.generation)
        found = [run.info.run_id for run in runs if run.data.tags.get(GENERATION_TAG) == generation]
        run_id: str = found[0] if found else self._create_run(delivery)
        # Again, if it was cut off before: a parameter may be given twice with the same value.
        self._log_params(run_id, delivery.job)
        for run in runs:
            if int(run.data.tags.get(GENERATION_TAG, 0)) < delivery.generation:
                self._client.delete_run(run.info.run_id)
        return run_id

    def _create_run(self, delivery: Delivery) -> str:
        job = delivery.job
        tags = {
            JOB_TAG: job.id,
            GENERATION_TAG: str(delivery.generation),
            STATE_TAG: str(job.state),
            "patchwork.name": job.name,
            "patchwork.kind": job.kind,
            "patchwork.project": job.project,
            **{f"label.{key}"[:_MAX_KEY_CHARS]: value for key, value in job.labels.items()},
        }
        if self._public_url:
            tags["patchwork.url"] = f"{self._public_url.rstrip('/')}/v1/jobs/{job.id}"
        tags = {key: value[:_MAX_TAG_CHARS] for key, value in tags.items()}
        start_ms = int((job.started_at or job.created_at).timestamp() * 1000)
        run = self._client.create_run(self._experiment_id, start_time=start_ms, tags=tags, run_name=job.name)
        run_id: str = run.info.run_id
        return run_id

    def _log_params(self, run_id: str, job: SinkJob) -> None:
        from mlflow.entities import Param

        given = [
            Param(key[:_MAX_KEY_CHARS], _shortened(str(value), _MAX_PARAM_CHARS))
            for key, value in job.parameters().items()
        ]
        for start in range(0, len(given), _MAX_PARAMS):
            self._client.log_batch(run_id, params=given[start : start + _MAX_PARAMS])

    def _log_metrics(self, run_id: str, delivery: Delivery) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(p.name, math.nan if p.value is None else p.value, int(p.at.timestamp() * 1000), p.step)
            for p in delivery.points
        ]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + _MAX_METRICS])


def _find_experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            made: str = client.create_experiment(name)
            return made
        except MlflowException:
            # Somebody else was faster, or it really failed: then it is still missing.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise SinkUnavailable(f"the experiment {name!r} was deleted in MLflow: restore it, or set mlflow_experiment")
    experiment_id: str = found.experiment_id
    return experiment_id


@contextmanager
def _translated(unfit_is_refused: bool = True) -> Iterator[None]:
    """Turn the errors of MLflow's client into ours."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if unfit_is_refused and 400 <= error.get_http_status_code() < 500 and not _is_everybodys(error):
            raise SinkRefused(f"MLflow refused it: {error.message}") from error
        raise SinkUnavailable(f"MLflow does not work: {error.message}") from error
    except (OSError, ImportError) as error:
        # requests' errors are OSErrors; a database's driver may be missing.
        raise SinkUnavailable(f"MLflow does not answer: {error}") from error


def _is_everybodys(error: Any) -> bool:
    """Credentials and limits: they concern every job alike."""
    return error.get_http_status_code() in (401, 403, 408, 429)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _secrets(uri: str) -> tuple[str, ...]:
    """What must be in no message: the address where it holds a password, the password, and MLflow's own."""
    found = [os.environ.get(name, "") for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")]
    password = urlsplit(uri).password
    if password:
        found += [uri, password]
    return tuple(secret for secret in found if secret)
