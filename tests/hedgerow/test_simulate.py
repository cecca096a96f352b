from __future__ import annotations

import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from foundation.energy import Kind
from foundation.errors import DataError, SettingsError
from hedgerow.cli import app
from hedgerow.simulate import Simulation, simulate, simulation_of
from hedgerow.simulate_report import SimulationReport, Watch
from hedgerow.simulate_tables import show
from hedgerow.virtual import Desk


def small(**changes: Any) -> Simulation:
    fields: dict[str, Any] = {
        "devices": 3,
        "rounds": 2,
        "partition": "iid",
        "limit": 240,
        "settings": {"epochs": 4, "warm_up": 0, "every": 1, "threshold_rate": 0.2, "learning_rate": 1e-2},
        "model": {"width": 16, "heads": 2, "ffl_ratio": 2},
        "profile": "raspberry-pi-4b",
    }
    return simulation_of(**(fields | changes))


def figures(report: SimulationReport) -> list[tuple[Any, ...]]:
    """Everything that must not depend on when and where it was computed."""
    return [(d.round, d.agent, d.examples, d.accuracy_sent, d.accuracy, d.kept_units) for d in report.devices]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> SimulationReport:
    return simulate(small(), tmp_path_factory.mktemp("simulation") / "a", workers=2)


def test_every_device_has_its_figures_in_every_round(report: SimulationReport) -> None:
    assert [(d.round, d.agent) for d in report.devices] == [
        (number, f"device-{index}") for number in (1, 2) for index in range(3)
    ]
    assert [r.devices for r in report.rounds] == [3, 3]
    for d in report.devices:
        assert 0 <= d.accuracy <= 1
        assert len(d.kept_units) == report.spec.depth == 2
        assert min(d.down_bytes, d.up_bytes, d.train_s) > 0
    last = report.rounds[-1]
    kept = sum(sum(d.kept_units) for d in report.devices if d.round == 2)
    assert last.units_gone == pytest.approx(1 - kept / (3 * 2 * report.spec.hidden))
    assert last.units_gone > 0
    assert not report.artifacts
    assert not report.refusals


def test_joules_are_modelled_and_belong_to_the_work(report: SimulationReport) -> None:
    assert {d.energy.kind for d in report.devices} == {Kind.MODELLED}
    assert all(d.energy.joules and d.energy.joules > 0 for d in report.devices)
    assert set(report.rounds[0].joules) == {Kind.MODELLED}


def test_workers_do_not_change_the_result(report: SimulationReport, tmp_path: Path) -> None:
    assert figures(simulate(small(), tmp_path, workers=1)) == figures(report)


def test_a_finished_folder_is_read_and_not_run_again(tmp_path: Path) -> None:
    first = simulate(small(rounds=1, artifacts=True), tmp_path)
    again = simulate(small(rounds=1, artifacts=True), tmp_path)
    assert again.model_dump(exclude={"seconds"}) == first.model_dump(exclude={"seconds"})
    assert [m.agent for m in again.artifacts] == ["device-0", "device-1", "device-2"]
    assert (tmp_path / "device-1" / "artifacts" / "current" / "model.onnx").exists()


def test_a_folder_of_another_simulation_is_refused_by_name(tmp_path: Path) -> None:
    simulate(small(rounds=1), tmp_path)
    with pytest.raises(SettingsError, match="seed is 0, not 1"):
        simulate(small(rounds=1, seed=1), tmp_path)


def test_an_interrupted_simulation_goes_on_to_the_same_end(report: SimulationReport, tmp_path: Path) -> None:
    class Interrupting(Watch):
        def _show(self) -> None:
            if self._round == 1 and self._updates == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(small(), tmp_path, watch=Interrupting(Console(file=io.StringIO()), 2, 3))
    assert figures(simulate(small(), tmp_path)) == figures(report)


def test_what_cannot_be_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="partition"):
        simulation_of(partition="nearly")
    with pytest.raises(SettingsError, match="targt"):
        simulation_of(settings={"targt": 0.9})
    with pytest.raises(SettingsError, match="no strategy"):
        simulation_of(strategy="fedfoo")
    with pytest.raises(SettingsError, match="devices"):
        simulation_of(devices=0)
    with pytest.raises(DataError, match="HEDGEROW_DATA"):
        simulate(simulation_of(dataset="mnist"), tmp_path)


def test_a_desk_counts_the_cpu_of_its_own_work_alone() -> None:
    def burn(seconds: float) -> str:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass
        return threading.current_thread().name

    with ThreadPoolExecutor(1, "worker") as pool:
        mine, other = Desk(pool), Desk(pool)
        assert mine.submit(burn, 0.05).result().startswith("worker")
        other.submit(burn, 0.1).result()
        mine.submit(burn, 0.05).result()
        with pytest.raises(ZeroDivisionError):
            mine.submit(lambda: 1 / 0).result()
    assert 0.1 <= mine.cpu_s() < 0.2
    assert 0.1 <= other.cpu_s() < 0.2


def test_the_tables_fit_80_columns_and_the_lines_tell_the_rounds(tmp_path: Path) -> None:
    paper = io.StringIO()
    console = Console(file=paper, width=80)
    with Watch(console, 2, 3) as watch:
        told = simulate(small(), tmp_path, watch=watch)
    show(told, console)
    text = paper.getvalue()
    assert "round 1/2  accuracy" in text
    assert "round 2/2  accuracy" in text
    assert "…" not in text
    assert "modelled" in text


def test_the_command_prints_json_and_says_what_is_wrong() -> None:
    options = ["simulate", "--devices", "2", "--rounds", "1", "--limit", "100", "--partition", "iid"]
    good = CliRunner().invoke(app, [*options, "--set", "epochs=0", "--model", "width=8", "--json"])
    assert good.exit_code == 0, good.output
    found = json.loads(good.stdout)
    assert len(found["devices"]) == 2
    assert found["simulation"]["settings"] == {"epochs": 0}
    bad = CliRunner().invoke(app, [*options, "--model", "widht=8"])
    assert bad.exit_code == 2
    assert "widht" in bad.output
