"""Late joiners, unequal models, data of one's own and what the report makes of many devices."""

from __future__ import annotations

import io
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from coordinator.strategies.base import available, load_strategy
from edge_agent.datasets import load, load_shares
from edge_agent.samples import DataSettings
from foundation.errors import DataError, SettingsError
from foundation.mqtt import MqttSettings
from hedgerow.cli import STRATEGIES, app
from hedgerow.simulate import Simulation, simulate, simulation_of
from hedgerow.simulate_report import SimulationReport, Watch, worst_tenth
from hedgerow.simulate_tables import show
from hedgerow.virtual import Clock, Where, how_to_join


def small(**changes: Any) -> Simulation:
    fields: dict[str, Any] = {
        "devices": 4,
        "rounds": 3,
        "strategy": "fedavg",
        "partition": "iid",
        "limit": 200,
        "settings": {"epochs": 1, "learning_rate": 1e-2},
        "model": {"width": 8, "heads": 2, "ffl_ratio": 2},
    }
    return simulation_of(**(fields | changes))


def printed(report: SimulationReport) -> str:
    paper = io.StringIO()
    show(report, Console(file=paper, width=80))
    return paper.getvalue()


# --- late joiners --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_late(tmp_path_factory: pytest.TempPathFactory) -> SimulationReport:
    return simulate(small(late=2, late_after=1), tmp_path_factory.mktemp("late") / "a")


def test_late_devices_are_not_asked_before_their_round(with_late: SimulationReport) -> None:
    asked = {number: [d.agent for d in with_late.devices if d.round == number] for number in (1, 2, 3)}
    early, everyone = ["device-0", "device-1"], [f"device-{index}" for index in range(4)]
    assert asked == {1: early, 2: everyone, 3: everyone}


def test_the_report_shows_late_devices_in_their_first_rounds(with_late: SimulationReport) -> None:
    first, second = with_late.late
    assert (first.turn, first.rounds, first.devices) == (1, (2,), 2)
    assert (second.turn, second.rounds, second.devices) == (2, (3,), 2)
    in_two = {d.agent: d for d in with_late.devices if d.round == 2}
    late, others = [in_two[f"device-{i}"] for i in (2, 3)], [in_two[f"device-{i}"] for i in (0, 1)]
    assert first.accuracy_sent == statistics.fmean(d.accuracy_sent for d in late)
    assert first.accuracy == statistics.fmean(d.accuracy for d in late)
    assert first.others == statistics.fmean(d.accuracy for d in others)
    assert "late joiners" in printed(with_late)


def test_nobody_is_late_unless_asked(tmp_path: Path) -> None:
    report = simulate(small(rounds=1), tmp_path)
    assert not report.late
    assert "late" not in printed(report)
    assert small().run().late == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"late": 2}, "belong together"),
        ({"late_after": 2}, "belong together"),
        ({"late": 4, "late_after": 1}, "some must be there from the start"),
        ({"late": 1, "late_after": 3}, "no round is left after 3 of 3"),
    ],
)
def test_late_joiners_that_cannot_be_are_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        small(**changes)


def test_the_eta_counts_whom_the_rounds_ask() -> None:
    simulation = small(devices=10, rounds=3, fraction=0.5, late=4, late_after=2)
    asked = [simulation.asked(number) for number in (1, 2, 3)]
    assert asked == [3, 3, 5]
    watch = Watch(Console(file=io.StringIO()), 3, asked)
    watch._round, watch._updates = 3, 4
    assert watch._done == 3 + 3 + 4


# --- the report ----------------------------------------------------------------------------------


def test_worst_tenth_and_spread_stand_beside_the_mean(with_late: SimulationReport) -> None:
    assert worst_tenth([0.5, 0.1, 0.9]) == 0.1
    assert worst_tenth([0.9] * 10 + [0.2, 0.1]) == pytest.approx(0.15)
    last = with_late.last
    sent, after = ([getattr(d, what) for d in with_late.devices if d.round == 3] for what in FIGURES)
    assert last.accuracy_sent_worst_tenth == min(sent)
    assert last.accuracy_worst_tenth == min(after)
    assert last.accuracy_sent_deviation == statistics.pstdev(sent)
    assert last.accuracy_deviation == statistics.pstdev(after)
    text = printed(with_late)
    assert re.search(r"sent +10% +± +after +10% +±", text)


FIGURES = ("accuracy_sent", "accuracy")


def test_what_after_means_is_said_where_it_is_fine_tuning(
    with_late: SimulationReport, tmp_path: Path
) -> None:
    assert "after: fine-tuned" in printed(with_late)
    assert "fine-tuned" not in printed(simulate(small(rounds=1, strategy="local"), tmp_path))


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["iid", "pathological:2", "dirichlet:0.3"])
def test_shares_that_are_read_together_are_those_of_each_device(partition: str) -> None:
    settings = DataSettings(name="digits", count=6, partition=partition, seed=3, limit=900)
    together = load_shares(settings)
    assert len(together) == 6
    for index, found in enumerate(together):
        alone = load(settings.model_copy(update={"index": index}))
        assert found.normalisation == alone.normalisation
        for name in ("train", "validation", "test"):
            mine, theirs = getattr(found, name), getattr(alone, name)
            assert np.array_equal(mine.x, theirs.x)
            assert np.array_equal(mine.y, theirs.y)
    base = together[0].train.x.base
    assert base is not None
    assert all(np.shares_memory(data.test.x, base) for data in together)  # the data set is held once


@pytest.mark.data
@pytest.mark.parametrize(("name", "partition"), [("fashion-mnist", "iid"), ("uci-har", "by:subject")])
def test_shares_of_real_data_are_those_of_each_device(data_dir: Path, name: str, partition: str) -> None:
    settings = DataSettings(name=name, count=12, partition=partition, limit=1200)
    together = load_shares(settings, data_dir)
    alone = load(settings.model_copy(update={"index": 7}), data_dir)
    assert np.array_equal(together[7].train.x, alone.train.x)
    assert np.array_equal(together[7].test.y, alone.test.y)


def test_only_shared_data_have_shares() -> None:
    with pytest.raises(SettingsError, match="own data"):
        load_shares(DataSettings(kind="npz", path=Path("x.npz")))


def people(folder: Path) -> Path:
    """Write three people's series, with the names of arrays that somebody chose."""
    rng = np.random.default_rng(0)
    y = np.tile([0, 1], 90)
    x = rng.normal(size=(180, 16, 3)).astype(np.float32) + y[:, None, None]
    part = np.where(np.arange(180) % 4 == 3, 1, 0)
    path = folder / "gait.npz"
    np.savez(path, signal=x, action=y, person=np.repeat([3, 5, 8], 60), part=part)
    return path


def test_a_npz_is_simulated_by_its_groups_and_split(tmp_path: Path) -> None:
    path = people(tmp_path)
    options = [
        "simulate",
        "--dataset",
        str(path),
        "--x",
        "signal",
        "--y",
        "action",
        "--partition",
        "by:person",
    ]
    options += ["--split", "part", "--devices", "3", "--rounds", "1", "--strategy", "fedavg"]
    done = CliRunner().invoke(app, [*options, "--set", "epochs=1", "--model", "width=8"])
    assert done.exit_code == 0, done.output
    simulation = simulation_of(
        devices=3, dataset=str(path), x="signal", y="action", partition="by:person", split="part"
    )
    data = load_shares(simulation.data(0))
    assert [len(d.test) for d in data] == [15, 15, 15]


def test_shares_that_train_badly_are_warned_of_before_anything_runs() -> None:
    options = ["simulate", "--devices", "4", "--rounds", "1", "--limit", "120", "--strategy", "fedavg"]
    told = CliRunner().invoke(
        app, [*options, "--set", "epochs=0", "--model", "width=8", "--partition", "iid"]
    )
    assert told.exit_code == 0, told.output
    assert "warning:" in told.output
    assert "batch" in told.output
    assert told.output.index("warning:") < told.output.index("round 1/1")


def test_a_partition_that_cannot_be_stops_it(tmp_path: Path) -> None:
    with pytest.raises((SettingsError, DataError), match="group"):
        simulate(small(partition="by:person"), tmp_path)


# --- models, strategies, boards ------------------------------------------------------------------


def test_own_models_are_for_strategies_that_allow_them() -> None:
    with pytest.raises(SettingsError, match="fedavg gives all devices one model"):
        small(device_models=[{"width": 8}])


def test_own_models_are_dealt_in_turn() -> None:
    unequal = next(name for name in available() if load_strategy(name).unequal)
    simulation = small(strategy=unequal, settings={}, device_models=[{"width": 8}, {"width": 16, "depth": 1}])
    assert [simulation.own_model(index).width for index in range(4)] == [8, 16, 8, 16]
    assert simulation.own_units == {"device-0": 32, "device-1": 64, "device-2": 32, "device-3": 64}


def test_the_help_lists_every_strategy() -> None:
    assert STRATEGIES.split(", ") == available()


def test_what_a_board_has_to_write_down_is_said() -> None:
    simulation = small(devices=2, boards=1)
    where = Where(listen=MqttSettings(host="lab.lan", port=1884), federation="greenhouse")
    told = how_to_join(simulation, where, load_shares(simulation.data(0))[0])
    assert "waiting for 1 more agent;" in told
    assert 'federation = "greenhouse"' in told
    assert 'host = "lab.lan", port = 1884' in told
    assert "image of shape (1, 8, 8), labels 0, 1, 2" in told
    assert 'name = "digits", count = 3' in told
    assert "index = 2" in told


def test_boards_need_a_broker(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--listen"):
        simulate(small(boards=1), tmp_path)
    bad = CliRunner().invoke(app, ["simulate", "--listen", "http://lab.lan"])
    assert bad.exit_code == 2
    assert "mqtt://" in bad.output


# --- clocks --------------------------------------------------------------------------------------


def test_a_held_clock_moves_only_when_it_is_moved() -> None:
    clock = Clock()
    with clock.held():
        then = clock()
        assert clock() == then
        clock.move(1.5)
        assert clock() == then + 1.5
    assert clock() < then + 1.5  # let go, it is the present again
    with pytest.raises(RuntimeError):
        clock.move(1.0)
