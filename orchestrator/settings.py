"""Settings of the control plane: environment variables `PATCHWORK_…`, or a file named by PATCHWORK_SETTINGS_FILE."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Everything the API and the controller need. `patchwork up` writes it as a 0600 file for its children."""

    # What is wrong may be a secret: errors name the setting, not its value.
    model_config = SettingsConfigDict(env_prefix="PATCHWORK_", extra="ignore", frozen=True, hide_input_in_errors=True)

    database_url: str = Field("sqlite:///patchwork.db", description="sqlite:///path or postgresql+psycopg://…")
    s3_endpoint: str | None = Field(None, description="URL of an S3-compatible service; left out: AWS.")
    s3_region: str = "us-east-1"
    s3_bucket: str = "patchwork"
    s3_prefix: str = Field("", description="Put before every key; empty or ending in /.")
    s3_access_key: SecretStr = SecretStr("")
    s3_secret_key: SecretStr = SecretStr("")
    s3_public: bool = Field(False, description="Clients reach the store: hand out presigned URLs instead of streaming.")
    s3_public_endpoint: str | None = Field(
        None, description="The store's address as clients reach it, for presigned URLs; left out: s3_endpoint."
    )
    max_import_bytes: int = Field(16 * 1024**3, description="The largest weights file that may be uploaded.")
    upload_expires_s: float = Field(24 * 3600.0, description="An upload that is not complete by then is aborted.")
    image_expires_s: float = Field(7 * 24 * 3600.0, description="An image uploaded for inspect jobs is kept so long.")
    ray_address: str = Field("http://127.0.0.1:8265", description="Ray's dashboard (Jobs and State API).")
    ray_token: SecretStr = SecretStr("")
    entrypoint: str = Field("python -m workers.driver", description="Constant command of every Ray job.")
    reap_entrypoint: str = "python -m workers.reap"
    worker_secret: SecretStr = Field(SecretStr(""), description="Drivers prove with it that they belong to us.")
    dashboard: bool = Field(True, description="Serve the dashboard at /dashboard, beside the API.")
    session_secret: SecretStr = Field(
        SecretStr(""),
        description="Signs the dashboard's session cookies, the same in every API process; empty: one of the process's "
        "own, and whoever is logged in logs in again when it restarts.",
    )
    data_root: Path | None = Field(None, description="Where image folders lie, as the workers see it.")
    host: str = "127.0.0.1"
    port: int = 8400
    processes: Annotated[int, Field(ge=1, le=256)] = Field(
        1, description="API processes that share the port; more than one only without the dashboard."
    )
    lease_s: float = 15.0
    poll_s: float = Field(1.0, description="Seconds between looks at a live attempt.")
    start_timeout_s: float = 180.0
    hang_timeout_s: float = Field(100.0, description="No progress of an attempt for so long: WORKER_HUNG.")
    report_timeout_s: float = Field(60.0, description="No report for so long: the attempt is looked at as unreachable.")
    stop_grace_s: float = Field(60.0, description="From a stop order to SIGKILL.")
    backoff_initial_s: float = 2.0
    backoff_max_s: float = 360.0
    public_url: str | None = Field(None, description="The API as people reach it: links in other tools lead there.")
    sink_every_s: float = Field(15.0, description="A running job's new metrics are written on so often.")
    tensorboard: bool = Field(True, description="Write event files for TensorBoard into the object store.")
    mlflow_tracking_uri: SecretStr = Field(
        SecretStr(""), description="MLflow's server, http(s)://…; sqlite:///… for one controller; empty: no MLflow."
    )
    mlflow_experiment: Annotated[str, Field(min_length=1)] = "patchwork"
    wandb_project: str = Field("", description="Weights & Biases: the project; empty: no W&B.")
    wandb_entity: str = Field("", description="A user or team; empty: the key's own.")
    wandb_mode: Literal["online", "offline"] = "online"
    wandb_dir: Path | None = Field(None, description="Runs of wandb_mode=offline lie here, for `wandb sync`.")

    @model_validator(mode="after")
    def _processes_fit(self) -> Self:
        if self.processes > 1 and self.dashboard:
            raise ValueError(
                f"processes {self.processes} does not go with dashboard true: only 1 is allowed there, since an open "
                "page's socket belongs to one process. Set dashboard to false here, and run one more API with "
                "processes 1 and another port to serve the dashboard"
            )
        return self

    @model_validator(mode="after")
    def _sinks_fit(self) -> Self:
        if self.wandb_project and self.wandb_mode == "offline" and self.wandb_dir is None:
            raise ValueError("wandb_dir is needed with wandb_mode 'offline': a folder to keep the runs in")
        if not self.wandb_project:
            names = ("wandb_entity", "wandb_mode", "wandb_dir")
            given = [n for n in names if getattr(self, n) != type(self).model_fields[n].default]
            if given:
                raise ValueError(f"{given[0]} does not apply without wandb_project")
        return self


def load_settings() -> Settings:
    """Settings from the file named by PATCHWORK_SETTINGS_FILE (JSON), overridden by environment variables."""
    values: dict[str, Any] = {}
    path = os.environ.get("PATCHWORK_SETTINGS_FILE")
    if path:
        values = json.loads(Path(path).read_text())
        names = {name.lower() for name in os.environ}
        values = {k: v for k, v in values.items() if f"patchwork_{k}" not in names}
    return Settings(**values)
