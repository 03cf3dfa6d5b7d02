"""An object store in a dictionary, with the errors a real one has."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

from orchestrator.storage.store import (
    CHUNK_BYTES,
    AlreadyExists,
    NotFound,
    StoredObject,
    StoredPart,
    StoreUnavailable,
)


class MemoryStore:
    """`orchestrator.storage.store.ObjectStore` in memory. `fail_next` makes the next calls, and `fail_delete` the
    next deletions, fail as if it were away;
    `lose_next_reply` does the next put and then fails, as a lost reply does."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[tuple[str, str], dict[int, bytes]] = {}
        self.upload_began = datetime.now(UTC)
        self.fail_next = 0
        self.fail_delete = 0
        self.lose_next_reply = False
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes:
        self._maybe_fail(key)
        try:
            return self.objects[key]
        except KeyError:
            raise NotFound(key) from None

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        data = self.get(key)
        part = data[start:] if length is None else data[start : start + length]
        return (part[i : i + CHUNK_BYTES] for i in range(0, len(part), CHUNK_BYTES))

    def put(self, key: str, data: bytes, *, if_none_match: bool = False) -> None:
        self._maybe_fail(key)
        with self._lock:
            if if_none_match and key in self.objects:
                raise AlreadyExists(key)
            self.objects[key] = data
        if self.lose_next_reply:
            self.lose_next_reply = False
            raise StoreUnavailable(f"{key}: the reply was lost")

    def list(self, prefix: str) -> Iterator[StoredObject]:
        self._maybe_fail(prefix)
        return iter([StoredObject(k, len(v)) for k, v in list(self.objects.items()) if k.startswith(prefix)])

    def folders(self, prefix: str) -> tuple[str, ...]:
        self._maybe_fail(prefix)
        rests = (k.removeprefix(prefix) for k in list(self.objects) if k.startswith(prefix))
        return tuple(sorted({f"{prefix}{rest.split('/')[0]}/" for rest in rests if "/" in rest}))

    def head(self, key: str) -> StoredObject:
        return StoredObject(key, len(self.get(key)))

    def delete(self, keys: Iterable[str]) -> None:
        if self.fail_delete > 0:
            self.fail_delete -= 1
            raise StoreUnavailable("nothing can be deleted")
        for key in keys:
            self._maybe_fail(key)
            self.objects.pop(key, None)

    def presign(self, key: str, expires_s: int) -> str:
        return f"https://store.example/{key}?expires={expires_s}"

    def create_upload(self, key: str) -> str:
        self._maybe_fail(key)
        upload = f"upload-{len(self.uploads)}"
        self.uploads[key, upload] = {}
        return upload

    def presign_part(self, key: str, upload: str, number: int, expires_s: int) -> str:
        return f"https://store.example/{key}?upload={upload}&part={number}&expires={expires_s}"

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> None:
        """What a client's PUT to a part's URL does."""
        self.uploads[key, upload][number] = data

    def list_parts(self, key: str, upload: str) -> tuple[StoredPart, ...]:
        self._maybe_fail(key)
        if (key, upload) not in self.uploads:
            raise NotFound(key)
        parts = self.uploads[key, upload]
        return tuple(StoredPart(number, len(data), f'"{number}"') for number, data in sorted(parts.items()))

    def complete_upload(self, key: str, upload: str, parts: Sequence[StoredPart]) -> None:
        self._maybe_fail(key)
        if (key, upload) not in self.uploads:
            raise NotFound(key)
        data = self.uploads.pop((key, upload))
        self.objects[key] = b"".join(data[part.number] for part in parts)

    def abort_upload(self, key: str, upload: str) -> None:
        self._maybe_fail(key)
        self.uploads.pop((key, upload), None)

    def open_uploads(self, prefix: str) -> Iterator[tuple[str, str, datetime]]:
        self._maybe_fail(prefix)
        return iter([(key, upload, self.upload_began) for key, upload in self.uploads if key.startswith(prefix)])

    def _maybe_fail(self, key: str) -> None:
        if self.fail_next > 0:
            self.fail_next -= 1
            raise StoreUnavailable(f"{key}: the store is away")
