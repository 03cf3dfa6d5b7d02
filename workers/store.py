"""The workers' side of the object store: one small Protocol, and S3 behind it.

StoreError
├── NotFound        no such object
├── AlreadyExists   a conditional write lost: the object is there
└── StorageError    anything else, after the client's own retries; the key and the service's answer are named
    └── StoreRefused    the service knows us and says no: trying again changes nothing until somebody mends it
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

Data = bytes | bytearray | memoryview


class StoreError(Exception):
    """Base of what an object store raises."""


class NotFound(StoreError):
    """There is no object of this key."""


class AlreadyExists(StoreError):
    """The object of a write with `if_none_match` is there already."""


class StorageError(StoreError):
    """The store could not be used."""


class StoreRefused(StorageError):
    """Keys, policy or bucket are wrong."""


class ObjectStore(Protocol):
    """Objects under one prefix of one bucket; keys are relative to it. Every method may raise StorageError."""

    def put(self, key: str, data: Data, *, if_none_match: bool = False) -> None:
        """Write an object whole. With `if_none_match` only if there is none; raises AlreadyExists."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Write the content of a local file."""
        ...

    def get(self, key: str) -> bytes:
        """Raises NotFound."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length); fewer where the object ends before. Raises NotFound."""
        ...

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys under `prefix` with their sizes in bytes, in no promised order."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""
        ...


class _MemoryFile(io.RawIOBase):
    """A seekable file over a buffer, without copying it (a shard may be gigabytes)."""

    def __init__(self, data: Data) -> None:
        self._view = memoryview(data).cast("B")
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        chunk = self._view[self._position : self._position + len(target)]
        target[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)


MULTIPART_BYTES = 32 * 1024 * 1024
# The classic client: boto3's CRT one cannot address a bucket by path on a loopback endpoint.
_TRANSFER = TransferConfig(
    multipart_threshold=2 * MULTIPART_BYTES,
    multipart_chunksize=MULTIPART_BYTES,
    max_concurrency=4,
    preferred_transfer_client="classic",
)
_NOT_FOUND = {"404", "NoSuchKey", "NotFound"}
_EXISTS = {"412", "PreconditionFailed"}
_CONFLICT = {"409", "ConditionalRequestConflict"}
_CONFLICT_TRIES = 5
_REFUSED = {"403", "AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "NoSuchBucket", "SignatureDoesNotMatch"}


class S3Store:
    """Any S3 service. Connections time out (5 s to connect, `read_timeout_s` for each answer) and are retried by the
    client."""

    def __init__(
        self,
        *,
        endpoint: str | None,
        region: str,
        bucket: str,
        prefix: str,
        access_key: str | None,
        secret_key: str | None,
        read_timeout_s: float = 30.0,
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._client = boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint,
            region_name=region,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            config=Config(
                signature_version="s3v4",
                connect_timeout=5,
                read_timeout=read_timeout_s,
                retries={"mode": "standard", "max_attempts": 5},
                # A SHA-256 of every part takes as long as the rest of an upload to a store without TLS (with TLS it is
                # never computed); the client's CRC-32, which the store checks, and the manifest's checksums remain.
                s3={"addressing_style": "path", "payload_signing_enabled": False},
                max_pool_connections=32,
            ),
        )

    def put(self, key: str, data: Data, *, if_none_match: bool = False) -> None:
        if not if_none_match:
            try:
                self._client.upload_fileobj(
                    io.BufferedReader(_MemoryFile(data)), self._bucket, self._prefix + key, Config=_TRANSFER
                )
            except (ClientError, BotoCoreError, boto3.exceptions.Boto3Error) as error:
                raise _storage_error("write", key, error) from error
            return
        for tries_left in reversed(range(_CONFLICT_TRIES)):
            try:
                self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=bytes(data), IfNoneMatch="*")
                return
            except ClientError as error:
                if _code(error) in _EXISTS:
                    raise AlreadyExists(key) from error
                # 409: another conditional write of this key is under way; S3 asks to try again.
                if _code(error) not in _CONFLICT or not tries_left:
                    raise _storage_error("write", key, error) from error
            except BotoCoreError as error:
                raise _storage_error("write", key, error) from error

    def put_file(self, key: str, path: Path) -> None:
        try:
            self._client.upload_file(str(path), self._bucket, self._prefix + key, Config=_TRANSFER)
        except (ClientError, BotoCoreError, boto3.exceptions.Boto3Error) as error:
            raise _storage_error("write", key, error) from error

    def get(self, key: str) -> bytes:
        return self._get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._get(key, Range=f"bytes={start}-{start + length - 1}") if length > 0 else b""

    def _get(self, key: str, **options: str) -> bytes:
        try:
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **options)["Body"].read()  # type: ignore[arg-type]
        except ClientError as error:
            if _code(error) in _NOT_FOUND:
                raise NotFound(key) from error
            if _code(error) in {"416", "InvalidRange"}:
                return b""
            raise _storage_error("read", key, error) from error
        except BotoCoreError as error:
            raise _storage_error("read", key, error) from error

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        try:
            for page in pages:
                for entry in page.get("Contents", []):
                    yield entry["Key"].removeprefix(self._prefix), entry["Size"]
        except (ClientError, BotoCoreError) as error:
            raise _storage_error("list", prefix, error) from error

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
            except (ClientError, BotoCoreError) as error:
                raise _storage_error("delete", key, error) from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _storage_error(action: str, key: str, error: Exception) -> StorageError:
    kind = StoreRefused if _refuses(error) else StorageError
    return kind(f"cannot {action} {key!r}: {type(error).__name__}: {error}")


def _refuses(error: Exception) -> bool:
    # boto3's transfers wrap the service's answer in an error of their own, whose text ends with it.
    answer: BaseException | None = error
    while answer is not None and not isinstance(answer, ClientError):
        answer = answer.__cause__ or answer.__context__
    return isinstance(answer, ClientError) and _code(answer) in _REFUSED
