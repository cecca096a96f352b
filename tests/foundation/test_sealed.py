"""Whole federations with seals, and what strangers at the broker can do."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from foundation.errors import NotEnrolled, SealBroken
from foundation.messages import AgentCard, Presence, Refusal
from foundation.seal import Opener, Sealer, SealKeys
from foundation.sealed import SealedTransport
from foundation.topics import Topics
from foundation.transport import MemoryBroker, MemoryTransport, Transport
from tests.fleet import TOPICS, Dial, fleet, memory, run_settings

pytestmark = pytest.mark.anyio
KEYS = {name: SealKeys(bytes([i]) * 32, bytes([100 + i]) * 32) for i, name in enumerate(("d0", "d1", "d2"))}


class Ring:
    """Keys of some devices, as one side has them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def key_to_write(self, topic: str) -> bytes | None:
        try:
            agent = TOPICS.agent_of(topic)
        except ValueError:
            return None
        return KEYS[agent].of(topic) if agent in self._names else None

    def key_to_read(self, topic: str) -> bytes | None:
        key = self.key_to_write(topic)
        if key is None and topic.startswith(TOPICS.of("x", "")[:-2]):
            raise NotEnrolled(f"{topic}: never joined")
        return key


def sealed(broker: MemoryBroker, told: list[tuple[str, str]]) -> Dial:
    def dial(client: str, will: tuple[str, bytes]) -> Transport:
        names = tuple(KEYS) if client == "coordinator" else (client,)
        ring, sealer = Ring(names), Sealer(1)
        key = ring.key_to_write(will[0])
        if key is not None:
            will = (will[0], sealer.seal(*will, key))

        def tell(topic: str, error: SealBroken) -> None:
            told.append((topic.rpartition("/")[2], type(error).__name__))

        return SealedTransport(MemoryTransport(broker, will=will), ring, sealer, Opener(), tell=tell)

    return dial


async def test_a_run_with_seals_comes_to_the_same_bits(tmp_path: Path) -> None:
    run = run_settings()
    async with fleet(tmp_path / "plain", memory(MemoryBroker()), run) as whole:
        assert await whole.finished() == "finished"
        expected = whole.state().to_bytes()
    broker, told = MemoryBroker(), list[tuple[str, str]]()
    async with fleet(tmp_path / "sealed", sealed(broker, told), run) as whole:
        assert await whole.finished() == "finished"
        assert whole.state().to_bytes() == expected
    assert told == []
    assert b"HGS\x01" in broker.retained[TOPICS.of("d0", "card")]


async def test_a_stranger_at_the_broker_can_say_nothing_for_a_device(tmp_path: Path) -> None:
    """Who may write anywhere, but has no key: no letter counts, and the device is not blamed for it."""
    broker, told = MemoryBroker(), list[tuple[str, str]]()
    async with fleet(tmp_path, sealed(broker, told), run_settings()) as whole:
        stranger = MemoryTransport(broker)
        async with stranger:
            card = AgentCard(agent="d0", version="0", profile="x", examples=1)
            refusal = Refusal(run="r", round=1, agent="d0", reason="no")
            for what, body in (
                ("card", card.model_dump_json()),
                ("refusal", refusal.model_dump_json()),
                ("presence", Presence(state="offline").model_dump_json()),
                ("telemetry", "{"),
                ("update", "x" * 500),
            ):
                for _ in range(4):
                    await stranger.publish(TOPICS.of("d0", what), body.encode())
            stolen = broker.retained.get(TOPICS.of("d1", "card"), b"{}")  # whole, but of another device
            await stranger.publish(TOPICS.of("d0", "card"), stolen)
            await stranger.publish(Topics("test").of("eve", "card"), card.model_dump_json().encode())
            assert await whole.finished() == "finished"
        assert whole.engine is not None
        assert all(entry.set_aside is None for entry in whole.engine.roster.entries.values())
        assert "eve" not in whole.engine.roster.entries
        assert whole.store is not None
        assert [len(whole.store.updates("r", n)) for n in (1, 2, 3)] == [3, 3, 3]
    assert {("card", "NotSealed"), ("refusal", "NotSealed"), ("card", "NotEnrolled")} <= set(told)


async def test_an_assignment_that_comes_again_in_another_life_is_not_worked_on() -> None:
    """What a device read it reads once, also after a restart: an old assignment cannot rewind its model."""
    broker, told = MemoryBroker(), list[tuple[str, str]]()
    topic = TOPICS.of("d0", "assignment")
    heard: list[bytes] = []
    broker_tap = MemoryTransport(broker)
    opener = Opener()
    async with broker_tap, sealed(broker, told)("coordinator", ("x", b"")) as coordinator:
        tap = await broker_tap.subscribe(topic)
        device = SealedTransport(MemoryTransport(broker), Ring(("d0",)), Sealer(1), opener)
        async with device:
            letters = await device.subscribe(topic)
            await coordinator.publish(topic, b"work")
            heard.append((await anext(letters)).body)
        recorded = (await anext(tap)).body
        again = SealedTransport(MemoryTransport(broker), Ring(("d0",)), Sealer(2), Opener(opener.marks()))
        async with again:
            letters = await again.subscribe(topic)
            await broker_tap.publish(topic, recorded)
            await coordinator.publish(topic, b"more")
            async with asyncio.timeout(5):
                heard.append((await anext(letters)).body)
        assert again.refused == {"Replayed": 1}
    assert heard == [b"work", b"more"]
