"""An object store in a folder, for one machine's processes. Keys are paths; writes are atomic."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from workers.store import AlreadyExists, Data, NotFound


class FolderStore:
    """The ObjectStore Protocol over a folder that several processes may share."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def put(self, key: str, data: Data, *, if_none_match: bool = False) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        temporary.write_bytes(data)
        try:
            if if_none_match:
                os.link(temporary, path)  # fails if there is one, atomically
            else:
                os.replace(temporary, path)
        except FileExistsError as error:
            raise AlreadyExists(key) from error
        finally:
            temporary.unlink(missing_ok=True)

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def get(self, key: str) -> bytes:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError as error:
            raise NotFound(key) from error

    def get_range(self, key: str, start: int, length: int) -> bytes:
        try:
            with (self.root / key).open("rb") as file:
                file.seek(start)
                return file.read(length)
        except FileNotFoundError as error:
            raise NotFound(key) from error

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        for path in self.root.rglob("*"):
            key = path.relative_to(self.root).as_posix()
            if path.is_file() and key.startswith(prefix) and not path.name.startswith("."):
                yield key, path.stat().st_size

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            (self.root / key).unlink(missing_ok=True)
