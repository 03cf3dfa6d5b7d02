"""How many trials a search may run side by side now.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("searches", sa.Column("places", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("searches", "places")
