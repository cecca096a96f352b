"""The comparison with the coordinator's clock: the error bar holds however uneven the ways are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import clock as clock_module
from edge_agent.clock import DRIFT, PAIRS, ClockComparison, pair_of
from edge_agent.energy.timeline import Stretch
from foundation.energy import Stage
from foundation.errors import TransportError
from foundation.messages import ClockAnswer, ClockQuestion
from foundation.transport import Letter, MemoryBroker, MemoryTransport

pytestmark = pytest.mark.anyio

UTC = 1.8e9
ASK, TIME = "x/clock", "x/time"
LINE = (Stretch(100.0, 130.0, {Stage.WAIT: 30.0}), Stretch(130.0, 200.0, {Stage.TRAIN: 70.0}))


@given(there=st.floats(0, 5), back=st.floats(0, 5), thinking=st.floats(0, 5), ahead=st.floats(-1e9, 1e9))
def test_half_the_round_trip_holds_the_error(
    there: float, back: float, thinking: float, ahead: float
) -> None:
    asked = 1000.0
    received = asked + there + ahead
    answer = ClockAnswer(id=1, received_s=max(0.0, received), answered_s=max(0.0, received) + thinking)
    ahead = answer.received_s - asked - there  # where the clock's bound moved it
    pair = pair_of(asked, answer, asked + there + thinking + back)
    if pair is None:  # rounding made the trip shorter than nothing
        assert there + back < 1e-5
        return
    assert pair.half_trip_s == pytest.approx((there + back) / 2, abs=1e-5)
    assert abs(pair.ahead_s - ahead) <= pair.half_trip_s + 1e-5


@pytest.mark.parametrize(("received", "answered"), [(10.0, 9.0), (10.0, 20.0)])
def test_times_that_cannot_be_are_no_pair(received: float, answered: float) -> None:
    assert pair_of(1.0, ClockAnswer(id=1, received_s=received, answered_s=answered), 2.0) is None


class Coordinator:
    """Answers questions with a clock of its own, after delays."""

    def __init__(self, broker: MemoryBroker, steady: Callable[[], float]) -> None:
        self.transport, self._steady = MemoryTransport(broker), steady
        self.ahead_s = UTC
        self.asked = 0
        self.garbage: list[bytes] = []

    async def run(self, most: int = 10**6) -> None:
        async with self.transport:
            async for letter in await self.transport.subscribe(ASK):
                self.asked += 1
                if self.asked > most:
                    continue
                for body in self.garbage:
                    await self.transport.publish(TIME, body)
                question = ClockQuestion.model_validate_json(letter.body)
                now = self._steady() + self.ahead_s
                answer = ClockAnswer(id=question.id, received_s=now, answered_s=now)
                await self.transport.publish(TIME, answer.model_dump_json().encode())


class Steady:
    """A clock on which every look takes a millisecond."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s


async def compared(
    coordinator: Coordinator, comparison: ClockComparison, broker: MemoryBroker, done: Callable[[], bool]
) -> None:
    async with MemoryTransport(broker) as transport, asyncio.timeout(20):
        tasks = [asyncio.create_task(comparison.run(transport))]
        await asyncio.sleep(0)
        comparison.wake()
        while not done():
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.fixture
async def world() -> AsyncIterator[tuple[MemoryBroker, Steady, Coordinator]]:
    broker, steady = MemoryBroker(), Steady()
    coordinator = Coordinator(broker, steady)
    task = asyncio.create_task(coordinator.run())
    await asyncio.sleep(0)
    yield broker, steady, coordinator
    task.cancel()
    await asyncio.wait([task])


World = tuple[MemoryBroker, Steady, Coordinator]


async def test_spans_are_in_the_devices_time_and_the_offset_leads_to_the_coordinators(world: World) -> None:
    broker, steady, coordinator = world
    comparison = ClockComparison(ASK, TIME, utc=lambda: steady.now_s + UTC - 7.0, clock=steady)
    coordinator.garbage = [b"", b"{}", b'{"id": 1, "received_s": NaN, "answered_s": 0}']
    await compared(coordinator, comparison, broker, lambda: coordinator.asked >= PAIRS)
    timing = comparison.timing(LINE)
    assert timing is not None
    assert timing.clock.offset_s == pytest.approx(7.0, abs=timing.clock.uncertainty_s)
    assert timing.clock.uncertainty_s < 0.1
    assert [(span.stage, round(span.seconds, 3)) for span in timing.spans] == [
        (Stage.WAIT, 30.0),
        (Stage.TRAIN, 70.0),
    ]
    joined_s = timing.spans[0].start_s + timing.clock.offset_s
    assert joined_s == pytest.approx(UTC + 100.0, abs=timing.clock.uncertainty_s)


async def test_a_device_whose_clock_is_set_in_mid_round_is_joined_right(world: World) -> None:
    """UTC that is noted at each edge would put one half of the round an hour away from the other."""
    broker, steady, coordinator = world
    comparison = ClockComparison(ASK, TIME, utc=lambda: steady.now_s + UTC + set_s, clock=steady)
    set_s = 0.0
    await compared(coordinator, comparison, broker, lambda: coordinator.asked >= 1)
    set_s = -3600.0
    timing = comparison.timing(LINE)
    assert timing is not None
    start_s = timing.spans[0].start_s + timing.clock.offset_s
    assert start_s == pytest.approx(UTC + 100.0, abs=timing.clock.uncertainty_s)


async def test_an_old_pair_counts_less(world: World) -> None:
    broker, steady, coordinator = world
    comparison = ClockComparison(ASK, TIME, clock=steady)
    await compared(coordinator, comparison, broker, lambda: coordinator.asked >= PAIRS)
    near, far = comparison.timing(LINE[:1]), comparison.timing((Stretch(1e5, 1.1e5, {Stage.TRAIN: 1e4}),))
    assert near is not None
    assert far is not None
    assert far.clock.uncertainty_s - near.clock.uncertainty_s == pytest.approx(DRIFT * 1.1e5, rel=0.01)


async def test_a_coordinator_that_does_not_answer_is_asked_once_for_each_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clock_module, "ANSWER_S", 0.02)
    broker = MemoryBroker()
    coordinator = Coordinator(broker, Steady())
    task = asyncio.create_task(coordinator.run(most=0))
    await asyncio.sleep(0)
    comparison = ClockComparison(ASK, TIME)
    await compared(
        coordinator, comparison, broker, lambda: coordinator.asked == 1 and not comparison._waiting
    )
    assert coordinator.asked == 1
    assert comparison.timing(LINE) is None
    task.cancel()
    await asyncio.wait([task])


async def test_another_coordinators_clock_is_compared_anew(world: World) -> None:
    broker, steady, coordinator = world
    comparison = ClockComparison(ASK, TIME, utc=lambda: steady.now_s, clock=steady)
    await compared(coordinator, comparison, broker, lambda: coordinator.asked >= PAIRS)
    comparison.wake(anew=True)
    assert comparison.timing(LINE) is None
    coordinator.ahead_s = UTC + 100
    await compared(coordinator, comparison, broker, lambda: coordinator.asked >= 2 * PAIRS)
    timing = comparison.timing(LINE)
    assert timing is not None
    assert timing.clock.offset_s == pytest.approx(UTC + 100, abs=0.1)


async def test_a_broker_that_does_not_let_it_hear_is_told_of_and_the_agent_lives_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Closed(MemoryTransport):
        async def subscribe(self, *patterns: str) -> AsyncIterator[Letter]:
            raise TransportError("refused the subscription to x/time: its ACL must let pi read it")

    async with Closed(MemoryBroker()) as transport:
        await ClockComparison(ASK, TIME).run(transport)
    assert "ACL" in caplog.records[-1].__dict__["reason"]


@given(st.binary(max_size=80))
def test_no_answer_is_believed_or_raises(body: bytes) -> None:
    comparison: Any = ClockComparison(ASK, TIME)
    comparison._heard(body)
    assert comparison.timing(LINE) is None
