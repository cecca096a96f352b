"""Who may take part: invitations, devices that joined, tokens of the API, who did what."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from coordinator.store.columns import Id, Words

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the four tables."""
    op.create_table(
        "invites",
        sa.Column("invite", Words, primary_key=True),
        sa.Column("name", Words),
        sa.Column("replace", sa.Boolean, nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.Column("expires", sa.Float(53), nullable=False),
        sa.Column("used_by", Words),
        sa.Column("used", sa.Float(53)),
    )
    op.create_table(
        "devices",
        sa.Column("agent", Words, primary_key=True),
        sa.Column("public", Words, nullable=False),
        sa.Column("salt", Words, nullable=False),
        sa.Column("enrolled", sa.Float(53), nullable=False),
        sa.Column("revoked", sa.Float(53)),
        sa.Column("reason", Words, nullable=False),
        sa.Column("marks_json", Words, nullable=False),
    )
    op.create_table(
        "api_tokens",
        sa.Column("name", Words, primary_key=True),
        sa.Column("role", Words, nullable=False),
        sa.Column("sha256", Words, nullable=False, unique=True),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.Column("expires", sa.Float(53)),
    )
    op.create_table(
        "audit",
        sa.Column("id", Id, primary_key=True),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("who", Words, nullable=False),
        sa.Column("what", Words, nullable=False),
        sa.Column("of", Words, nullable=False),
        sa.Column("detail", Words, nullable=False),
    )
