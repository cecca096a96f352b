"""Hears the plugs of `[wall]`, keeps what they say, tells agents the time, and joins both to updates.

It stands beside the engine: rounds wait for nothing here. Times are this process's: UTC as it was at its
start, and a clock that nobody sets since, for plugs' messages and agents' questions alike. Messages' own
stamps, of clocks that nobody keeps, tell repeated ones and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from pydantic import ValidationError

from coordinator.live import Live
from coordinator.settings import CoordinatorSettings
from coordinator.store.records import PlugReading, PlugRecord
from coordinator.store.sql import Store
from coordinator.wall.join import LAG_S, Series, WallRecord, joined, not_joined
from foundation.errors import NotConnected, PublishRefused, StoreError, TransportError
from foundation.messages import ClockAnswer, ClockQuestion
from foundation.plug import Plug, keep_asking, plug_of
from foundation.timing import Timing, steady_s
from foundation.topics import Topics
from foundation.transport import Letter, Transport

logger = logging.getLogger(__name__)

TICK_S = 2.0
"""How often readings go to the store, and updates are looked for."""
SLOT_S = 0.2
"""Of messages that come faster the last one is kept."""
MOST_HELD = 5_000
"""Readings of one plug that wait for a store that fails; then the oldest are lost."""
MOST_KEPT = 1_000_000
"""Readings of one plug in the store, whatever their age."""
MOST_JOINED = 200_000
"""Readings of one round: two days of one a second."""
FORGET_S = 3600.0
RETRY_S = 60.0
END_S = 3.0
"""How long the end of the program waits for a plug to speak after the last update."""
DAY_S = 86_400.0


def steady_utc() -> Callable[[], float]:
    """Return a clock: UTC as it is now, and the seconds since then, however UTC is set."""
    ahead_s = time.time() - steady_s()
    return lambda: ahead_s + steady_s()


@dataclass
class _Behind:
    """A device and the plug that it is behind."""

    agent: str
    name: str
    plug: Plug
    heard_s: float
    """When it was last heard, or began to be listened to."""
    row: PlugRecord | None = None
    held: deque[PlugReading] = field(default_factory=deque)
    silent: bool = False
    lost: int = 0

    def add(self, reading: PlugReading) -> None:
        """Hold a reading; of several in one slot the last one counts."""
        if self.held and int(self.held[-1].at / SLOT_S) == int(reading.at / SLOT_S):
            self.held.pop()
        elif len(self.held) >= MOST_HELD:
            self.held.popleft()
            self.lost += 1
        self.held.append(reading)


class Wall:
    """The plugs of one coordinator; `run` is a task beside the engine."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        transport: Transport,
        store: Store,
        live: Live,
        clock: Callable[[], float] | None = None,
        tick_s: float = TICK_S,
    ) -> None:
        """Hear through `transport`, which the engine opens; `clock` gives UTC seconds and is never set."""
        self._mine, self._topics = settings.wall, Topics(settings.federation)
        self._transport, self._store, self._live = transport, store, live
        self._clock = clock or steady_utc()
        self._tick_s = tick_s
        self._forgot_s: float | None = None
        now = self._clock()
        self._behind = {
            agent: _Behind(agent, name, plug_of(name), now) for agent, name in self._mine.plugs.items()
        }

    async def run(self) -> None:
        """Hear, keep and join until cancelled; what is not joined by then is, as far as it was heard."""
        if not self._behind:
            return
        async with asyncio.TaskGroup() as tasks:
            for one in self._behind.values():
                tasks.create_task(self._hear(one))
            tasks.create_task(self._tell_time())
            try:
                while True:
                    await self.tick()
                    await asyncio.sleep(self._tick_s)
            except asyncio.CancelledError:
                await self._end()
                raise

    async def tick(self) -> bool:
        """Keep what was heard, say who is silent, join what can be; returns whether that was all."""
        try:
            await self._keep()
            return await self._join()
        except StoreError as error:
            logger.error("readings of plugs not kept yet", extra={"reason": str(error)})
            return False

    async def _end(self) -> None:
        until = time.monotonic() + END_S
        while not await self.tick() and time.monotonic() < until:
            await asyncio.sleep(min(self._tick_s, 0.1))
        try:
            await self._join(final=True)
        except StoreError as error:
            logger.error("the last rounds are joined at the next start", extra={"reason": str(error)})

    # --- hearing -------------------------------------------------------------------------------

    async def _hear(self, one: _Behind) -> None:
        """Listen to a plug, again and again where the broker does not let it."""
        while True:
            try:
                letters = await self._transport.subscribe(*one.plug.topics)
            except TransportError as error:
                text = f"{one.agent}: its plug {one.name} cannot be heard: {error}"
                self._live.emit("plug_unheard", text, agent=one.agent)
                await asyncio.sleep(RETRY_S)
                continue
            async with asyncio.TaskGroup() as tasks:
                asking = tasks.create_task(self._ask(one.plug))
                await self._listen(one, letters)
                asking.cancel()
            return  # the transport was closed

    async def _ask(self, plug: Plug) -> None:
        while plug.question is not None:
            try:
                await keep_asking(plug, self._transport)
            except (NotConnected, PublishRefused) as error:
                logger.debug("plug not asked", extra={"reason": str(error)})
                await asyncio.sleep(1.0)

    async def _listen(self, one: _Behind, letters: AsyncIterator[Letter]) -> None:
        async for letter in letters:
            now, breaks, first = self._clock(), one.plug.breaks, one.plug.last is None
            reading = one.plug.take(letter.topic, letter.body, now, retained=letter.retained)
            if reading is None:
                continue
            one.add(PlugReading(now, reading.watts, reading.joules))
            one.heard_s = now
            if first:
                said = one.plug.own_clock
                clock = f"; its own clock says {said[:40]}, which is not used" if said else ""
                logger.info("%s: its plug %s is heard%s", one.agent, one.name, clock)
            if one.plug.breaks > breaks:
                text = f"{one.agent}: the total of its plug {one.name} went backwards; its watts are taken"
                self._live.emit("plug_reset", text, agent=one.agent)

    async def _tell_time(self) -> None:
        """Answer agents that are behind a plug; the others need no clock, and are not answered."""
        letters = await self._transport.subscribe(self._topics.every("clock"))
        async for letter in letters:
            received_s, agent = self._clock(), self._topics.agent_of(letter.topic)
            if agent not in self._behind or letter.retained:
                continue
            try:
                question = ClockQuestion.model_validate_json(letter.body)
                answer = ClockAnswer(id=question.id, received_s=received_s, answered_s=self._clock())
                body = answer.model_dump_json().encode()
                await self._transport.publish(self._topics.of(agent, "time"), body, qos=0)
            except ValidationError as error:
                logger.warning("question for the time not understood", extra={"agent": agent})
                logger.debug("it was", extra={"reason": str(error)})
            except NotConnected as error:
                logger.debug("time not told", extra={"agent": agent, "reason": str(error)})

    # --- keeping -------------------------------------------------------------------------------

    async def _keep(self) -> None:
        now = self._clock()
        for one in self._behind.values():
            self._tell_silence(one, now)
            if one.row is None:
                one.row = await asyncio.to_thread(self._store.plug, one.agent, one.name, now)
            await self._flush(one, one.row)
        if self._forgot_s is None or now - self._forgot_s > FORGET_S:
            before = now - self._mine.keep_days * DAY_S
            gone = await asyncio.to_thread(self._store.forget_plug_readings, before, MOST_KEPT)
            logger.debug("readings of plugs forgotten", extra={"count": gone})
            self._forgot_s = now

    async def _flush(self, one: _Behind, row: PlugRecord) -> None:
        if one.lost:
            logger.error("%d readings of %s are lost: the store failed for too long", one.lost, one.name)
            one.lost = 0
        held = list(one.held)
        if not held:
            return
        steps = {"step_j": one.plug.step_j, "step_w": one.plug.step_w}
        await asyncio.to_thread(lambda: self._store.add_plug_readings(row.id, held, **steps))
        kept = set(held)
        one.held = deque(reading for reading in one.held if reading not in kept)

    def _tell_silence(self, one: _Behind, now: float) -> None:
        silent = now - one.heard_s > one.plug.silent_s
        if silent == one.silent:
            return
        one.silent = silent
        if silent:
            text = (
                f"{one.agent}: nothing from its plug {one.name} for {one.plug.silent_s:g} s: is its MQTT on,"
                " and may the coordinator read its topics? Rounds have no joules at the wall meanwhile"
            )
            self._live.emit("plug_silent", text, agent=one.agent)
        else:
            self._live.emit("plug_back", f"{one.agent}: its plug {one.name} speaks again", agent=one.agent)

    # --- joining -------------------------------------------------------------------------------

    async def _join(self, *, final: bool = False) -> bool:
        """Join the updates whose time the plugs have seen; with `final` all. Returns whether none is left."""
        oldest = self._clock() - self._mine.keep_days * DAY_S
        left = False
        for one in self._behind.values():
            if one.row is None:
                continue
            since = max(one.row.since, oldest)
            for run, number, agent, summary in await asyncio.to_thread(
                self._store.unjoined, [one.agent], since
            ):
                record = await asyncio.to_thread(self._record, one, number, summary, final)
                left = left or record is None
                if record is not None:
                    body = record.model_dump_json()
                    await asyncio.to_thread(self._store.add_wall, run, number, agent, body)
        return not left

    def _record(self, one: _Behind, number: int, summary: str, final: bool) -> WallRecord | None:
        """Return what an update's time drew; `None` while the plug has not spoken after it."""
        timing = _timing(summary)
        if timing is None:
            why = "its agent told no times: an older one, or its user may not read its topic .../time"
            return not_joined(one.agent, number, one.name, why)
        offset, error_s = timing.clock.offset_s, timing.clock.uncertainty_s
        start_s, end_s = timing.spans[0].start_s + offset, timing.spans[-1].end_s + offset
        around_s = error_s + LAG_S
        late = final or self._clock() - end_s > one.plug.silent_s
        if not late and (one.plug.last is None or one.plug.last.time_s < end_s + around_s):
            return None
        assert one.row is not None
        row = self._store.plug(one.agent, one.name, one.row.since)  # with its finest steps
        before, after = start_s - one.plug.silent_s - around_s, end_s + one.plug.silent_s + around_s
        readings = self._store.plug_readings(row.id, before, after, MOST_JOINED)
        if not late and (not readings or readings[-1].at < end_s + around_s):
            return None  # heard, but not in the store yet
        series = Series(
            readings,
            silent_s=one.plug.silent_s,
            accuracy=self._mine.accuracy,
            step_j=row.step_j,
            step_w=row.step_w,
        )
        return joined(one.agent, number, one.name, timing, series)


def _timing(summary: str) -> Timing | None:
    """Return an update's times; `None` where it has none, or what cannot be read."""
    try:
        told = json.loads(summary)
        return Timing.model_validate(told["timing"]) if told.get("timing") else None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        logger.warning("times of an update not understood", extra={"reason": str(error)[:200]})
        return None
