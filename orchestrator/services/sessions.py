"""Sessions of browsers: a token is shown once, then a signed cookie stands for it until it expires or is revoked.

The cookie names the token and when the session ends, signed with a secret of the servers; it does not hold the token.
Every use looks the token up again, so that a revoked one ends its sessions too.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import UTC, datetime, timedelta

from sqlalchemy.orm import Session

from orchestrator.services.auth import Actor, actor_of, authenticate
from orchestrator.services.problems import Unauthorized
from orchestrator.storage.tables import TokenRow

LASTS = timedelta(days=7)
_LONGEST_COOKIE = 256


def open_session(session: Session, secret: bytes, token: str, now: datetime) -> tuple[Actor, str]:
    """The actor whose token this is, and the value of its cookie.

    Raises:
        Unauthorized: the token is unknown, revoked or expired.
    """
    actor = authenticate(session, f"Bearer {token}", now)
    body = f"{actor.token_id}.{int((now + LASTS).timestamp())}"
    return actor, f"{body}.{_signature(secret, body)}"


def actor_of_session(session: Session, secret: bytes, cookie: str | None, now: datetime) -> Actor:
    """The actor of a cookie.

    Raises:
        Unauthorized: there is none, it is not one of ours, it has expired, or its token is no good any more.
    """
    body, _, signature = (cookie or "")[:_LONGEST_COOKIE].rpartition(".")
    if not body or not hmac.compare_digest(signature.encode(), _signature(secret, body).encode()):
        raise Unauthorized("Log in first.")
    token_id, _, ends_at = body.rpartition(".")
    if datetime.fromtimestamp(int(ends_at), UTC) <= now:
        raise Unauthorized("The session has expired: log in again.")
    row = session.get(TokenRow, token_id)
    if row is None:
        raise Unauthorized("The token of this session is not known here any more.")
    return actor_of(row, now)


def _signature(secret: bytes, body: str) -> str:
    return hmac.new(secret, f"patchwork session {body}".encode(), hashlib.sha256).hexdigest()
