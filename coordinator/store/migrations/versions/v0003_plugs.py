"""Smart plugs: which device is on which, what they said, and what a round drew from the wall."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from coordinator.store.columns import Id, Words

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the three tables."""
    op.create_table(
        "plugs",
        sa.Column("id", Id, primary_key=True),
        sa.Column("agent", Words, nullable=False),
        sa.Column("plug", Words, nullable=False),
        sa.Column("since", sa.Float(53), nullable=False),
        sa.Column("step_j", sa.Float(53)),
        sa.Column("step_w", sa.Float(53)),
        sa.UniqueConstraint("agent", "plug"),
    )
    op.create_table(
        "plug_readings",
        sa.Column("plug", Id, sa.ForeignKey("plugs.id"), primary_key=True, autoincrement=False),
        sa.Column("at", sa.Float(53), primary_key=True, autoincrement=False),
        sa.Column("watts", sa.Float(53)),
        sa.Column("joules", sa.Float(53)),
    )
    op.create_table(
        "walls",
        sa.Column("run", Words, primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("agent", Words, primary_key=True),
        sa.Column("record_json", Words, nullable=False),
        sa.ForeignKeyConstraint(["run", "round", "agent"], ["updates.run", "updates.round", "updates.agent"]),
    )
