"""One ingest worker: takes parts of updates with others, puts frames together, checks and keeps them.

What a device is told `stored` of is durable: its bytes are a blob, and a row tells the coordinator. A worker
remembers nothing that counts. Killed anywhere it leaves rows behind, the device asks, and whichever worker
hears that goes on from them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator

from coordinator.ingest.check import checked
from coordinator.store.arrivals import Standing
from coordinator.store.sql import Store
from foundation import halt
from foundation.errors import StoreError, TransportError, WireError, WorkRefused
from foundation.topics import Topics, checked_name
from foundation.transfer import INTERNAL, MAX_RANGES, REASON_CHARACTERS, Part, Receipt
from foundation.transport import Letter, Transport, shared

logger = logging.getLogger(__name__)

GROUP = "hedgerow"
"""Name of the shared subscription: workers of one name share one broker's letters."""
AT_ONCE = 32
"""Letters in hand; the others wait in the transport's inbox."""
MAX_FRAME_BYTES = 256 * 1024 * 1024
STALE_S, LOOK_S = 600.0, 60.0
"""After how long silence a frame is given up, and how often that is looked at."""
REMEMBERED = 1024
"""Refusals that are remembered, so that later parts of the same sending hear them too."""


class Worker:
    """Takes what devices send until it is cancelled."""

    def __init__(self, federation: str, *, transport: Transport, store: Store, name: str) -> None:
        """`name` stands in the rows of what it took, for people."""
        self._topics, self._transport, self._store, self._name = Topics(federation), transport, store, name
        self._turns: dict[str, asyncio.Lock] = {}
        self._refusals: OrderedDict[tuple[str, bytes], tuple[int, str]] = OrderedDict()
        self.taken = 0
        """Whole frames that this worker kept."""

    async def serve(self) -> None:
        """Listen until cancelled; the transport is open."""
        hands = asyncio.Semaphore(AT_ONCE)
        pattern = shared(self._topics.every("update"), GROUP)
        letters = await self._transport.subscribe(pattern)
        logger.info("listening", extra={"worker": self._name, "topic": pattern})
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tidy())
            tasks.create_task(self._listen(letters, hands, tasks))

    async def _listen(
        self, letters: AsyncIterator[Letter], hands: asyncio.Semaphore, tasks: asyncio.TaskGroup
    ) -> None:
        async for letter in letters:
            await hands.acquire()
            tasks.create_task(self._take(letter, hands))
        raise TransportError("the broker ended the subscription: start the worker again")

    async def _take(self, letter: Letter, hands: asyncio.Semaphore) -> None:
        try:
            agent = checked_name(self._topics.agent_of(letter.topic), "agent")
            part = Part.of(letter.body)
            async with self._turns.setdefault(agent, asyncio.Lock()):  # one agent's letters keep their order
                await self._part(agent, part, len(letter.body))
        except WireError as error:
            logger.warning("letter dropped", extra={"topic": letter.topic, "reason": str(error)})
        except (StoreError, TransportError) as error:  # nothing was confirmed: the device asks again
            logger.error("part not taken", extra={"topic": letter.topic, "reason": str(error)})
        finally:
            hands.release()

    async def _part(self, agent: str, part: Part, wire_bytes: int) -> None:
        refused = self._refused(agent, part)
        if refused is None and part.total > MAX_FRAME_BYTES:
            refused = f"a frame of {part.total:,} bytes is over {MAX_FRAME_BYTES:,}"
        if refused is not None:
            await self._refuse(agent, part, refused)
            return
        standing = await asyncio.to_thread(self._store.take_part, agent, part, wire_bytes)
        halt.at("part", part.index)
        if len(standing.numbers) == part.count:
            await self._whole(agent, part)
        elif part.ask:
            await self._tell(agent, receipt_of(part, standing))

    async def _whole(self, agent: str, part: Part) -> None:
        """Put a frame together, check it, keep it, and tell its sender."""
        digest = part.digest.hex()
        found = await asyncio.to_thread(self._store.assembled, agent, digest)
        if found is None:  # another worker was faster; this asks what came of it
            probe = Part(part.digest, part.attempt, 0, part.count, part.total, probe=True)
            standing = await asyncio.to_thread(self._store.take_part, agent, probe, 0)
            await self._tell(agent, receipt_of(part, standing))
            return
        frame, wire_bytes = found
        try:
            if await asyncio.to_thread(lambda: hashlib.sha256(frame).hexdigest()) != digest:
                await asyncio.to_thread(self._store.forget_parts, agent, digest)
                raise WorkRefused("the parts do not make the frame of that digest")
            await self._keep(agent, digest, frame, wire_bytes)
        except (WireError, WorkRefused) as error:
            await self._refuse(agent, part, str(error)[:REASON_CHARACTERS] or type(error).__name__)
        except StoreError as error:
            logger.error("a frame could not be kept", extra={"agent": agent, "reason": str(error)})
            await self._refuse(agent, part, INTERNAL, remember=False)
        else:
            await self._tell(agent, Receipt(digest=digest, attempt=part.attempt, state="stored"))

    async def _keep(self, agent: str, digest: str, frame: bytes, wire_bytes: int) -> None:
        try:
            update = await asyncio.to_thread(checked, self._store, agent, frame)
        except WireError as error:
            reason = str(error)[:REASON_CHARACTERS] or type(error).__name__
            await asyncio.to_thread(
                self._store.arrive, agent, frame, digest, wire_bytes, worker=self._name, refused=reason
            )
            raise
        except WorkRefused:
            await asyncio.to_thread(self._store.forget_parts, agent, digest)
            raise
        if update is None:  # of a letter that was taken long ago
            await asyncio.to_thread(self._store.forget_parts, agent, digest)
            return
        halt.at("ingest", update.round)
        await asyncio.to_thread(self._store.arrive, agent, frame, digest, wire_bytes, worker=self._name)
        self.taken += 1
        logger.info("update kept", extra={"agent": agent, "round": update.round, "bytes": len(frame)})

    def _refused(self, agent: str, part: Part) -> str | None:
        attempt, reason = self._refusals.get((agent, part.digest), (-1, ""))
        return reason if attempt == part.attempt else None

    async def _refuse(self, agent: str, part: Part, reason: str, *, remember: bool = True) -> None:
        if remember:
            self._refusals[agent, part.digest] = (part.attempt, reason)
            while len(self._refusals) > REMEMBERED:
                self._refusals.popitem(last=False)
        facts = {"digest": part.digest.hex(), "attempt": part.attempt, "state": "refused", "reason": reason}
        await self._tell(agent, Receipt.model_validate(facts))

    async def _tell(self, agent: str, receipt: Receipt) -> None:
        body = receipt.model_dump_json(exclude_defaults=True).encode()
        await self._transport.publish(self._topics.of(agent, "receipt"), body)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                gone = await asyncio.to_thread(self._store.forget_silent, time.time() - STALE_S)
            except StoreError as error:
                logger.error("frames not looked at", extra={"reason": str(error)})
                continue
            if gone:
                logger.info("frames given up, their senders are gone", extra={"frames": gone})


def receipt_of(part: Part, standing: Standing) -> Receipt:
    """Return what the sender of a part should know; the whole frame's parts after a probe."""
    digest, probe = part.digest.hex(), part.index if part.probe else None
    if standing.kept:
        return Receipt(digest=digest, attempt=part.attempt, state="stored", probe=probe)
    numbers = standing.numbers
    upto = part.count if part.probe else (numbers[-1] + 1 if numbers else 0)
    gaps, upto = gaps_of(numbers, upto)
    return Receipt(digest=digest, attempt=part.attempt, state="parts", upto=upto, missing=gaps, probe=probe)


def gaps_of(numbers: tuple[int, ...], upto: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Return the gaps below `upto` between sorted numbers, and up to where they are all of them."""
    gaps: list[tuple[int, int]] = []
    at = 0
    for number in (*numbers, upto):
        if number > at:
            if len(gaps) == MAX_RANGES:
                return tuple(gaps), at
            gaps.append((at, number))
        at = number + 1
    return tuple(gaps), upto
