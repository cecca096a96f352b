"""Tells Home Assistant of the federation: devices by MQTT discovery, their states at a bounded rate.

Runs beside the engine, on its transport. Discovery and states are retained, so that a Home Assistant that
starts later, and a broker that was restarted, have them at once; whether they hold is said by the presences.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator import home_today
from coordinator.home_discovery import (
    agent_config,
    agent_state,
    config_topic,
    coordinator_config,
    coordinator_state,
    model_version,
)
from coordinator.home_today import Known, Memory, counted, of_today
from coordinator.live import AgentStatus, Live
from coordinator.settings import CoordinatorSettings
from coordinator.store.sql import Store
from foundation.errors import HedgerowError
from foundation.topics import Topics
from foundation.transport import Transport

logger = logging.getLogger(__name__)

TICK_S = 1.0
"""How often the picture is looked at; joules are counted at this rate, states go out more rarely."""
RETRY_S = 10.0
ONLINE_S = 3600.0
"""How exactly it is kept when a device was last online: days count, and every change is a write."""
DAY_S = 86_400.0


@dataclass(slots=True)
class _Said:
    """What was last published of one device, and when on the monotonic clock."""

    config: bytes = b""
    state: bytes = b""
    at: float = float("-inf")


class HomeAssistant:
    """One federation as Home Assistant sees it; `run` belongs beside `Engine.serve`."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        transport: Transport,
        store: Store,
        live: Live,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Publish through `transport`, which the engine opens; `clock` gives UTC seconds since the epoch."""
        self.settings, self.transport, self.store, self.live = settings, transport, store, live
        self.topics = Topics(settings.federation)
        self._mine = settings.home_assistant
        self._clock, self._monotonic = clock, monotonic
        self._devices: dict[str, Known] = {}
        self._kept: Memory | None = None
        self._said: dict[str | None, _Said] = {}
        self._models: dict[str, str | None] = {}
        self._told_not = ""

    async def run(self) -> None:
        """Tell until cancelled; what an earlier life told and this one does not is taken back first."""
        kept = await asyncio.to_thread(home_today.read, self.settings.folder)
        if kept is not None:
            self._devices = dict(kept.devices)
            if not self._continues(kept):
                await self._take_back(kept)
        if not self._mine.enabled:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._hear())
            tasks.create_task(self._tell())

    # --- what is over --------------------------------------------------------------------------

    def _continues(self, kept: Memory) -> bool:
        same = (kept.federation, kept.prefix) == (self.settings.federation, self._mine.prefix)
        return self._mine.enabled and same

    async def _take_back(self, kept: Memory) -> None:
        """Remove from Home Assistant whom it was told of under other settings; days are kept."""
        topics = Topics(kept.federation)
        for agent in (*kept.devices, None):
            state = topics.coordinator_state if agent is None else topics.home(agent)
            for topic in (config_topic(kept.prefix, kept.federation, agent), state):
                while not await self._publish(topic, b""):
                    await asyncio.sleep(RETRY_S)
        if not self._mine.enabled:
            await asyncio.to_thread((self.settings.folder / home_today.FILE).unlink, missing_ok=True)
        logger.info("taken out of Home Assistant", extra={"devices": len(kept.devices) + 1})

    async def _forget(self, agent: str) -> None:
        """Take out a device that has been away for too long; it comes back when it does."""
        mine = config_topic(self._mine.prefix, self.settings.federation, agent)
        if await self._publish(mine, b"") and await self._publish(self.topics.home(agent), b""):
            del self._devices[agent]
            self._said.pop(agent, None)
            logger.info("%s was away for too long: taken out of Home Assistant", agent)

    # --- what is now ---------------------------------------------------------------------------

    async def _hear(self) -> None:
        """Look for a device's model again when it may have another."""
        while await self._heard_till_dropped():
            self._models.clear()  # some events were not heard

    async def _heard_till_dropped(self) -> bool:
        async for event in self.live.listen():
            if event.kind == "update" and event.agent is not None:
                self._models.pop(event.agent, None)
            if event.kind == "dropped":
                return True
        return False

    async def _tell(self) -> None:
        pause = min(TICK_S, self._mine.every_s)
        while True:
            await self.tick()
            await asyncio.sleep(pause)

    async def tick(self) -> None:
        """Count, and publish what is due and has changed."""
        now = self._clock()
        picture = self.live.snapshot()
        for status in picture.agents:
            self._count(status, now)
        due = [s for s in picture.agents if s.agent in self._devices and self._is_due(s.agent)]
        if due or self._kept is None:
            await self._keep()  # before it is told: a day that was shown never falls
        if self._is_due(None):
            config = (
                config_topic(self._mine.prefix, self.settings.federation),
                coordinator_config(self.topics),
            )
            state = (self.topics.coordinator_state, coordinator_state(picture))
            await self._say(None, config, state)
        for status in due:
            await self._say_agent(status, now)
        for agent, known in list(self._devices.items()):
            if now - known.online > self._mine.forget_days * DAY_S:
                await self._forget(agent)

    def _count(self, status: AgentStatus, now: float) -> None:
        """Note that a device is here, and what it has used since it last told."""
        known = self._devices.get(status.agent)
        if status.online and (known is None or now - known.online > ONLINE_S):
            known = Known(online=now, day=known.day if known else None)
        if known is None:
            return  # never online since Home Assistant is told
        self._devices[status.agent] = known
        if status.joules is None:
            return
        day, meter = known.day, (status.energy_kind, status.energy_source)
        # The same number again is not news: the device may be away.
        if day is None or day.told != status.joules or (day.kind, day.source) != meter:
            self._devices[status.agent] = known.model_copy(
                update={"day": counted(day, status.joules, *meter, now)}
            )

    def _is_due(self, who: str | None) -> bool:
        return self._monotonic() - self._said.setdefault(who, _Said()).at >= self._mine.every_s

    async def _say_agent(self, status: AgentStatus, now: float) -> None:
        agent = status.agent
        model = await self._model(agent)
        day = of_today(self._devices[agent].day, now)
        config = (
            config_topic(self._mine.prefix, self.settings.federation, agent),
            agent_config(self.topics, status),
        )
        await self._say(agent, config, (self.topics.home(agent), agent_state(status, day, model)))

    async def _say(
        self, who: str | None, config: tuple[str, dict[str, Any]], state: tuple[str, dict[str, Any]]
    ) -> None:
        """Publish the announcement and the state of one device where they are news, in this order."""
        said = self._said[who]
        body = _json(config[1])
        if body != said.config and await self._publish(config[0], body):
            said.config, said.at = body, self._monotonic()
        body = _json(state[1])
        if said.config and body != said.state and await self._publish(state[0], body):
            said.state, said.at = body, self._monotonic()

    async def _model(self, agent: str) -> str | None:
        if agent not in self._models:
            try:
                found = await asyncio.to_thread(self.store.artifacts, agent=agent, limit=1)
            except HedgerowError as error:
                logger.error("model of %s not known to Home Assistant: %s", agent, error)
                return None
            self._models[agent] = model_version(found[0]) if found else None
        return self._models[agent]

    async def _keep(self) -> None:
        memory = Memory(
            federation=self.settings.federation, prefix=self._mine.prefix, devices=dict(self._devices)
        )
        if memory == self._kept:
            return
        try:
            await asyncio.to_thread(home_today.write, self.settings.folder, memory)
        except OSError as error:
            logger.error(
                "joules of today are not kept (%s): after a restart they begin anew",
                error.strerror or error,
            )
        self._kept = memory

    async def _publish(self, topic: str, body: bytes) -> bool:
        """Publish, retained; False when that could not be done, which is said once a reason."""
        try:
            await self.transport.publish(topic, body, retain=True)
        except HedgerowError as error:
            if str(error) != self._told_not:
                logger.warning("Home Assistant not told", extra={"topic": topic, "reason": str(error)})
            self._told_not = str(error)
            return False
        self._told_not = ""
        return True


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
