"""The corrupt-image policy: counted, named, replaced; never silent, and never more than the job allows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from workers.data.errors import DataError, UnreadableImage
from workers.data.source import ImageSource


@dataclass(frozen=True)
class CorruptImage:
    """An image that could not be read. Told once per image and rank."""

    index: int
    name: str
    error: str
    count: int
    """Unreadable images so far on this rank, this one included."""
    limit: int
    """How many the job tolerates."""

    @property
    def message(self) -> str:
        return f"unreadable image {self.name}: {self.error} ({self.count} so far, {self.limit} tolerated)"


OnCorrupt = Callable[[CorruptImage], None]


def no_report(_: CorruptImage) -> None:
    """For callers that only need the count."""


class CorruptImages:
    """Reads images and keeps the account of those that cannot be read. Safe to use from several threads."""

    def __init__(self, source: ImageSource, max_share: float, on_corrupt: OnCorrupt) -> None:
        self.limit = int(max_share * len(source))
        self._source = source
        self._on_corrupt = on_corrupt
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return len(self._seen)

    def read(self, index: int) -> Tensor | None:
        """The image, or None if it cannot be read, which is then counted.

        Raises:
            DataError: more images than tolerated cannot be read.
        """
        try:
            return self._source.read(index)
        except UnreadableImage as error:
            self._record(index, str(error))
            return None

    def read_or_substitute(self, index: int) -> tuple[Tensor, int]:
        """The first readable image among index, index + 1, … (around the end), and its index. Raises as `read`."""
        for candidate in range(index, index + len(self._source)):
            image = self.read(candidate % len(self._source))
            if image is not None:
                return image, candidate % len(self._source)
        raise DataError("no image of the data set can be read")

    def _record(self, index: int, error: str) -> None:
        with self._lock:
            if index in self._seen:
                return
            self._seen.add(index)
            corrupt = CorruptImage(index, self._source.name(index), error, len(self._seen), self.limit)
        self._on_corrupt(corrupt)
        if corrupt.count > corrupt.limit:
            raise DataError(
                f"{corrupt.count} of {len(self._source)} images cannot be read and data.max_corrupt allows "
                f"{corrupt.limit}; the last one was {corrupt.name}: {corrupt.error}. "
                "Repair the data set, or raise data.max_corrupt"
            )
