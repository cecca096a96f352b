"""The Transport protocol, and the broker inside one process that all logic is tested on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from foundation.errors import NotConnected

SHARE = "$share/"


@dataclass(frozen=True, slots=True)
class Letter:
    """A message with its topic."""

    topic: str
    body: bytes
    retained: bool = False


class Transport(Protocol):
    """What agents and coordinator ask of a network: four methods.

    `subscribe` is awaited before anything is published, so no letter can fall between the two.
    """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    async def publish(self, topic: str, body: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Publish; returns when the broker has acknowledged (QoS 1) or the bytes are handed over (QoS 0).

        Raises `NotConnected` when there is no connection within the transport's patience, `PublishRefused`
        where the broker says no and can say so.
        """
        ...

    async def subscribe(self, *patterns: str) -> AsyncIterator[Letter]:
        """Subscribe; returns when the broker has confirmed, with the letters that match from then on."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """A transport that knows the largest body its broker takes; it may change with every connection."""

    @property
    def max_body_bytes(self) -> int:
        """Largest body of one publish, bytes."""
        ...


class MemoryBroker:
    """A broker inside one process: topics with `+` and `#`, retained letters, last wills."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.published = 0
        self.bytes = 0
        self._exact: dict[str, list[_Subscription]] = {}
        """By topic, so that hundreds of agents do not look at each other's letters."""
        self._wild: list[_Subscription] = []
        self._of: dict[MemoryTransport, list[_Subscription]] = {}

    def deliver(self, topic: str, body: bytes, *, retain: bool) -> None:
        """Hand one message to every subscriber whose pattern matches."""
        self.published += 1
        self.bytes += len(body)
        if retain and body:
            self.retained[topic] = body
        elif retain:
            self.retained.pop(topic, None)
        for one in self._exact.get(topic, ()):
            one.queue.put_nowait(Letter(topic, body))
        groups: dict[str, list[_Subscription]] = {}
        for one in self._wild:
            found = next((pattern for pattern in one.patterns if matches(pattern, topic)), None)
            if found is not None and found.startswith(SHARE):
                groups.setdefault(found, []).append(one)
            elif found is not None:
                one.queue.put_nowait(Letter(topic, body))
        for sharing in groups.values():  # in turn, as Mosquitto does
            sharing[self.published % len(sharing)].queue.put_nowait(Letter(topic, body))

    def attach(self, patterns: tuple[str, ...], owner: MemoryTransport) -> asyncio.Queue[Letter | None]:
        """Open a queue for patterns, with the retained letters first."""
        one = _Subscription(patterns)
        for topic in self.retained if one.wild else [t for t in patterns if t in self.retained]:
            if any(matches(pattern, topic) for pattern in patterns):
                one.queue.put_nowait(Letter(topic, self.retained[topic], retained=True))
        for place in self._places(one):
            place.append(one)
        self._of.setdefault(owner, []).append(one)
        return one.queue

    def detach(self, owner: MemoryTransport) -> None:
        """Close all queues of one transport."""
        for one in self._of.pop(owner, []):
            one.queue.put_nowait(None)
            for place in self._places(one):
                place.remove(one)

    def _places(self, one: _Subscription) -> list[list[_Subscription]]:
        if one.wild:
            return [self._wild]
        return [self._exact.setdefault(topic, []) for topic in dict.fromkeys(one.patterns)]


@dataclass(eq=False, slots=True)
class _Subscription:
    """Patterns, and what came for them; told apart by identity."""

    patterns: tuple[str, ...]
    queue: asyncio.Queue[Letter | None] = field(default_factory=asyncio.Queue)

    @property
    def wild(self) -> bool:
        return any("+" in pattern or "#" in pattern for pattern in self.patterns)


class MemoryTransport:
    """A `Transport` over a `MemoryBroker`; `drop()` breaks it as a dead socket would."""

    def __init__(self, broker: MemoryBroker, *, will: tuple[str, bytes] | None = None) -> None:
        self._broker = broker
        self._will = will
        self._open = False

    async def __aenter__(self) -> Self:
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        self._broker.detach(self)

    def drop(self) -> None:
        """Break the connection without goodbye: the last will is delivered, the queues end."""
        self._open = False
        self._broker.detach(self)
        if self._will:
            self._broker.deliver(*self._will, retain=True)

    async def publish(self, topic: str, body: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Deliver at once; raises `NotConnected` when the transport is not open."""
        if not self._open:
            raise NotConnected("the memory transport is not open")
        self._broker.deliver(topic, bytes(body), retain=retain)
        await asyncio.sleep(0)

    async def subscribe(self, *patterns: str) -> AsyncIterator[Letter]:
        """Attach to the broker; the iterator ends when the transport closes."""
        if not self._open:
            raise NotConnected("the memory transport is not open")
        return _drain(self._broker.attach(patterns, self))


async def _drain(queue: asyncio.Queue[Letter | None]) -> AsyncIterator[Letter]:
    while (letter := await queue.get()) is not None:
        yield letter


def shared(pattern: str, group: str) -> str:
    """Return the pattern of a shared subscription: each letter goes to one subscriber of the group."""
    return f"{SHARE}{group}/{pattern}"


def matches(pattern: str, topic: str) -> bool:
    """Whether an MQTT topic filter (`+` one level, `#` the rest) matches a topic; a shared one, too."""
    if pattern.startswith(SHARE):
        pattern = pattern.removeprefix(SHARE).partition("/")[2]
    wanted, given = pattern.split("/"), topic.split("/")
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i >= len(given) or level not in ("+", given[i]):
            return False
    return len(wanted) == len(given)
