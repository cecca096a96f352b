"""A federation of virtual devices in one process: the real engine and the real agents, and no network.

Nothing is imitated but the wire, which is a broker in memory. Every device has its share of a data set, its
own vault and its own personal model; rounds, frames, receipts, checkpoints and snapshots are those of a real
federation, so a simulation that is stopped goes on in the same folder and ends at the same bits. Its training
can be spread over a Ray cluster, and real boards can join it over a real broker.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from rich.console import Console

from coordinator.settings import Robust, RunSettings
from coordinator.store.sql import Store
from coordinator.strategies.base import load_strategy
from edge_agent.datasets import load_shares, partition_problems
from edge_agent.samples import DataSettings
from foundation.errors import HedgerowError, SettingsError
from foundation.frozen import Frozen
from foundation.lock import hold
from foundation.mqtt import MqttSettings
from foundation.spec import ModelSettings
from foundation.topics import checked_name
from foundation.words import unknown
from hedgerow.hostile import Attack
from hedgerow.simulate_report import SimulationReport, Watch, gather
from hedgerow.simulate_tables import show
from hedgerow.virtual import RUN, Where, run

HERE = Where()
"""In this process, without a network."""
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
    device_models: tuple[ModelSettings, ...] = ()
    """Own models, dealt in turn, where the strategy lets devices differ; without them all have `model`."""
    dataset: str = "digits"
    """A built-in data set, or a `.npz` file that is shared."""
    partition: str = "dirichlet:0.3"
    limit: int | None = Field(None, ge=1)
    """Samples over all devices together; all of the data set when not set."""
    x: str | None = None
    y: str | None = None
    group: str | None = None
    split: str | None = None
    """Arrays of a `.npz`: samples, labels, groups (people, sites), and the part of each row."""
    seed: int = Field(0, ge=0)
    """Decides shares, initial model and batches."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the devices that is asked in each round."""
    late: int = Field(0, ge=0)
    """The last so many devices join late ..."""
    late_after: int = Field(0, ge=0)
    """... after this round."""
    boards: int = Field(0, ge=0, le=1000)
    """Real agents that are waited for, beside the virtual devices."""
    hostile: dict[int, Attack] = Field(default_factory=dict)
    """Devices, by number, that attack, and how: rehearses what `robust` is worth."""
    robust: Robust = Robust()
    deadline_s: float = Field(ROUND_S, gt=0)
    """For a round; matters where real boards take part."""
    profile: str = "auto"
    """Device profile for joules."""
    artifacts: bool = False
    """Whether the last round exports personal ONNX models."""

    @model_validator(mode="after")
    def _late_ones_can_be(self) -> Simulation:
        if bool(self.late) != bool(self.late_after):
            raise ValueError("late and late_after belong together: how many devices, and after which round")
        if self.late >= self.devices:
            raise ValueError(
                f"late: {self.late} of {self.devices} devices; some must be there from the start"
            )
        if wrong := [str(index) for index in self.hostile if not 0 <= index < self.devices]:
            raise ValueError(f"hostile: no device {', '.join(wrong)} among 0 to {self.devices - 1}")
        if self.late_after >= self.rounds:
            raise ValueError(f"late_after: no round is left after {self.late_after} of {self.rounds}")
        return self

    @property
    def names(self) -> list[str]:
        """Names of the virtual devices."""
        width = len(str(self.devices - 1))
        return [f"device-{index:0{width}d}" for index in range(self.devices)]

    @property
    def late_names(self) -> list[str]:
        """Names of those that join late."""
        return self.names[self.devices - self.late :]

    def data(self, index: int) -> DataSettings:
        """Return the `[data]` table of one device; shares after the last virtual device's are for boards."""
        arrays = {"x": self.x, "y": self.y, "group": self.group, "split": self.split}
        return DataSettings(
            kind="builtin",
            name=self.dataset,
            index=index,
            count=self.devices + self.boards,
            partition=self.partition,
            seed=self.seed,
            limit=self.limit,
            **{key: name for key, name in arrays.items() if name is not None},
        )

    def own_model(self, index: int) -> ModelSettings:
        """Return the model that a device has where devices may differ."""
        return self.device_models[index % len(self.device_models)] if self.device_models else self.model

    @property
    def own_units(self) -> dict[str, int]:
        """FFL units of one dense block of the devices that have a model of their own."""
        models = [self.own_model(index) for index in range(self.devices)] if self.device_models else []
        return {name: round(m.width * m.ffl_ratio) for name, m in zip(self.names, models, strict=False)}

    def asked(self, number: int) -> int:
        """Return how many agents round `number` asks."""
        away = self.late if number <= self.late_after else 0
        return max(1, round(self.fraction * (self.devices + self.boards - away)))

    def run(self) -> RunSettings:
        """Return what the coordinator is told."""
        return RunSettings(
            name=RUN,
            strategy=self.strategy,
            settings=self.settings,
            rounds=self.rounds,
            seed=self.seed,
            min_agents=self.devices + self.boards,
            fraction=self.fraction,
            late=dict.fromkeys(self.late_names, self.late_after + 1),
            deadline_s=self.deadline_s,
            export=self.artifacts,
            model=self.model,
            robust=self.robust,
        )


def simulation_of(**fields: Any) -> Simulation:
    """Return a simulation; raises `SettingsError` that says which field is wrong and why."""
    try:
        simulation = Simulation(**fields)
        simulation.data(0)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".lstrip(": ")
            for e in error.errors()
        )
        raise SettingsError("; ".join(problems)) from error
    strategy = load_strategy(simulation.strategy, simulation.settings)
    if simulation.device_models and not strategy.unequal:
        raise SettingsError(
            f"strategy {simulation.strategy} gives all devices one model: leave --device-model out, or choose"
            " a strategy for unequal models, such as mh_pfedhn"
        )
    return simulation


def where_of(
    engine: str = "process",
    ray_address: str | None = None,
    listen: str | None = None,
    federation: str = RUN,
) -> Where:
    """Return where a simulation runs; raises `SettingsError` for an unknown engine or a wrong address."""
    if engine not in ("process", "ray"):
        raise SettingsError(unknown("engine", engine, ("process", "ray")))
    if ray_address is not None and engine != "ray":
        raise SettingsError("a Ray address is for the engine ray: give --engine ray with --ray-address")
    broker = MqttSettings.from_url(listen) if listen is not None else None
    return Where(
        engine="ray" if engine == "ray" else "process",
        ray_address=ray_address,
        listen=broker,
        federation=checked_name(federation, "federation"),
    )


def run_command(
    fields: dict[str, Any],
    *,
    folder: Path | None = None,
    data_dir: Path | None = None,
    workers: int | None = None,
    engine: str = "process",
    ray_address: str | None = None,
    listen: str | None = None,
    federation: str = RUN,
    as_json: bool = False,
) -> int:
    """Simulate what `fields` describe, show progress and result, and return the exit code.

    Without `folder`, nothing is kept. `listen` is the address of a broker, for boards that join.
    """
    console = Console(stderr=as_json)
    try:
        simulation = simulation_of(**fields)
        where = where_of(engine, ray_address, listen, federation)
        console.print(_title(simulation), highlight=False)
        for warning in problems_of(simulation, data_dir):
            console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
        asked = [simulation.asked(number) for number in range(1, simulation.rounds + 1)]
        with _kept_or_not(folder) as place, Watch(console, simulation.rounds, asked) as watch:
            report = simulate(simulation, place, data_dir=data_dir, workers=workers, where=where, watch=watch)
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


def _title(simulation: Simulation) -> str:
    return (
        f"[bold]hedgerow simulate[/bold]: {simulation.devices} devices, {simulation.strategy},"
        f" {simulation.dataset} ({simulation.partition}), {simulation.rounds} rounds, seed {simulation.seed}"
    )


def problems_of(simulation: Simulation, data_dir: Path | None = None) -> list[str]:
    """Return what to know of the devices' shares before anything runs; raises as `partition_problems`."""
    strategy = load_strategy(simulation.strategy, simulation.settings)
    return partition_problems(simulation.data(0), data_dir, strategy.batch_size)


def simulate(
    simulation: Simulation,
    folder: Path,
    *,
    data_dir: Path | None = None,
    workers: int | None = None,
    where: Where = HERE,
    watch: Watch | None = None,
) -> SimulationReport:
    """Run the federation in `folder`, or go on with the one that is there; returns what came of it.

    At most `workers` devices train at once (default: one for each core, or all there are in the Ray cluster),
    with one thread of arithmetic each. Raises `SettingsError` when the folder holds another simulation or
    boards are to come without a broker, `DataError` when a share cannot be had, `RoundError` when the run
    fails.
    """
    if simulation.boards and where.listen is None:
        raise SettingsError("boards come over a broker: give --listen mqtt://host:port with --boards")
    # Loaded here, before several threads ask for it at once.
    importlib.import_module("edge_agent.training.trainer")
    started = time.monotonic()
    with hold(folder, "simulation"):
        _remember(simulation, folder)
        if not _is_finished(folder):
            if watch:
                watch.say("reading the data")
            data = load_shares(simulation.data(0), data_dir)[: simulation.devices]
            run(simulation, folder, data, where, workers=workers, watch=watch)
        with Store.open(_store(folder)) as store:
            return gather(
                store,
                RUN,
                simulation.model_dump(mode="json"),
                time.monotonic() - started,
                late=simulation.late_names,
                hidden=simulation.own_units,
            )


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
