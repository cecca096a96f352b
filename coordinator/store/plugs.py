"""The store's verbs about smart plugs: readings that are forgotten in time, and what they came to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from coordinator.store import schema
from coordinator.store.columns import insert_or
from coordinator.store.records import PlugReading, PlugRecord


class Transactions(Protocol):
    """What these verbs ask of the store."""

    def _reading(self) -> AbstractContextManager[Connection]: ...

    def _writing(self) -> AbstractContextManager[Connection]: ...


class PlugVerbs:
    """A part of `coordinator.store.sql.Store`; all verbs may be called from any thread."""

    def plug(self: Transactions, agent: str, plug: str, now: float) -> PlugRecord:
        """Return the row of a device's plug, made at `now` (UTC seconds) where there was none."""
        table = schema.plugs
        query = sa.select(table).where(table.c.agent == agent, table.c.plug == plug)
        with self._writing() as connection:
            if connection.execute(query).first() is None:
                connection.execute(sa.insert(table).values(agent=agent, plug=plug, since=now))
            row = connection.execute(query).one()
        return PlugRecord(**row._mapping)

    def add_plug_readings(
        self: Transactions,
        plug: int,
        readings: Sequence[PlugReading],
        *,
        step_j: float | None = None,
        step_w: float | None = None,
    ) -> None:
        """Keep readings, each once, and the finest steps that the plug has shown."""
        table, rows = schema.plug_readings, {reading.at: reading for reading in readings}
        values = [{"plug": plug, "at": r.at, "watts": r.watts, "joules": r.joules} for r in rows.values()]
        with self._writing() as connection:
            if values:
                connection.execute(insert_or(connection, table, replace=True), values)
            for column, step in ((schema.plugs.c.step_j, step_j), (schema.plugs.c.step_w, step_w)):
                if step is not None:
                    finer = sa.or_(column.is_(None), column > step)
                    change = sa.update(schema.plugs).where(schema.plugs.c.id == plug, finer)
                    connection.execute(change.values({column: step}))

    def plug_readings(
        self: Transactions, plug: int, start: float, end: float, limit: int
    ) -> list[PlugReading]:
        """Return what a plug said between two times (UTC seconds), in order, the first `limit`."""
        table = schema.plug_readings
        query = (
            sa.select(table.c.at, table.c.watts, table.c.joules)
            .where(table.c.plug == plug, table.c.at >= start, table.c.at <= end)
            .order_by(table.c.at)
            .limit(limit)
        )
        with self._reading() as connection:
            return [PlugReading(row.at, row.watts, row.joules) for row in connection.execute(query)]

    def forget_plug_readings(self: Transactions, before: float, most: int) -> int:
        """Forget readings from before a time (UTC seconds), and all but the newest `most` of each plug.

        Returns how many went.
        """
        table, gone = schema.plug_readings, 0
        with self._writing() as connection:
            gone += connection.execute(sa.delete(table).where(table.c.at < before)).rowcount
            for number in connection.execute(sa.select(schema.plugs.c.id)).scalars().all():
                mine = table.c.plug == number
                newest = sa.select(table.c.at).where(mine).order_by(table.c.at.desc())
                first = connection.execute(newest.offset(most).limit(1)).scalar()
                if first is not None:
                    gone += connection.execute(sa.delete(table).where(mine, table.c.at <= first)).rowcount
        return gone

    def unjoined(
        self: Transactions, agents: Collection[str], since: float
    ) -> list[tuple[str, int, str, str]]:
        """Return run, round, agent and summary of updates since a time that have no wall record yet."""
        u, w = schema.updates, schema.walls
        same = sa.and_(w.c.run == u.c.run, w.c.round == u.c.round, w.c.agent == u.c.agent)
        query = (
            sa.select(u.c.run, u.c.round, u.c.agent, u.c.summary_json)
            .select_from(u.outerjoin(w, same))
            .where(w.c.run.is_(None), u.c.agent.in_(list(agents)), u.c.received >= since)
            .order_by(u.c.received)
        )
        with self._reading() as connection:
            return [(r.run, r.round, r.agent, r.summary_json) for r in connection.execute(query)]

    def add_wall(self: Transactions, run: str, round: int, agent: str, record_json: str) -> None:
        """Keep what an update's time came to at the wall; the first one stays."""
        table, key = schema.walls, {"run": run, "round": round, "agent": agent}
        with self._writing() as connection:
            if connection.execute(sa.select(table).filter_by(**key)).first() is None:
                connection.execute(sa.insert(table).values(**key, record_json=record_json))

    def walls(self: Transactions, run: str) -> list[tuple[int, str, str]]:
        """Return round, agent and record of all of a run's joins, in order; the JSON as it stands there."""
        table = schema.walls
        query = sa.select(table).where(table.c.run == run).order_by(table.c.round, table.c.agent)
        with self._reading() as connection:
            return [(row.round, row.agent, row.record_json) for row in connection.execute(query)]
