"""Whole federations for tests: an engine and agents in one process, over any transport."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.engine import Engine
from coordinator.ingest.worker import Worker
from coordinator.live import Live
from coordinator.settings import (
    BudgetSettings,
    CoordinatorSettings,
    HttpSettings,
    RolloutSettings,
    RunSettings,
    WallSettings,
)
from coordinator.store.place import StoreSettings
from coordinator.store.sql import Store
from coordinator.strategies.base import State
from coordinator.wall.collector import Wall
from edge_agent.agent import OFFLINE, Agent, CarryOut
from edge_agent.conditions import Conditions
from edge_agent.datasets import DataSettings
from edge_agent.energy.meter import Meter
from edge_agent.limits import Limits
from edge_agent.samples import LocalData
from edge_agent.settings import AgentSettings, PrivacySettings, ServeSettings
from foundation.messages import Presence
from foundation.profile import DeviceProfile
from foundation.spec import ModelSettings
from foundation.topics import Topics
from foundation.transport import MemoryBroker, MemoryTransport, Transport
from hedgerow import hostile
from hedgerow.hostile import Attack
from tests.metered import Metered
from tests.toys import toy_data

TOPICS = Topics("test")
MODEL = ModelSettings(width=8, depth=2, heads=2, ffl_ratio=2, patch=2)
Dial = Callable[[str, tuple[str, bytes]], Transport]


def memory(broker: MemoryBroker) -> Dial:
    """Connect through a broker inside this process."""
    return lambda client, will: MemoryTransport(broker, will=will)


def run_settings(**changes: Any) -> RunSettings:
    fields: dict[str, Any] = {
        "name": "r",
        "strategy": "pfl_tpp",
        "settings": {"warm_up": 0, "target": 0.5, "every": 2, "learning_rate": 5e-3},
        "rounds": 3,
        "min_agents": 3,
        "deadline_s": 60,
        "wait_s": 30,
        "model": MODEL,
    }
    return RunSettings(**(fields | changes))


@dataclass
class Fleet:
    """An engine and agents; each agent and the engine can be cut off and started again."""

    folder: Path
    dial: Dial
    run: RunSettings = field(default_factory=run_settings)
    load: Callable[[int], LocalData] = toy_data
    budgets: BudgetSettings = field(default_factory=BudgetSettings)
    clock: Callable[[], float] = time.time
    metered: dict[str, Metered] = field(default_factory=dict)
    """Agents whose joules are known; of the others nobody knows them."""
    limits: dict[str, Callable[[Meter, Path], Limits]] = field(default_factory=dict)
    """What makes the limits of an agent, of its meter and its vault."""
    conditions: Path | None = None
    """Root of the files that say under what conditions all agents work; nothing is told without."""
    threads: int = 1
    serve: dict[str, ServeSettings] = field(default_factory=dict)
    """Agents that answer requests, and how."""
    wall: WallSettings = field(default_factory=WallSettings)
    """Agents behind smart plugs."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    carry_out: dict[str, CarryOut] = field(default_factory=dict)
    """How agents work that do not only train."""
    utc: dict[str, Callable[[], float]] = field(default_factory=dict)
    """Agents whose clock is another."""
    hostile: dict[str, Attack] = field(default_factory=dict)
    """Agents that attack, and how."""
    privacy: dict[str, PrivacySettings] = field(default_factory=dict)
    """Agents that clip and blur what leaves them."""
    workers: int = 0
    """Ingest workers `w0`, `w1` and so on, which take the updates."""
    place: StoreSettings = field(default_factory=StoreSettings)
    """Where the store is."""
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    agents: dict[str, Agent] = field(default_factory=dict)
    engine: Engine | None = None
    store: Store | None = None

    async def coordinator(self) -> None:
        """Serve until cancelled."""
        settings = CoordinatorSettings(
            federation="test",
            folder=self.folder / "c",
            http=HttpSettings(enabled=False),
            run=self.run,
            budgets=self.budgets,
            wall=self.wall,
            rollout=self.rollout,
            workers=self.workers > 0,
            store=self.place,
        )
        will = (TOPICS.coordinator_presence, Presence(state="offline").model_dump_json().encode())
        with Store.open(settings.folder, clock=self.clock, place=self.place) as self.store:
            async with Live(self.store) as live:
                transport = self.dial("coordinator", will)
                wall = Wall(settings, transport=transport, store=self.store, live=live, tick_s=0.1)
                self.engine = Engine(
                    settings,
                    transport=transport,
                    store=self.store,
                    live=live,
                    clock=self.clock,
                    beside=[wall.run],
                )
                await self.engine.serve()

    async def agent(self, name: str, seed: int) -> None:
        """Live until cancelled."""
        settings = AgentSettings(
            agent=name,
            federation="test",
            vault=self.folder / name,
            data=DataSettings(kind="builtin", name="digits"),
            serve=self.serve.get(name, ServeSettings()),
            privacy=self.privacy.get(name, PrivacySettings()),
        )
        will = (TOPICS.of(name, "presence"), OFFLINE.model_dump_json().encode())
        metered, limits = self.metered.get(name), self.limits.get(name)
        attack, data = self.hostile.get(name), self.load
        carry_out = metered.carry_out if metered else self.carry_out.get(name)
        if attack is not None:
            carry_out, data = (
                hostile.carry_out(attack),
                lambda seed: hostile.poisoned(self.load(seed), attack),
            )
        with metered.meter if metered else Meter(DeviceProfile.load("unknown-linux")) as meter:
            self.agents[name] = hostile.agent_of(attack)(
                settings,
                transport=self.dial(name, will),
                meter=meter,
                profile="unknown-linux",
                threads=self.threads,
                load_data=lambda: data(seed),
                retry_s=0.05,
                carry_out=carry_out,
                utc=self.utc.get(name, time.time),
                limits=limits(meter, settings.vault) if limits else None,
                conditions=Conditions(self.conditions) if self.conditions else None,
            )
            await self.agents[name].run()

    async def worker(self, name: str) -> None:
        """Take updates until cancelled, with a store and a connection of its own."""
        with Store.open(self.folder / "c", place=self.place, sweep=False) as store:
            async with self.dial(name, ("", b"")) as transport:
                await Worker("test", transport=transport, store=store, name=name).serve()

    def start(self, name: str) -> None:
        """Start `coordinator`, a worker named `w<number>`, or an agent named `d<seed>`."""
        if name.startswith("w"):
            self.tasks[name] = asyncio.create_task(self.worker(name), name=name)
            return
        work = self.coordinator() if name == "coordinator" else self.agent(name, int(name[1:]))
        self.tasks[name] = asyncio.create_task(work, name=name)

    async def cut(self, name: str) -> None:
        """End one of them at once; its work in hand stays in its folder."""
        task = self.tasks.pop(name)
        task.cancel()
        await asyncio.wait([task])

    async def finished(self, within_s: float = 60) -> str:
        """Wait for the run's end and return how it ended; raises what ended a task before."""
        async with asyncio.timeout(within_s):
            while self.engine is None or not self.engine.finished.is_set() or self.engine.outcome is None:
                for task in self.tasks.values():
                    if task.done():
                        task.result()
                await asyncio.sleep(0.01)
        return self.engine.outcome

    def state(self) -> State:
        """Return the run's last state."""
        assert self.store is not None
        latest = self.store.latest_state(self.run.name)
        assert latest is not None
        return State.from_bytes(latest[1])


@contextlib.asynccontextmanager
async def fleet(
    folder: Path,
    dial: Dial,
    run: RunSettings | None = None,
    load: Callable[[int], LocalData] = toy_data,
    **more: Any,
) -> AsyncIterator[Fleet]:
    """A coordinator and agents d0, d1, d2, all started; everything is ended on the way out."""
    whole = Fleet(folder, dial, run or run_settings(), load, **more)
    try:
        for name in ("coordinator", *(f"w{i}" for i in range(whole.workers)), "d0", "d1", "d2"):
            whole.start(name)
        yield whole
    finally:
        for name in list(whole.tasks):
            await whole.cut(name)
