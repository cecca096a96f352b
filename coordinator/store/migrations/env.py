"""What Alembic runs for every upgrade: the migrations, on the connection that the store handed over."""

from __future__ import annotations

from alembic import context

from coordinator.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite can roll DDL back, and the store begins its own transactions: a killed migration leaves nothing.
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
