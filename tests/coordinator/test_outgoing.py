"""Assignments on their way out: few frames at once, the same each time, nobody waits for a slow device."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from coordinator.outgoing import Outgoing
from coordinator.report import role_bytes
from coordinator.strategies.base import load_strategy
from foundation.codec import frame_of
from foundation.messages import Assignment
from tests.toys import ToyFederation

pytestmark = pytest.mark.anyio


def asked(agents: int) -> list[Assignment]:
    toy = ToyFederation(load_strategy("fedavg"), agents=agents)
    return list(toy.plan(toy.begin(), 1))


async def test_frames_are_made_when_they_are_sent_and_are_always_the_same() -> None:
    one, other = asked(2)
    made: list[str] = []

    def frame(assignment: Assignment) -> bytes:
        made.append(assignment.agent)
        return frame_of(assignment)

    outgoing = Outgoing([one, other], frame)
    assert made == []
    assert "d0" in outgoing
    assert "d9" not in outgoing
    assert outgoing.frame("d0") == outgoing.frame("d0") == frame_of(one)
    assert outgoing.roles("d0") == role_bytes(frame_of(one))
    assert made == ["d0", "d0"]
    assert outgoing.roles("d1") == role_bytes(frame_of(other)), "its device had it from an earlier life"
    assert outgoing.roles("d9") == {}


@pytest.mark.parametrize("devices", [4, 40])
async def test_so_many_have_a_place_at_once_however_many_there_are(devices: int) -> None:
    outgoing = Outgoing([], frame_of, at_once=3, slow_s=3600)
    inside, most, done = 0, 0, 0

    async def send() -> None:
        nonlocal inside, most, done
        async with outgoing.turn():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1
        done += 1

    await asyncio.gather(*(send() for _ in range(devices)))
    assert (most, done) == (3, devices)


async def test_no_place_is_given_up_while_the_coordinator_is_behind() -> None:
    behind, asked_for = True, 0

    def busy() -> bool:
        nonlocal asked_for
        asked_for += 1
        if asked_for == 3:
            looked.set()
        return behind

    async def next_one() -> None:
        async with outgoing.turn():
            pass

    looked = asyncio.Event()
    outgoing = Outgoing([], frame_of, at_once=1, slow_s=0.001, busy=busy)
    async with asyncio.timeout(10), outgoing.turn():
        waiting = asyncio.create_task(next_one())
        await looked.wait()
        assert not waiting.done()
        behind = False
        await waiting


async def test_a_slow_device_gives_its_place_up_once() -> None:
    outgoing = Outgoing([], partial(frame_of), at_once=1, slow_s=0.01)
    through = asyncio.Event()

    async def slow() -> None:
        async with outgoing.turn():
            await through.wait()

    first = asyncio.create_task(slow())
    await asyncio.sleep(0)
    async with asyncio.timeout(10), outgoing.turn():
        through.set()  # the slow one is still at it, and ends beside us
        await first
        with pytest.raises(TimeoutError):  # it gave its place up once, not twice
            async with asyncio.timeout(0), outgoing.turn():
                pass
