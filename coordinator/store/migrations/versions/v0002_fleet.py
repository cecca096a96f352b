"""Who may take part: invitations, devices that joined, tokens of the API, who did what."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the four tables."""
    op.create_table(
        "invites",
        sa.Column("invite", sa.Text, primary_key=True),
        sa.Column("name", sa.Text),
        sa.Column("replace", sa.Boolean, nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.Column("expires", sa.Float(53), nullable=False),
        sa.Column("used_by", sa.Text),
        sa.Column("used", sa.Float(53)),
    )
    op.create_table(
        "devices",
        sa.Column("agent", sa.Text, primary_key=True),
        sa.Column("public", sa.Text, nullable=False),
        sa.Column("salt", sa.Text, nullable=False),
        sa.Column("enrolled", sa.Float(53), nullable=False),
        sa.Column("revoked", sa.Float(53)),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("marks_json", sa.Text, nullable=False),
    )
    op.create_table(
        "api_tokens",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False, unique=True),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.Column("expires", sa.Float(53)),
    )
    op.create_table(
        "audit",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("of", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
    )
