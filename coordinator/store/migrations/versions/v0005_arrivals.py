"""Ingest workers: parts of frames, whole ones that the coordinator has yet to take, the counter of seals."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from coordinator.store.columns import Words

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the four tables."""
    op.create_table(
        "transfers",
        sa.Column("agent", Words, primary_key=True),
        sa.Column("digest", Words, primary_key=True),
        sa.Column("parts", sa.Integer, nullable=False),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("wire_bytes", sa.BigInteger, nullable=False),
        sa.Column("touched", sa.Float(53), nullable=False),
    )
    op.create_table(
        "parts",
        sa.Column("agent", Words, primary_key=True),
        sa.Column("digest", Words, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "arrivals",
        sa.Column("agent", Words, primary_key=True),
        sa.Column("digest", Words, primary_key=True),
        sa.Column("wire_bytes", sa.BigInteger, nullable=False),
        sa.Column("received", sa.Float(53), nullable=False),
        sa.Column("worker", Words, nullable=False),
        sa.Column("refused", Words),
    )
    op.create_index("ix_arrivals_digest", "arrivals", ["digest"])
    op.create_table(
        "seal_counters",
        sa.Column("name", Words, primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("counter", sa.BigInteger, nullable=False),
    )
