"""What `hedgerow simulate` finds is what a federation of real processes over MQTT finds, to the bit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.store.sql import Store
from edge_agent.settings import AgentSettings
from foundation.mqtt import MqttSettings
from hedgerow.broker import EmbeddedBroker, find_broker
from hedgerow.children import spawn
from hedgerow.simulate import Simulation, simulate, simulation_of
from hedgerow.simulate_report import SimulationReport
from hedgerow.virtual import RUN, Where
from tests.conftest import LONG, require_service
from tests.processes import Processes, sets

pytestmark = [pytest.mark.broker, pytest.mark.slow]

Figures = list[tuple[Any, ...]]


def small(strategy: str, **changes: Any) -> Simulation:
    settings: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2}
    if strategy == "pfl_tpp":
        settings |= {"warm_up": 0, "every": 1, "threshold_rate": 0.2, "encoding": "float16"}
    fields: dict[str, Any] = {
        "devices": 3,
        "rounds": 2,
        "partition": "dirichlet:0.5",
        "limit": 240,
        "seed": 7,
        "strategy": strategy,
        "settings": settings,
        "model": {"width": 16, "heads": 2, "ffl_ratio": 2},
    }
    return simulation_of(**(fields | changes))


class RealDevices(Processes):
    """The same devices as those of a simulation, each a process of its own."""

    simulation: Simulation

    def agent_command(self, name: str) -> list[str]:
        """Return how one device is started, of the names that the simulation gives them."""
        s = self.simulation
        settings = AgentSettings(
            agent=name,
            federation="test",
            vault=self.vault(name),
            profile="unknown-linux",
            threads=1,
            mqtt=MqttSettings(port=self.port),
            data=s.data(s.names.index(name)),
        )
        table = settings.model_dump(mode="json", exclude_unset=True)
        return [sys.executable, "-m", "edge_agent", *sets(table)]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    require_service(find_broker() is not None, "MQTT broker")
    with EmbeddedBroker(tmp_path / "broker") as running:
        yield running


def figures_of(store: Store, run: str) -> Figures:
    """Everything that training decides, of every device and round."""
    return [
        (u.round, u.agent, u.summary["examples"], u.summary["kept_units"], *results(u.summary["metrics"]))
        for u in store.history(run)
    ]


def results(metrics: dict[str, float]) -> list[tuple[str, float]]:
    """All but what a clock decides."""
    return sorted((name, value) for name, value in metrics.items() if name not in ("step_ms", "cpu_s"))


def simulated(simulation: Simulation, folder: Path, **how: Any) -> tuple[Figures, bytes, SimulationReport]:
    report = simulate(simulation, folder, workers=2, **how)
    with Store.open(folder / "coordinator") as store:
        latest = store.latest_state(RUN)
        assert latest is not None
        return figures_of(store, RUN), latest[1], report


def test_a_simulation_equals_real_processes_over_mqtt(tmp_path: Path, broker: EmbeddedBroker) -> None:
    real = RealDevices(tmp_path, broker.port)
    try:
        for strategy in ("pfl_tpp", "fedavg"):
            simulation = real.simulation = small(strategy)
            expected, state, report = simulated(simulation, tmp_path / f"simulated-{strategy}")
            assert len(expected) == 3 * 2
            assert len({d.accuracy for d in report.devices}) > 1  # so that equality says something
            for name in simulation.names:
                if name not in real.children:
                    real.start_agent(name)
            real.start_coordinator(simulation.run().model_copy(update={"name": strategy}))
            assert real.finished(strategy) == state
            with real.store(strategy) as store:
                assert figures_of(store, strategy) == expected
    finally:
        real.close()


@LONG
def test_a_board_in_place_of_a_virtual_device_changes_nothing(tmp_path: Path, broker: EmbeddedBroker) -> None:
    """A real `python -m edge_agent`, under the name and with the share of the third device, joins two."""
    expected, state, _ = simulated(small("pfl_tpp"), tmp_path / "all-virtual")
    simulation = small("pfl_tpp", devices=2, boards=1, deadline_s=120)
    where = Where(listen=MqttSettings.from_url(broker.url), federation="greenhouse")
    settings = AgentSettings(
        agent="device-2",
        federation="greenhouse",
        vault=tmp_path / "board",
        profile="unknown-linux",
        threads=1,
        mqtt=MqttSettings(port=broker.port),
        data=simulation.data(2),
    )
    table = settings.model_dump(mode="json", exclude_unset=True)
    command = [sys.executable, "-m", "edge_agent", *sets(table)]
    board = spawn("board", command, tmp_path / "board.log", dict(os.environ))
    try:
        found, mixed, _ = simulated(simulation, tmp_path / "mixed", where=where)
        assert board.process.poll() is None, board.tail()
        assert mixed == state
        assert found == expected
        assert (tmp_path / "board" / "personal" / RUN).is_dir()
        assert not (tmp_path / "mixed" / "device-2").exists()
    finally:
        board.process.terminate()
        board.process.wait(20)
