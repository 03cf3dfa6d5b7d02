"""Indexes of what jobs were made of.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None
_COLUMNS = ("init_from", "resume_from", "retry_of")


def upgrade() -> None:
    for column in _COLUMNS:
        given = sa.text(f"{column} IS NOT NULL")
        op.create_index(f"ix_jobs_{column}", "jobs", [column], sqlite_where=given, postgresql_where=given)


def downgrade() -> None:
    for column in _COLUMNS:
        op.drop_index(f"ix_jobs_{column}", "jobs")
