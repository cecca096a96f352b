"""The first tables: runs, agents, rounds, states, updates, refusals, artifacts, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from coordinator.store.columns import Id, Words

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the eight tables."""
    _runs_and_agents()
    _rounds_and_updates()
    _lists()


def _runs_and_agents() -> None:
    op.create_table(
        "runs",
        sa.Column("run", Words, primary_key=True),
        sa.Column("strategy", Words, nullable=False),
        sa.Column("settings_json", Words, nullable=False),
        sa.Column("spec_json", Words, nullable=False),
        sa.Column("rounds", sa.Integer, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("state", Words, nullable=False),
        sa.Column("reason", Words, nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.Column("changed", sa.Float(53), nullable=False),
    )
    op.create_table(
        "agents",
        sa.Column("agent", Words, primary_key=True),
        sa.Column("card_json", Words, nullable=False),
        sa.Column("first_seen", sa.Float(53), nullable=False),
        sa.Column("last_seen", sa.Float(53), nullable=False),
    )


def _rounds_and_updates() -> None:
    op.create_table(
        "rounds",
        sa.Column("run", Words, sa.ForeignKey("runs.run"), primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("state", Words, nullable=False),
        sa.Column("agents_json", Words, nullable=False),
        sa.Column("deadline", sa.Float(53), nullable=False),
        sa.Column("opened", sa.Float(53), nullable=False),
        sa.Column("closed", sa.Float(53)),
        sa.Column("metrics_json", Words, nullable=False),
    )
    op.create_table(
        "states",
        sa.Column("run", Words, sa.ForeignKey("runs.run"), primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("sha256", Words, nullable=False, index=True),
    )
    op.create_table(
        "updates",
        sa.Column("run", Words, primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("agent", Words, primary_key=True),
        sa.Column("received", sa.Float(53), nullable=False),
        sa.Column("summary_json", Words, nullable=False),
        sa.Column("frame_sha256", Words, index=True),
        sa.Column("frame_bytes", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.round"]),
    )


def _lists() -> None:
    op.create_table(
        "refusals",
        sa.Column("id", Id, primary_key=True),
        sa.Column("run", Words, nullable=False, index=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("agent", Words, nullable=False),
        sa.Column("reason", Words, nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
    )
    op.create_table(
        "artifacts",
        sa.Column("id", Id, primary_key=True),
        sa.Column("run", Words, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("agent", Words, nullable=False),
        sa.Column("sha256", Words, nullable=False),
        sa.Column("manifest_json", Words, nullable=False),
        sa.UniqueConstraint("run", "round", "agent", "sha256"),
    )
    op.create_table(
        "events",
        sa.Column("id", Id, primary_key=True),
        sa.Column("kind", Words, nullable=False),
        sa.Column("run", Words),
        sa.Column("round", sa.Integer),
        sa.Column("agent", Words),
        sa.Column("text", Words, nullable=False),
        sa.Column("data_json", Words, nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
    )
