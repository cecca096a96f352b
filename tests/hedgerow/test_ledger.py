"""`hedgerow report energy`: tables, CSV and JSON of made-up stores and of real simulations."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from coordinator.ledger.report import EnergyReport
from coordinator.store.sql import Store
from foundation.energy import Kind, Scope
from hedgerow.cli import app
from hedgerow.ledger import ledger
from hedgerow.ledger_tables import grids, show
from hedgerow.simulate import simulate
from tests.coordinator.ledgers import DENSE, measured, open_run, put, spoil, told, wall
from tests.hedgerow.test_simulate import small


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", "energy", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs: three devices of which one is measured, one modelled, one unknown."""
    with Store.open(tmp_path) as store:
        for run, factor in (("dense", 2.0), ("pruned", 1.0)):
            open_run(store, run)
            for number, kept in ((1, DENSE), (2, [32, 32])):
                share = factor * (1.0 if number == 1 else 0.5)
                common: dict[str, Any] = {"run": run, "kept_units": kept, "steps": 10}
                common |= {"accuracy_sent": 0.3 * number, "accuracy": 0.4 * number}
                put(store, number, "a", {"train": told(10 * share), "wait": told(1.0)}, **common)
                put(store, number, "n", {"train": measured(20 * share), "wait": measured(2.0)}, **common)
                put(store, number, "u", {"train": told(None, 5.0)}, **common)
    return tmp_path


def test_tables_keep_kinds_apart_and_fit_a_hundred_columns(folder: Path) -> None:
    said = call(
        "--folder", folder, "--run", "pruned", "--against", "dense", "--accuracy", "0.7", "--radio", "1"
    )
    assert said.exit_code == 0, said.output
    lines = said.output.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split() for line in lines if line.startswith(("measured ", "modelled ", "unknown "))] == [
        ["measured", "module", "34.0", "±", "3.40", "17.0", "–", "4.00", "4"],
        ["modelled", "board_dc", "17.0", "±", "1.70", "8.50", "–", "4.00", "4"],
        ["unknown", "–", "–", "–", "–", "10.0", "2"],
    ]
    assert "51.0" not in said.output, "17 + 34 is nobody's number"
    for text in (
        "radiated RF energy, modelled, not battery energy",
        "pruned over dense, round by round",
        "training, pruned over dense, on the same device",
        "profile unknown-linux: seconds only",
        'profile = "raspberry-pi-4b"',
    ):
        assert text in said.output


@pytest.mark.parametrize("long", ["x" * 60, "[b]d[/b]", "Ł" * 30])
def test_long_names_fit_as_well(tmp_path: Path, long: str) -> None:
    with Store.open(tmp_path) as store:
        open_run(store)
        for number, kept in ((1, DENSE), (2, [1, 1])):
            reading = told(1e7, 1e7, Kind.MEASURED, Scope.GPU_BOARD, 1e7, sensor=long)
            more = {"accuracy": 0.5, "accuracy_sent": 0.1, "wire_bytes": 10**12}
            put(store, number, long, {"train": reading, "evaluate": told(None)}, kept_units=kept, **more)
            wall(store, number, long, 1e7, 1e7)
    said = call("--folder", tmp_path, "--radio", "0.1", "--accuracy", "0.4", "--against", "r")
    assert said.exit_code == 0, said.output
    assert max(map(len, said.output.splitlines())) <= 100
    assert long[:10] in said.output, "names are no markup"


def test_the_newest_run_is_shown_and_json_is_complete(folder: Path) -> None:
    said = call("--folder", folder, "--json")
    found = EnergyReport.model_validate_json(said.stdout)
    assert found.run == "pruned"
    assert found == ledger(folder)
    assert len(found.entries) == 10
    assert set(json.loads(said.stdout)["total"]) == {"measured", "mixed", "modelled", "unknown"}


def test_csv_has_a_row_for_every_device_round_and_stage(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "rows.csv"
    target.write_text("old")
    said = call("--folder", folder, "--run", "dense", "--csv", target, "--radio", "0.25")
    assert (said.exit_code, f"wrote {target}" in "".join(said.output.splitlines())) == (0, True)
    rows = list(csv.DictReader(io.StringIO(target.read_text())))
    assert len(rows) == 10
    assert len({(row["device"], row["round"], row["stage"]) for row in rows}) == 10
    found = ledger(folder, "dense", radio_km=0.25)
    for part in found.total.parts:
        same = [row for row in rows if (row["kind"], row["scope"]) == (part.kind, part.scope)]
        assert math.fsum(float(row["joules"]) for row in same) == pytest.approx(part.joules)
    assert {row["joules"] for row in rows if row["device"] == "u"} == {""}
    assert sum(int(row["up_bytes"] or 0) for row in rows) == 6 * 500, "of a round once, so that they add up"
    assert math.fsum(float(row["radiated_j"] or 0) for row in rows) == pytest.approx(
        found.radiated and found.radiated.radiated_j
    )
    assert {row["kept_units"] for row in rows} == {"128+128", "32+32", ""}
    assert not list(tmp_path.glob("*.tmp"))


def test_many_rounds_and_devices_are_counted_not_lost(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        open_run(store)
        for number in range(1, 41):
            put(store, number, f"d{number}", {"train": told(1.0)})
    said = call("--folder", tmp_path)
    assert "16 more rows: see --json or --csv" in said.output
    assert "16 earlier rows" in said.output
    assert f"\n   {40} " in said.output


def test_silent_agents_and_broken_updates_are_told(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        open_run(store)
        store.open_round("r", 1, ["a", "b", "c"], 0)
        put(store, 1, "a", {"train": told(1.0)})
        put(store, 1, "b", {"train": told(1.0)})
        spoil(store, 1, "b", "{")
        assert "sent no update" not in call("--folder", tmp_path).output, "the round is still open"
        store.close_round("r", 1, None, {})
    said = call("--folder", tmp_path).output
    assert "once an agent of a round sent no update" in said
    assert "unreadable, and in no figure (1 part of updates):" in said
    assert "round 1, b: the update's summary is no JSON object" in said
    assert "dense against pruned is not available: no round with fewer than" in said


# --- errors ----------------------------------------------------------------------------------------


def test_errors_say_what_there_is(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    with Store.open(empty):
        pass
    for arguments, words in (
        (["--folder", tmp_path / "nowhere"], "there is no store in"),
        (["--folder", folder, "--run", "prune"], "did you mean 'pruned'? There are: dense, pruned"),
        (["--folder", folder, "--against", "nothing"], "There are: dense, pruned"),
        (["--folder", empty], "has no run yet"),
        (["--folder", folder, "--csv", tmp_path], "is a folder"),
        (["--folder", folder, "--radio", "-1"], "cannot be"),
    ):
        said = call(*arguments)
        assert said.exit_code == 2
        assert words in said.output
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_store_is_no_setting(tmp_path: Path) -> None:
    (tmp_path / "hedgerow.sqlite").write_bytes(b"x" * 5000)
    assert call("--folder", tmp_path).exit_code == 1


def test_a_folder_of_several_simulations_is_asked_which(tmp_path: Path) -> None:
    for name in ("fedavg-seed0", "local-seed0"):
        with Store.open(tmp_path / name / "coordinator") as store:
            open_run(store, "simulation")
            put(store, 1, "a", {"train": told(1.0)}, run="simulation")
    said = call("--folder", tmp_path)
    assert said.exit_code == 2
    assert str(tmp_path / "fedavg-seed0") in said.output
    both = call("--folder", tmp_path / "fedavg-seed0", "--against", tmp_path / "local-seed0", "--json")
    found = EnergyReport.model_validate_json(both.stdout).against
    assert found is not None
    assert found.run == f"simulation in {tmp_path / 'local-seed0'}"
    assert found.devices[0].joules is not None
    assert found.devices[0].joules.ratio == 1.0


def test_help_teaches() -> None:
    said = CliRunner().invoke(app, ["report", "--help"])
    assert "energy" in said.output
    assert "never added" in call("--help").output


# --- real runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("modelled")
    simulate(small(rounds=3), place, workers=2)
    return place


def test_a_simulation_on_a_profile_is_modelled_throughout(modelled: Path) -> None:
    found = ledger(modelled, accuracy=0.01)
    assert {(part.kind, part.scope) for part in found.total.parts} == {(Kind.MODELLED, Scope.BOARD_DC)}
    assert (found.total.measured, found.total.mixed, found.total.unknown.readings) == ((), (), 0)
    total = found.total.only()
    assert total.joules == pytest.approx(math.fsum(d.energy.only().joules for d in found.devices))
    assert total.joules == pytest.approx(math.fsum(s.energy.only().joules for s in found.stages))
    assert total.joules == pytest.approx(math.fsum(r.energy.only().joules for r in found.rounds))
    # one profile: the error bars of all devices add up
    assert total.uncertainty_joules == pytest.approx(
        math.fsum(d.energy.only().uncertainty_joules or math.nan for d in found.devices)
    )
    assert [d.profile for d in found.devices] == ["raspberry-pi-4b"] * 3
    assert all(d.bytes.payload_down and d.bytes.payload_up for d in found.devices)
    assert not found.skipped
    assert [r.updates for r in found.rounds] == [3, 3, 3]
    assert len(found.accuracy.points) == 6
    assert all(one.round is not None for one in found.accuracy.reached)


def test_what_a_simulation_reports_is_what_the_ledger_says(modelled: Path) -> None:
    told_there = simulate(small(rounds=3), modelled)  # finished: only read
    for device in ledger(modelled).devices:
        joules = math.fsum(d.energy.joules or math.nan for d in told_there.devices if d.agent == device.agent)
        assert device.energy.only().joules == pytest.approx(joules)


def test_every_table_of_a_real_run_fits(modelled: Path) -> None:
    target = io.StringIO()
    found = ledger(modelled, against=str(modelled), accuracy=0.2, radio_km=0.25)
    show(found, Console(file=target, width=100))
    assert max(map(len, target.getvalue().splitlines())) <= 100
    titles = [grid.title for grid in grids(found)]
    assert len(titles) == len(set(titles)) >= 7
    assert all(grid.rows for grid in grids(found))


def test_an_unknown_device_has_seconds_and_the_report_says_so(tmp_path: Path) -> None:
    simulate(small(profile="unknown-linux"), tmp_path, workers=2)
    found = ledger(tmp_path)
    assert found.total.parts == ()
    assert found.total.unknown.readings == len(found.entries) > 0
    assert found.seconds > 0
    said = call("--folder", tmp_path)
    assert said.exit_code == 0
    assert "profile unknown-linux: seconds only" in said.output
    assert " J" not in said.output.replace(" J/point", "").replace("J/point:", "")


def test_conditions_of_the_devices_are_in_tables_csv_and_json(tmp_path: Path) -> None:
    hot = {"power_mode": "15W", "governor": "schedutil", "most_c": 83.4, "throttle_events": 3, "threads": 4}
    cool = {"power_mode": "7W", "most_c": 55.0, "throttle_events": 1, "threads": 2}
    with Store.open(tmp_path) as store:
        open_run(store)
        put(store, 1, "a", {"train": told(1.0)}, state=hot)
        put(store, 2, "a", {"train": told(1.0)}, state=cool)
        put(store, 1, "b", {"train": told(1.0)}, state={"no": "state"})
        put(store, 1, "c", {"train": told(1.0)})
    said = call("--folder", tmp_path)
    assert said.exit_code == 0, said.output
    rows = {line.split()[0]: line.split()[-1] for line in said.output.splitlines() if "utilisation" in line}
    assert rows == {"a": "83", "b": "–", "c": "–"}
    assert "power modes: a 15W and 7W" in said.output
    assert "throttled: a 4 times" in said.output
    device = {
        d["agent"]: d["conditions"]
        for d in json.loads(call("--folder", tmp_path, "--json").stdout)["devices"]
    }
    assert device["a"] == {
        "power_modes": ["15W", "7W"],
        "governors": ["schedutil"],
        "threads": [2, 4],
        "most_c": 83.4,
        "throttle_events": 4,
    }
    assert device["b"]["throttle_events"] is None, "not told is not never"
    target = tmp_path / "rows.csv"
    call("--folder", tmp_path, "--csv", target)
    found = {(r["device"], r["round"]): r for r in csv.DictReader(io.StringIO(target.read_text()))}
    assert (found["a", "1"]["power_mode"], found["a", "2"]["threads"], found["c", "1"]["most_c"]) == (
        "15W",
        "2",
        "",
    )


def test_the_wall_has_tables_and_columns_of_its_own(folder: Path, tmp_path: Path) -> None:
    with Store.open(folder) as store:
        wall(store, 1, "n", 30.0, 20.0, run="pruned")
        wall(store, 2, "n", None, run="pruned")
        wall(store, 1, "a", 15.0, run="pruned")
    out = tmp_path / "out.csv"
    said = call("--folder", folder, "--run", "pruned", "--csv", out)
    assert said.exit_code == 0, said.output
    lines = said.output.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines]
    assert [
        "a",
        "1/1",
        "measured",
        "15.0",
        "±",
        "0.75",
        "100.0",
        "modelled",
        "board_dc",
        "11.0",
        "±",
        "1.10",
    ] in rows
    assert "n: no joules at the wall in round 2: it was silent" in said.output
    assert "shelly:n" in said.output
    table = list(csv.DictReader(io.StringIO(out.read_text())))
    mine = [row for row in table if (row["device"], row["round"]) == ("n", "1")]
    assert [(row["stage"], row["wall_joules"], row["wall_stage_joules"]) for row in mine] == [
        ("train", "30.0", "20.0"),
        ("wait", "", ""),
    ]
    assert {row["wall_kind"] for row in table if (row["device"], row["round"]) == ("n", "2")} == {"none", ""}
    assert {row["wall_joules"] for row in table if row["device"] == "u"} == {""}
    told_json = call("--folder", folder, "--run", "pruned", "--json")
    found = json.loads(told_json.stdout)["wall"]
    assert [device["agent"] for device in found["devices"]] == ["a", "n"]
    assert [record["plug"] for record in found["records"]] == ["shelly:a", "shelly:n", "shelly:n"]
