"""The store's verbs about what workers take in: parts of frames, and whole ones the coordinator takes next.

A frame's parts may come to any worker, each is a row; whoever brings the last one puts the frame together.
The row of an arrival, one for each agent and digest, decides that this happens once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from coordinator.store import schema
from coordinator.store.blobs import BlobStore
from coordinator.store.columns import insert_or
from coordinator.store.postgres import lock_blobs
from foundation.errors import StoreError
from foundation.transfer import Part

FRAMES = 4
"""Frames of one agent that are collected at once; the one silent for longest makes room."""
RECEIPTS = "receipts"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A whole frame that a worker keeps for the coordinator."""

    agent: str
    digest: str
    wire_bytes: int
    received: float
    """UTC seconds."""
    worker: str
    refused: str | None
    """Why the worker refused it: the coordinator counts and quarantines it."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How much of a frame is here."""

    kept: bool
    """It is whole, and durable."""
    numbers: tuple[int, ...] = ()
    """Its parts that are here, in order."""


class Transactions(Protocol):
    """What these verbs ask of the store."""

    _blobs: BlobStore
    _clock: Callable[[], float]

    def _reading(self) -> AbstractContextManager[Connection]: ...

    def _writing(self) -> AbstractContextManager[Connection]: ...

    def _beside(self) -> AbstractContextManager[Connection]: ...

    def _discard(self, digests: Collection[str]) -> None: ...


class ArrivalVerbs:
    """A part of `coordinator.store.sql.Store`; all verbs may be called from any thread and process."""

    def take_part(self: Transactions, agent: str, part: Part, wire_bytes: int) -> Standing:
        """Keep a part (of a probe nothing) and return where its frame stands; durable when this returns."""
        digest, now = part.digest.hex(), self._clock()
        with self._beside() as connection:
            if _is_kept(connection, agent, digest):
                return Standing(kept=True)
            if not part.probe:
                _open(connection, agent, part, now)
                row = {"agent": agent, "digest": digest, "number": part.index, "body": part.payload}
                connection.execute(insert_or(connection, schema.parts, replace=False).values(**row))
                # It waits for others at the same frame, so the last to come sees what all have brought.
                table = schema.transfers
                mine = (table.c.agent == agent) & (table.c.digest == digest)
                grown = {"touched": now, "wire_bytes": table.c.wire_bytes + wire_bytes}
                connection.execute(sa.update(table).where(mine).values(grown))
            return Standing(kept=False, numbers=_numbers(connection, agent, part))

    def assembled(self: Transactions, agent: str, digest: str) -> tuple[bytes, int] | None:
        """Return a frame of all its parts and its bytes on the wire; `None` where a part is missing."""
        table = schema.parts
        mine = (table.c.agent == agent) & (table.c.digest == digest)
        with self._reading() as connection:
            transfer = _transfer(connection, agent, digest)
            bodies = connection.execute(
                sa.select(table.c.body).where(mine).order_by(table.c.number)
            ).scalars()
            found = [bytes(body) for body in bodies]
        if transfer is None or len(found) != transfer.parts:
            return None
        return b"".join(found), int(transfer.wire_bytes)

    def arrive(
        self: Transactions,
        agent: str,
        frame: bytes,
        digest: str,
        wire_bytes: int,
        *,
        worker: str,
        refused: str | None = None,
    ) -> bool:
        """Keep a whole frame for the coordinator and let go of its parts; false if another worker has."""
        with self._beside() as connection:
            lock_blobs(connection, take_away=False)
            if self._blobs.put(frame) != digest:
                raise StoreError(f"a frame of {agent!r} is not of digest {digest}")
            row = {"agent": agent, "digest": digest, "wire_bytes": wire_bytes, "worker": worker}
            values = row | {"received": self._clock(), "refused": refused}
            insert = insert_or(connection, schema.arrivals, replace=False).values(**values)
            new = connection.execute(insert.returning(schema.arrivals.c.agent)).first() is not None
            _forget(connection, agent, digest)
        return new

    def forget_parts(self: Transactions, agent: str, digest: str) -> None:
        """Let go of the parts of a frame that is not wanted."""
        with self._beside() as connection:
            _forget(connection, agent, digest)

    def forget_silent(self: Transactions, before: float) -> int:
        """Let go of frames of which nothing came since a time (UTC seconds); returns how many."""
        table = schema.transfers
        with self._beside() as connection:
            query = sa.select(table.c.agent, table.c.digest).where(table.c.touched < before)
            silent = connection.execute(query).all()
            for row in silent:
                _forget(connection, row.agent, row.digest)
        return len(silent)

    def arrivals(self: Transactions, limit: int) -> list[Arrival]:
        """Return what the coordinator has to take, oldest first."""
        table = schema.arrivals
        query = sa.select(table).order_by(table.c.received, table.c.agent, table.c.digest).limit(limit)
        with self._reading() as connection:
            return [Arrival(**row._mapping) for row in connection.execute(query)]

    def arrived_frame(self: Transactions, digest: str) -> bytes:
        """Return the frame of an arrival; raises `StoreError` where it is gone."""
        return self._blobs.get(digest)

    def drop_arrival(self: Transactions, agent: str, digest: str) -> None:
        """Forget an arrival that was taken, or refused; its bytes stay where an update has them."""
        table = schema.arrivals
        with self._writing() as connection:
            connection.execute(sa.delete(table).where((table.c.agent == agent) & (table.c.digest == digest)))
        self._discard([digest])

    def begin_seals(self: Transactions, epoch: int) -> None:
        """Let workers seal their receipts in this epoch; counters begin anew."""
        with self._writing() as connection:
            insert = insert_or(connection, schema.seal_counters, replace=True)
            connection.execute(insert.values(name=RECEIPTS, epoch=epoch, counter=0))

    def draw_seal(self: Transactions) -> tuple[int, int]:
        """Return epoch and counter of the next receipt; no two are the same. Raises `StoreError`."""
        table = schema.seal_counters
        with self._beside() as connection:
            drawn = connection.execute(
                sa.update(table)
                .where(table.c.name == RECEIPTS)
                .values(counter=table.c.counter + 1)
                .returning(table.c.epoch, table.c.counter)
            ).first()
        if drawn is None:
            raise StoreError("the coordinator has not begun its seals: start it once with `workers = true`")
        return int(drawn.epoch), int(drawn.counter)


def _is_kept(connection: Connection, agent: str, digest: str) -> bool:
    arrivals, updates = schema.arrivals, schema.updates
    waiting = sa.select(arrivals.c.agent).where(
        arrivals.c.agent == agent, arrivals.c.digest == digest, arrivals.c.refused.is_(None)
    )
    taken = sa.select(updates.c.agent).where(updates.c.agent == agent, updates.c.frame_sha256 == digest)
    return any(connection.execute(query.limit(1)).first() is not None for query in (waiting, taken))


def _transfer(connection: Connection, agent: str, digest: str) -> sa.Row[tuple[object, ...]] | None:
    table = schema.transfers
    query = sa.select(table).where(table.c.agent == agent, table.c.digest == digest)
    return connection.execute(query).first()


def _open(connection: Connection, agent: str, part: Part, now: float) -> None:
    """Make a frame's row; the same frame in other pieces begins anew."""
    table, digest = schema.transfers, part.digest.hex()
    known = _transfer(connection, agent, digest)
    if known is not None and (known.parts, known.total) == (part.count, part.total):
        return
    if known is not None:
        _forget(connection, agent, digest)
    mine = sa.select(table.c.digest).where(table.c.agent == agent).order_by(table.c.touched.desc())
    for old in connection.execute(mine.offset(FRAMES - 1)).scalars().all():
        _forget(connection, agent, old)
    row = {"agent": agent, "digest": digest, "parts": part.count, "total": part.total}
    values = row | {"wire_bytes": 0, "touched": now}
    connection.execute(insert_or(connection, table, replace=False).values(**values))


def _numbers(connection: Connection, agent: str, part: Part) -> tuple[int, ...]:
    digest, table = part.digest.hex(), schema.parts
    known = _transfer(connection, agent, digest)
    if known is None or (known.parts, known.total) != (part.count, part.total):
        return ()
    query = sa.select(table.c.number).where(table.c.agent == agent, table.c.digest == digest)
    return tuple(connection.execute(query.order_by(table.c.number)).scalars())


def _forget(connection: Connection, agent: str, digest: str) -> None:
    for table in (schema.parts, schema.transfers):
        connection.execute(sa.delete(table).where(table.c.agent == agent, table.c.digest == digest))
