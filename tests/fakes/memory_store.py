"""An object store in a dictionary, with the errors a real one has."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from orchestrator.storage.store import CHUNK_BYTES, AlreadyExists, NotFound, StoredObject, StoreUnavailable


class MemoryStore:
    """`orchestrator.storage.store.ObjectStore` in memory. `fail_next` makes the next calls fail as if it were away;
    `lose_next_reply` does the next put and then fails, as a lost reply does."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.fail_next = 0
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
        for key in keys:
            self._maybe_fail(key)
            self.objects.pop(key, None)

    def presign(self, key: str, expires_s: int) -> str:
        return f"https://store.example/{key}?expires={expires_s}"

    def _maybe_fail(self, key: str) -> None:
        if self.fail_next > 0:
            self.fail_next -= 1
            raise StoreUnavailable(f"{key}: the store is away")
