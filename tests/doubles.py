"""Doubles that are real implementations; nothing is patched by name."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self

from foundation.errors import NotConnected
from foundation.transport import Letter, Transport

Edit = Callable[[str, bytes], Sequence[bytes]]


class FaultyTransport:
    """A `Transport` around another that loses, doubles, delays and edits what is published through it.

    Shares are of letters, drawn from a seed; a delayed letter is overtaken by those of the next `delay_s`.
    `edit` turns one body into those that are published instead: none, one or several. While `offline` is set,
    publishing raises `NotConnected`. Everything that was handed in is in `log`.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        seed: int = 0,
        lose: float = 0.0,
        double: float = 0.0,
        delay: float = 0.0,
        delay_s: float = 0.005,
        edit: Edit | None = None,
    ) -> None:
        self.inner = inner
        self.lose, self.double, self.delay, self.delay_s = lose, double, delay, delay_s
        self.edit = edit
        self.offline = False
        self.log: list[tuple[str, bytes]] = []
        self._random = random.Random(seed)
        self._late: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in list(self._late):
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)
        await self.inner.__aexit__(kind, error, trace)

    async def publish(self, topic: str, body: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Publish with faults; as over MQTT, a letter that gets lost was acknowledged all the same."""
        if self.offline:
            raise NotConnected("the double is offline")
        self.log.append((topic, body))
        bodies = [body] if self.edit is None else self.edit(topic, body)
        for one in bodies:
            copies = 2 if self._random.random() < self.double else 1
            for _ in range(copies):
                await self._publish(topic, one, retain=retain, qos=qos)
        await asyncio.sleep(0)

    async def _publish(self, topic: str, body: bytes, *, retain: bool, qos: int) -> None:
        if self._random.random() < self.lose:
            return
        if self._random.random() < self.delay:
            task = asyncio.create_task(self._later(topic, body, retain=retain, qos=qos))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            return
        await self.inner.publish(topic, body, retain=retain, qos=qos)

    async def _later(self, topic: str, body: bytes, *, retain: bool, qos: int) -> None:
        await asyncio.sleep(self.delay_s * self._random.random())
        await self.inner.publish(topic, body, retain=retain, qos=qos)

    async def subscribe(self, *patterns: str) -> AsyncIterator[Letter]:
        """Subscribe without faults."""
        return await self.inner.subscribe(*patterns)

    def bodies(self, topic: str) -> list[bytes]:
        """Return what was handed in for one topic."""
        return [body for t, body in self.log if t == topic]
