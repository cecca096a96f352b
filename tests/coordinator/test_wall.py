"""The collector of plugs beside a store and a broker in memory: what is heard, kept, told and joined."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from coordinator.ledger.entries import read
from coordinator.live import Live
from coordinator.settings import CoordinatorSettings, WallSettings
from coordinator.store.records import PlugReading
from coordinator.store.sql import Store
from coordinator.wall import collector
from coordinator.wall.collector import MOST_HELD, Wall, _timing
from coordinator.wall.join import WallRecord
from foundation.energy import Kind
from foundation.errors import StoreError, TransportError
from foundation.messages import ClockAnswer
from foundation.timing import ClockOffset, Span, Stage, Timing
from foundation.topics import Topics
from foundation.transport import Letter, MemoryBroker, MemoryTransport
from tests.coordinator.ledgers import measured, open_run, put

pytestmark = pytest.mark.anyio

TOPICS = Topics("test")
NAME = "shelly:plug-n"
TOPIC = "plug-n/status/switch:0"


class Clock:
    """UTC that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1.8e9

    def __call__(self) -> float:
        return self.now_s


class World:
    """A coordinator's store, its wall, and a plug in the test's hand; the device `n` is behind it."""

    def __init__(self, folder: Path, store: Store, live: Live, clock: Clock) -> None:
        self.broker, self.store, self.live, self.clock = MemoryBroker(), store, live, clock
        self.plug = MemoryTransport(self.broker)
        self.settings = CoordinatorSettings(
            federation="test", folder=folder, wall=WallSettings(plugs={"n": NAME})
        )
        self.wall = self.new_wall()
        self.joules = 1e6

    def new_wall(self) -> Wall:
        transport = MemoryTransport(self.broker)
        self.transport = transport
        return Wall(
            self.settings,
            transport=transport,
            store=self.store,
            live=self.live,
            clock=self.clock,
            tick_s=0.002,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.transport:
            task = asyncio.create_task(self.wall.run())
            await self.until(lambda: bool(self.broker._of.get(self.transport)) or task.done())
            await self.until(lambda: len(self.broker._of.get(self.transport, [])) >= 2 or task.done())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.result()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.002)

    async def speak(self, watts: float, seconds: float = 1.0, **more: Any) -> None:
        """Let time pass at a power, and the plug say so at its end."""
        self.clock.now_s += seconds
        self.joules += watts * seconds
        said = {"apower": watts, "aenergy": {"total": self.joules / 3600}} | more
        before = self.wall._behind["n"].plug.last
        await self.plug.publish(TOPIC, json.dumps(said).encode())
        await self.until(lambda: self.wall._behind["n"].plug.last is not before)

    def readings(self) -> list[PlugReading]:
        row = self.store.plug("n", NAME, 0.0)
        return self.store.plug_readings(row.id, 0.0, 4e9, 10**6)

    def all_is_kept(self) -> bool:
        readings = self.readings()
        return bool(readings) and readings[-1].at == self.clock.now_s

    def events(self, kind: str) -> list[str]:
        return [event.text for event in self.store.events(limit=1000) if event.kind == kind]

    def update(self, number: int, start_s: float, end_s: float) -> None:
        """Keep an update whose time on its device, which is 7 s behind, was this."""
        span = Span(stage=Stage.TRAIN, start_s=start_s - 7, end_s=end_s - 7)
        clock = ClockOffset(offset_s=7.0, uncertainty_s=0.01, pairs=8)
        timing = Timing(spans=(span,), clock=clock).model_dump(mode="json")
        put(self.store, number, "n", {"train": measured(100.0, end_s - start_s)}, timing=timing)

    def records(self) -> list[WallRecord]:
        return list(read(self.store, "r").wall)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(collector, "END_S", 0.05)
    clock = Clock()
    with Store.open(tmp_path, clock=clock) as store:
        open_run(store)
        async with Live(store) as live:
            made = World(tmp_path, store, live, clock)
            async with made.plug:
                yield made


async def test_what_a_plug_says_is_kept_and_joined_when_it_has_spoken_after_the_round(world: World) -> None:
    async with world.running():
        for _ in range(10):
            await world.speak(5.0)
        start_s = world.clock.now_s
        for _ in range(90):
            await world.speak(6.0)
        world.update(1, start_s, world.clock.now_s)
        end_s = world.clock.now_s
        await world.speak(5.0, 0.5)
        await world.until(world.all_is_kept)
        assert world.records() == []  # a plug may be late by a second
        await world.speak(5.0)
        await world.until(lambda: len(world.records()) == 1)
        (record,) = world.records()
        assert record.start_s == pytest.approx(start_s)
        assert record.reading.joules == pytest.approx(540.0, rel=0.01)
        assert record.reading.kind is Kind.MEASURED
        (phase,) = record.phases
        assert (phase.stage, phase.reading.seconds) == (Stage.TRAIN, pytest.approx(end_s - start_s))


async def test_a_restart_goes_on_where_the_store_is(world: World) -> None:
    async with world.running():
        for _ in range(10):
            await world.speak(5.0)
        world.update(1, world.clock.now_s - 8, world.clock.now_s - 4)
        await world.until(lambda: len(world.records()) == 1)
    before = world.readings()
    world.wall = world.new_wall()
    async with world.running():
        for _ in range(10):
            await world.speak(5.0)
        world.update(2, world.clock.now_s - 16, world.clock.now_s - 4)  # across the restart
        await world.until(lambda: len(world.records()) == 2)
    assert world.readings()[: len(before)] == before
    assert world.records()[1].reading.joules == pytest.approx(60.0, rel=0.01)


async def test_at_the_programs_end_the_last_round_is_joined_as_far_as_it_was_heard(world: World) -> None:
    async with world.running():
        for _ in range(30):
            await world.speak(5.0)
        world.update(1, world.clock.now_s - 20, world.clock.now_s)
        world.update(2, world.clock.now_s, world.clock.now_s + 30)  # nothing was heard of it
    one, two = world.records()
    assert one.reading.joules == pytest.approx(100.0, rel=0.01)
    assert (two.reading.joules, two.reading.kind) == (None, Kind.NONE)
    assert "silent" in str(two.why)


async def test_silence_is_said_once_and_so_is_its_end(world: World) -> None:
    async with world.running():
        await world.speak(5.0)
        start_s = world.clock.now_s
        world.clock.now_s += 91
        await world.until(lambda: len(world.events("plug_silent")) == 1)
        world.update(1, start_s, start_s + 60)
        world.clock.now_s += 91
        await world.until(lambda: len(world.records()) == 1)  # it is not waited for any longer
        await world.speak(5.0)
        await world.until(lambda: len(world.events("plug_back")) == 1)
    assert len(world.events("plug_silent")) == 1
    assert NAME in world.events("plug_silent")[0]


async def test_a_total_that_goes_backwards_is_said_and_watts_are_taken(world: World) -> None:
    async with world.running():
        for _ in range(10):
            await world.speak(5.0)
        world.joules = 0.0
        for _ in range(10):
            await world.speak(5.0)
        world.update(1, world.clock.now_s - 18, world.clock.now_s - 3)
        await world.until(lambda: len(world.records()) == 1)
    (record,) = world.records()
    assert (record.how, record.reading.flags) == ("watts", ("total_fell",))
    assert record.reading.joules == pytest.approx(75.0, rel=0.01)
    assert len(world.events("plug_reset")) == 1


async def test_a_plugs_own_clock_counts_for_nothing(tmp_path: Path, world: World) -> None:
    """It lives in 1970, and in another time zone: by its stamps the round would have no readings."""
    plugs = {"n": "mqtt:tasmota/plug3"}
    world.settings = world.settings.model_copy(update={"wall": WallSettings(plugs=plugs)})
    world.wall = world.new_wall()
    async with world.running():
        for number in range(30):
            world.clock.now_s += 1
            said = {"Time": f"1970-01-01T00:00:{number:02}", "ENERGY": {"Power": 5.0}}
            before = world.wall._behind["n"].plug.last
            await world.plug.publish("tele/plug3/SENSOR", json.dumps(said).encode())
            await world.until(lambda before=before: world.wall._behind["n"].plug.last is not before)  # type: ignore[misc]
        world.update(1, world.clock.now_s - 20, world.clock.now_s - 5)
        await world.until(lambda: len(world.records()) == 1)
    (record,) = world.records()
    assert record.reading.joules == pytest.approx(75.0)
    assert world.wall._behind["n"].plug.own_clock == "1970-01-01T00:00:29"


async def test_an_agent_without_times_is_said_and_not_waited_for(world: World) -> None:
    async with world.running():
        await world.speak(5.0)
        await world.until(lambda: bool(world.readings()))
        put(world.store, 1, "n", {"train": measured(100.0)})
        put(world.store, 2, "n", {"train": measured(100.0)}, timing={"spans": "yes"})
        put(world.store, 3, "a", {"train": measured(100.0)})  # behind no plug
        await world.until(lambda: len(world.records()) == 2)
    assert all("told no times" in str(record.why) for record in world.records())


async def test_readings_are_bounded_by_age_number_and_rate(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = world.store.plug("n", NAME, world.clock.now_s)
    old = [PlugReading(world.clock.now_s - 8 * 86_400 + i, 5.0, None) for i in range(5)]
    new = [PlugReading(world.clock.now_s - 100 + i, 5.0, None) for i in range(50)]
    world.store.add_plug_readings(row.id, old + new)
    monkeypatch.setattr(collector, "MOST_KEPT", 20)
    async with world.running():
        await world.until(lambda: len(world.readings()) == 20)
        assert world.readings()[-1] == new[-1]
        for _ in range(50):
            await world.speak(5.0, 0.001)  # a thousand a second
        await world.until(world.all_is_kept)
        assert len(world.readings()) <= 22


async def test_a_store_that_fails_costs_the_oldest_readings_and_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = world.wall._behind["n"]
    for number in range(MOST_HELD + 10):
        one.add(PlugReading(float(number), 5.0, None))
    assert (len(one.held), one.held[0].at, one.lost) == (MOST_HELD, 10.0, 10)

    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "add_plug_readings", fail)
        assert not await world.wall.tick()
        assert len(one.held) == MOST_HELD
    assert await world.wall.tick()
    assert not one.held


async def test_the_time_is_told_to_agents_behind_a_plug_alone(world: World) -> None:
    async with world.running(), MemoryTransport(world.broker) as agent:
        letters = await agent.subscribe(TOPICS.every("time"))
        for name, body in (
            ("a", b'{"id": 1}'),  # behind no plug
            ("n", b"what time is it?"),
            ("n", b'{"id": -1}'),
            ("n", b'{"id": 5, "more": 1}'),
            ("n", b'{"id": 7}'),
        ):
            await agent.publish(TOPICS.of(name, "clock"), body)
        async with asyncio.timeout(10):
            letter = await anext(letters)
    assert letter.topic == TOPICS.of("n", "time")
    answer = ClockAnswer.model_validate_json(letter.body)
    assert (answer.id, answer.received_s) == (7, world.clock.now_s)


async def test_a_retained_question_is_not_answered(world: World) -> None:
    await world.plug.publish(TOPICS.of("n", "clock"), b'{"id": 3}', retain=True)
    async with world.running(), MemoryTransport(world.broker) as agent:
        letters = await agent.subscribe(TOPICS.of("n", "time"))
        await agent.publish(TOPICS.of("n", "clock"), b'{"id": 4}')
        async with asyncio.timeout(10):
            assert ClockAnswer.model_validate_json((await anext(letters)).body).id == 4


async def test_a_plug_that_may_not_be_heard_is_said_and_the_rounds_go_on(world: World) -> None:
    class Closed(MemoryTransport):
        async def subscribe(self, *patterns: str) -> AsyncIterator[Letter]:
            if TOPIC in patterns:
                raise TransportError(
                    "refused the subscription to plug-n: its ACL must let coordinator read it"
                )
            return await super().subscribe(*patterns)

    transport = Closed(world.broker)
    wall = Wall(world.settings, transport=transport, store=world.store, live=world.live, tick_s=0.002)
    async with transport:
        task = asyncio.create_task(wall.run())
        await world.until(lambda: len(world.events("plug_unheard")) == 1)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
    assert "ACL" in world.events("plug_unheard")[0]


async def test_without_plugs_it_is_not_there(world: World) -> None:
    world.settings = world.settings.model_copy(update={"wall": WallSettings()})
    await world.new_wall().run()
    assert world.broker.published == 0


@pytest.mark.parametrize(
    ("plugs", "says"),
    [
        ({"pi": "sonoff:x"}, "pi: 'sonoff:x' is no smart plug: write mqtt:tasmota/PLUG"),
        ({"a": "mqtt:tasmota/p", "b": "mqtt:tasmota/p#0"}, "a and b are on one plug"),
    ],
)
def test_plugs_that_cannot_be_are_refused_with_what_to_write(plugs: dict[str, str], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        WallSettings(plugs=plugs)
    WallSettings(plugs={"a": "mqtt:tasmota/p", "b": "mqtt:tasmota/p#1"})


@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["timing", "spans", "clock", "stage", "start_s", "end_s", "offset_s"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
    | st.text()
)
def test_no_summary_is_believed_or_raises(summary: Any) -> None:
    assert _timing(json.dumps(summary)) is None
    assert _timing(str(summary)) is None
