"""HTTP/1.1 as uvicorn reads it with httptools, and a bound on what is kept of a request that is not yet whole."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""Of a request line with its headers."""


class BoundedHttp(HttpToolsProtocol):
    """A head that is longer is refused with 400 and the connection closed; httptools itself would keep any number of
    bytes. (uvicorn's other reader, h11, has a bound, and is Python throughout.)"""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_in_head = False
        self._num_head_bytes = 0

    def data_received(self, data: bytes) -> None:
        # What a head began with came with the end of the message before, if there was one, and is counted at its end.
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(_REFUSED)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._num_head_bytes = 0

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        num_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if num_bytes > MAX_HEAD_BYTES:
            raise ValueError(_REFUSED)  # the parser stops, and uvicorn answers 400
        super().on_headers_complete()


_REFUSED = f"The head of a request may have at most {MAX_HEAD_BYTES} bytes."
