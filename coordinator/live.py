"""What is going on now, and the bus that tells everybody who listens.

All methods belong to the event loop's thread; none of them waits. Events are first written to the store, in
order and off the loop, and only then handed to listeners, so an id that was seen can always be resumed from.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, Self, TypeAlias

from pydantic import Field

from coordinator.store.records import AgentRecord, EventRecord, NewEvent, finite, loads
from coordinator.store.sql import Store
from foundation.energy import Kind, Stage
from foundation.errors import StoreError
from foundation.frozen import Frozen
from foundation.messages import AgentCard, Json, Telemetry

logger = logging.getLogger(__name__)

Phase: TypeAlias = Literal[
    "waiting for agents",
    "planning",
    "sending",
    "collecting",
    "absorbing",
    "paused",
    "idle",
    "finished",
    "failed",
    "stopped",
]
AT_REST: frozenset[Phase] = frozenset({"paused", "idle", "finished", "failed", "stopped"})

LISTENER_EVENTS = 256
"""Events that wait for one listener before it is dropped."""
PENDING_EVENTS = 10_000
"""Events that wait for the store before further ones are refused, with an error in the log."""
BATCH = 100
"""Events written in one transaction."""


class Event(Frozen):
    """Something that happened."""

    id: int | None = None
    """Position in the store; `None` when the store could not keep it."""
    kind: str
    at: datetime
    text: str
    run: str | None = None
    round: int | None = None
    agent: str | None = None
    data: Json = Field(default_factory=dict)

    @classmethod
    def of(cls, record: EventRecord) -> Event:
        """Return the event of a row."""
        return cls(
            id=record.id,
            kind=record.kind,
            at=record.when,
            text=record.text,
            run=record.run,
            round=record.round,
            agent=record.agent,
            data=record.data,
        )


class AgentStatus(Frozen):
    """One agent, as last heard."""

    agent: str
    online: bool = False
    profile: str | None = None
    version: str | None = None
    examples: int | None = None
    stage: Stage | None = None
    """What it is doing; `None` while offline or before it said so."""
    run: str | None = None
    round: int | None = None
    progress: float | None = None
    """Of its present work, 0 to 1."""
    eta_s: float | None = None
    accuracy: float | None = None
    """Share of right answers on its own held-out part, 0 to 1."""
    kept_units: tuple[int, ...] = ()
    """FFL units kept in every block."""
    hidden_units: int | None = None
    """FFL units of one dense block."""
    joules: float | None = None
    """Since its program started."""
    watts: float | None = None
    """At present; `None` while offline."""
    energy_kind: Kind = Kind.NONE
    energy_source: str = "none"
    sent_bytes: int | None = None
    received_bytes: int | None = None
    rss_bytes: int | None = None
    last_seen: datetime | None = None
    problem: str | None = None
    unavailable: str | None = None
    """Why it takes no work at present: a limit of its owner's."""
    skipped: str | None = None
    """Why the present round does without it."""
    eased: str | None = None
    """With what it is asked for less in the present round, and why."""
    quarantined: str | None = None
    """Why its last update that was not merged was not, since this coordinator started."""
    epsilon: float | None = None
    """Privacy that its updates have spent, as it says itself, at `delta`; `None` where it adds no noise."""
    delta: float | None = None
    serving: str | None = None
    model_run: str | None = None
    model_round: int | None = None
    """Which run and round made the personal model that answers there; `None` for none, and for not told."""
    temperature_c: float | None = None
    """Of its hottest thermal zone at the end of its last round, since this coordinator started."""


class Status(Frozen):
    """The whole picture at one moment."""

    run: str | None = None
    round: int = 0
    rounds: int = 0
    phase: Phase = "idle"
    detail: Json = Field(default_factory=dict)
    since: datetime
    """When this phase began."""
    progress: float | None = None
    """Of the run, 0 to 1: closed rounds, and of the open one the updates that are in."""
    eta_s: float | None = None
    """Mean seconds of the rounds closed so far, times the rounds left; `None` while nobody can know."""
    online: int = 0
    version: int = 0
    """Grows with every change; ask for what changed since."""
    agents: tuple[AgentStatus, ...] = ()


@dataclass(slots=True)
class _Seat:
    """What is known of one agent, and the version at which that last changed."""

    status: AgentStatus
    version: int


@dataclass(slots=True)
class _Turn:
    """Where the run stands."""

    run: str | None = None
    round: int = 0
    rounds: int = 0
    phase: Phase = "idle"
    detail: Json = field(default_factory=dict)
    since: float = 0.0
    closed: int = 0
    seconds: list[float] = field(default_factory=list)
    began: float = 0.0
    """When the present round was first heard of, on the monotonic clock."""


class Live:
    """State of the coordinator in memory, and its event bus.

    `clock` gives UTC seconds since the epoch and `monotonic` seconds of a clock that never jumps. Without a
    store, events are numbered here and not kept. Use it as an async context manager: entering loads the
    agents that the store knows and starts the writer, leaving writes what is pending and ends all listeners.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._clock = clock
        self._monotonic = monotonic
        self._seats: dict[str, _Seat] = {}
        self._turn = _Turn(since=clock())
        self._version = 0
        self._listeners: list[Listener] = []
        self._pending: asyncio.Queue[NewEvent | None] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None
        self._refused = 0
        self._numbered = 0

    async def __aenter__(self) -> Self:
        if self._store is not None:
            self.restore(await asyncio.to_thread(self._store.agents))
        self._writer = asyncio.create_task(self._write(), name="live events")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._pending.put_nowait(None)
            await self._writer
            self._writer = None
        for listener in list(self._listeners):
            listener.end()

    # What agents say

    def restore(self, agents: Iterable[AgentRecord]) -> None:
        """Put the agents of an earlier life on the list, offline until they say otherwise."""
        for record in agents:
            self.card(record.card, seen=record.last_seen)

    def card(self, card: AgentCard, *, seen: datetime | None = None) -> None:
        """An agent has introduced itself; `seen` is now unless it is from the store."""
        answers = None if card.models is None else card.models.linked("serving")
        self._change(
            card.agent,
            profile=card.profile,
            version=card.version,
            examples=card.examples,
            energy_source=card.energy_source,
            energy_kind=_kind(card.energy_kind),
            serving=card.serving,
            model_run=answers and answers.run,
            model_round=answers and answers.round,
            problem=card.problem,
            unavailable=None if card.unavailable is None else str(card.unavailable),
            last_seen=seen or self._now(),
        )

    def presence(self, agent: str, online: bool) -> None:
        """An agent is there, or its last will says that it is not; progress of a lost one is forgotten."""
        if online:
            self._change(agent, online=True, last_seen=self._now())
        else:
            self._change(agent, online=False, stage=None, progress=None, eta_s=None, watts=None)

    def telemetry(self, told: Telemetry) -> None:
        """Take the latest figures of an agent; a figure it does not tell keeps its last value."""
        before = self._seat(told.agent).status
        kept = bool(told.kept_units)
        self._change(
            told.agent,
            stage=told.stage,
            run=told.run,
            round=told.round,
            progress=told.progress,
            eta_s=told.eta_s,
            accuracy=before.accuracy if told.accuracy is None else told.accuracy,
            kept_units=told.kept_units if kept else before.kept_units,
            hidden_units=told.hidden_units or before.hidden_units,
            # Joules and how they are known belong together: never one of now with one of before.
            joules=told.joules,
            watts=told.watts,
            energy_kind=before.energy_kind if told.joules is None else _kind(told.energy_kind),
            sent_bytes=told.sent_bytes,
            received_bytes=told.received_bytes,
            rss_bytes=told.rss_bytes,
            last_seen=self._now(),
        )

    # What the engine says

    def phase(self, run: str, round: int, rounds: int, phase: Phase, detail: Json | None = None) -> None:
        """The engine has come to `phase` of `round`, of `rounds`.

        `detail` is shown as it is; where it has the numbers `updates` and `expected`, they make progress
        finer than whole rounds.
        """
        turn = self._turn
        if run != turn.run:
            turn = self._turn = _Turn(run=run, began=self._monotonic())
        if round != turn.round:
            turn.began = self._monotonic()
        if phase != turn.phase or round != turn.round:
            turn.since = self._clock()
        turn.round, turn.rounds, turn.phase = round, rounds, phase
        told = finite(detail or {})
        turn.detail = told if isinstance(told, dict) else {}
        self._version += 1

    def asked(self, agent: str, *, skipped: str | None = None, eased: str | None = None) -> None:
        """The present round asks an agent: not at all, for less, or in full."""
        self._change(agent, skipped=skipped, eased=eased)

    def privacy(self, agent: str, epsilon: float | None, delta: float | None) -> None:
        """An agent has told what its updates have spent of its privacy, or that it adds no noise."""
        self._change(agent, epsilon=epsilon, delta=delta)

    def temperature(self, agent: str, celsius: float | None) -> None:
        """How hot a device was when its round ended, as it told with its update, or that it did not tell."""
        self._change(agent, temperature_c=celsius)

    def quarantined(self, agent: str, reason: str) -> None:
        """An update of an agent was not merged, but kept apart."""
        self._change(agent, quarantined=reason)

    def round_closed(self, run: str, round: int, seconds: float | None) -> None:
        """A round of `run` is closed and took `seconds`; the estimate of the time left rests on these.

        After a restart, tell the rounds that the store has closed before calling `phase`.
        """
        if run != self._turn.run:
            self._turn = _Turn(run=run, since=self._clock(), began=self._monotonic())
        self._turn.closed = max(self._turn.closed, round)
        if seconds is not None:
            self._turn.seconds.append(seconds)
        self._version += 1

    def emit(
        self,
        kind: str,
        text: str,
        run: str | None = None,
        round: int | None = None,
        agent: str | None = None,
        **data: object,
    ) -> None:
        """Tell log, store and then everybody who listens that something happened; returns at once."""
        facts = {"run": run, "round": round}
        logger.info(text, extra={name: value for name, value in facts.items() if value is not None})
        if self._pending.qsize() >= PENDING_EVENTS:
            self._refused += 1
            logger.error("event lost, the store is %d events behind: %s", PENDING_EVENTS, text)
            return
        # One value that JSON has no word for must not cost the whole batch its place in the store.
        told = loads(json.dumps(finite(data), default=str))
        event = NewEvent(kind, text, run, round, agent, told, self._now())
        self._pending.put_nowait(event)

    # What others ask

    @property
    def version(self) -> int:
        """Grows with every change of the picture."""
        return self._version

    def agent(self, agent: str) -> AgentStatus | None:
        """Return one agent as last heard, or `None` if nobody of that name was ever heard of."""
        seat = self._seats.get(agent)
        return None if seat is None else seat.status

    def snapshot(self, since: int = -1) -> Status:
        """Return the picture; with `since`, only those agents that changed after that version."""
        turn = self._turn
        changed = sorted(name for name, seat in self._seats.items() if seat.version > since)
        return Status(
            run=turn.run,
            round=turn.round,
            rounds=turn.rounds,
            phase=turn.phase,
            detail=turn.detail,
            since=datetime.fromtimestamp(turn.since, UTC),
            progress=_progress(turn),
            eta_s=self._eta_s(),
            online=sum(seat.status.online for seat in self._seats.values()),
            version=self._version,
            agents=tuple(self._seats[name].status for name in changed),
        )

    def listen(self, after: int | None = None) -> Listener:
        """Register a listener and return it: `async for event in live.listen()`.

        It hears every event from this call on. With `after`, it first hears what the store has kept since
        that id, without a gap or a repetition in between. One that is too slow hears a last event of kind
        `dropped`, with the id to come back with in its data, and then the end.
        """
        listener = Listener(self, self._store, after)
        self._listeners.append(listener)
        return listener

    def forget(self, listener: Listener) -> None:
        """Stop telling a listener."""
        with suppress(ValueError):
            self._listeners.remove(listener)

    async def flush(self) -> None:
        """Wait until everything emitted so far is in the store and with the listeners."""
        await self._pending.join()

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    def _seat(self, agent: str) -> _Seat:
        return self._seats.setdefault(agent, _Seat(AgentStatus(agent=agent), self._version))

    def _change(self, agent: str, **values: object) -> None:
        self._version += 1
        seat = self._seat(agent)
        seat.status = seat.status.model_copy(update=values)
        seat.version = self._version

    def _eta_s(self) -> float | None:
        turn = self._turn
        if turn.phase in AT_REST or not turn.seconds:
            return None
        mean = sum(turn.seconds) / len(turn.seconds)
        left = max(0, turn.rounds - turn.closed)
        spent = self._monotonic() - turn.began if turn.round > turn.closed else 0.0
        return max(0.0, left * mean - min(spent, mean))

    async def _write(self) -> None:
        """Take events in order, keep them, pass them on; ends at the first `None`."""
        while True:
            batch = [await self._pending.get()]
            while len(batch) < BATCH and not self._pending.empty():
                batch.append(self._pending.get_nowait())
            ending = None in batch
            for event in await self._kept([event for event in batch if event is not None]):
                for listener in list(self._listeners):
                    listener.offer(event)
            for _ in batch:
                self._pending.task_done()
            if ending:
                return

    async def _kept(self, batch: list[NewEvent]) -> list[Event]:
        ids: list[int | None]
        try:
            ids = await self._numbers(batch)
        except StoreError:
            logger.exception("%d events could not be kept; listeners still hear them", len(batch))
            ids = [None] * len(batch)
        return [_heard(event, id) for event, id in zip(batch, ids, strict=True)]

    async def _numbers(self, batch: list[NewEvent]) -> list[int | None]:
        if self._store is None:
            self._numbered += len(batch)
            return list(range(self._numbered - len(batch) + 1, self._numbered + 1))
        return list(await asyncio.to_thread(self._store.add_events, batch)) if batch else []


class Listener:
    """One who listens; iterate once. `close` when done, also after leaving the loop early."""

    def __init__(self, live: Live, store: Store | None, after: int | None) -> None:
        self._live = live
        self._store = store
        self._last = after
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue(LISTENER_EVENTS + 1)  # one place for the end
        self._dropped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._live.forget(self)

    def offer(self, event: Event) -> None:
        """Hand over one event; a full queue ends the listening instead."""
        if self._queue.qsize() < LISTENER_EVENTS:
            self._queue.put_nowait(event)
        else:
            self._dropped = True
            self.end()

    def end(self) -> None:
        """Let the iteration end after what is queued."""
        self.close()
        if not self._queue.full():
            self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for event in self._kept():
            yield event
        while (queued := await self._queue.get()) is not None:
            if queued.id is not None:
                if self._last is not None and queued.id <= self._last:
                    continue
                self._last = queued.id
            yield queued
        if self._dropped:
            text = "too slow: events were left out; come back with the last id to hear them"
            yield Event(kind="dropped", at=datetime.now(UTC), text=text, data={"last": self._last})

    async def _kept(self) -> AsyncIterator[Event]:
        """Yield what the store has after the last id; the queue has whatever is written meanwhile."""
        store = self._store
        if store is None or self._last is None:
            return
        newest = await asyncio.to_thread(store.latest_events, 1)
        if not newest or self._last > newest[0].id:
            # An id from the future is of another store, before its folder was replaced: hear what is next.
            self._last = None
            return
        while page := await asyncio.to_thread(store.events, self._last):
            for record in page:
                self._last = record.id
                yield Event.of(record)


def _progress(turn: _Turn) -> float | None:
    if turn.run is None or turn.rounds < 1:
        return None
    part = 0.0
    got, expected = turn.detail.get("updates"), turn.detail.get("expected")
    if (
        turn.round > turn.closed
        and isinstance(got, int | float)
        and isinstance(expected, int | float)
        and expected
    ):
        part = min(1.0, max(0.0, got / expected))
    return min(1.0, (turn.closed + part) / turn.rounds)


def _heard(event: NewEvent, id: int | None) -> Event:
    return Event(
        id=id,
        kind=event.kind,
        at=event.when or datetime.now(UTC),
        text=event.text,
        run=event.run,
        round=event.round,
        agent=event.agent,
        data=event.data,
    )


def _kind(text: str) -> Kind:
    # An agent of another version may know a kind that we do not; what we cannot name we do not claim.
    try:
        return Kind(text)
    except ValueError:
        return Kind.NONE
