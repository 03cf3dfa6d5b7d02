"""Who is asking: bearer tokens (256 random bits, stored as SHA-256 only), roles, and the drivers' shared secret."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import get_args

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from orchestrator.schemas import Role
from orchestrator.services.problems import Forbidden, Unauthorized
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.tables import TokenRow

TOKEN_PREFIX = "pw_"
_RANK = {role: rank for rank, role in enumerate(get_args(Role))}
_LONGEST_TOKEN = 512
KNOWN_S = 1.0
MAX_KNOWN = 10_000


@dataclass(frozen=True)
class Actor:
    """The holder of a token. Its name is written beside every change it makes."""

    token_id: str
    name: str
    role: str
    expires_at: datetime | None = None


_BY_DIGEST = select(TokenRow).where(TokenRow.sha256 == bindparam("digest"))


def new_token() -> str:
    """A fresh secret: `pw_` and 256 random bits."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """What is stored of a token. A plain hash is enough: there is nothing to guess in 256 random bits."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def bearer(authorization: str | None) -> str:
    """The token in an Authorization header.

    Raises:
        Unauthorized: there is none.
    """
    scheme, _, token = (authorization or "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > _LONGEST_TOKEN:
        raise Unauthorized("This needs a token.")
    return token


def authenticate(session: Session, authorization: str | None, now: datetime) -> Actor:
    """The actor whose token the header holds.

    Raises:
        Unauthorized: no token, or it is unknown, revoked or expired.
    """
    digest = token_hash(bearer(authorization))
    row = session.scalar(_BY_DIGEST, {"digest": digest})
    if row is None or not hmac.compare_digest(row.sha256, digest):
        raise Unauthorized("This token is not known here.")
    return actor_of(row, now)


def actor_of(row: TokenRow, now: datetime) -> Actor:
    """The holder of a token that was found.

    Raises:
        Unauthorized: it is revoked or expired.
    """
    if row.revoked_at is not None:
        raise Unauthorized(f"This token ({row.id}) was revoked.")
    if row.expires_at is not None and row.expires_at <= now:
        raise Unauthorized(f"This token ({row.id}) expired at {row.expires_at.isoformat()}.")
    return Actor(token_id=row.id, name=row.name, role=row.role, expires_at=row.expires_at)


class KnownTokens:
    """Tokens that were looked up within the last second: a person's dashboard or script asks many times in one. A token
    that is revoked here is forgotten at once; one that another process revokes is used for that second at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_age_s: float = KNOWN_S) -> None:
        self._clock = clock
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Actor]] = {}

    def find(self, authorization: str | None) -> Actor | None:
        """The header's actor, if it was known within the last second. Raises Unauthorized: there is no token."""
        found = self._known.get(token_hash(bearer(authorization)))
        return found[1] if found is not None and self._clock() < found[0] else None

    def authenticate(self, db: Database, authorization: str | None, now: datetime) -> Actor:
        """As `authenticate`, from the database; what was found is known for a second, less if it expires before."""
        digest = token_hash(bearer(authorization))
        # Before the look: what was read is no newer than this.
        looked_at = self._clock()
        with db.reader() as session:
            actor = authenticate(session, authorization, now)
        age_s = self._max_age_s
        if actor.expires_at is not None:
            age_s = min(age_s, (actor.expires_at - now).total_seconds())
        with self._lock:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[digest] = looked_at + age_s, actor
        return actor

    def forget(self) -> None:
        """Look every token up again."""
        with self._lock:
            self._known = {}


def require(actor: Actor, role: Role) -> Actor:
    """The actor, if its role is at least `role`.

    Raises:
        Forbidden: it is not.
    """
    if _RANK.get(actor.role, -1) < _RANK[role]:
        raise Forbidden(
            f"This needs the role {role}; the token {actor.token_id} has the role {actor.role}.",
            hint="Ask an administrator for a token with that role (patchwork tokens add).",
        )
    return actor


def check_worker_secret(settings: Settings, authorization: str | None) -> None:
    """Let drivers in that know the worker secret; with no secret configured, nobody.

    Raises:
        Unauthorized: it is missing or wrong.
    """
    given = bearer(authorization).encode("utf-8", "surrogateescape")
    expected = settings.worker_secret.get_secret_value().encode()
    if not expected or not hmac.compare_digest(given, expected):
        raise Unauthorized("This is for drivers only: wrong worker secret.")
