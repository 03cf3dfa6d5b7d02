"""Images that somebody uploaded, for inspect jobs: each an object of the store, without a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from configs.layout import image_key
from workers.data.errors import DataError
from workers.data.files import decode
from workers.data.order import Indices
from workers.data.source import UNKNOWN_LABEL
from workers.store import NotFound


class UploadedImages:
    """The images `ids`, read from the store by `read_object` as they are asked for, as `channels` channels."""

    def __init__(self, ids: Sequence[str], read_object: Callable[[str], bytes], channels: int) -> None:
        self._ids = ids
        self._read_object = read_object
        self.channels = channels
        self.labels = np.full(len(ids), UNKNOWN_LABEL, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def name(self, index: int) -> str:
        return self._ids[index]

    def read(self, index: int) -> Tensor:
        """As of every source. Raises DataError too: the image was deleted."""
        try:
            content = self._read_object(image_key(self._ids[index]))
        except NotFound:
            raise DataError(
                f"image {self._ids[index]} is no longer in the object store, which keeps uploaded images for a "
                "while only. Upload it again, and submit the job with its new id"
            ) from None
        return decode(content, self.channels)

    def read_many(self, indices: Indices) -> None:  # noqa: ARG002 - they need decoding
        return None
