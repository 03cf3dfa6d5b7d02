"""Tokens: made by administrators, shown once, stored as a hash, revoked at once (in other API processes: in 1 s)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.ids import new_token_id
from orchestrator.schemas import TokenCreate, TokenCreated, TokenPage, TokenPublic
from orchestrator.services.auth import Actor, new_token, token_hash
from orchestrator.services.problems import Conflict, NotFound
from orchestrator.storage.db import Database
from orchestrator.storage.tables import TokenRow


def create_token(db: Database, actor: Actor, request: TokenCreate) -> TokenCreated:
    """Store a new token; the answer holds the only copy of the secret."""
    now = datetime.now(UTC)
    token = new_token()
    row = TokenRow(
        id=new_token_id(),
        name=request.name,
        role=request.role,
        sha256=token_hash(token),
        created_by=actor.name,
        created_at=now,
        expires_at=None if request.expires_in_s is None else now + timedelta(seconds=request.expires_in_s),
        revoked_at=None,
    )
    with db.session() as session:
        session.add(row)
        session.flush()
        return TokenCreated(**_public(row).model_dump(), token=token)


def list_tokens(db: Database) -> TokenPage:
    """Every token, the newest first, revoked ones too."""
    with db.reader() as session:
        rows = session.scalars(select(TokenRow).order_by(TokenRow.created_at.desc(), TokenRow.id.desc()))
        return TokenPage(items=tuple(_public(row) for row in rows))


def revoke_token(db: Database, token_id: str) -> None:
    """Make a token useless from now on. Revoking it again changes nothing.

    Raises:
        NotFound: there is no such token.
        Conflict: it is the last administrator's.
    """
    with db.session() as session:
        row = session.get(TokenRow, token_id)
        if row is None:
            raise NotFound(f"There is no token {token_id}.")
        now = datetime.now(UTC)
        if row.revoked_at is None:
            if row.role == "admin" and _num_active_admins(session, now) == 1:
                raise Conflict(
                    "This is the last active administrator token.", hint="Make another admin token before revoking it."
                )
            row.revoked_at = now


def ensure_admin_token(db: Database, token: str, name: str) -> None:
    """Make sure that `token` opens the API as an administrator; a second call changes nothing.

    For `patchwork up`, which keeps the secret in a file of its data directory.
    """
    digest = token_hash(token)
    with db.session() as session:
        if session.scalar(select(TokenRow).where(TokenRow.sha256 == digest)) is None:
            session.add(
                TokenRow(
                    id=new_token_id(),
                    name=name,
                    role="admin",
                    sha256=digest,
                    created_by=name,
                    created_at=datetime.now(UTC),
                    expires_at=None,
                    revoked_at=None,
                )
            )


def _num_active_admins(session: Session, now: datetime) -> int:
    rows = session.scalars(select(TokenRow).where(TokenRow.role == "admin", TokenRow.revoked_at.is_(None)))
    return sum(1 for row in rows if row.expires_at is None or row.expires_at > now)


def _public(row: TokenRow) -> TokenPublic:
    return TokenPublic(
        id=row.id,
        name=row.name,
        role=row.role,
        created_by=row.created_by,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
