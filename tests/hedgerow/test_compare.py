"""`hedgerow compare` from the command line: what is compared, resuming, files, and bad input in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coordinator.strategies.base import available
from foundation.errors import SettingsError
from hedgerow.cli import app
from hedgerow.compare_plan import Comparison, comparison_of, run_folder
from hedgerow.compare_report import ComparisonReport

SMALL = ["--devices", "2", "--rounds", "2", "--limit", "120", "--partition", "iid"]
SMALL += ["--model", "width=8", "--model", "heads=2", "--set", "epochs=1", "--workers", "1"]
TIMES = {
    *("cpu_s", "wall_s", "seconds", "energy", "stages", "latency_ms", "dense_latency_ms", "saved", "kind"),
    *("reach_cpu_s", "reach_joules", "reach_saved_cpu", "reach_saved_joules", "joules", "saved_cpu"),
    *("saved_joules", "bytes", "dense_bytes"),
    # An update's header and a model's metadata hold joules in digits: their lengths follow the clock.
    *("down_bytes", "up_bytes", "reach_bytes", "reach_saved_bytes", "saved_bytes"),
}


def planned(strategies: str, **changes: Any) -> Comparison:
    fields: dict[str, Any] = {"seeds": "0", "devices": 2, "rounds": 2}
    return comparison_of(strategies, **(fields | changes))


def timeless(value: Any) -> Any:
    """A report without what depends on when it was computed."""
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if key not in TIMES}
    return [timeless(one) for one in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison from the command line, with all its files, and what it said."""
    place = tmp_path_factory.mktemp("compare")
    files = [f"--{kind}={place / f'report.{kind}'}" for kind in ("json", "html", "csv")]
    options = ["--strategies", "fedavg,pfl_tpp", "--only", "--profile", "raspberry-pi-4b"]
    result = CliRunner().invoke(app, ["compare", *SMALL, *options, *files, "--folder", str(place / "runs")])
    assert result.exit_code == 0, result.output
    return place, result.output


def test_the_command_writes_json_csv_and_a_page(done: tuple[Path, str]) -> None:
    place, output = done
    report = ComparisonReport.model_validate_json((place / "report.json").read_text())
    assert report.schema_version == 1
    assert report.labels == ["fedavg", "fedavg + fine-tuning", "pfl_tpp"]
    assert [(len(run.rounds), len(run.devices), len(run.models)) for run in report.runs] == [(2, 4, 2)] * 2
    assert all(d.up_role_bytes["attention"] > 0 for run in report.runs for d in run.devices)
    assert all(d.cpu_s and d.cpu_s > 0 for run in report.runs for d in run.devices)
    assert len((place / "report.csv").read_text().splitlines()) == 1 + 2 * 2 * 2
    assert "pfl_tpp, seed 0: round 2/2  accuracy" in output
    assert "run 2/2  pfl_tpp, seed 0" in output
    assert "modelled" in output
    assert max(map(len, output.split("accuracy in the last round")[1].splitlines()[:-3])) <= 100


def test_the_page_needs_nothing_but_itself(done: tuple[Path, str]) -> None:
    text = (done[0] / "report.html").read_text()
    head = text[: text.index('<script type="application/json"')]
    assert "src=" not in head
    assert "href=" not in head
    assert "fedavg + fine-tuning" in head
    figures = text[text.index('id="figures">') + len('id="figures">') :]
    named = json.loads(figures[: figures.index("</script>")])
    drawn = {part.split('"')[0] for part in head.split('data-figure="')[1:]}
    assert set(named) == drawn
    assert "Plotly" in text


def test_a_killed_comparison_goes_on_to_the_same_report(done: tuple[Path, str], tmp_path: Path) -> None:
    options = ["--strategies", "fedavg,pfl_tpp", "--only", "--profile", "raspberry-pi-4b"]
    command = [sys.executable, "-m", "hedgerow.cli", "compare", *SMALL, *options]
    command += ["--folder", str(tmp_path / "runs")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("pfl_tpp, seed 0: round 1/2"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    again = CliRunner().invoke(app, [*command[3:], "--json", "-"])
    assert again.exit_code == 0, again.output
    assert "fedavg, seed 0: round" not in again.stderr  # that run was over: it is read, not run
    found = json.loads(again.stdout)
    assert timeless(found) == timeless(json.loads((done[0] / "report.json").read_text()))


def test_a_comparison_that_is_done_is_read_and_strategies_can_be_added(done: tuple[Path, str]) -> None:
    options = ["--strategies", "fedavg,pfl_tpp,local", "--only", "--profile", "raspberry-pi-4b"]
    place = str(done[0] / "runs")
    result = CliRunner().invoke(app, ["compare", *SMALL, *options, "--json", "-", "--folder", place])
    assert result.exit_code == 0, result.output
    assert "local, seed 0: round 2/2" in result.stderr
    assert "pfl_tpp, seed 0: round" not in result.stderr
    before = json.loads((done[0] / "report.json").read_text())
    assert json.loads(result.stdout)["runs"][:2] == before["runs"]


def test_a_run_that_fails_is_told_and_the_others_go_on(done: tuple[Path, str]) -> None:
    wild = "local@wild:optimizer=sgd;learning_rate=10;clip=1e30;epochs=20"
    options = ["--strategies", f"{wild},fedavg", "--only", "--profile", "raspberry-pi-4b", "--json", "-"]
    result = CliRunner().invoke(app, ["compare", *SMALL, *options, "--folder", str(done[0] / "runs")])
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert [(f["label"], f["seed"]) for f in found["failures"]] == [("wild", 0)]
    assert "lower the learning rate" in found["failures"][0]["reason"]
    assert [run["label"] for run in found["runs"]] == ["fedavg"]
    assert "run 1/2  wild, seed 0: failed: " in result.stderr
    assert "failed: wild, seed 0: " in result.stderr


# --- what is compared ----------------------------------------------------------------------------


def test_the_baselines_stand_beside_whatever_is_named() -> None:
    labels = [entry.label for entry in planned("pfl_tpp").entries]
    assert labels[0] == "pfl_tpp"
    assert {name for name in ("fedavg", "local", "fedper") if name in available()} <= set(labels)
    assert [entry.label for entry in planned("pfl_tpp", only=True).entries] == ["pfl_tpp"]
    assert planned("pfl_tpp", only=True).reference is None
    named = planned("local,fedavg:epochs=3")
    assert [e.label for e in named.entries if e.strategy == "fedavg"] == ["fedavg epochs=3"]
    assert named.reference == "fedavg epochs=3"


def test_one_strategy_can_stand_twice_with_other_settings() -> None:
    found = planned("pfl_tpp,pfl_tpp:target=0.95;floor=2,pfl_tpp@hot:learning_rate=0.01", only=True).entries
    assert [(e.label, e.settings) for e in found] == [
        ("pfl_tpp", {}),
        ("pfl_tpp target=0.95 floor=2", {"target": 0.95, "floor": 2}),
        ("hot", {"learning_rate": 0.01}),
    ]


def test_settings_go_to_all_that_have_them_or_to_one_by_name() -> None:
    sets = [("epochs", 3), ("target", 0.8), ("hot.epochs", 5), ("fedavg.optimizer", "sgd")]
    found = planned("fedavg,pfl_tpp,pfl_tpp@hot:target=0.5", sets=sets, only=True).entries
    assert [e.settings for e in found] == [
        {"epochs": 3, "optimizer": "sgd"},
        {"epochs": 3, "target": 0.8},
        {"epochs": 5, "target": 0.5},
    ]


def test_the_same_fleet_has_one_folder_and_every_run_its_own() -> None:
    one, more = planned("fedavg", seeds="0,1"), planned("fedavg,pfl_tpp", seeds="0,1,2")
    assert one.folder() == more.folder()
    assert one.folder().parts[0] == "compare-runs"
    assert one.folder() != planned("fedavg", devices=3).folder()
    runs = [run_folder(entry.label, simulation) for entry, _, simulation in more.runs()]
    assert len(set(runs)) == len(runs) == len(more.entries) * 3
    assert {run_folder(entry.label, simulation) for entry, _, simulation in one.runs()} <= set(runs)


@pytest.mark.parametrize(
    ("strategies", "changes", "words"),
    [
        ("fedvag", {}, "fedavg"),
        ("pfl_tpp:targt=0.9", {}, "target"),
        ("pfl_tpp:target", {}, "is not KEY=VALUE"),
        ("pfl_tpp@a b", {}, "label 'a b'"),
        ("pfl_tpp,pfl_tpp", {}, "compared twice"),
        (" , ", {}, "names none"),
        ("fedavg", {"sets": [("epohcs", 2)]}, "epochs"),
        ("fedavg", {"sets": [("fedtp.epochs", 2)], "only": True}, "no compared strategy 'fedtp'"),
        ("fedavg", {"sets": [("fedavg.target", 2)]}, "target"),
        ("fedavg", {"seeds": "0,x"}, "whole numbers"),
        ("fedavg", {"seeds": ""}, "whole numbers"),
        ("fedavg", {"partition": "nearly"}, "partition"),
        ("fedavg", {"rounds": 0}, "rounds"),
    ],
)
def test_what_cannot_be_compared_is_said_in_words(
    strategies: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        planned(strategies, **changes)


def test_a_report_that_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "report.html"
    result = CliRunner().invoke(app, ["compare", *SMALL, "--html", str(missing)])
    assert result.exit_code == 2
    assert "does not exist" in result.output
    result = CliRunner().invoke(app, ["compare", *SMALL, "--csv", str(tmp_path)])
    assert result.exit_code == 2
    assert "is a folder" in result.output
