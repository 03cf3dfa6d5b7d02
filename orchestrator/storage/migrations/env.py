"""Alembic's entry: runs the revisions on the connection, and in the transaction, that `Database.upgrade` opened."""

from __future__ import annotations

from alembic import context

from orchestrator.storage.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
