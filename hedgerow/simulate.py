"""A federation of virtual devices in one process: the real engine and the real agents, and no network.

Nothing is imitated but the wire, which is a broker in memory. Every device has its share of a data set, its
own vault and its own personal model; rounds, frames, receipts, checkpoints and snapshots are those of a real
federation, so a simulation that is stopped goes on in the same folder and ends at the same bits.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pydantic import Field, ValidationError
from rich.console import Console

from coordinator.engine import Engine
from coordinator.live import Live
from coordinator.settings import CoordinatorSettings, HttpSettings, ModelSettings, RunSettings
from coordinator.store.sql import Store
from coordinator.strategies.base import load_strategy
from edge_agent.agent import OFFLINE, Agent
from edge_agent.datasets import load
from edge_agent.energy.meter import Meter
from edge_agent.energy.sensor import find_sensors
from edge_agent.energy.utilisation import ProcessShare
from edge_agent.samples import DataSettings, LocalData
from edge_agent.settings import AgentSettings
from foundation.errors import HedgerowError, RoundError, SettingsError
from foundation.frozen import Frozen
from foundation.lock import hold
from foundation.profile import DeviceProfile
from foundation.topics import Topics
from foundation.transport import MemoryBroker, MemoryTransport
from hedgerow.simulate_report import SimulationReport, Watch, gather, show

P = ParamSpec("P")
T = TypeVar("T")

RUN = "simulation"
"""Name of the run, and of the federation."""
ROUND_S = 7 * 24 * 3600.0
"""Deadline of a round: nobody is late here, however many devices share few cores."""


class Simulation(Frozen):
    """What is simulated: everything that the result depends on, and nothing else."""

    devices: int = Field(10, ge=1, le=10_000)
    rounds: int = Field(10, ge=1)
    strategy: str = "pfl_tpp"
    settings: dict[str, Any] = Field(default_factory=dict)
    """The strategy's hyperparameters."""
    model: ModelSettings = ModelSettings()
    dataset: str = "digits"
    partition: str = "dirichlet:0.3"
    limit: int | None = Field(None, ge=1)
    """Samples over all devices together; all of the data set when not set."""
    seed: int = Field(0, ge=0)
    """Decides shares, initial model and batches."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the devices that is asked in each round."""
    profile: str = "auto"
    """Device profile for joules."""
    artifacts: bool = False
    """Whether the last round exports personal ONNX models."""

    def data(self, index: int) -> DataSettings:
        """Return the `[data]` table of one device."""
        return DataSettings(
            kind="builtin",
            name=self.dataset,
            index=index,
            count=self.devices,
            partition=self.partition,
            seed=self.seed,
            limit=self.limit,
        )

    def run(self) -> RunSettings:
        """Return what the coordinator is told."""
        return RunSettings(
            name=RUN,
            strategy=self.strategy,
            settings=self.settings,
            rounds=self.rounds,
            seed=self.seed,
            min_agents=self.devices,
            fraction=self.fraction,
            deadline_s=ROUND_S,
            export=self.artifacts,
            model=self.model,
        )


def simulation_of(**fields: Any) -> Simulation:
    """Return a simulation; raises `SettingsError` that says which field is wrong and why."""
    try:
        simulation = Simulation(**fields)
        simulation.data(0)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors())
        raise SettingsError("; ".join(problems)) from error
    load_strategy(simulation.strategy, simulation.settings)
    return simulation


def run_command(
    fields: dict[str, Any],
    *,
    folder: Path | None = None,
    data_dir: Path | None = None,
    workers: int | None = None,
    as_json: bool = False,
) -> int:
    """Simulate what `fields` describe, show progress and result, and return the exit code.

    Without `folder`, nothing is kept.
    """
    console = Console(stderr=as_json)
    try:
        simulation = simulation_of(**fields)
        console.print(
            f"[bold]hedgerow simulate[/bold]: {simulation.devices} devices, {simulation.strategy},"
            f" {simulation.dataset} ({simulation.partition}), {simulation.rounds} rounds,"
            f" seed {simulation.seed}",
            highlight=False,
        )
        with _kept_or_not(folder) as place, Watch(console, simulation.rounds, simulation.devices) as watch:
            report = simulate(simulation, place, data_dir=data_dir, workers=workers, watch=watch)
    except KeyboardInterrupt:
        again = f": the same command goes on in {folder}" if folder else ""
        console.print(f"\n[yellow]stopped[/yellow]{again}", highlight=False)
        return 130
    except HedgerowError as error:
        console.print("[red]the simulation failed:[/red] ", end="")
        console.print(str(error), markup=False, highlight=False)
        return 2 if isinstance(error, SettingsError) else 1
    show(report, console)
    if as_json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    return 0


def simulate(
    simulation: Simulation,
    folder: Path,
    *,
    data_dir: Path | None = None,
    workers: int | None = None,
    watch: Watch | None = None,
) -> SimulationReport:
    """Run the federation in `folder`, or go on with the one that is there; returns what came of it.

    At most `workers` devices train at once (default: one for each core), with one thread of arithmetic
    each. Raises `SettingsError` when the folder holds another simulation, `DataError` when a share cannot
    be had, `RoundError` when the run fails.
    """
    # Loaded here, before several threads ask for it at once.
    importlib.import_module("edge_agent.training.trainer")
    started = time.monotonic()
    with hold(folder, "simulation"), ThreadPoolExecutor(workers or os.cpu_count() or 1, "device") as pool:
        _remember(simulation, folder)
        if not _is_finished(folder):
            if watch:
                watch.say("reading the data")
            read = partial(_read, simulation, data_dir)
            data = list(pool.map(read, range(simulation.devices)))
            asyncio.run(_federate(simulation, folder, data, pool, watch))
        with Store.open(_store(folder)) as store:
            return gather(store, RUN, simulation.model_dump(mode="json"), time.monotonic() - started)


def _read(simulation: Simulation, data_dir: Path | None, index: int) -> LocalData:
    return load(simulation.data(index), data_dir)


# --- the folder ----------------------------------------------------------------------------------


@contextmanager
def _kept_or_not(folder: Path | None) -> Iterator[Path]:
    """Give the folder, or a temporary one that goes at the end."""
    if folder is not None:
        yield folder
        return
    temporary = Path(tempfile.mkdtemp(prefix="hedgerow-simulate-"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _store(folder: Path) -> Path:
    return folder / "coordinator"


def _remember(simulation: Simulation, folder: Path) -> None:
    """Write down what is simulated here; raises `SettingsError` when it is something else already."""
    path = folder / "simulation.json"
    if not path.exists():
        beside = path.with_suffix(".tmp")
        beside.write_text(simulation.model_dump_json(indent=2))
        beside.replace(path)
        return
    try:
        found = Simulation.model_validate_json(path.read_text()).model_dump()
    except ValidationError as error:
        raise SettingsError(f"{path} cannot be read: give --folder another folder") from error
    wanted = simulation.model_dump()
    other = [f"{key} is {found[key]!r}, not {wanted[key]!r}" for key in wanted if found[key] != wanted[key]]
    if other:
        raise SettingsError(
            f"{folder} holds another simulation ({'; '.join(other)}): repeat its options to go on with it, or"
            " give --folder another folder"
        )


def _is_finished(folder: Path) -> bool:
    with Store.open(_store(folder)) as store:
        return store.has_run(RUN) and store.run(RUN).state == "finished"


# --- the federation ------------------------------------------------------------------------------


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

    def cpu_s(self) -> float:
        """Return CPU seconds so far; brought up to date by whoever asks from inside the work.

        The meter asks at every edge of a stage, and those of the work are in the worker's own thread.
        """
        if threading.get_ident() == self._thread:
            self._known = self._offset + time.thread_time()
        return self._known


async def _federate(
    simulation: Simulation, folder: Path, data: Sequence[LocalData], pool: Executor, watch: Watch | None
) -> None:
    """Run coordinator and devices until the run is over; raises `RoundError` when it failed."""
    broker = MemoryBroker()
    settings = CoordinatorSettings(
        federation=RUN, folder=_store(folder), http=HttpSettings(enabled=False), run=simulation.run()
    )
    profile = (
        DeviceProfile.detect() if simulation.profile == "auto" else DeviceProfile.load(simulation.profile)
    )
    with Store.open(settings.folder) as store:
        async with Live(store) as live:
            engine = Engine(settings, transport=MemoryTransport(broker), store=store, live=live)
            lives = [engine.serve()]
            lives += [
                _device(simulation, folder, index, own, broker, profile, Desk(pool))
                for index, own in enumerate(data)
            ]
            if watch is not None:
                hidden = round(simulation.model.width * simulation.model.ffl_ratio)
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


async def _device(
    simulation: Simulation,
    folder: Path,
    index: int,
    data: LocalData,
    broker: MemoryBroker,
    profile: DeviceProfile,
    desk: Desk,
) -> None:
    """Live as one device until cancelled."""
    name = f"device-{index:0{len(str(simulation.devices - 1))}d}"
    settings = AgentSettings(
        agent=name, federation=RUN, vault=folder / name, profile=profile.id, data=simulation.data(index)
    )
    will = (Topics(RUN).of(name, "presence"), OFFLINE.model_dump_json().encode())
    with _meter(profile, simulation.devices, desk) as meter:
        agent = Agent(
            settings,
            transport=MemoryTransport(broker, will=will),
            meter=meter,
            profile=profile.id,
            threads=1,
            load_data=lambda: data,
            training=desk,
        )
        await agent.run()


def _meter(profile: DeviceProfile, devices: int, desk: Desk) -> Meter:
    """Return a meter that charges a device its work's share of this machine, as the demo does its process's.

    Counters and models need no thread that samples; with hundreds of devices that is worth a lot.
    """
    model = profile.model
    sensors = [
        ProcessShare(sensor, devices, own=desk.cpu_s, u_rel=model.relative_net if model else None)
        for sensor in find_sensors(profile)
    ]
    return Meter(profile, sensors, threaded=not all(sensor.cumulative for sensor in sensors))
