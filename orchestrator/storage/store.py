"""The control plane's side of the object store. Keys are those of `configs.layout`; the prefix is put on here.

StoreError
  NotFound          no such key
  AlreadyExists     a conditional put lost
  StoreUnavailable  unreachable, timed out, or it answered 5xx after every retry: try again later
  StoreRefused      it answered 4xx: credentials, bucket or permissions are wrong
  StoreUnfit        the self-test failed: this service must not hold checkpoints
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from orchestrator.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CHUNK_BYTES = 1024 * 1024
_DELETE_BATCH = 1000
_CONFLICT_RETRIES = 5


class StoreError(Exception):
    """The object store could not do what was asked. The message names the key."""


class NotFound(StoreError):
    pass


class AlreadyExists(StoreError):
    pass


class StoreUnavailable(StoreError):
    pass


class StoreRefused(StoreError):
    pass


class StoreUnfit(StoreError):
    pass


class StoredObject(NamedTuple):
    key: str
    size: int


class StoredPart(NamedTuple):
    number: int
    size: int
    etag: str


class ObjectStore(Protocol):
    """Keys to bytes. Every method may raise StoreUnavailable or StoreRefused."""

    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound."""
        ...

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes [start, start + length) (length left out: to the end) in chunks of at most CHUNK_BYTES.
        Raises NotFound at the call, not at the first chunk. Close the iterator if it is not read to its end."""
        ...

    def put(self, key: str, data: bytes, *, if_none_match: bool = False) -> None:
        """Store `data`. With `if_none_match` only if the key is free. Raises AlreadyExists."""
        ...

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Every object under `prefix`, in no promised order."""
        ...

    def folders(self, prefix: str) -> tuple[str, ...]:
        """The distinct `<prefix><name>/` under which objects lie; `prefix` ends in /. Sorted. One that was emptied a
        moment ago may still be named."""
        ...

    def head(self, key: str) -> StoredObject:
        """Key and size. Raises NotFound."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are no error."""
        ...

    def presign(self, key: str, expires_s: int) -> str:
        """A URL that lets its holder GET the object for so many seconds."""
        ...

    def create_upload(self, key: str) -> str:
        """Begin an upload in parts; returns the store's name for it."""
        ...

    def presign_part(self, key: str, upload: str, number: int, expires_s: int) -> str:
        """A URL that lets its holder PUT part `number` (from 1)."""
        ...

    def list_parts(self, key: str, upload: str) -> tuple[StoredPart, ...]:
        """The parts that have arrived, by number. Raises NotFound: there is no such upload (any more)."""
        ...

    def complete_upload(self, key: str, upload: str, parts: Sequence[StoredPart]) -> None:
        """Make the object of its parts. Raises NotFound."""
        ...

    def abort_upload(self, key: str, upload: str) -> None:
        """Forget the upload and its parts; a missing one is no error."""
        ...

    def open_uploads(self, prefix: str) -> Iterator[tuple[str, str, datetime]]:
        """Key, name and beginning of every upload under `prefix` that is neither complete nor aborted."""
        ...


class S3Store:
    """An S3 service, through boto3. Safe to use from several threads."""

    def __init__(
        self,
        *,
        endpoint: str | None,
        region: str,
        bucket: str,
        prefix: str,
        access_key: str,
        secret_key: str,
        public_endpoint: str | None = None,
    ) -> None:
        self.bucket = bucket
        self.prefix = prefix

        # What decides how long a call may take and how it is signed is said here, not left to the environment.
        def client(address: str | None) -> S3Client:
            return boto3.client(
                "s3",
                endpoint_url=address,
                region_name=region,
                aws_access_key_id=access_key,
                aws_secret_access_key=secret_key,
                config=Config(
                    connect_timeout=5,
                    read_timeout=30,
                    retries={"mode": "standard", "total_max_attempts": 5},
                    signature_version="s3v4",
                    s3={"addressing_style": "path" if address else "auto"},
                    max_pool_connections=32,
                ),
            )

        self._client = client(endpoint)
        # Signs URLs only, and never connects: the address is part of what is signed.
        self._signer = self._client if public_endpoint in (None, endpoint) else client(public_endpoint)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(
            endpoint=settings.s3_endpoint,
            region=settings.s3_region,
            bucket=settings.s3_bucket,
            prefix=settings.s3_prefix,
            access_key=settings.s3_access_key.get_secret_value(),
            secret_key=settings.s3_secret_key.get_secret_value(),
            public_endpoint=settings.s3_public_endpoint,
        )

    def get(self, key: str) -> bytes:
        with _translated(key):
            return self._client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        if length is not None and length <= 0:
            return iter(())
        last = "" if length is None else str(start + length - 1)
        wanted: dict[str, Any] = {"Range": f"bytes={start}-{last}"} if start or length is not None else {}
        with _translated(key):
            body = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, **wanted)["Body"]
        return _chunks(key, body)

    def put(self, key: str, data: bytes, *, if_none_match: bool = False) -> None:
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_none_match else {}
        for remaining in reversed(range(_CONFLICT_RETRIES)):
            try:
                with _translated(key):
                    self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, **condition)
                return
            except _Conflict:
                # 409 is not 412: another conditional write was in flight and neither has won yet.
                if not remaining:
                    raise

    def list(self, prefix: str) -> Iterator[StoredObject]:
        for page in self._pages(prefix):
            for item in page.get("Contents", []):
                yield StoredObject(item["Key"].removeprefix(self.prefix), item["Size"])

    def folders(self, prefix: str) -> tuple[str, ...]:
        pages = self._pages(prefix, Delimiter="/")
        names = {c["Prefix"].removeprefix(self.prefix) for page in pages for c in page.get("CommonPrefixes", [])}
        return tuple(sorted(names))

    def head(self, key: str) -> StoredObject:
        with _translated(key):
            return StoredObject(
                key, self._client.head_object(Bucket=self.bucket, Key=self.prefix + key)["ContentLength"]
            )

    def delete(self, keys: Iterable[str]) -> None:
        names = list(keys)
        for start in range(0, len(names), _DELETE_BATCH):
            batch = names[start : start + _DELETE_BATCH]
            with _translated(batch[0]):
                reply = self._client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": self.prefix + k} for k in batch], "Quiet": True}
                )
            for error in reply.get("Errors", []):
                raise StoreRefused(f"{error.get('Key')}: not deleted: {error.get('Code')} {error.get('Message', '')}")

    def presign(self, key: str, expires_s: int) -> str:
        return self._signer.generate_presigned_url(
            "get_object", Params={"Bucket": self.bucket, "Key": self.prefix + key}, ExpiresIn=expires_s
        )

    def create_upload(self, key: str) -> str:
        with _translated(key):
            return self._client.create_multipart_upload(Bucket=self.bucket, Key=self.prefix + key)["UploadId"]

    def presign_part(self, key: str, upload: str, number: int, expires_s: int) -> str:
        part = {"Bucket": self.bucket, "Key": self.prefix + key, "UploadId": upload, "PartNumber": number}
        return self._signer.generate_presigned_url("upload_part", Params=part, ExpiresIn=expires_s)

    def list_parts(self, key: str, upload: str) -> tuple[StoredPart, ...]:
        pages = self._client.get_paginator("list_parts")
        with _translated(key):
            found = pages.paginate(Bucket=self.bucket, Key=self.prefix + key, UploadId=upload)
            parts = [part for page in found for part in page.get("Parts", [])]
        return tuple(StoredPart(part["PartNumber"], part["Size"], part["ETag"]) for part in parts)

    def complete_upload(self, key: str, upload: str, parts: Sequence[StoredPart]) -> None:
        with _translated(key):
            self._client.complete_multipart_upload(
                Bucket=self.bucket,
                Key=self.prefix + key,
                UploadId=upload,
                MultipartUpload={"Parts": [{"PartNumber": part.number, "ETag": part.etag} for part in parts]},
            )

    def abort_upload(self, key: str, upload: str) -> None:
        with suppress(NotFound), _translated(key):
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=self.prefix + key, UploadId=upload)

    def open_uploads(self, prefix: str) -> Iterator[tuple[str, str, datetime]]:
        pages = self._client.get_paginator("list_multipart_uploads")
        with _translated(prefix):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for item in page.get("Uploads", []):
                    yield item["Key"].removeprefix(self.prefix), item["UploadId"], item["Initiated"]

    def create_bucket(self) -> None:
        """Create the bucket if it is missing."""
        try:
            with _translated(self.bucket):
                self._client.head_bucket(Bucket=self.bucket)
        except NotFound:
            where: dict[str, Any] = {}
            region = self._client.meta.region_name
            if region != "us-east-1":
                where = {"CreateBucketConfiguration": {"LocationConstraint": region}}
            with _translated(self.bucket):
                self._client.create_bucket(Bucket=self.bucket, **where)

    def self_test(self) -> None:
        """Try what checkpoints rely on: read after write, one winner of two conditional puts, bad checksums refused.

        Raises:
            StoreUnfit: the service does not keep one of these promises.
        """
        folder = f"self-test/{uuid.uuid4().hex}"
        try:
            self._test_read_back(f"{folder}/plain")
            self._test_race(f"{folder}/race")
            self._test_checksum(f"{folder}/checksum")
        finally:
            self.delete(f"{folder}/{name}" for name in ("plain", "race", "checksum"))

    def _test_read_back(self, key: str) -> None:
        payload = uuid.uuid4().bytes * 64
        self.put(key, payload)
        if self.get(key) != payload:
            raise StoreUnfit(f"{key}: what was read is not what was written")

    def _test_race(self, key: str) -> None:
        start = threading.Barrier(2)

        def contend(payload: bytes) -> bytes | None:
            start.wait(timeout=10)
            try:
                self.put(key, payload, if_none_match=True)
            except AlreadyExists:
                return None
            return payload

        with ThreadPoolExecutor(2) as pool:
            winners = [won for won in pool.map(contend, (b"a" * 4096, b"b" * 4096)) if won is not None]
        if len(winners) != 1 or self.get(key) != winners[0]:
            raise StoreUnfit(f"{key}: {len(winners)} of 2 racing If-None-Match puts succeeded, expected exactly 1")

    def _test_checksum(self, key: str) -> None:
        try:
            with _translated(key):
                # CRC32 of nothing: wrong for this body.
                self._client.put_object(
                    Bucket=self.bucket, Key=self.prefix + key, Body=b"body", ChecksumCRC32="AAAAAA=="
                )
        except StoreRefused:
            return
        raise StoreUnfit(f"{key}: a body with a wrong checksum was accepted")

    def _pages(self, prefix: str, **options: Any) -> Iterator[Any]:
        paginator = self._client.get_paginator("list_objects_v2")
        with _translated(prefix):
            yield from paginator.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix, **options)


class _Conflict(StoreUnavailable):
    """409: a conditional write raced another one."""


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Turn botocore's errors into ours, each naming the key."""
    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        message = f"{key}: {code or status} {error.response.get('Error', {}).get('Message', '')}".rstrip()
        if code in ("NoSuchKey", "NoSuchBucket", "404") or status == 404:
            raise NotFound(message) from error
        if status == 412 or code == "PreconditionFailed":
            raise AlreadyExists(message) from error
        if status == 409:
            raise _Conflict(message) from error
        if 400 <= status < 500 and status != 429:
            raise StoreRefused(message) from error
        raise StoreUnavailable(message) from error
    except BotoCoreError as error:
        raise StoreUnavailable(f"{key}: {error}") from error


def _chunks(key: str, body: Any) -> Iterator[bytes]:
    try:
        with _translated(key):
            yield from body.iter_chunks(CHUNK_BYTES)
    finally:
        body.close()
