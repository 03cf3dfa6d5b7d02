"""Bring a weights file into the store: hashed, sent in parts, several at a time, resumed where it was cut.

Nothing is kept on this side: the server knows the file by its SHA-256 and says which parts have arrived.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from configs.errors import SpecError, field_errors
from configs.imports import refused_by_name
from orchestrator.client import Client, PatchworkError
from orchestrator.schemas import ImportCreate, JobPublic, PartUrl, UploadPublic

_CHUNK_BYTES = 1024 * 1024
_URLS_AT_ONCE = 16
_NUM_TRIES = 5
_RETRY_STATUS = (408, 429, 500, 502, 503, 504)


class UploadError(PatchworkError):
    """The file could not be sent; the parts that have arrived stay and are used by the next try."""


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The file's SHA-256, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(4 * _CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()


def import_file(
    client: Client,
    path: Path,
    *,
    name: str | None = None,
    source: str = "",
    num_threads: int = 4,
    on_hash: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    **described: Any,
) -> JobPublic:
    """Send a .safetensors or .npz file and queue its import. Returns the job; its checkpoint is the imported model.

    Args:
        name: of the job; left out: the file's.
        source: where the file came from, a URL or text; kept with the checkpoint.
        on_hash: told of bytes hashed, before anything is sent.
        on_bytes: told of bytes that are in the store; by several threads.
        described: more fields of `schemas.ImportCreate`: format, model, preprocess, config, project.

    Raises:
        FileNotFoundError: there is no such file.
        UploadError: it is of a kind that is not read, changed meanwhile, or the store did not take it.
        SpecError: `described` is not valid.
        ApiError, Unreachable: from the server.
    """
    reason = refused_by_name(path.name)
    if reason is not None:
        raise UploadError(reason)
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise UploadError(f"{path} is empty")
    asked = {
        "file": path.name,
        "num_bytes": num_bytes,
        "sha256": sha256_of(path, on_hash),
        "name": name,
        "source": source,
    }
    try:
        request = ImportCreate.model_validate(asked | described)
    except ValidationError as error:
        raise SpecError(field_errors(error, asked | described, ImportCreate)) from None
    upload = client.checkpoints.begin_import(request)
    _Sender(client, path, upload, num_threads, on_bytes or (lambda _: None)).run()
    return client.checkpoints.complete_import(upload.id)


class _Sender:
    """Sends the parts that have not arrived."""

    def __init__(
        self, client: Client, path: Path, upload: UploadPublic, num_threads: int, on_bytes: Callable[[int], None]
    ) -> None:
        self._client = client
        self._path = path
        self._upload = upload
        self._num_threads = num_threads
        self._on_bytes = on_bytes
        self._stop = threading.Event()
        # The store's own address, with no token of ours: the URLs are signed.
        self._http = httpx.Client(timeout=httpx.Timeout(60.0, connect=10.0), limits=httpx.Limits())

    def run(self) -> None:
        upload = self._upload
        sizes = {part.number: part.num_bytes for part in upload.parts}
        numbers = []
        for number in range(1, upload.num_parts + 1):
            size = min(upload.part_bytes, upload.num_bytes - (number - 1) * upload.part_bytes)
            if sizes.get(number) == size:
                self._on_bytes(size)
            else:
                numbers.append(number)
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="upload")
        try:
            for start in range(0, len(numbers), _URLS_AT_ONCE):
                urls = self._client.checkpoints.part_urls(upload.id, numbers[start : start + _URLS_AT_ONCE])
                futures = [pool.submit(self._send, url) for url in urls]
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._http.close()

    def _send(self, part: PartUrl) -> None:
        problem = ""
        for trial in range(_NUM_TRIES):
            if self._stop.is_set():
                raise UploadError("stopped")
            try:
                headers = {"Content-Length": str(part.num_bytes)}
                response = self._http.put(part.url, content=self._bytes_of(part), headers=headers)
            except httpx.TransportError as error:
                problem = f"{httpx.URL(part.url).host} did not take it: {error}"
            else:
                if response.is_success:
                    self._on_bytes(part.num_bytes)
                    return
                problem = f"{httpx.URL(part.url).host} answered {response.status_code}: {response.text[:300]}"
                if response.status_code not in _RETRY_STATUS:
                    break
            if trial < _NUM_TRIES - 1:
                self._stop.wait(0.25 * 3**trial)
        raise UploadError(
            f"part {part.number} of {self._path.name}: {problem}. The parts that have arrived stay: the same command "
            "goes on from there. If this machine cannot reach the store, its PATCHWORK_S3_PUBLIC_ENDPOINT is wrong."
        )

    def _bytes_of(self, part: PartUrl) -> Iterator[bytes]:
        left = part.num_bytes
        with self._path.open("rb") as file:
            file.seek((part.number - 1) * self._upload.part_bytes)
            while left:
                if self._stop.is_set():
                    raise UploadError("stopped")
                chunk = file.read(min(_CHUNK_BYTES, left))
                if not chunk:
                    raise UploadError(f"{self._path} became shorter while it was sent")
                left -= len(chunk)
                yield chunk
