"""Indexes of jobs for lists of a hundred thousand: that of trials holds trials only, those of all jobs hold what lists
are filtered by.

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
    op.drop_index("ix_jobs_project", "jobs")
    op.drop_index("ix_jobs_created", "jobs")
    listed = ["created_at", "id", "state", "kind", "project", "search_id", "name", "priority"]
    op.create_index("ix_jobs_created", "jobs", listed)
    op.drop_index("ix_jobs_state_priority", "jobs")
    op.create_index("ix_jobs_state_priority", "jobs", ["state", "priority", "created_at", "search_id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_state_priority", "jobs")
    op.create_index("ix_jobs_state_priority", "jobs", ["state", "priority", "created_at"])
    op.drop_index("ix_jobs_created", "jobs")
    op.create_index("ix_jobs_created", "jobs", ["created_at", "id"])
    op.create_index("ix_jobs_project", "jobs", ["project"])
    op.drop_index("ix_jobs_search_id", "jobs")
    op.create_index("ix_jobs_search_id", "jobs", ["search_id"])
