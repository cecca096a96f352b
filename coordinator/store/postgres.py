"""The tables in PostgreSQL: how it is opened, who writes at one time, and what waits for a restart of it.

SQLite has one writer at a time, and the store's verbs are written for that. Here a transaction that writes
takes an advisory lock of the database first, and what reads sees one moment (REPEATABLE READ), as there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from foundation.errors import StoreError

WRITER, BLOBS, COORDINATOR = 0x4864_6701, 0x4864_6702, 0x4864_6703
"""Advisory locks: who writes; who puts blobs (shared) or takes them away; which coordinator is the one."""
PATIENCE_S = 30.0
"""How long a verb waits for a server that is being started again."""
AGAIN_S = 0.2
READS: Mapping[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}


def connect(url: URL, *, reads: bool = False) -> Engine:
    """Return an engine that has reached its server, with `reads` one that changes nothing.

    Raises `StoreError` saying what is in the way.
    """
    name = url.render_as_string(hide_password=True)
    try:
        engine = sa.create_engine(
            url,
            pool_size=4,
            max_overflow=12,
            pool_pre_ping=True,  # a connection from before a restart is replaced
            hide_parameters=True,
            connect_args={"connect_timeout": 10, "application_name": "hedgerow"},
        )
    except ModuleNotFoundError as error:
        raise StoreError(
            f"{name} needs the driver for PostgreSQL: pip install 'hedgerow[postgres]'"
        ) from error
    sa.event.listen(engine, "begin", _begin)
    try:
        with engine.connect() as connection:
            encoding = connection.execute(sa.text("SHOW server_encoding")).scalar()
    except SQLAlchemyError as error:
        engine.dispose()
        raise StoreError(f"the database {name} cannot be opened: {error}") from error
    if encoding != "UTF8":
        engine.dispose()
        raise StoreError(f"the database {name} keeps {encoding}: make one with ENCODING 'UTF8'")
    return engine.execution_options(postgresql_readonly=True) if reads else engine


def _begin(connection: Connection) -> None:
    if connection.get_execution_options().get("writes", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER})")


def lock_blobs(connection: Connection, *, take_away: bool) -> None:
    """Until the end of this transaction let nobody take blobs away, or (`take_away`) let nobody put one."""
    if connection.dialect.name == "postgresql":
        name = "pg_advisory_xact_lock" if take_away else "pg_advisory_xact_lock_shared"
        connection.exec_driver_sql(f"SELECT {name}({BLOBS})")


def patiently(engine: Engine) -> Connection:
    """Return a connection; waits for a PostgreSQL that is away, for `PATIENCE_S` at most."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return engine.connect()
        except OperationalError:
            if engine.dialect.name != "postgresql" or time.monotonic() > deadline:
                raise
            time.sleep(AGAIN_S)


@contextmanager
def alone(engine: Engine) -> Iterator[None]:
    """Be the one coordinator of a PostgreSQL database; raises `StoreError` where there is another.

    The lock goes with its connection, however this process ends. In SQLite the folder's lock does it.
    """
    if engine.dialect.name != "postgresql":
        yield
        return
    connection = engine.connect()
    try:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        got = connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({COORDINATOR})").scalar()
        if not got:
            raise StoreError(
                "another coordinator works on this database: stop that one, or give this one a database"
                " of its own (store.database)"
            )
        yield
    finally:
        with suppress(SQLAlchemyError):  # a server that is gone has let go of it
            connection.invalidate()
        connection.close()
