"""A control plane as drivers see it: claims and reports over HTTP on loopback, standard library only."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from configs.states import Desired
from configs.wire import ClaimReply, ClaimRequest, ReportBatch, ReportReply

SECRET = "worker-secret-for-tests"


@dataclass
class FakeAttempt:
    """What the control plane knows of one attempt, and what it answers."""

    desired: Desired = Desired.RUN
    superseded: bool = False
    claims: list[ClaimRequest] = field(default_factory=list)
    batches: dict[int, ReportBatch] = field(default_factory=dict)
    """By `seq`: a repeated batch changes nothing."""
    order: list[int] = field(default_factory=list)
    """Sequence numbers as they arrived, repetitions included."""

    def values(self, name: str) -> dict[int, float | None]:
        """Points of one metric by step."""
        columns = [c for seq in sorted(self.batches) for c in self.batches[seq].columns if c.name == name]
        return {step: value for c in columns for step, value in zip(c.steps, c.values, strict=True)}

    @property
    def checkpoints(self) -> list[str]:
        return [c for seq in sorted(self.batches) for c in self.batches[seq].checkpoints]

    @property
    def last_step(self) -> int:
        """The furthest step any heartbeat told of."""
        return max((beat.step for batch in self.batches.values() for beat in batch.heartbeats), default=0)

    @property
    def is_finished(self) -> bool:
        return any(batch.finished for batch in self.batches.values())

    def pids(self) -> dict[int, int]:
        """Process of each rank."""
        return {beat.rank: beat.pid for batch in self.batches.values() for beat in batch.heartbeats}


class FakeControlPlane:
    """A server on a free loopback port. `go_away` closes the port, `come_back` opens the same one again."""

    def __init__(self) -> None:
        self.attempts: dict[str, FakeAttempt] = {}
        self.unauthorised = 0
        self.says_nonsense = False
        """Answers 200 without taking anything, as a proxy's page does."""
        self._server: ThreadingHTTPServer | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.come_back()

    def attempt(self, attempt_id: str) -> FakeAttempt:
        return self.attempts.setdefault(attempt_id, FakeAttempt())

    def come_back(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, reply = fake._answer(self.path, self.headers.get("Authorization", ""), body)
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def go_away(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _answer(self, path: str, authorization: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.says_nonsense:
            return 200, {"title": "Welcome to the hotel's network"}
        *_, attempt_id, action = path.split("/")
        if authorization != f"Bearer {SECRET}":
            self.unauthorised += 1
            return 401, {"title": "Unauthorized"}
        attempt = self.attempt(attempt_id)
        if action == "claim":
            claim = ClaimRequest.model_validate_json(body)
            if attempt.superseded or any(c.nonce != claim.nonce for c in attempt.claims):
                return 409, {"title": "claimed by another driver"}
            attempt.claims.append(claim)
            return 200, ClaimReply(attempt_id=attempt_id, desired=attempt.desired).model_dump(mode="json")
        if attempt.superseded:
            return 409, {"title": "superseded"}
        batch = ReportBatch.model_validate_json(body)
        attempt.order.append(batch.seq)
        attempt.batches.setdefault(batch.seq, batch)
        return 200, ReportReply(desired=attempt.desired, acknowledged_seq=batch.seq).model_dump(mode="json")
