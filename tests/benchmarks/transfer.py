"""A checkpoint of 512 MiB into the embedded object store and back, as workers upload it and as `patchwork fetch` takes
it away: checksums, verification, assembly and all. Opponents: s5cmd and boto3's transfers, on the same store and file,
each with the settings that were fastest in a trial just before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from boto3.s3.transfer import TransferConfig

from configs.ids import checkpoint_id
from configs.layout import checkpoint_prefix, manifest_key
from configs.model import VitConfig
from configs.wire import Manifest, Preprocess, ShardFile, TensorSlice
from orchestrator.client import Client
from orchestrator.embedded.object_store import ObjectStoreServer
from orchestrator.embedded.ports import free_ports
from orchestrator.fetch import WEIGHTS_NAME, fetch
from orchestrator.services.auth import Actor
from orchestrator.services.submission import parse_request, submit_job
from orchestrator.services.tokens import ensure_admin_token
from orchestrator.storage.db import Database
from tests.benchmarks.api import TOKEN, end_servers_when_terminated, serving, wait_until_up
from tests.benchmarks.harness import Row, arguments, interleave, progress, report, timed
from tests.orchestrator.rows import add_checkpoint, spec_with
from workers.shards import ShardBuffer
from workers.store import S3Store

MIB = 1024 * 1024
TENSOR_MIB = 16
KEY = "benchmark/opponent"
MODEL = VitConfig(
    patch_size=7, embed_dim=64, depth=2, num_heads=4, mlp_dim=128, image_size=(28, 28), in_channels=3, num_classes=10
)
PREPROCESS = Preprocess(image_size=(28, 28), in_channels=3, mean=(0.5,), std=(0.5,))
# Connections, MiB of each part.
SETTINGS = ((2, 64), (4, 32), (5, 50), (8, 16))


@dataclass
class Bench:
    """The store, what lies in it, and the three who move it."""

    store: ObjectStoreServer
    buffer: ShardBuffer
    file: Path
    job_id: str
    client: Client
    folder: Path
    ours: S3Store
    boto3: Any

    @property
    def num_bytes(self) -> int:
        return len(self.buffer.data)

    # -- ours ----------------------------------------------------------------------------------------------------------
    def upload(self) -> None:
        """As `workers.checkpoint.Checkpointer` does behind the step: checksums, the shard, the manifest."""
        prefix = checkpoint_prefix(self.job_id, 1, 1)
        described = self.buffer.describe()
        self.ours.put(prefix + self.buffer.name, self.buffer.data)
        self.ours.put(manifest_key(prefix), _manifest(self.job_id, described).model_dump_json().encode())

    def download(self) -> None:
        """`patchwork fetch`: through the API's redirects, verified, assembled into a file of whole tensors."""
        shutil.rmtree(self.folder / "fetched", ignore_errors=True)
        fetched = fetch(self.client, checkpoint_id(self.job_id, 1, 1), self.folder / "fetched")
        assert fetched.num_bytes_read == self.num_bytes

    # -- s5cmd ---------------------------------------------------------------------------------------------------------
    def s5cmd_upload(self, connections: int, part_mib: int) -> None:
        self._s5cmd(connections, part_mib, str(self.file), f"s3://{self.store.bucket}/{KEY}")

    def s5cmd_download(self, connections: int, part_mib: int) -> None:
        target = self._target()
        self._s5cmd(connections, part_mib, f"s3://{self.store.bucket}/{KEY}", str(target))
        _sync(target)

    def _s5cmd(self, connections: int, part_mib: int, source: str, target: str) -> None:
        keys = {"AWS_ACCESS_KEY_ID": self.store.access_key, "AWS_SECRET_ACCESS_KEY": self.store.secret_key}
        options = ["--concurrency", str(connections), "--part-size", str(part_mib)]
        command = [s5cmd_path(), "--endpoint-url", self.store.endpoint, "cp", *options, source, target]
        environment = {**os.environ, **keys, "AWS_REGION": self.store.region}
        subprocess.run(command, env=environment, check=True, capture_output=True)

    # -- boto3 ---------------------------------------------------------------------------------------------------------
    def boto3_upload(self, connections: int, part_mib: int) -> None:
        config = _transfer_config(connections, part_mib)
        self.boto3.upload_file(str(self.file), self.store.bucket, KEY, Config=config)

    def boto3_download(self, connections: int, part_mib: int) -> None:
        target, config = self._target(), _transfer_config(connections, part_mib)
        self.boto3.download_file(self.store.bucket, KEY, str(target), Config=config)
        _sync(target)

    def _target(self) -> Path:
        target = self.folder / "downloaded"
        target.unlink(missing_ok=True)
        return target


def _transfer_config(connections: int, part_mib: int) -> TransferConfig:
    return TransferConfig(
        multipart_threshold=8 * MIB,
        multipart_chunksize=part_mib * MIB,
        max_concurrency=connections,
        # Its CRT client cannot address a bucket by path on a loopback endpoint.
        preferred_transfer_client="classic",
    )


def _sync(path: Path) -> None:
    """As `fetch` does before it says that a model is there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def s5cmd_path() -> str:
    """The program, beside this interpreter or in the environment that its packages come from."""
    packages = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    places = [Path(sysconfig.get_path("scripts")), *(folder.parents[2] / "bin" for folder in packages)]
    for place in places:
        if (place / "s5cmd").is_file():
            return str(place / "s5cmd")
    raise RuntimeError(f"s5cmd is not installed: looked in {', '.join(map(str, places))}")


def _buffer(num_mib: int) -> ShardBuffer:
    """A shard of random weights: so many MiB in tensors of 16."""
    numel = TENSOR_MIB * MIB // 4
    names = [f"blocks.{number}.weight" for number in range(num_mib // TENSOR_MIB)]
    slices = tuple(TensorSlice(key=name, name=name, kind="weight", start=0, numel=numel) for name in names)
    buffer = ShardBuffer("shards/weights-00000-of-00001.safetensors", 0, "weights", slices, pinned=False)
    generator = torch.Generator().manual_seed(0)
    for _, slot in buffer.slots():
        slot.normal_(generator=generator)
    return buffer


def _manifest(job_id: str, shard: ShardFile) -> Manifest:
    return Manifest(
        checkpoint_id=checkpoint_id(job_id, 1, 1),
        job_id=job_id,
        attempt=1,
        step=1,
        position=1,
        total_steps=1,
        world_size=1,
        zero_stage=0,
        optimizer="adamw",
        optimizer_step=1,
        spec_hash="",
        training_fingerprint="",
        data_fingerprint="",
        versions={},
        metrics={},
        model=MODEL,
        preprocess=PREPROCESS,
        tensors={piece.name: (piece.numel,) for piece in shard.slices},
        files=(shard,),
        nonce="benchmark",
        created_at=datetime.now(UTC),
    )


def start(stack: ExitStack, num_mib: int) -> Bench:
    """The embedded store and the API on it, with the checkpoint registered (its files are yet to come)."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pw-bench-")))
    store = ObjectStoreServer(folder / "store")
    store.start()
    stack.callback(store.stop)
    store.wait_ready()
    url = f"sqlite:///{folder}/patchwork.db"
    db = Database(url)
    stack.callback(db.close)
    db.upgrade()
    ensure_admin_token(db, TOKEN, "bench")
    request = parse_request(json.dumps({"spec": spec_with()}).encode(), is_yaml=False)
    job_id = submit_job(db, Actor("tok_bench", "bench", "admin"), request, None).job_id
    add_checkpoint(db, job_id, 1)
    [port] = free_ports(1)
    settings = {
        "database_url": url,
        "s3_endpoint": store.endpoint,
        "s3_bucket": store.bucket,
        "s3_region": store.region,
        "s3_access_key": store.access_key,
        "s3_secret_key": store.secret_key,
        "s3_prefix": "",
        "s3_public": True,
        "worker_secret": "secret",
        "port": port,
    }
    path, log = folder / "settings.json", folder / "api.log"
    path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "orchestrator.api.server"]
    stack.enter_context(serving(command, log, {"PATCHWORK_SETTINGS_FILE": str(path)}))
    wait_until_up(f"http://127.0.0.1:{port}/healthz", log)
    buffer = _buffer(num_mib)
    file = folder / "file"
    file.write_bytes(buffer.data)
    ours = S3Store(
        endpoint=store.endpoint,
        region=store.region,
        bucket=store.bucket,
        prefix="",
        access_key=store.access_key,
        secret_key=store.secret_key,
    )
    client = Client(f"http://127.0.0.1:{port}", TOKEN)
    return Bench(store, buffer, file, job_id, client, folder, ours, store.client())


def best_settings(title: str, action: Callable[[int, int], None]) -> tuple[int, int]:
    """Of SETTINGS the fastest in one trial each."""
    seconds = {setting: timed(partial(action, *setting)) for setting in SETTINGS}
    best = min(seconds, key=lambda setting: seconds[setting])
    progress(f"{title}: {best[0]} connections, parts of {best[1]} MiB")
    return best


def measure(bench: Bench, direction: str, repetitions: int, notes: dict[str, Any]) -> list[Row]:
    """Rows of MB/s of the three."""
    ours: Callable[[], None] = getattr(bench, direction)
    actions: dict[str, Callable[[], None]] = {"patchwork": ours}
    for name in ("s5cmd", "boto3"):
        action: Callable[[int, int], None] = getattr(bench, f"{name}_{direction}")
        setting = best_settings(f"{direction}, {name}", action)
        notes[f"{direction}, {name}"] = {"connections": setting[0], "part_mib": setting[1]}
        actions[name] = partial(action, *setting)

    def rate(action: Callable[[], None]) -> float:
        return bench.num_bytes / 1e6 / timed(action)

    values = interleave({name: partial(rate, action) for name, action in actions.items()}, repetitions)
    rows = [Row(f"{direction}: {name}", "MB/s", values[name]) for name in ("s5cmd", "boto3")]
    better = max(rows, key=lambda row: row.median)
    return [Row(f"{direction}: patchwork", "MB/s", values["patchwork"], better.name, ("at least", 0.9)), *rows]


def main() -> None:
    """Measure, print the table, write transfer.json."""
    parser = arguments(__doc__ or "", repetitions=3)
    parser.add_argument("--mib", type=int, default=512, help=f"of the checkpoint, by {TENSOR_MIB} (default 512)")
    options = parser.parse_args()
    end_servers_when_terminated()
    if options.mib < TENSOR_MIB or options.mib % TENSOR_MIB:
        parser.error(f"--mib {options.mib}, must be a multiple of {TENSOR_MIB}")
    notes: dict[str, Any] = {"mib": options.mib}
    with ExitStack() as stack:
        bench = start(stack, options.mib)
        bench.upload()
        rows = measure(bench, "upload", options.repetitions, notes)
        rows += measure(bench, "download", options.repetitions, notes)
        assert (bench.folder / "fetched" / WEIGHTS_NAME).stat().st_size >= options.mib * MIB
    report("transfer", f"A checkpoint of {options.mib} MiB and the embedded object store", rows, options.out, notes)


if __name__ == "__main__":
    main()
