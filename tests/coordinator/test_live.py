"""The live picture and its bus: order, resuming, slow listeners, estimates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from coordinator import live as module
from coordinator.live import Event, Listener, Live
from coordinator.store.sql import Store
from foundation.energy import Kind, Stage
from foundation.messages import AgentCard, Telemetry

pytestmark = pytest.mark.anyio
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOON.timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as store:
        yield store


def a_live(clock: Clock, store: Store | None = None) -> Live:
    return Live(store, clock=clock, monotonic=clock)


async def heard(listener: Listener, count: int) -> list[Event]:
    events: list[Event] = []
    async for event in listener:
        events.append(event)
        if len(events) == count:
            break
    return events


CARD = AgentCard(
    agent="pi",
    version="0.1.0",
    profile="raspberry_pi_5",
    examples=120,
    energy_kind="modelled",
    energy_source="utilisation",
    serving="http://pi:8000",
)


async def test_the_picture_of_an_agent(clock: Clock) -> None:
    live = a_live(clock)
    live.card(CARD)
    live.presence("pi", online=True)
    live.telemetry(
        Telemetry(
            agent="pi",
            stage=Stage.TRAIN,
            run="r",
            round=1,
            progress=0.25,
            eta_s=12,
            accuracy=0.5,
            kept_units=(30, 40),
            hidden_units=64,
            joules=8.5,
            watts=4.5,
            energy_kind="measured",
            received_bytes=1000,
        )
    )
    here = live.agent("pi")
    assert here is not None
    assert (here.joules, here.watts, here.energy_kind) == (8.5, 4.5, Kind.MEASURED)
    clock.now += 5
    live.telemetry(Telemetry(agent="pi", stage=Stage.SEND, run="r", round=1, progress=0.9, sent_bytes=10))
    (agent,) = live.snapshot().agents
    assert (agent.stage, agent.progress, agent.eta_s) == (Stage.SEND, 0.9, None)
    assert (agent.accuracy, agent.kept_units, agent.hidden_units) == (0.5, (30, 40), 64)
    assert (agent.joules, agent.watts) == (None, None)  # not the figures of five seconds ago
    assert (agent.profile, agent.serving, agent.online) == ("raspberry_pi_5", "http://pi:8000", True)
    assert agent.last_seen is not None
    assert agent.last_seen.timestamp() == clock.now
    live.telemetry(Telemetry(agent="pi", stage=Stage.SEND, watts=2.0))
    live.presence("pi", online=False)
    gone = live.agent("pi")
    assert gone is not None
    assert (gone.online, gone.stage, gone.progress, gone.watts) == (False, None, None, None)
    assert live.agent("nobody") is None


async def test_a_kind_nobody_knows_claims_nothing(clock: Clock) -> None:
    live = a_live(clock)
    live.telemetry(Telemetry(agent="a", stage=Stage.TRAIN, joules=1.0, energy_kind="guessed"))
    (agent,) = live.snapshot().agents
    assert agent.energy_kind is Kind.NONE


async def test_snapshots_tell_only_what_changed(clock: Clock) -> None:
    live = a_live(clock)
    for name in ("b", "a"):
        live.card(CARD.model_copy(update={"agent": name}))
    before = live.snapshot()
    assert [agent.agent for agent in before.agents] == ["a", "b"]
    live.presence("b", online=True)
    after = live.snapshot(since=before.version)
    assert [agent.agent for agent in after.agents] == ["b"]
    assert after.online == 1
    assert live.snapshot(since=after.version).agents == ()


async def test_the_time_left_rests_on_closed_rounds(clock: Clock) -> None:
    live = a_live(clock)
    assert live.snapshot().progress is None
    live.phase("r", 1, 4, "collecting", {"updates": 1, "expected": 2, "loss": float("nan")})
    status = live.snapshot()
    assert (status.eta_s, status.progress) == (None, 0.125)
    assert status.detail == {"updates": 1, "expected": 2, "loss": None}
    live.round_closed("r", 1, 10.0)
    live.phase("r", 2, 4, "planning")
    assert live.snapshot().eta_s == 30.0
    clock.now += 4
    assert live.snapshot().eta_s == 26.0
    live.round_closed("r", 2, 20.0)
    assert live.snapshot().eta_s == 30.0
    assert live.snapshot().progress == 0.5
    live.phase("r", 3, 4, "failed", {"reason": "quorum missed"})
    assert live.snapshot().eta_s is None
    live.phase("next", 1, 4, "planning")
    assert live.snapshot().progress == 0.0
    assert live.snapshot().eta_s is None


async def test_events_are_kept_before_they_are_heard(clock: Clock, store: Store) -> None:
    async with a_live(clock, store) as live:
        with live.listen() as listener:
            for i in range(250):
                live.emit("update", f"update {i}", run="r", round=1, agent="pi", i=i, bad={1.5, float("inf")})
            events = await heard(listener, 250)
        kept = store.events(limit=1000)
    assert [event.text for event in events] == [f"update {i}" for i in range(250)]
    assert [event.id for event in events] == [record.id for record in kept]
    assert events[3].data["i"] == 3
    assert events[0].at == NOON
    assert kept[3].agent == "pi"


async def test_one_odd_value_does_not_cost_the_others_their_place(clock: Clock, store: Store) -> None:
    async with a_live(clock, store) as live:
        live.emit("note", "odd", what=object())
        live.emit("note", "even")
        await live.flush()
    assert [record.text for record in store.events()] == ["odd", "even"]


async def test_resuming_leaves_no_gap_and_repeats_nothing(clock: Clock, store: Store) -> None:
    async with a_live(clock, store) as live:
        for i in range(450):
            live.emit("note", str(i))
        await live.flush()
        first = store.events(limit=10)[-1].id
        listener = live.listen(after=first)
        for i in range(450, 460):
            live.emit("note", str(i))
        events = await heard(listener, 450)
        assert [event.text for event in events] == [str(i) for i in range(10, 460)]
        from_another_store = live.listen(after=10**9)
        live.emit("note", "next")
        assert [event.text for event in await heard(from_another_store, 1)] == ["next"]


async def test_a_slow_listener_is_told_and_dropped(clock: Clock, store: Store) -> None:
    async with a_live(clock, store) as live:
        slow, quick = live.listen(), live.listen()
        everything: list[Event] = []

        async def read() -> None:
            everything.extend(await heard(quick, 400))

        reading = asyncio.create_task(read())
        for i in range(4):
            for j in range(100):
                live.emit("note", f"{i} {j}")
            await live.flush()
        await reading
        told = [event async for event in slow]
    assert len(everything) == 400
    assert len(told) == module.LISTENER_EVENTS + 1
    assert told[-1].kind == "dropped"
    assert told[-1].data == {"last": told[-2].id}


async def test_closing_keeps_what_is_pending_and_ends_listeners(clock: Clock, store: Store) -> None:
    async with a_live(clock, store) as live:
        listener = live.listen()
        live.emit("note", "last words")
    assert [event.text async for event in listener] == ["last words"]
    assert [record.text for record in store.events()] == ["last words"]


async def test_listeners_hear_what_the_store_could_not_keep(
    clock: Clock, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_live(clock, store) as live:
        listener = live.listen()
        with store._engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE events")
        live.emit("note", "the disk is full")
        (event,) = await heard(listener, 1)
    assert (event.id, event.text) == (None, "the disk is full")
    assert "could not be kept" in caplog.text


async def test_agents_of_an_earlier_life_are_listed_as_offline(clock: Clock, store: Store) -> None:
    store.upsert_agent(CARD, NOON)
    async with a_live(clock, store) as live:
        (agent,) = live.snapshot().agents
    assert (agent.agent, agent.online, agent.last_seen) == ("pi", False, NOON)


async def test_without_a_store_events_are_numbered_and_heard(clock: Clock) -> None:
    async with a_live(clock) as live:
        listener = live.listen()
        live.emit("note", "a")
        live.emit("note", "b")
        assert [event.id for event in await heard(listener, 2)] == [1, 2]
