"""The assignments of a round on their way out: each is made a frame when it is sent, a few at a time.

Frames of a round differ by their header alone, but each is as large as the model. Made when they are sent and
forgotten when they have arrived, they take memory for `AT_ONCE` of them, however many devices there are; the
receipts that let the next ones out come in with the updates: a coordinator that falls behind sends slower.
A device that takes longer than `SLOW_S` gives its place up and goes on: nobody waits for a bad link. While
the coordinator itself is behind (`busy`), no place is given up: its own slowness is no device's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

from coordinator.report import role_bytes
from foundation.messages import Assignment

AT_ONCE = 32
"""Devices that take their assignment at the same time."""
SLOW_S = 5.0
"""Seconds for which a device holds a place."""


class Outgoing:
    """What a round asks, as frames. Making one is pure: the frame of an assignment is always the same."""

    def __init__(
        self,
        assignments: Iterable[Assignment],
        frame: Callable[[Assignment], bytes],
        *,
        at_once: int = AT_ONCE,
        slow_s: float = SLOW_S,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._assignments = {assignment.agent: assignment for assignment in assignments}
        self._frame, self._slow_s, self._busy = frame, slow_s, busy
        self._places = asyncio.Semaphore(at_once)
        self._roles: dict[str, Mapping[str, int]] = {}

    def __contains__(self, agent: str) -> bool:
        return agent in self._assignments

    def frame(self, agent: str) -> bytes:
        """Make the frame of an agent's assignment; in a thread, as it may be large."""
        made = self._frame(self._assignments[agent])
        self._roles[agent] = role_bytes(made)
        return made

    def roles(self, agent: str) -> Mapping[str, int]:
        """Return the bytes by role of an agent's assignment; nothing for who was not asked."""
        if agent not in self._roles and agent in self._assignments:
            self.frame(agent)
        return self._roles.get(agent, {})

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a place, and hold it for `slow_s` at most."""
        await self._places.acquire()
        later, held = asyncio.get_running_loop().call_later, True
        timer: asyncio.TimerHandle

        def give_up() -> None:
            nonlocal held, timer
            if self._busy():
                timer = later(self._slow_s, give_up)
            else:
                held = False
                self._places.release()

        timer = later(self._slow_s, give_up)
        try:
            yield
        finally:
            timer.cancel()
            if held:
                self._places.release()
