"""Virtual devices: agents that share a process, its workers and its broker with the coordinator."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from coordinator.engine import Engine
from coordinator.live import Live
from coordinator.settings import CoordinatorSettings, HttpSettings
from coordinator.store.sql import Store
from edge_agent.agent import OFFLINE
from edge_agent.energy.meter import Meter
from edge_agent.energy.sensor import EnergySensor, find_sensors
from edge_agent.energy.utilisation import ProcessShare, Utilisation
from edge_agent.samples import LocalData
from edge_agent.settings import AgentSettings
from foundation.errors import RoundError
from foundation.messages import Presence
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.profile import DeviceProfile
from foundation.topics import Topics
from foundation.transport import MemoryBroker, MemoryTransport, Transport
from hedgerow import hostile
from hedgerow.simulate_report import Watch

if TYPE_CHECKING:
    from hedgerow.simulate import Simulation
    from hedgerow.simulate_ray import RayCrew

P = ParamSpec("P")
T = TypeVar("T")

Dial = Callable[[str, tuple[str, bytes]], Transport]
"""Connects one client, given its name and its last will (topic and body)."""

RUN = "simulation"
"""Name of the run, and of the federation."""


@dataclass(frozen=True)
class Where:
    """Where a simulation runs; nothing of it changes the result."""

    engine: Literal["process", "ray"] = "process"
    """What trains: threads of this process, or the workers of a Ray cluster."""
    ray_address: str | None = None
    """Without it, a Ray of this machine's own is started."""
    listen: MqttSettings | None = None
    """A broker to talk over, so that boards can join; without it there is no network."""
    federation: str = RUN
    """Its name on that broker."""


class Desk(Executor):
    """One device's place at the shared workers; counts the CPU seconds of its own work."""

    def __init__(self, workers: Executor) -> None:
        self._workers = workers
        self._thread: int | None = None
        self._offset = 0.0
        self._known = 0.0

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue work for whichever worker is free next."""
        return self._workers.submit(self._counted, partial(work, *args, **kwargs))

    def _counted(self, work: Callable[[], T]) -> T:
        self._offset = self._known - time.thread_time()
        self._thread = threading.get_ident()
        try:
            return work()
        finally:
            self.cpu_s()
            self._thread = None

    def charge(self, seconds: float) -> None:
        """Count CPU seconds that the work in hand took in another process."""
        self._offset += seconds

    def cpu_s(self) -> float:
        """Return CPU seconds so far; brought up to date by whoever asks from inside the work.

        The meter asks at every edge of a stage, and those of the work are in the worker's own thread.
        """
        if threading.get_ident() == self._thread:
            self._known = self._offset + time.thread_time()
        return self._known


class Clock:
    """The monotonic clock; it can be held while work is done elsewhere, and moved by what was measured there.

    Let go, it jumps to the present, so that waiting for a free worker is nobody's training time.
    """

    def __init__(self) -> None:
        self._held: float | None = None

    def __call__(self) -> float:
        """Return seconds."""
        held = self._held
        return time.monotonic() if held is None else held

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stand still while this is open."""
        self._held = time.monotonic()
        try:
            yield
        finally:
            self._held = None

    def move(self, seconds: float) -> None:
        """Go on by what took so long elsewhere, while held."""
        if self._held is None:
            raise RuntimeError("the clock is not held")
        self._held += seconds


def meter(profile: DeviceProfile, devices: int, desk: Desk) -> Meter:
    """Return a meter that charges a device its work's share of this machine, as the demo does its process's.

    Counters and models need no thread that samples; with hundreds of devices that is worth a lot.
    """
    net = profile.model.relative_net if profile.model else None
    sensors = [ProcessShare(sensor, devices, own=desk.cpu_s, u_rel=net) for sensor in find_sensors(profile)]
    return Meter(profile, sensors, threaded=not all(sensor.cumulative for sensor in sensors))


def meter_elsewhere(profile: DeviceProfile, devices: int, desk: Desk, clock: Clock) -> Meter:
    """Return a meter for work that other machines do: the profile's model of the CPU time that it took there.

    No sensor of this machine sees that work, so there is the model or nothing.
    """
    sensors: list[EnergySensor] = []
    if profile.model is not None:
        model = Utilisation(profile.model, busy=desk.cpu_s)
        net = profile.model.relative_net
        sensors = [ProcessShare(model, devices, busy=desk.cpu_s, own=desk.cpu_s, u_rel=net)]
    return Meter(profile, sensors, clock=clock, threaded=False)


@dataclass(frozen=True)
class _Fleet:
    """What all virtual devices share."""

    simulation: Simulation
    folder: Path
    federation: str
    dial: Dial
    profile: DeviceProfile
    pool: Executor
    crew: RayCrew | None

    async def live(self, index: int, name: str, data: LocalData) -> None:
        """Live as one device until cancelled."""
        devices = self.simulation.devices
        settings = AgentSettings(
            agent=name,
            federation=self.federation,
            vault=self.folder / name,
            profile=self.profile.id,
            data=self.simulation.data(index),
            model=self.simulation.own_model(index),
        )
        desk, clock = Desk(self.pool), Clock()
        if self.crew is None:
            own, carry_out = meter(self.profile, devices, desk), None
        else:
            own = meter_elsewhere(self.profile, devices, desk, clock)
            carry_out = self.crew.carry_out(data, desk, clock, own)
        will = (Topics(self.federation).of(name, "presence"), OFFLINE.model_dump_json().encode())
        attack = self.simulation.hostile.get(index)
        if attack is not None:
            data = hostile.poisoned(data, attack)
        with own:
            agent = hostile.agent_of(attack)(
                settings,
                transport=self.dial(name, will),
                meter=own,
                profile=self.profile.id,
                threads=1,
                load_data=lambda: data,
                training=desk,
                carry_out=carry_out if attack is None else hostile.carry_out(attack, carry_out),
            )
            await agent.run()


def run(
    simulation: Simulation,
    folder: Path,
    data: Sequence[LocalData],
    where: Where,
    *,
    workers: int | None = None,
    watch: Watch | None = None,
) -> None:
    """Run coordinator and devices in `folder` until the run is over; raises `RoundError` when it failed."""
    with ExitStack() as stack:
        crew = stack.enter_context(_crew(where, workers)) if where.engine == "ray" else None
        places = crew.workers if crew else workers or os.cpu_count() or 1
        pool = stack.enter_context(ThreadPoolExecutor(places, "device"))
        auto = simulation.profile == "auto"
        profile = DeviceProfile.detect() if auto else DeviceProfile.load(simulation.profile)
        fleet = _Fleet(simulation, folder, where.federation, _dial(where), profile, pool, crew)
        if watch and where.listen:
            watch.tell(how_to_join(simulation, where, data[0]))
        asyncio.run(_federate(fleet, data, watch))


def _crew(where: Where, workers: int | None) -> RayCrew:
    from hedgerow.simulate_ray import RayCrew  # Ray is an extra

    return RayCrew(where.ray_address, workers)


def _dial(where: Where) -> Dial:
    if where.listen is None:
        broker = MemoryBroker()
        return lambda client, will: MemoryTransport(broker, will=will)
    settings, federation = where.listen, where.federation
    return lambda client, will: MqttTransport(settings, f"{federation}-{client}", will=will)


def how_to_join(simulation: Simulation, where: Where, like: LocalData) -> str:
    """Return what the owner of a board writes into its `agent.toml`."""
    boards, s = simulation.boards, simulation
    head = f"waiting for {boards} more agent{'s' * (boards > 1)}" if boards else "boards can join"
    labels = ", ".join(like.labels[:12]) + (", ..." if like.classes > 12 else "")
    lines = [
        f"{head}; in agent.toml, beside a name of its own:",
        f'  federation = "{where.federation}"',
    ]
    if where.listen is not None:
        broker = where.listen
        lines.append(f'  mqtt = {{ host = "{broker.host}", port = {broker.port} }}')
    lines.append(f"  [data]: {like.input} of shape {like.shape}, labels {labels}")
    if boards:
        numbers = f"{s.devices}" if boards == 1 else f"{s.devices} to {s.devices + boards - 1}"
        shared = s.data(s.devices).model_dump(mode="json", exclude_unset=True, exclude={"index"})
        table = ", ".join(
            f"{key} = {json.dumps(value)}" for key, value in shared.items() if value is not None
        )
        lines.append(f"  or the share that is kept for it: {table}, index = {numbers}")
    return "\n".join(lines)


async def _federate(fleet: _Fleet, data: Sequence[LocalData], watch: Watch | None) -> None:
    simulation = fleet.simulation
    settings = CoordinatorSettings(
        federation=fleet.federation,
        folder=fleet.folder / "coordinator",
        http=HttpSettings(enabled=False),
        run=simulation.run(),
    )
    presence = Topics(fleet.federation).coordinator_presence
    will = (presence, Presence(state="offline").model_dump_json().encode())
    with Store.open(settings.folder) as store:
        async with Live(store) as live:
            engine = Engine(settings, transport=fleet.dial("coordinator", will), store=store, live=live)
            lives = [engine.serve()]
            devices = zip(simulation.names, data, strict=True)
            lives += [fleet.live(index, name, own) for index, (name, own) in enumerate(devices)]
            if watch is not None:
                model = simulation.model
                hidden = 0 if simulation.device_models else round(model.width * model.ffl_ratio)
                lives.append(watch.follow(live.listen(), hidden))
            tasks = [asyncio.create_task(life) for life in lives]
            over = asyncio.create_task(engine.finished.wait())
            try:
                await asyncio.wait([over, *tasks], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await live.flush()
                for task in (over, *tasks):
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
            for outcome in ended:
                if isinstance(outcome, Exception):
                    raise outcome
            if engine.outcome != "finished":
                raise RoundError(
                    str(live.snapshot().detail.get("reason", "the run stopped without a reason"))
                )
