"""Idempotency-Key: a repeated request gets the first answer again; the same key with another body is refused.

The key is claimed in the transaction that does the work, so an answer is remembered exactly if its work was done.
Of two requests at once the second waits for the first one's transaction.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete
from sqlalchemy.orm import Session

from orchestrator.services.auth import Actor
from orchestrator.services.problems import KeyReused
from orchestrator.storage.db import upsert
from orchestrator.storage.tables import IdempotencyRow

KEPT_FOR = timedelta(hours=24)
_IN_PROGRESS = 0


@dataclass(frozen=True)
class Answer:
    """What was said the first time."""

    status: int
    body: bytes


@dataclass(frozen=True)
class Key:
    """An actor's Idempotency-Key and the request it stands for."""

    actor: Actor
    value: str
    request_sha256: str


def key_for(actor: Actor, value: str | None, *request: bytes) -> Key | None:
    """The key of a request made of these parts; None if the client gave none."""
    if value is None:
        return None
    digest = hashlib.sha256()
    for part in request:
        digest.update(len(part).to_bytes(8, "big") + part)
    return Key(actor, value, digest.hexdigest())


def claim(session: Session, key: Key | None) -> Answer | None:
    """The answer already given for `key`; None if the work is to be done now (then `remember` in this transaction).

    Raises:
        KeyReused: the key was used for another request.
    """
    if key is None:
        return None
    now = datetime.now(UTC)
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < now - KEPT_FOR))
    fresh = {
        "actor": key.actor.token_id,
        "key": key.value,
        "request_sha256": key.request_sha256,
        "status": _IN_PROGRESS,
        "body": b"",
        "created_at": now,
    }
    # On PostgreSQL this waits for another transaction that inserted the same key.
    upsert(session, IdempotencyRow, [fresh], keys=("actor", "key"), update=())
    row = _row(session, key)
    if row.request_sha256 != key.request_sha256:
        raise KeyReused(
            f"Idempotency-Key {key.value!r} was used for another request.", hint="Use a new key for a new request."
        )
    # In progress can only be what this transaction has just inserted.
    return None if row.status == _IN_PROGRESS else Answer(row.status, row.body)


def remember(session: Session, key: Key | None, answer: Answer) -> None:
    """Keep the answer for 24 hours, in the transaction that did the work."""
    if key is not None:
        row = _row(session, key)
        row.status, row.body = answer.status, answer.body


def _row(session: Session, key: Key) -> IdempotencyRow:
    return session.get_one(IdempotencyRow, (key.actor.token_id, key.value))
