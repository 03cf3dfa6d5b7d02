"""Clients that keep their connection and send what was prepared, as fast as answers come."""

from __future__ import annotations

import http.client
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """One request, its body made before the clock starts."""

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """How a run went."""

    seconds: float
    latencies_s: list[float]
    bodies: list[bytes]

    @property
    def per_second(self) -> float:
        return len(self.latencies_s) / self.seconds

    def percentile_ms(self, percent: int) -> float:
        """The latency that so many of a hundred requests did not exceed."""
        if len(self.latencies_s) < 2:
            return 1000 * self.latencies_s[0]
        return 1000 * statistics.quantiles(self.latencies_s, n=100, method="inclusive")[percent - 1]


def run(port: int, calls: Sequence[Call], num_clients: int) -> Load:
    """Send `calls` from so many clients, each with its share, all beginning at once.

    Raises:
        RuntimeError: an answer was not a success.
    """
    start = threading.Barrier(num_clients + 1)

    def client(share: Sequence[Call]) -> list[tuple[float, bytes]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.connect()
        start.wait(60)
        try:
            return [_send(connection, call) for call in share]
        finally:
            connection.close()

    with ThreadPoolExecutor(num_clients) as pool:
        futures = [pool.submit(client, calls[number::num_clients]) for number in range(num_clients)]
        start.wait(60)
        began = time.perf_counter()
        answers = [answer for future in futures for answer in future.result()]
        seconds = time.perf_counter() - began
    return Load(seconds, [latency for latency, _ in answers], [body for _, body in answers])


def _send(connection: http.client.HTTPConnection, call: Call) -> tuple[float, bytes]:
    began = time.perf_counter()
    headers = {"Content-Type": "application/json", **call.headers}
    connection.request(call.method, call.path, body=call.body, headers=headers)
    try:
        response = connection.getresponse()
    except http.client.RemoteDisconnected:
        # A server may close a connection between two requests; as every client does, connect again, once.
        connection.close()
        connection.request(call.method, call.path, body=call.body, headers=headers)
        try:
            response = connection.getresponse()
        except http.client.RemoteDisconnected as error:
            raise RuntimeError(f"{call.method} {call.path}: cut off twice") from error
    body = response.read()
    latency = time.perf_counter() - began
    if response.status >= 300:
        raise RuntimeError(f"{call.method} {call.path}: {response.status} {body[:300]!r}")
    return latency, body
