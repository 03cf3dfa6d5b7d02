"""Take a checkpoint's weights away: verified, resumable, put together in a folder that `vit.load` opens.

    <folder>/
        model.safetensors   every weight whole, fp32
        config.json         ModelFile; written last
        .parts-<checkpoint> while it is under way: the weights as far as they have come

Only shards that hold weights are read, in ranges of one block (8 MiB), several at a time. Every block is checked
against the CRC32C in the manifest and then written where it belongs in the file of whole tensors. After a cut the
blocks that are there are checked and not read again.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import google_crc32c
import httpx
import numpy as np

from configs.train import Weights
from configs.wire import BLOCK_BYTES, Manifest, ModelFile, ShardFile
from orchestrator.client import Client, Unreachable, check
from orchestrator.ranges import RangeReader, is_direct
from orchestrator.weights_file import FetchError, WeightsFile

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_NUM_TRIES = 4
_SYNC_BYTES = 64 * 1024**2
_TIMEOUT_S = 30.0
"""Of silence, of the store."""


@dataclass(frozen=True)
class Fetched:
    """What lies in the folder now."""

    folder: Path
    checkpoint_id: str
    num_bytes: int
    """Of the shards."""
    num_bytes_read: int
    """Over the network, this time."""
    num_parameters: int
    seconds: float


@dataclass(frozen=True)
class _Block:
    shard: ShardFile
    number: int

    @property
    def start(self) -> int:
        return self.number * BLOCK_BYTES

    @property
    def num_bytes(self) -> int:
        return min(BLOCK_BYTES, self.shard.num_bytes - self.start)


def fetch(
    client: Client,
    reference: str,
    folder: Path,
    *,
    force: bool = False,
    weights: Weights = "raw",
    num_threads: int = 8,
    on_start: Callable[[str, int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Fetched:
    """Fetch the weights of a checkpoint (`ckpt_…`, `job_…/best`, `job_…/latest` or a job) into `folder`.

    Args:
        force: replace a model that is there.
        weights: ema for the moving average of the weights, of a job with `train.ema_decay`.
        on_start: told the checkpoint's id and the bytes to come.
        on_bytes: told of every block that is there and verified, in bytes; by several threads.

    Raises:
        FileExistsError: a model is there and `force` is not set.
        FetchError: bytes are missing or wrong after several tries, or the disk is too small.
        ApiError, Unreachable, LookupError: from the server.
    """
    started = time.monotonic()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (folder / name).exists() and not force:
            raise FileExistsError(
                f"{folder / name} is there already: choose another folder, or replace it with --force"
            )
    checkpoint_id = client.checkpoints.find(reference).id
    manifest = client.checkpoints.manifest(checkpoint_id)
    role = "weights" if weights == "raw" else "ema"
    shards = [file for file in manifest.files if file.role == role]
    if not shards:
        raise FetchError(f"checkpoint {checkpoint_id} holds no moving average: its job had no train.ema_decay")
    total = sum(shard.num_bytes for shard in shards)
    parts = folder / (f".parts-{checkpoint_id}" if weights == "raw" else f".parts-ema-{checkpoint_id}")
    parts.mkdir(parents=True, exist_ok=True)
    _check_space(folder, total)
    if on_start is not None:
        on_start(checkpoint_id, total)
    with WeightsFile(manifest, role, parts / WEIGHTS_NAME) as file:
        download = _Download(client, checkpoint_id, file, num_threads, on_bytes or (lambda _: None))
        num_bytes_read = download.run([_Block(shard, n) for shard in shards for n in range(len(shard.crc32c))])
    _publish(manifest, parts, folder)
    return Fetched(
        folder=folder,
        checkpoint_id=checkpoint_id,
        num_bytes=total,
        num_bytes_read=num_bytes_read,
        num_parameters=sum(int(np.prod(shape)) for shape in manifest.tensors.values()),
        seconds=time.monotonic() - started,
    )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FetchError(f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed while fetching")


# -- download ----------------------------------------------------------------------------------------------------------
class _Download:
    """Reads the blocks that are not there yet, each verified before it counts."""

    def __init__(
        self,
        client: Client,
        checkpoint_id: str,
        file: WeightsFile,
        num_threads: int,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._client = client
        self._checkpoint_id = checkpoint_id
        self._file = file
        self._addresses: dict[str, str | None] = {}
        """Where the server sends us for a shard, which is good for many of its blocks; None: it gives them itself."""
        self._asking = threading.Lock()
        self._ranges = RangeReader(_TIMEOUT_S)
        self._num_threads = num_threads
        self._on_bytes = on_bytes
        self._stop = threading.Event()
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing: Future[None] | None = None
        self._num_unsynced = 0
        self._counting = threading.Lock()

    def run(self, blocks: list[_Block]) -> int:
        """Returns the bytes that were read from the server."""
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="fetch")
        try:
            futures = [pool.submit(self._ensure, block) for block in blocks]
            wait(futures, return_when=FIRST_EXCEPTION)
            done = [future for future in futures if future.done()]
            # The first error is the cause; the others follow from stopping.
            num_bytes_read = sum(future.result() for future in (done if len(done) < len(futures) else futures))
            if self._syncing is not None:
                self._syncing.result()
            return num_bytes_read
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._syncer.shutdown()
            self._ranges.close()

    def _ensure(self, block: _Block) -> int:
        """Have the block on disk, verified. Returns the bytes that were read for it."""
        num_bytes_read = 0
        name = block.shard.name
        if self._file.is_new or not _is_right(self._file.read(name, block.start, block.num_bytes), block):
            data = self._read_verified(block)
            self._file.write(name, block.start, data)
            num_bytes_read = len(data)
            self._sync_now_and_then(num_bytes_read)
        self._on_bytes(block.num_bytes)
        return num_bytes_read

    def _sync_now_and_then(self, num_bytes: int) -> None:
        """The disk writes while blocks come in; otherwise all of it is waited for at the end."""
        with self._counting:
            self._num_unsynced += num_bytes
            if self._num_unsynced >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
                self._num_unsynced = 0
                if self._syncing is not None:
                    # Of an error that was seen once, the disk does not speak again at the next sync.
                    self._syncing.result()
                self._syncing = self._syncer.submit(self._file.sync)

    def _read_verified(self, block: _Block) -> memoryview:
        """The block's bytes, until this thread reads the next one."""
        problem = ""
        for trial in range(_NUM_TRIES):
            if self._stop.is_set():
                raise FetchError("stopped")
            try:
                data = self._read(block)
            except (httpx.TransportError, Unreachable) as error:
                problem = f"could not be read: {error}"
            else:
                if _is_right(data, block):
                    return data
                problem = f"has {len(data)} bytes that do not match its checksum, {block.num_bytes} were expected"
            if trial < _NUM_TRIES - 1:
                self._stop.wait(0.2 * 3**trial)
        raise FetchError(
            f"{self._checkpoint_id}: bytes {block.start} to {block.start + block.num_bytes} of {block.shard.name} "
            f"{problem} ({_NUM_TRIES} tries). Nothing of it was used; run the same command again to go on."
        )

    def _read(self, block: _Block) -> memoryview:
        name = block.shard.name
        address = self._address(name)
        if address is not None and self._client.is_direct and is_direct(address):
            return self._read_directly(block, address)
        headers = {"Range": f"bytes={block.start}-{block.start + block.num_bytes - 1}", "Accept-Encoding": "identity"}
        with self._client.checkpoints.read(self._checkpoint_id, name, headers, address) as response:
            if address is not None and response.status_code in (400, 401, 403, 404, 410):
                # It is good for an hour only: the server says where to go on.
                self._addresses.pop(name, None)
                raise Unreachable(f"{response.request.url.host} answered {response.status_code}")
            if response.status_code in (429, 500, 502, 503, 504):
                raise Unreachable(f"{response.request.url.host} answered {response.status_code}")
            if not response.is_success:
                response.read()
                check(response)
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > block.num_bytes or self._stop.is_set():
                    # More than was asked for: a server that ignores Range would send the whole file.
                    break
        return memoryview(data)

    def _address(self, name: str) -> str | None:
        """Where a shard's bytes come from, asked for once and with one byte: all threads begin at the same time, and
        what comes through a redirect comes slowly."""
        with self._asking:
            if name not in self._addresses:
                one_byte = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
                with self._client.checkpoints.read(self._checkpoint_id, name, one_byte) as response:
                    if not response.is_success:
                        return None
                    self._addresses[name] = str(response.url) if response.history else None
            return self._addresses[name]

    def _read_directly(self, block: _Block, address: str) -> memoryview:
        status, data = self._ranges.read(address, block.start, block.num_bytes)
        if status not in (200, 206):
            # It is good for an hour only: the server says where to go on.
            self._addresses.pop(block.shard.name, None)
            raise Unreachable(f"{urlsplit(address).hostname} answered {status}")
        return data


def _is_right(data: bytearray | memoryview, block: _Block) -> bool:
    # As an array: the checksum takes neither, and bytes would be a copy.
    view = np.frombuffer(data, np.uint8)
    return len(data) == block.num_bytes and google_crc32c.value(view) == block.shard.crc32c[block.number]


def _publish(manifest: Manifest, parts: Path, folder: Path) -> None:
    """Put both files in place; config.json goes first and comes last, so that a torn pair is never a model."""
    model_file = ModelFile(
        model=manifest.model,
        preprocess=manifest.preprocess,
        checkpoint_id=manifest.checkpoint_id,
        job_id=manifest.job_id,
        step=manifest.step,
        metrics=manifest.metrics,
    )
    (parts / CONFIG_NAME).write_text(model_file.model_dump_json(indent=2) + "\n")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        with (parts / name).open("rb") as file:
            os.fsync(file.fileno())
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (parts / name).replace(folder / name)
    shutil.rmtree(parts)
