"""The tables, and how a database is opened and brought to them.

Keys are natural: run, (run, round), (run, round, agent). Times are UTC seconds since the epoch, JSON is
text, and the tables are the same in SQLite and in PostgreSQL (postgres.py). `REVISION` is the migration that
leads to these tables; a test holds the two together.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from coordinator.store import postgres
from coordinator.store.columns import Id, Words
from foundation.errors import StoreError

REVISION = "0005"
MIGRATIONS = Path(__file__).parent / "migrations"
FILE = "hedgerow.sqlite"
PATIENCE_S = 30.0
"""How long one connection waits for another process's lock."""

metadata = sa.MetaData()

runs = sa.Table(
    "runs",
    metadata,
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

agents = sa.Table(
    "agents",
    metadata,
    sa.Column("agent", Words, primary_key=True),
    sa.Column("card_json", Words, nullable=False),
    sa.Column("first_seen", sa.Float(53), nullable=False),
    sa.Column("last_seen", sa.Float(53), nullable=False),
)

rounds = sa.Table(
    "rounds",
    metadata,
    sa.Column("run", Words, sa.ForeignKey("runs.run"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", Words, nullable=False),
    sa.Column("agents_json", Words, nullable=False),
    sa.Column("deadline", sa.Float(53), nullable=False),
    sa.Column("opened", sa.Float(53), nullable=False),
    sa.Column("closed", sa.Float(53)),
    sa.Column("metrics_json", Words, nullable=False),
)

states = sa.Table(
    "states",
    metadata,
    sa.Column("run", Words, sa.ForeignKey("runs.run"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("sha256", Words, nullable=False, index=True),
)

updates = sa.Table(
    "updates",
    metadata,
    sa.Column("run", Words, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("agent", Words, primary_key=True),
    sa.Column("received", sa.Float(53), nullable=False),
    sa.Column("summary_json", Words, nullable=False),
    sa.Column("frame_sha256", Words, index=True),
    sa.Column("frame_bytes", sa.BigInteger, nullable=False),
    sa.ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.round"]),
)

refusals = sa.Table(
    "refusals",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("run", Words, nullable=False, index=True),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("agent", Words, nullable=False),
    sa.Column("reason", Words, nullable=False),
    sa.Column("at", sa.Float(53), nullable=False),
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("run", Words, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("agent", Words, nullable=False),
    sa.Column("sha256", Words, nullable=False),
    sa.Column("manifest_json", Words, nullable=False),
    sa.UniqueConstraint("run", "round", "agent", "sha256"),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("kind", Words, nullable=False),
    sa.Column("run", Words),
    sa.Column("round", sa.Integer),
    sa.Column("agent", Words),
    sa.Column("text", Words, nullable=False),
    sa.Column("data_json", Words, nullable=False),
    sa.Column("at", sa.Float(53), nullable=False),
)

invites = sa.Table(
    "invites",
    metadata,
    sa.Column("invite", Words, primary_key=True),
    sa.Column("name", Words),
    sa.Column("replace", sa.Boolean, nullable=False),
    sa.Column("created", sa.Float(53), nullable=False),
    sa.Column("expires", sa.Float(53), nullable=False),
    sa.Column("used_by", Words),
    sa.Column("used", sa.Float(53)),
)

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("agent", Words, primary_key=True),
    sa.Column("public", Words, nullable=False),
    sa.Column("salt", Words, nullable=False),
    sa.Column("enrolled", sa.Float(53), nullable=False),
    sa.Column("revoked", sa.Float(53)),
    sa.Column("reason", Words, nullable=False),
    sa.Column("marks_json", Words, nullable=False),
)

api_tokens = sa.Table(
    "api_tokens",
    metadata,
    sa.Column("name", Words, primary_key=True),
    sa.Column("role", Words, nullable=False),
    sa.Column("sha256", Words, nullable=False, unique=True),
    sa.Column("created", sa.Float(53), nullable=False),
    sa.Column("expires", sa.Float(53)),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("at", sa.Float(53), nullable=False),
    sa.Column("who", Words, nullable=False),
    sa.Column("what", Words, nullable=False),
    sa.Column("of", Words, nullable=False),
    sa.Column("detail", Words, nullable=False),
)

plugs = sa.Table(
    "plugs",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("agent", Words, nullable=False),
    sa.Column("plug", Words, nullable=False),
    sa.Column("since", sa.Float(53), nullable=False),
    sa.Column("step_j", sa.Float(53)),
    sa.Column("step_w", sa.Float(53)),
    sa.UniqueConstraint("agent", "plug"),
)

plug_readings = sa.Table(
    "plug_readings",
    metadata,
    sa.Column("plug", Id, sa.ForeignKey("plugs.id"), primary_key=True, autoincrement=False),
    sa.Column("at", sa.Float(53), primary_key=True, autoincrement=False),
    sa.Column("watts", sa.Float(53)),
    sa.Column("joules", sa.Float(53)),
)

walls = sa.Table(
    "walls",
    metadata,
    sa.Column("run", Words, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("agent", Words, primary_key=True),
    sa.Column("record_json", Words, nullable=False),
    sa.ForeignKeyConstraint(["run", "round", "agent"], ["updates.run", "updates.round", "updates.agent"]),
)

orders = sa.Table(
    "orders",
    metadata,
    sa.Column("id", Words, primary_key=True),
    sa.Column("agent", Words, nullable=False, index=True),
    sa.Column("verb", Words, nullable=False),
    sa.Column("model", Words, nullable=False),
    sa.Column("reason", Words, nullable=False),
    sa.Column("who", Words, nullable=False),
    sa.Column("at", sa.Float(53), nullable=False),
    sa.Column("state", Words, nullable=False, index=True),
    sa.Column("said", Words, nullable=False),
    sa.Column("answered", sa.Float(53)),
)

rollouts = sa.Table(
    "rollouts",
    metadata,
    sa.Column("run", Words, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", Words, nullable=False),
    sa.Column("ring", sa.Integer, nullable=False),
    sa.Column("reason", Words, nullable=False),
    sa.Column("began", sa.Float(53), nullable=False),
    sa.Column("changed", sa.Float(53), nullable=False),
)

rollout_members = sa.Table(
    "rollout_members",
    metadata,
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

transfers = sa.Table(
    "transfers",
    metadata,
    sa.Column("agent", Words, primary_key=True),
    sa.Column("digest", Words, primary_key=True),
    sa.Column("parts", sa.Integer, nullable=False),
    sa.Column("total", sa.BigInteger, nullable=False),
    sa.Column("wire_bytes", sa.BigInteger, nullable=False),
    sa.Column("touched", sa.Float(53), nullable=False),
)

parts = sa.Table(
    "parts",
    metadata,
    sa.Column("agent", Words, primary_key=True),
    sa.Column("digest", Words, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

arrivals = sa.Table(
    "arrivals",
    metadata,
    sa.Column("agent", Words, primary_key=True),
    sa.Column("digest", Words, primary_key=True, index=True),
    sa.Column("wire_bytes", sa.BigInteger, nullable=False),
    sa.Column("received", sa.Float(53), nullable=False),
    sa.Column("worker", Words, nullable=False),
    sa.Column("refused", Words),
)

seal_counters = sa.Table(
    "seal_counters",
    metadata,
    sa.Column("name", Words, primary_key=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("counter", sa.BigInteger, nullable=False),
)

# Alembic's operations stand behind one proxy per process, so two stores may not migrate at one time.
_MIGRATING = threading.Lock()


def open_engine(folder: Path, url: URL | None = None) -> Engine:
    """Open, and if need be make or migrate, the database at `url`, or the SQLite database in `folder`.

    Raises `StoreError` when it is no database, is of a newer Hedgerow, or cannot be written.
    """
    path = folder / FILE
    engine, name = (_sqlite(path), str(path)) if url is None else (postgres.connect(url), _shown(url))
    try:
        with _MIGRATING, engine.connect().execution_options(writes=True) as connection, connection.begin():
            _migrate(connection, name)
    except (SQLAlchemyError, sqlite3.Error) as error:
        engine.dispose()
        raise StoreError(f"the database {name} cannot be opened: {error}") from error
    except StoreError:
        engine.dispose()
        raise
    return engine


def _sqlite(path: Path) -> Engine:
    engine = sa.create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": PATIENCE_S, "check_same_thread": False},
        pool_size=8,
        max_overflow=56,  # more threads than asyncio.to_thread ever has
    )
    sa.event.listen(engine, "connect", _set_up)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True)


def open_engine_to_read(folder: Path, url: URL | None = None) -> Engine:
    """Open the database at `url`, or in `folder`, and change nothing of it, also while a coordinator writes.

    Raises `StoreError` when there is none, or when it is not at this revision: nobody migrates here.
    """
    path = folder / FILE
    engine, name = (
        (_sqlite_to_read(path), str(path))
        if url is None
        else (postgres.connect(url, reads=True), _shown(url))
    )
    try:
        with engine.connect() as connection:
            found = _revision(connection)
    except (SQLAlchemyError, sqlite3.Error) as error:
        engine.dispose()
        raise StoreError(f"the database {name} cannot be read: {error}") from error
    if found != REVISION:
        engine.dispose()
        raise StoreError(
            f"the database {name} is at revision {found}, this Hedgerow reads {REVISION}: a coordinator of"
            " this version migrates an older one when it starts, a newer one needs a newer Hedgerow"
        )
    return engine


def _sqlite_to_read(path: Path) -> Engine:
    if not path.is_file():
        raise StoreError(f"there is no store in {path.parent}: no file {FILE}")
    engine = sa.create_engine(
        URL.create("sqlite", database=path.absolute().as_uri(), query=_reading(path)),
        connect_args={"timeout": PATIENCE_S, "check_same_thread": False},
    )
    sa.event.listen(engine, "connect", _set_up_to_read)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _reading(path: Path) -> dict[str, str]:
    """Return SQLite's parameters for reading a file, where it may lie in a folder that is not ours."""
    # Readers of a log share a file beside it with its writer, and whoever comes first makes it; one that may
    # not write at all would leave it behind. In a folder that is not ours there is none while nobody writes.
    log = path.with_name(f"{FILE}-wal")
    still = not os.access(path.parent, os.W_OK) and not log.exists()
    return {"uri": "true", **({"immutable": "1"} if still else {"mode": "rw"})}


def _set_up_to_read(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA query_only=ON")


def _set_up(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    # The driver's own transactions begin late and leave DDL outside; we say BEGIN ourselves.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin(connection: Connection) -> None:
    # IMMEDIATE takes the write lock at once: a writer that read first could otherwise find it taken.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: Connection, name: str) -> None:
    """Run the migrations that are missing, all in the transaction of `connection`."""
    if _revision(connection) == REVISION:
        return
    # Imported here: a database that is up to date, which is nearly every start, does not pay for it.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    noise = logging.getLogger("alembic")
    if noise.level == logging.NOTSET:
        noise.setLevel(logging.WARNING)
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    found = _revision(connection)
    if found is not None and found not in known:
        raise StoreError(
            f"the database {name} is at revision {found}, which this Hedgerow does not know:"
            " it was written by a newer one; upgrade, or choose another folder or database"
        )
    command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
