"""Searches and their trials.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("search_id", sa.String(length=40), nullable=True))
    op.create_index("ix_jobs_search_id", "jobs", ["search_id"])
    op.add_column("attempts", sa.Column("ended_trials", sa.Integer(), nullable=False, server_default="0"))
    op.create_table(
        "searches",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("num_trials", sa.Integer(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_searches_job_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_searches")),
    )
    op.create_table(
        "trials",
        sa.Column("search_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("setting", sa.Integer(), nullable=False),
        sa.Column("repeat", sa.Integer(), nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("parent", sa.Integer(), nullable=True),
        sa.Column("parent_step", sa.BigInteger(), nullable=True),
        sa.Column("replaces", sa.Integer(), nullable=True),
        sa.Column("asked_after", sa.Integer(), nullable=False),
        sa.Column("told", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["search_id"], ["jobs.id"], name=op.f("fk_trials_search_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_trials_job_id")),
        sa.PrimaryKeyConstraint("search_id", "number", name=op.f("pk_trials")),
    )
    op.create_index("ix_trials_job_id", "trials", ["job_id"])


def downgrade() -> None:
    op.drop_index("ix_trials_job_id", "trials")
    op.drop_table("trials")
    op.drop_table("searches")
    op.drop_column("attempts", "ended_trials")
    op.drop_index("ix_jobs_search_id", "jobs")
    op.drop_column("jobs", "search_id")
