"""Models under control: orders to devices, rollouts in rings, and who is in which."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from coordinator.store.columns import Words

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the three tables."""
    op.create_table(
        "orders",
        sa.Column("id", Words, primary_key=True),
        sa.Column("agent", Words, nullable=False),
        sa.Column("verb", Words, nullable=False),
        sa.Column("model", Words, nullable=False),
        sa.Column("reason", Words, nullable=False),
        sa.Column("who", Words, nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("state", Words, nullable=False),
        sa.Column("said", Words, nullable=False),
        sa.Column("answered", sa.Float(53)),
    )
    op.create_index("ix_orders_agent", "orders", ["agent"])
    op.create_index("ix_orders_state", "orders", ["state"])
    op.create_table(
        "rollouts",
        sa.Column("run", Words, primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("state", Words, nullable=False),
        sa.Column("ring", sa.Integer, nullable=False),
        sa.Column("reason", Words, nullable=False),
        sa.Column("began", sa.Float(53), nullable=False),
        sa.Column("changed", sa.Float(53), nullable=False),
    )
    op.create_table(
        "rollout_members",
        sa.Column("run", Words, primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("agent", Words, primary_key=True),
        sa.Column("ring", sa.Integer, nullable=False),
        sa.Column("state", Words, nullable=False),
        sa.Column("model", Words),
        sa.Column("before", Words),
        sa.Column("since", sa.Float(53), nullable=False),
        sa.Column("reason", Words, nullable=False),
        sa.ForeignKeyConstraint(["run", "round"], ["rollouts.run", "rollouts.round"]),
    )
