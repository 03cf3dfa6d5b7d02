"""Metrics in the order they arrived, and how far sinks have written them.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def _time() -> sa.DateTime:
    return sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("metrics", sa.Column("seq", sa.BigInteger(), nullable=False, server_default="0"))
    # Points that are there already came before every report that is still to come: by step, with negative numbers.
    op.execute("UPDATE metrics SET seq = step - 1099511627776")
    op.create_index("ix_metrics_arrival", "metrics", ["job_id", "attempt", "seq"])
    op.create_table(
        "sink_cursors",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("sink", sa.String(length=16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("max_step", sa.BigInteger(), nullable=False),
        sa.Column("memory", sa.JSON(), nullable=False),
        sa.Column("done", sa.Boolean(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("not_before", _time(), nullable=True),
        sa.Column("told", sa.Boolean(), nullable=False),
        sa.Column("written_at", _time(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_sink_cursors_job_id")),
        sa.PrimaryKeyConstraint("job_id", "sink", name=op.f("pk_sink_cursors")),
    )
    op.create_table(
        "sinks",
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("ok", sa.Boolean(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("since", _time(), nullable=False),
        sa.Column("seen_at", _time(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_sinks")),
    )


def downgrade() -> None:
    op.drop_table("sinks")
    op.drop_table("sink_cursors")
    op.drop_index("ix_metrics_arrival", "metrics")
    op.drop_column("metrics", "seq")
