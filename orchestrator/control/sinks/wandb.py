"""A run in Weights & Biases for each job, through its own package, online or as files for `wandb sync`.

Each write opens the run by its id, logs and closes it: only a closed run says that everything has arrived. Rows are the
points of one report at one step, counted from 0; the count is W&B's own step, which may only grow. Online, the run says
how many rows it has, and those are not logged again; offline, each write is a folder named by its first row, made anew.

The steps of training are the metric `step`, the x-axis of all others. W&B cannot take rows back: where steps were
rolled back, the job goes on in a new run of the same group, from its first point on.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from configs.states import JobState
from orchestrator.control.sinks.sink import Delivery, SinkUnavailable, missing_package

KEY = "WANDB_API_KEY"
STEP = "step"
_LEAST_EVERY_S = 60.0
"""Opening and closing a run takes seconds."""
_TIMEOUT_S = 60.0


class WandbSink:
    """Writes runs into `project`; offline, below `folder`."""

    name = "wandb"
    takes_back = False

    def __init__(
        self,
        project: str,
        entity: str,
        mode: Literal["online", "offline"],
        folder: Path | None,
        every_s: float,
        public_url: str | None = None,
    ) -> None:
        self.every_s = max(every_s, _LEAST_EVERY_S) if mode == "online" else every_s
        self._project, self._entity, self._mode, self._folder = project, entity, mode, folder
        self._public_url = public_url
        self.secrets = tuple(key for key in (os.environ.get(KEY),) if key)

    def prepare(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise missing_package(self.name, "wandb", "sinks") from None
        if self._mode == "online" and not os.environ.get(KEY):
            raise SinkUnavailable(f"{KEY} is not set in the controller's environment")

    def write(self, delivery: Delivery) -> dict[str, Any]:
        """Memory: the number of rows."""
        first = int(delivery.memory.get("rows", 0))
        rows = list(_rows(delivery))
        with self._run_folder(delivery, first) as folder, _translated():
            run = self._open(delivery, folder)
            try:
                # Of a run that is continued online: the rows that are there already.
                known = int(run.starting_step)
                for number, row in enumerate(rows, first):
                    if number >= known:
                        run.log(row, step=number)
                run.summary["state"] = str(delivery.job.state)
            finally:
                failed = delivery.final and delivery.job.state is not JobState.SUCCEEDED
                run.finish(exit_code=1 if failed else 0)
        return {"rows": first + len(rows)}

    def _open(self, delivery: Delivery, folder: Path) -> Any:
        import wandb

        job = delivery.job
        settings = wandb.Settings(
            mode=self._mode,
            root_dir=str(folder),
            api_key=os.environ.get(KEY),
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_update_finish_state=delivery.final,
            login_timeout=_TIMEOUT_S,
            init_timeout=_TIMEOUT_S,
            finish_timeout=_TIMEOUT_S,
            finish_timeout_raises=True,
        )
        about: dict[str, Any] = {"job_id": job.id, "labels": dict(job.labels)}
        if self._public_url:
            about["url"] = f"{self._public_url.rstrip('/')}/v1/jobs/{job.id}"
        run = wandb.init(
            project=self._project,
            entity=self._entity or None,
            id=run_id(delivery),
            name=job.name,
            group=job.id,
            job_type=job.kind,
            resume="allow",
            reinit="create_new",
            config={**job.spec(), "patchwork": about},
            settings=settings,
        )
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        return run

    @contextmanager
    def _run_folder(self, delivery: Delivery, first: int) -> Iterator[Path]:
        """Where the package writes. Offline it stays; one that an earlier try of the same rows left is removed."""
        if self._mode == "online":
            with tempfile.TemporaryDirectory(prefix="patchwork-wandb-") as name:
                yield Path(name)
            return
        assert self._folder is not None, "settings say where"
        folder = self._folder / run_id(delivery) / f"{first:09d}"
        try:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        except OSError as error:
            raise SinkUnavailable(f"wandb_dir: {error}") from error
        yield folder


def run_id(delivery: Delivery) -> str:
    """The job's id; of a run that took over from one with steps that were rolled back, with a number."""
    return delivery.job.id if not delivery.generation else f"{delivery.job.id}-{delivery.generation}"


def _rows(delivery: Delivery) -> Iterator[dict[str, float | int]]:
    """A row for each step of each report: the same rows however many reports are delivered together."""
    ordered = sorted(delivery.points, key=lambda point: (point.place, point.step, point.name))
    for (_, step), points in groupby(ordered, key=lambda point: (point.place, point.step)):
        same = list(points)
        values = {point.name: math.nan if point.value is None else point.value for point in same}
        yield {**values, STEP: step, "_timestamp": same[0].at.timestamp()}


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the package's errors into ours. It does not tell whose fault they are: they concern every job."""
    from wandb.errors import Error

    try:
        yield
    except (Error, OSError, TimeoutError) as error:
        raise SinkUnavailable(f"W&B does not take it: {type(error).__name__}: {error}") from error
