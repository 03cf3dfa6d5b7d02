"""Ranges of a file at a plain address, read straight into memory: what moves the bytes of a fetch.

httpx takes a body in pieces of 64 KiB through several layers, which is more work than everything else in a fetch. Here
the standard library's client writes what the socket gives into the block's own buffer.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import urllib.request
from urllib.parse import SplitResult, urlsplit

import httpx

from orchestrator.connection import Unreachable


class RangeReader:
    """Each thread keeps a connection of its own. To be closed when all of them are done."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()
        self._tls: ssl.SSLContext | None = None

    def close(self) -> None:
        with self._lock:
            for connection in self._open:
                connection.close()
            self._open.clear()

    def read(self, address: str, start: int, num_bytes: int) -> tuple[int, memoryview]:
        """The status of the answer, and the bytes of the range if it is 206 (or 200 for a range that begins the file);
        fewer if the file ends before. They lie in a buffer of the calling thread, until it reads again.

        Raises:
            Unreachable: no answer, or it was cut off.
        """
        parts = urlsplit(address)
        connection = self._connection(parts)
        try:
            target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
            wanted = f"bytes={start}-{start + num_bytes - 1}"
            connection.request("GET", target, headers={"Range": wanted, "Accept-Encoding": "identity"})
            response = connection.getresponse()
            is_range = response.status == 206 or (response.status == 200 and start == 0)
            data = _read_into(response, self._buffer(num_bytes) if is_range else memoryview(b""))
            if not response.isclosed():
                # More came than was asked for, or an error's text: not worth reading.
                self._drop(connection)
            return response.status if is_range or response.status != 200 else 416, data
        except (OSError, http.client.HTTPException) as error:
            self._drop(connection)
            raise Unreachable(f"{parts.hostname} does not answer: {error or type(error).__name__}") from error

    def _buffer(self, num_bytes: int) -> memoryview:
        """Used again and again: the first touch of new memory costs as much as copying into it."""
        buffer: bytearray | None = getattr(self._of_thread, "buffer", None)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._of_thread.buffer = bytearray(num_bytes)
        return memoryview(buffer)[:num_bytes]

    def _connection(self, parts: SplitResult) -> http.client.HTTPConnection:
        where = parts.scheme, parts.netloc
        if getattr(self._of_thread, "where", None) != where:
            if parts.scheme == "https":
                self._tls = self._tls or httpx.create_ssl_context()
                made: http.client.HTTPConnection = http.client.HTTPSConnection(
                    parts.netloc, timeout=self._timeout_s, context=self._tls
                )
            else:
                made = http.client.HTTPConnection(parts.netloc, timeout=self._timeout_s)
            with self._lock:
                self._open.add(made)
            self._of_thread.where, self._of_thread.connection = where, made
        connection: http.client.HTTPConnection = self._of_thread.connection
        return connection

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        connection.close()
        with self._lock:
            self._open.discard(connection)
        self._of_thread.where = None


def is_direct(address: str) -> bool:
    """Whether the address is reached without a proxy: through one, httpx knows the way."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return False
    has_proxy = parts.scheme in urllib.request.getproxies() or "all" in urllib.request.getproxies()
    return not has_proxy or bool(urllib.request.proxy_bypass(parts.hostname))


def _read_into(response: http.client.HTTPResponse, buffer: memoryview) -> memoryview:
    filled = 0
    while filled < len(buffer) and (num_read := response.readinto(buffer[filled:])):
        filled += num_read
    return buffer[:filled]
