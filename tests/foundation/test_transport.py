"""The broker inside one process: topics, retained letters, last wills, broken connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import NotConnected, SettingsError
from foundation.topics import Topics
from foundation.transport import Letter, MemoryBroker, MemoryTransport, matches


async def some(letters: AsyncIterator[Letter], count: int) -> list[tuple[str, bytes, bool]]:
    async with asyncio.timeout(2):
        came = [await anext(letters) for _ in range(count)]
    return [(letter.topic, letter.body, letter.retained) for letter in came]


@pytest.mark.parametrize(
    ("pattern", "topic", "fits"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/b/c", "a/b", False),
        ("a/+/c", "a/b/c", True),
        ("a/+/c", "a/b/d", False),
        ("a/+", "a", False),
        ("+/+", "a/b", True),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("#", "a/b", True),
        ("a/#", "b/a", False),
        ("a/+", "a/", True),
    ],
)
def test_topic_filters_are_those_of_mqtt(pattern: str, topic: str, fits: bool) -> None:  # noqa: FBT001, RUF100
    assert matches(pattern, topic) is fits


@given(st.lists(st.text("ab", max_size=2), min_size=1, max_size=5))
def test_a_topic_matches_itself_and_the_rest_sign(levels: list[str]) -> None:
    topic = "/".join(levels)
    assert matches(topic, topic)
    assert matches("#", topic)
    assert matches("/".join("+" for _ in levels), topic)
    assert not matches(topic + "/more", topic)


@pytest.mark.anyio
async def test_letters_come_in_order_to_all_who_asked() -> None:
    broker = MemoryBroker()
    async with MemoryTransport(broker) as one, MemoryTransport(broker) as two:
        all_of_a, b = await one.subscribe("a/#", "a/+"), await two.subscribe("a/b")
        for body in (b"1", b"2"):
            await two.publish("a/b", body)
        await two.publish("a/c", b"3", qos=0)
        assert await some(all_of_a, 3) == [("a/b", b"1", False), ("a/b", b"2", False), ("a/c", b"3", False)]
        assert await some(b, 2) == [("a/b", b"1", False), ("a/b", b"2", False)]
    assert (broker.published, broker.bytes) == (3, 3)


@pytest.mark.anyio
async def test_a_retained_letter_waits_for_who_comes_later_until_it_is_cleared() -> None:
    broker = MemoryBroker()
    async with MemoryTransport(broker) as t:
        await t.publish("card", b"old", retain=True)
        await t.publish("card", b"new", retain=True)
        assert await some(await t.subscribe("card"), 1) == [("card", b"new", True)]
        await t.publish("card", b"", retain=True)
        letters = await t.subscribe("card")
        await t.publish("card", b"live", retain=True)
        assert await some(letters, 1) == [("card", b"live", False)]


@pytest.mark.anyio
async def test_the_will_is_published_on_a_broken_connection_only() -> None:
    broker = MemoryBroker()
    async with MemoryTransport(broker) as other:
        letters = await other.subscribe("presence")
        async with MemoryTransport(broker, will=("presence", b"offline")) as polite:
            await polite.publish("presence", b"online", retain=True)
        rude = MemoryTransport(broker, will=("presence", b"offline"))
        await rude.__aenter__()
        own = await rude.subscribe("#")
        rude.drop()
        assert await some(letters, 2) == [("presence", b"online", False), ("presence", b"offline", False)]
        assert broker.retained["presence"] == b"offline"
        assert [letter async for letter in own] == [Letter("presence", b"online", retained=True)]
        with pytest.raises(NotConnected):
            await rude.publish("x", b"")
        with pytest.raises(NotConnected):
            await rude.subscribe("x")


@pytest.mark.anyio
async def test_closing_ends_the_letters() -> None:
    broker = MemoryBroker()
    async with MemoryTransport(broker) as t:
        letters = await t.subscribe("a")
        await t.publish("a", b"last")
    assert [letter.body async for letter in letters] == [b"last"]


def test_topics_name_an_agent_and_give_it_back() -> None:
    topics = Topics("garden")
    assert topics.of("pi-4.b_2", "update") == "hedgerow/v1/garden/agents/pi-4.b_2/update"
    assert topics.agent_of(topics.of("pi-4.b_2", "update")) == "pi-4.b_2"
    assert matches(topics.every("update"), topics.of("x", "update"))
    assert not matches(topics.every("update"), topics.of("x", "receipt"))
    for foreign in (topics.coordinator_presence, Topics("meadow").of("x", "update"), topics.of("x", "y/z")):
        with pytest.raises(ValueError, match="not an agent's topic"):
            topics.agent_of(foreign)


@pytest.mark.parametrize("name", ["", "a/b", "a+", "#", "-a", "ä", "a" * 65, "a b", "a\n"])
def test_a_federation_must_fit_into_a_topic(name: str) -> None:
    with pytest.raises(SettingsError, match="cannot be used in a topic"):
        Topics(name)
