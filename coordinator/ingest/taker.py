"""The coordinator's side of workers: takes what they keep for it, each frame once, a few at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from coordinator.store.arrivals import Arrival
from coordinator.store.sql import Store
from foundation.errors import StoreError, WireError, WorkRefused

logger = logging.getLogger(__name__)

LOOK_S = 0.1
"""How often the rows are looked at."""
AT_ONCE = 8
"""Frames in hand, which bounds the memory that they take."""


class Taker:
    """Hands arrivals on until cancelled.

    A row goes once it was handed on. Killed between the two, the coordinator takes it again, and finds the
    update of that run, round and agent in its store.
    """

    def __init__(
        self,
        store: Store,
        take: Callable[[str, bytes, int], Awaitable[None]],
        refused: Callable[[str, bytes, str], Awaitable[None]],
    ) -> None:
        """`take` gets agent, frame and bytes on the wire; `refused` agent, frame and a worker's reason."""
        self._store, self._take, self._refused = store, take, refused
        self._in_hand: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Look for arrivals until cancelled."""
        try:
            while True:
                await self._look()
                await asyncio.sleep(LOOK_S)
        finally:
            for task in self._in_hand.values():
                task.cancel()

    async def _look(self) -> None:
        try:
            found = await asyncio.to_thread(self._store.arrivals, 2 * AT_ONCE)
        except StoreError as error:
            logger.error("arrivals not looked at", extra={"reason": str(error)})
            return
        for one in found:
            key = (one.agent, one.digest)
            if key not in self._in_hand and len(self._in_hand) < AT_ONCE:
                task = self._in_hand[key] = asyncio.create_task(self._hand_on(one))
                task.add_done_callback(lambda _, key=key: self._in_hand.pop(key, None))  # type: ignore[misc]

    async def _hand_on(self, one: Arrival) -> None:
        try:
            frame = await asyncio.to_thread(self._store.arrived_frame, one.digest)
            if one.refused is not None:
                await self._refused(one.agent, frame, one.refused)
            else:
                await self._take(one.agent, frame, one.wire_bytes)
        except (WireError, WorkRefused) as error:  # said and counted by whoever refused it
            logger.info("arrival refused", extra={"agent": one.agent, "reason": str(error)})
        except StoreError as error:  # the row stays, and is taken again
            logger.error("arrival not taken", extra={"agent": one.agent, "reason": str(error)})
            return
        await self._drop(one)

    async def _drop(self, one: Arrival) -> None:
        try:
            await asyncio.to_thread(self._store.drop_arrival, one.agent, one.digest)
        except StoreError as error:
            logger.error("arrival not dropped", extra={"agent": one.agent, "reason": str(error)})
