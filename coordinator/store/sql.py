"""The coordinator's memory: rows in SQLite or PostgreSQL, blobs beside them, one writer at a time.

What a verb has returned from survives a power cut (WAL, synchronous=FULL; blobs fsynced before the row that
names them). Blobs are written and swept only inside a write transaction, so no sweep, of this process or of
another one on the same folder, can meet a blob whose row is still on its way. All verbs may be called from
any thread; every failure of the database or the disk is a `StoreError`.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel, ValidationError
from sqlalchemy.engine import Connection, Engine, Row
from sqlalchemy.exc import SQLAlchemyError

from coordinator.store import postgres, schema
from coordinator.store.arrivals import ArrivalVerbs
from coordinator.store.blobs import Blobs, BlobStore
from coordinator.store.place import StoreSettings, recall, remember
from coordinator.store.plugs import PlugVerbs
from coordinator.store.postgres import lock_blobs, patiently
from coordinator.store.quarantine import Quarantine
from coordinator.store.records import (
    RUN_STATES,
    AgentRecord,
    EventRecord,
    NewEvent,
    RefusalRecord,
    RoundRecord,
    RunRecord,
    RunState,
    UpdateRecord,
    dumps,
    loads,
)
from coordinator.store.rollouts import RolloutVerbs
from coordinator.store.s3 import S3Blobs
from foundation.artifact import Manifest
from foundation.errors import StoreError
from foundation.messages import AgentCard, Json

M = TypeVar("M", bound=BaseModel)

QUARANTINE = "quarantine"
STATES_KEPT = 2
"""Snapshots kept of every run: the last, and the one before it."""


class Store(PlugVerbs, RolloutVerbs, ArrivalVerbs):
    """Runs, agents, rounds, updates, refusals, artifacts, events, plugs, rollouts and arrivals."""

    def __init__(
        self, engine: Engine, blobs: BlobStore, clock: Callable[[], float], quarantine: Quarantine
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._reads = dict(postgres.READS) if engine.dialect.name == "postgresql" else {}
        self.quarantine = quarantine
        self._clock = clock
        self._writer = threading.Lock()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        clock: Callable[[], float] = time.time,
        place: StoreSettings | None = None,
        sweep: bool = True,
    ) -> Self:
        """Open the store in `folder`, making or migrating it if need be, and sweep what a crash left.

        Rows and blobs are where `place` says. `clock` gives UTC seconds since the epoch. Raises `StoreError`.
        """
        place = place or StoreSettings()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remember(folder, place)
        except OSError as error:
            raise StoreError(f"the store's folder {folder} cannot be made: {error}") from error
        blobs = _blobs(folder, place)
        engine = schema.open_engine(folder, place.url)
        store = cls(engine, blobs, clock, Quarantine(folder / QUARANTINE, clock))
        if sweep:
            store.sweep()
        return store

    @classmethod
    def open_to_read(cls, folder: Path) -> Self:
        """Open the store of `folder` and change nothing of it, also while its coordinator runs.

        Verbs that write fail. Raises `StoreError` when there is no store, or one of another revision.
        """
        place = recall(folder)
        engine, blobs = schema.open_engine_to_read(folder, place.url), _blobs(folder, place, make=False)
        return cls(engine, blobs, time.time, Quarantine(folder / QUARANTINE, time.time))

    def alone(self) -> AbstractContextManager[None]:
        """Be the one coordinator of this store; raises `StoreError` where its database has another."""
        return postgres.alone(self._engine)

    def close(self) -> None:
        """Close all connections; a second call does nothing."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def transaction(self, *, writes: bool = False) -> Iterator[Connection]:
        """Yield a connection in one transaction, for rows with a module of their own (coordinator/fleet)."""
        with self._writing() if writes else self._reading() as connection:
            yield connection

    # Runs

    def open_run(self, record: RunRecord) -> None:
        """Begin a run; once more with the same settings does nothing, with others raises `StoreError`."""
        fixed = {
            "strategy": record.strategy,
            "settings_json": record.settings_json,
            "spec_json": record.spec_json,
            "rounds": record.rounds,
            "seed": record.seed,
        }
        with self._writing() as connection:
            row = _one(connection, schema.runs, run=record.run)
            if row is None:
                now = self._clock()
                fresh = {"state": "waiting", "reason": "", "created": now, "changed": now}
                connection.execute(sa.insert(schema.runs).values(run=record.run, **fixed, **fresh))
                return
            other = [name for name, value in fixed.items() if not _same(name, row._mapping[name], value)]
        if other:
            raise StoreError(
                f"run {record.run!r} is there already with another {' and '.join(other)}:"
                " choose another name, or go on with the settings it began with"
            )

    def set_run_state(self, run: str, state: RunState, reason: str = "") -> None:
        """Say how a run stands; raises `StoreError` for a run or a state that is not known."""
        if state not in RUN_STATES:
            raise StoreError(f"{state!r} is no state of a run: use one of {', '.join(RUN_STATES)}")
        with self._writing() as connection:
            change = sa.update(schema.runs).where(schema.runs.c.run == run)
            done = connection.execute(change.values(state=state, reason=reason, changed=self._clock()))
            if not done.rowcount:
                raise _no_run(run)

    def run(self, run: str) -> RunRecord:
        """Return one run; raises `StoreError` if there is none of that name."""
        with self._reading() as connection:
            row = _one(connection, schema.runs, run=run)
        if row is None:
            raise _no_run(run)
        return _run(row)

    def has_run(self, run: str) -> bool:
        """Whether there is a run of that name."""
        with self._reading() as connection:
            return _one(connection, schema.runs, run=run) is not None

    def runs(self) -> list[RunRecord]:
        """Return all runs, newest first."""
        table = schema.runs
        return [
            _run(row)
            for row in self._all(sa.select(table).order_by(table.c.created.desc(), table.c.run.desc()))
        ]

    # Agents

    def upsert_agent(self, card: AgentCard, seen: datetime) -> None:
        """Keep the latest card of an agent; `seen` never moves `last_seen` back."""
        at = seen.timestamp()
        with self._writing() as connection:
            table = schema.agents
            row = _one(connection, table, agent=card.agent)
            if row is None:
                values = {"agent": card.agent, "first_seen": at, "last_seen": at}
                connection.execute(sa.insert(table).values(card_json=_model_json(card), **values))
                return
            change = sa.update(table).where(table.c.agent == card.agent)
            connection.execute(change.values(card_json=_model_json(card), last_seen=max(at, row.last_seen)))

    def agents(self) -> list[AgentRecord]:
        """Return every agent that ever introduced itself, by name."""
        rows = self._all(sa.select(schema.agents).order_by(schema.agents.c.agent))
        return [
            AgentRecord(_model(AgentCard, row.card_json), _when(row.first_seen), _when(row.last_seen))
            for row in rows
        ]

    def cards(self, agent: str | None = None) -> dict[str, AgentCard | None]:
        """Return every agent's card, or one's; `None` for one that cannot be read, as of another version."""
        found: dict[str, AgentCard | None] = {}
        query = sa.select(schema.agents).order_by(schema.agents.c.agent)
        for row in self._all(query if agent is None else query.where(schema.agents.c.agent == agent)):
            try:
                found[row.agent] = AgentCard.model_validate_json(row.card_json)
            except ValidationError:
                found[row.agent] = None
        return found

    # Rounds and states

    def open_round(
        self,
        run: str,
        round: int,
        agents: Sequence[str],
        deadline: float,
        *,
        eased: Json | None = None,
        skipped: Json | None = None,
    ) -> None:
        """Open a round; once more, open or closed, does nothing. `deadline` is UTC seconds since the epoch.

        A round that is open already keeps the agents, the deadline and the decisions it was opened with.
        Raises `StoreError` for a run that is not known.
        """
        with self._writing() as connection:
            if _one(connection, schema.runs, run=run) is None:
                raise _no_run(run)
            if _one(connection, schema.rounds, run=run, round=round) is not None:
                return
            asked = {"agents": list(agents), "eased": eased or {}, "skipped": skipped or {}}
            values = {"state": "open", "agents_json": dumps(asked), "deadline": deadline}
            times = {"opened": self._clock(), "closed": None, "metrics_json": "{}"}
            connection.execute(sa.insert(schema.rounds).values(run=run, round=round, **values, **times))

    def round_record(self, run: str, round: int) -> RoundRecord | None:
        """Return one round, or `None` if it was never opened."""
        with self._reading() as connection:
            row = _one(connection, schema.rounds, run=run, round=round)
        return None if row is None else _round(row)

    def rounds(self, run: str, *, after: int = 0, limit: int | None = None) -> list[RoundRecord]:
        """Return the rounds of a run above `after`, in order."""
        table = schema.rounds
        where = (table.c.run == run) & (table.c.round > after)
        return [
            _round(row)
            for row in self._all(sa.select(table).where(where).order_by(table.c.round).limit(limit))
        ]

    def latest_rounds(self, run: str, limit: int) -> list[RoundRecord]:
        """Return the last rounds of a run, in order."""
        table = schema.rounds
        query = sa.select(table).where(table.c.run == run).order_by(table.c.round.desc()).limit(limit)
        return [_round(row) for row in reversed(self._all(query))]

    def save_initial_state(self, run: str, state: bytes) -> None:
        """Keep the state before round 1; the same bytes once more do nothing, others raise `StoreError`."""
        with self._writing() as connection:
            if _one(connection, schema.runs, run=run) is None:
                raise _no_run(run)
            digest = self._blobs.put(state)
            table = schema.states
            found = connection.execute(
                sa.select(table).where(table.c.run == run).order_by(table.c.round)
            ).first()
            if found is None:
                connection.execute(sa.insert(table).values(run=run, round=0, sha256=digest))
            elif found.round != 0 or found.sha256 != digest:
                raise StoreError(
                    f"run {run!r} has a state already (after round {found.round}): resume from it"
                )

    def close_round(
        self,
        run: str,
        round: int,
        state: bytes | None,
        metrics: Json,
        *,
        absorbed: Collection[str] | None = None,
        late: Collection[tuple[int, str]] = (),
        refused: Collection[tuple[int, str]] = (),
    ) -> None:
        """Close an open round, with the state that came of it where there is one: both or neither.

        Without a state, `absorbed` (the agents whose updates made it), `late` (updates of earlier rounds that
        did too, by round and agent) and their frames are what it can be made of again, until `save_state`;
        the frames of others, and those of earlier rounds that were `refused` in it, are let go. Closing a
        closed round again with the same state does nothing. Raises `StoreError` when the round was never
        opened, or was closed with another state.
        """
        released: list[str] = []
        with self._writing() as connection:
            row = _one(connection, schema.rounds, run=run, round=round)
            if row is None:
                raise StoreError(f"round {round} of run {run!r} was never opened")
            digest = None if state is None else self._blobs.put(state)
            if row.state == "closed":
                kept = _one(connection, schema.states, run=run, round=round)
                if digest is not None and (kept is None or kept.sha256 != digest):
                    raise StoreError(f"round {round} of run {run!r} is closed already, with another state")
                return
            if absorbed is not None:
                released += _let_go_of_others(connection, run, round, absorbed)
                for number, agent in refused:
                    released += _let_go(connection, run, number, agent)
            journal = loads(row.agents_json)
            if absorbed is not None:
                journal |= {"absorbed": sorted(absorbed), "late": [list(one) for one in sorted(late)]}
            _close(connection, run, round, dumps(metrics), dumps(journal), self._clock())
            if digest is not None:
                released += _keep_state(connection, run, round, digest)
        self._discard(released)

    def save_state(self, run: str, round: int, state: bytes) -> None:
        """Keep the state after a round that was closed without one; older states go.

        Raises `StoreError` when the round is not closed, or has another state.
        """
        with self._writing() as connection:
            row = _one(connection, schema.rounds, run=run, round=round)
            if row is None or row.state != "closed":
                raise StoreError(f"round {round} of run {run!r} is not closed: it has no state to keep")
            digest = self._blobs.put(state)
            kept = _one(connection, schema.states, run=run, round=round)
            if kept is not None and kept.sha256 != digest:
                raise StoreError(f"round {round} of run {run!r} has another state already")
            released = [] if kept is not None else _keep_state(connection, run, round, digest)
        self._discard(released)

    def latest_state(self, run: str) -> tuple[int, bytes] | None:
        """Return the last closed round (0 before the first) and its state, or `None` before any state.

        Raises `StoreError` by name when the blob is missing or damaged.
        """
        table = schema.states
        query = sa.select(table).where(table.c.run == run).order_by(table.c.round.desc()).limit(1)
        with self._reading() as connection:
            row = connection.execute(query).first()
            # Read inside the transaction: a round that closes meanwhile may release this very blob.
            return None if row is None else (row.round, self._blobs.get(row.sha256))

    def state_round(self, run: str) -> int | None:
        """Return the round whose state `latest_state` has, without reading it; `None` before any."""
        table = schema.states
        query = sa.select(sa.func.max(table.c.round)).where(table.c.run == run)
        with self._reading() as connection:
            found: int | None = connection.execute(query).scalar_one()
            return found

    # Updates

    def add_update(self, run: str, round: int, agent: str, frame: bytes, summary: Json) -> bool:
        """Keep an update; durable when this returns. False if this agent's is there already.

        The first one stays. `summary` is what it says beside its arrays. Raises `StoreError` for a round
        that was never opened.
        """
        with self._writing() as connection:
            if _one(connection, schema.updates, run=run, round=round, agent=agent) is not None:
                return False
            if _one(connection, schema.rounds, run=run, round=round) is None:
                raise StoreError(f"an update of {agent!r} is for round {round} of run {run!r}, never opened")
            values = {
                "received": self._clock(),
                "summary_json": dumps(summary),
                "frame_bytes": len(frame),
                "frame_sha256": self._put(connection, agent, frame),
            }
            connection.execute(sa.insert(schema.updates).values(run=run, round=round, agent=agent, **values))
            return True

    def _put(self, connection: Connection, agent: str, frame: bytes) -> str:
        """Keep a frame's bytes, unless a worker has, and return their digest."""
        digest = hashlib.sha256(frame).hexdigest()
        if _one(connection, schema.arrivals, agent=agent, digest=digest) is not None:
            return digest
        return self._blobs.put(frame)

    def updates(self, run: str, round: int) -> list[UpdateRecord]:
        """Return the updates of one round, by agent."""
        table = schema.updates
        where = (table.c.run == run) & (table.c.round == round)
        return [_update(row) for row in self._all(sa.select(table).where(where).order_by(table.c.agent))]

    def has_update(self, run: str, round: int, agent: str) -> bool:
        """Whether an agent's update of a round is here; costs the same however many there are."""
        table = schema.updates
        key = (table.c.run == run) & (table.c.round == round) & (table.c.agent == agent)
        with self._reading() as connection:
            return connection.execute(sa.select(table.c.agent).where(key)).first() is not None

    def update_frame(self, run: str, round: int, agent: str) -> bytes:
        """Return the frame of an update; raises `StoreError` when there is none, or no longer."""
        with self._reading() as connection:
            row = _one(connection, schema.updates, run=run, round=round, agent=agent)
            if row is None:
                raise StoreError(f"there is no update of {agent!r} in round {round} of run {run!r}")
            if row.frame_sha256 is None:
                raise StoreError(f"the frame of {agent!r} in round {round} of run {run!r} has been released")
            return self._blobs.get(row.frame_sha256)

    def history(
        self, run: str, *, after: tuple[int, str] | None = None, limit: int | None = None
    ) -> list[UpdateRecord]:
        """Return the updates of a run by round and agent, those after the key `after` (round, agent)."""
        table = schema.updates
        where = table.c.run == run
        if after is not None:
            past = (table.c.round == after[0]) & (table.c.agent > after[1])
            where = where & ((table.c.round > after[0]) | past)
        query = sa.select(table).where(where).order_by(table.c.round, table.c.agent).limit(limit)
        return [_update(row) for row in self._all(query)]

    def summaries(self, run: str) -> list[tuple[int, str, str]]:
        """Return round, agent and summary of every update of a run, in order; the JSON as it stands there."""
        table = schema.updates
        query = sa.select(table).where(table.c.run == run).order_by(table.c.round, table.c.agent)
        return [(row.round, row.agent, row.summary_json) for row in self._all(query)]

    def latest_of(self, runs: Collection[str], agents: Collection[str], limit: int) -> list[UpdateRecord]:
        """Return the last updates of each of these agents in these runs, at most `limit`, newest first."""
        table = schema.updates
        newest = (table.c.received.desc(), table.c.round.desc())
        place = sa.func.row_number().over(partition_by=table.c.agent, order_by=newest).label("place")
        inner = (
            sa.select(table, place)
            .where(table.c.run.in_(list(runs)), table.c.agent.in_(list(agents)))
            .subquery()
        )
        columns = [inner.c[column.name] for column in table.c]
        query = sa.select(*columns).where(inner.c.place <= limit).order_by(inner.c.agent, inner.c.place)
        return [_update(row) for row in self._all(query)]

    def updates_since(self, moment: float, agents: Collection[str]) -> list[UpdateRecord]:
        """Return what these agents sent in all runs from a moment on (UTC seconds), oldest first."""
        table = schema.updates
        where = (table.c.received >= moment) & table.c.agent.in_(list(agents))
        return [_update(row) for row in self._all(sa.select(table).where(where).order_by(table.c.received))]

    def count_updates(self, run: str) -> int:
        """Return how many updates a run has."""
        table = schema.updates
        with self._reading() as connection:
            count = sa.select(sa.func.count()).select_from(table).where(table.c.run == run)
            return int(connection.execute(count).scalar_one())

    def counts(self, run: str) -> dict[int, int]:
        """Return how many updates each round of a run has; rounds without any are not there."""
        table = schema.updates
        query = sa.select(table.c.round, sa.func.count()).where(table.c.run == run).group_by(table.c.round)
        with self._reading() as connection:
            return {int(round): int(count) for round, count in connection.execute(query)}

    def late_updates(self, run: str, after: int) -> list[tuple[int, str]]:
        """Return the updates that came after their round was closed, and no round was made of so far.

        Of rounds above `after`; by round and agent.
        """
        with self._reading() as connection:
            last = connection.execute(
                sa.select(sa.func.max(schema.rounds.c.round)).where(schema.rounds.c.run == run)
            ).scalar()
            return sorted(_waiting(connection, run, last or 0, after))

    def drop_frames(self, run: str, before_round: int, *, late_after: int | None = None) -> int:
        """Release the frames of all closed rounds below `before_round`; summaries stay. Returns how many.

        Those of rounds above `late_after` stay that came late and no round up to `before_round` was made of.
        """
        table = schema.updates
        closed = sa.select(schema.rounds.c.round).where(
            schema.rounds.c.run == run,
            schema.rounds.c.state == "closed",
            schema.rounds.c.round < before_round,
        )
        where = (table.c.run == run) & table.c.round.in_(closed) & table.c.frame_sha256.is_not(None)
        with self._writing() as connection:
            kept = set() if late_after is None else _waiting(connection, run, before_round, late_after)
            found = connection.execute(sa.select(table).where(where)).all()
            gone = [row for row in found if (row.round, row.agent) not in kept]
            for row in gone:
                _let_go(connection, run, row.round, row.agent)
        self._discard([row.frame_sha256 for row in gone])
        return len(gone)

    # Refusals, artifacts, events

    def add_refusal(self, run: str, round: int, agent: str, reason: str, when: datetime) -> int:
        """Keep a refusal and return its id."""
        values = {"run": run, "round": round, "agent": agent, "reason": reason, "at": when.timestamp()}
        with self._writing() as connection:
            return _insert(connection, schema.refusals, **values)

    def refusals(
        self, run: str | None = None, *, after_id: int = 0, limit: int | None = None
    ) -> list[RefusalRecord]:
        """Return the refusals of one run, or of all, oldest first."""
        table = schema.refusals
        query = sa.select(table).where(table.c.id > after_id).order_by(table.c.id).limit(limit)
        if run is not None:
            query = query.where(table.c.run == run)
        return [
            RefusalRecord(row.id, row.run, row.round, row.agent, row.reason, _when(row.at))
            for row in self._all(query)
        ]

    def add_artifact(self, manifest: Manifest) -> bool:
        """Keep what an agent said about an artifact; False if it is there already."""
        key: dict[str, str | int] = {
            "run": manifest.run,
            "round": manifest.round,
            "agent": manifest.agent,
            "sha256": manifest.sha256,
        }
        with self._writing() as connection:
            if _one(connection, schema.artifacts, **key) is not None:
                return False
            _insert(connection, schema.artifacts, manifest_json=_model_json(manifest), **key)
            return True

    def artifacts(
        self, run: str | None = None, *, agent: str | None = None, after: int = 0, limit: int | None = None
    ) -> list[Manifest]:
        """Return manifests, of one run or agent or of all, newest first; `after` of them are left out."""
        table = schema.artifacts
        query = sa.select(table.c.manifest_json).order_by(table.c.id.desc()).limit(limit).offset(after)
        if run is not None:
            query = query.where(table.c.run == run)
        if agent is not None:
            query = query.where(table.c.agent == agent)
        return [_model(Manifest, row.manifest_json) for row in self._all(query)]

    def add_event(
        self,
        kind: str,
        run: str | None = None,
        round: int | None = None,
        agent: str | None = None,
        text: str = "",
        data: Json | None = None,
    ) -> int:
        """Keep an event and return its id, which is larger than any before."""
        return self.add_events([NewEvent(kind, text, run, round, agent, data or {})])[0]

    def add_events(self, events: Sequence[NewEvent]) -> list[int]:
        """Keep several events in one transaction; returns their ids in order."""
        with self._writing() as connection:
            return [
                _insert(
                    connection,
                    schema.events,
                    kind=event.kind,
                    run=event.run,
                    round=event.round,
                    agent=event.agent,
                    text=event.text,
                    data_json=dumps(event.data),
                    at=self._clock() if event.when is None else event.when.timestamp(),
                )
                for event in events
            ]

    def events(self, after_id: int = 0, limit: int = 200) -> list[EventRecord]:
        """Return up to `limit` events after an id, oldest first."""
        table = schema.events
        query = sa.select(table).where(table.c.id > after_id).order_by(table.c.id).limit(limit)
        return [_event(row) for row in self._all(query)]

    def latest_events(self, limit: int = 20, run: str | None = None) -> list[EventRecord]:
        """Return the last events, of one run or of all, newest first."""
        table = schema.events
        query = sa.select(table).order_by(table.c.id.desc()).limit(limit)
        if run is not None:
            query = query.where(table.c.run == run)
        return [_event(row) for row in self._all(query)]

    # The folder

    def sweep(self) -> int:
        """Remove every blob that no row names, and leftovers of writing; returns how many blobs went."""
        with self._writing() as connection:
            lock_blobs(connection, take_away=True)
            named = sa.union(
                sa.select(schema.states.c.sha256),
                sa.select(schema.arrivals.c.digest),
                sa.select(schema.updates.c.frame_sha256).where(schema.updates.c.frame_sha256.is_not(None)),
            )
            return self._blobs.sweep(set(connection.execute(named).scalars()))

    def check(self) -> None:
        """Return when the database answers; raises `StoreError` when it does not."""
        with self._reading() as connection:
            connection.execute(sa.select(1))

    def _discard(self, digests: Collection[str]) -> None:
        """Remove blobs whose rows are gone, unless another row still names them."""
        if not digests:
            return
        with self._writing() as connection:
            lock_blobs(connection, take_away=True)
            self._blobs.discard([digest for digest in set(digests) if not _is_named(connection, digest)])

    def _all(self, query: sa.Select[tuple[object, ...]]) -> Sequence[Row[tuple[object, ...]]]:
        with self._reading() as connection:
            return connection.execute(query).all()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with (
            _as_store_errors(),
            patiently(self._engine).execution_options(**self._reads) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def _beside(self) -> Iterator[Connection]:
        """Write rows of one's own, which no other verb reads before it writes: several at one time."""
        if self._engine.dialect.name != "postgresql":
            with self._writing() as connection:
                yield connection
            return
        with _as_store_errors(), patiently(self._engine) as connection, connection.begin():
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with (
            self._writer,
            _as_store_errors(),
            patiently(self._engine).execution_options(writes=True) as connection,
            connection.begin(),
        ):
            yield connection


def _blobs(folder: Path, place: StoreSettings, *, make: bool = True) -> BlobStore:
    if place.s3.bucket is not None:
        return S3Blobs(place.s3)
    return Blobs(folder / "blobs", make=make)


@contextmanager
def _as_store_errors() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise StoreError(f"the store failed: {error}") from error


def _close(connection: Connection, run: str, round: int, metrics: str, agents: str, now: float) -> None:
    rounds = schema.rounds
    connection.execute(
        sa.update(rounds)
        .where(rounds.c.run == run, rounds.c.round == round)
        .values(state="closed", closed=now, metrics_json=metrics, agents_json=agents)
    )


def _let_go_of_others(connection: Connection, run: str, round: int, agents: Collection[str]) -> list[str]:
    """Forget the frames of a round's updates that are not of `agents`, and return their digests."""
    table = schema.updates
    where = (
        (table.c.run == run)
        & (table.c.round == round)
        & table.c.agent.not_in(list(agents))
        & table.c.frame_sha256.is_not(None)
    )
    frames = list(connection.execute(sa.select(table.c.frame_sha256).where(where)).scalars())
    connection.execute(sa.update(table).where(where).values(frame_sha256=None))
    return frames


def _let_go(connection: Connection, run: str, round: int, agent: str) -> list[str]:
    """Forget the frame of one update, and return its digest."""
    table = schema.updates
    where = (table.c.run == run) & (table.c.round == round) & (table.c.agent == agent)
    row = connection.execute(sa.select(table.c.frame_sha256).where(where)).first()
    connection.execute(sa.update(table).where(where).values(frame_sha256=None))
    return [] if row is None or row.frame_sha256 is None else [row.frame_sha256]


def _waiting(connection: Connection, run: str, before: int, after: int = 0) -> set[tuple[int, str]]:
    """Return updates of closed rounds above `after` that no closed round up to `before` was made of."""
    rounds, updates = schema.rounds, schema.updates
    closed = [
        _round(row)
        for row in connection.execute(
            sa.select(rounds).where(rounds.c.run == run, rounds.c.state == "closed", rounds.c.round > after)
        )
    ]
    own = {record.round: record.absorbed for record in closed if record.absorbed is not None}
    merged = {one for record in closed if record.round <= before for one in record.late}
    where = (updates.c.run == run) & updates.c.round.in_(own) & updates.c.frame_sha256.is_not(None)
    found = connection.execute(sa.select(updates.c.round, updates.c.agent).where(where))
    return {(r, a) for r, a in found if a not in (own[r] or ()) and (r, a) not in merged}


def _keep_state(connection: Connection, run: str, round: int, digest: str) -> list[str]:
    """Write a state, forget older ones, and return the digests that were let go."""
    states = schema.states
    connection.execute(sa.insert(states).values(run=run, round=round, sha256=digest))
    mine = (
        sa.select(states.c.round, states.c.sha256).where(states.c.run == run).order_by(states.c.round.desc())
    )
    old = connection.execute(mine.offset(STATES_KEPT)).all()
    for row in old:
        connection.execute(sa.delete(states).where(states.c.run == run, states.c.round == row.round))
    return [row.sha256 for row in old]


def _is_named(connection: Connection, digest: str) -> bool:
    places = (schema.states.c.sha256, schema.updates.c.frame_sha256, schema.arrivals.c.digest)
    return any(
        connection.execute(sa.select(place).where(place == digest).limit(1)).first() is not None
        for place in places
    )


def _one(connection: Connection, table: sa.Table, **key: str | int) -> Row[tuple[object, ...]] | None:
    return connection.execute(sa.select(table).filter_by(**key)).first()


def _insert(connection: Connection, table: sa.Table, **values: object) -> int:
    """Insert a row into a table that counts its rows, and return the id it was given."""
    key = connection.execute(sa.insert(table).values(**values)).inserted_primary_key
    if key is None:
        raise StoreError(f"the database gave no id for a row of {table.name}")
    return int(key[0])


def _same(name: str, kept: object, given: object) -> bool:
    if name.endswith("_json"):
        return loads(str(kept)) == loads(str(given))  # the order of keys says nothing
    return kept == given


def _no_run(run: str) -> StoreError:
    return StoreError(f"there is no run {run!r} in this store")


def _when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _model_json(model: BaseModel) -> str:
    return dumps(model.model_dump(mode="json"))


def _model(kind: type[M], text: str) -> M:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise StoreError(f"a row holds no {kind.__name__}: {error}") from error


def _run(row: Row[tuple[object, ...]]) -> RunRecord:
    values = dict(row._mapping)
    values["created"], values["changed"] = _when(row.created), _when(row.changed)
    return RunRecord(**values)


def _round(row: Row[tuple[object, ...]]) -> RoundRecord:
    asked = loads(row.agents_json)
    return RoundRecord(
        run=row.run,
        round=row.round,
        state=row.state,
        agents=tuple(asked["agents"]),
        eased=asked.get("eased", {}),  # a round of an earlier version has neither
        skipped=asked.get("skipped", {}),
        absorbed=None if "absorbed" not in asked else tuple(asked["absorbed"]),
        late=tuple((int(number), str(agent)) for number, agent in asked.get("late", [])),
        deadline=row.deadline,
        opened=_when(row.opened),
        closed=None if row.closed is None else _when(row.closed),
        metrics=loads(row.metrics_json),
    )


def _update(row: Row[tuple[object, ...]]) -> UpdateRecord:
    return UpdateRecord(
        run=row.run,
        round=row.round,
        agent=row.agent,
        received=_when(row.received),
        summary=loads(row.summary_json),
        frame_sha256=row.frame_sha256,
        frame_bytes=row.frame_bytes,
    )


def _event(row: Row[tuple[object, ...]]) -> EventRecord:
    return EventRecord(
        id=row.id,
        kind=row.kind,
        when=_when(row.at),
        text=row.text,
        run=row.run,
        round=row.round,
        agent=row.agent,
        data=loads(row.data_json),
    )
