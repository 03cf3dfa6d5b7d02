"""Settings of a Ray node, in its own environment: the operator puts them there; no job ever carries them.

`PATCHWORK_…` variables of the raylet's environment, or a 0600 JSON file named by PATCHWORK_NODE_FILE. Drivers, ranks
and couriers inherit both from the raylet that starts them.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from workers.store import S3Store

Seconds = Annotated[float, Field(gt=0.0)]


class NodeSettings(BaseSettings):
    """What every process of an attempt finds on its node: the store, the control plane, directories, time limits."""

    # Errors are logged: they name the setting, not what was given for it, which may be a secret.
    model_config = SettingsConfigDict(env_prefix="PATCHWORK_", extra="ignore", frozen=True, hide_input_in_errors=True)

    s3_endpoint: str | None = Field(None, description="URL of an S3-compatible service; left out: AWS.")
    s3_region: str = "us-east-1"
    s3_bucket: str = "patchwork"
    s3_prefix: str = Field("", description="Put before every key; empty or ending in /.")
    s3_access_key: SecretStr = SecretStr("")
    s3_secret_key: SecretStr = SecretStr("")
    s3_read_timeout_s: Seconds = Field(30.0, description="The store's silence for so long: the request is tried again.")
    api_url: str = Field("http://127.0.0.1:8400", description="The control plane, as this node reaches it.")
    worker_secret: SecretStr = Field(SecretStr(""), description="Proves to the control plane that a driver is ours.")
    data_root: Path | None = Field(None, description="Where data sets lie on this node.")
    log_dir: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()) / f"patchwork-logs-{os.getuid()}",
        description="Output of ranks and drivers.",
    )
    start_timeout_s: Seconds = Field(120.0, description="From the driver's start to the first sign of every rank.")
    hang_timeout_s: Seconds = Field(100.0, description="No step of a rank for so long: WORKER_HUNG.")
    silent_timeout_s: Seconds = Field(30.0, description="Nothing heard of a rank for so long while others speak.")
    stop_grace_s: Seconds = Field(60.0, description="From an order to leave until the ranks are ended.")
    term_grace_s: Seconds = Field(5.0, description="The same after SIGTERM; less than RAY_JOB_STOP_WAIT_TIME_S.")


def load_node_settings() -> NodeSettings:
    """Settings from the file named by PATCHWORK_NODE_FILE, overridden by environment variables.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a JSON object, or a setting is wrong.
    """
    values: dict[str, Any] = {}
    path = os.environ.get("PATCHWORK_NODE_FILE")
    if path:
        loaded = json.loads(Path(path).read_text())
        if not isinstance(loaded, dict):
            raise ValueError(f"{path}: expected a JSON object")
        given = {name.lower() for name in os.environ}
        values = {k: v for k, v in loaded.items() if f"patchwork_{k}" not in given}
    return NodeSettings(**values)


def open_store(settings: NodeSettings) -> S3Store:
    """The object store as this node reaches it."""
    return S3Store(
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        bucket=settings.s3_bucket,
        prefix=settings.s3_prefix,
        # Without keys boto3 looks where it always does (instance role, profile).
        access_key=settings.s3_access_key.get_secret_value() or None,
        secret_key=settings.s3_secret_key.get_secret_value() or None,
        read_timeout_s=settings.s3_read_timeout_s,
    )
