"""An index of the jobs that wait, in their order.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    waiting = sa.text("state = 'QUEUED' AND start_workers IS NULL AND desired = 'run' AND search_id IS NULL")
    columns = ["priority", "created_at", "state", "start_workers", "desired", "search_id"]
    op.create_index("ix_jobs_waiting", "jobs", columns, sqlite_where=waiting, postgresql_where=waiting)


def downgrade() -> None:
    op.drop_index("ix_jobs_waiting", "jobs")
