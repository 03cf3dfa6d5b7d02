"""The index of trials holds trials only.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    given = sa.text("search_id IS NOT NULL")
    op.drop_index("ix_jobs_search_id", "jobs")
    op.create_index("ix_jobs_search_id", "jobs", ["search_id"], sqlite_where=given, postgresql_where=given)


def downgrade() -> None:
    op.drop_index("ix_jobs_search_id", "jobs")
    op.create_index("ix_jobs_search_id", "jobs", ["search_id"])
