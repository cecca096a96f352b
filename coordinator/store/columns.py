"""Types of columns that mean the same in SQLite and in PostgreSQL."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.types import TypeEngine

Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""A number that the database counts up; only INTEGER counts up by itself in SQLite."""


class Words(sa.TypeDecorator[str]):
    """Text, in the order of its code points everywhere: strategies absorb updates in the order of names.

    PostgreSQL holds no NUL, which a device may say: it is kept as U+FFFD there.
    """

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the type as this database has it."""
        text = sa.Text(collation="C") if dialect.name == "postgresql" else sa.Text()
        return dialect.type_descriptor(text)

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return what is sent to the database."""
        return value.replace("\0", "\ufffd") if value and dialect.name == "postgresql" else value


def insert_or(connection: Connection, table: sa.Table, *, replace: bool) -> Any:
    """Return an INSERT that, where a row of the same key is there, replaces its values or does nothing."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as of_postgres

        made: Any = of_postgres(table)
    else:
        from sqlalchemy.dialects.sqlite import insert as of_sqlite

        made = of_sqlite(table)
    key = list(table.primary_key)
    if not replace:
        return made.on_conflict_do_nothing(index_elements=key)
    others = {c.name: made.excluded[c.name] for c in table.columns if c not in key}
    return made.on_conflict_do_update(index_elements=key, set_=others)
