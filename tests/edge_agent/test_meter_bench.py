"""bench/meter.py says what it measures: it notices what it is there to notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import meter as bench


def test_the_load_is_the_integral_of_its_watts() -> None:
    load = bench.Load(np.random.default_rng(1), 3.0)
    times = np.linspace(0, 2.5, 25_001)
    watts = np.array([load.watts(at) for at in times])
    assert set(watts) == {bench.HIGH_W, bench.LOW_W}
    summed = float(np.sum(watts[:-1] * np.diff(times)))
    assert load.joules(2.5) - load.joules(0.0) == pytest.approx(summed, rel=1e-3)
    lengths = np.diff(load.edges) / (0.5 * bench.PERIOD_S)
    assert lengths.min() >= 1 - bench.DRAWN
    assert lengths.max() <= 1 + bench.DRAWN


def test_the_rectangle_rule_loses_what_is_after_its_last_look() -> None:
    rows = np.array([bench.one_error(seed, 5.0, 2.0) for seed in range(100)])
    meter, rectangle = (bench.figures(column) for column in rows.T)
    assert abs(meter["bias"]) < 0.02
    assert rectangle["bias"] < -0.03
    assert rectangle["rms"] > 1.5 * meter["rms"]


def test_it_notices_processes_however_they_are_started() -> None:
    with bench.starts() as heard:
        subprocess.run([sys.executable, "-c", ""], check=True)
        os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ), 0)
    assert "subprocess.Popen" in heard
    assert "os.posix_spawn" in heard
    before = list(heard)
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert heard == before, "only what happened meanwhile"


@pytest.mark.parametrize(
    ("profile", "sensor"), [("jetson-orin-nano", "ina3221"), ("generic-x86-server", "rapl")]
)
def test_the_meter_reads_the_made_up_tree(tmp_path: Path, profile: str, sensor: str) -> None:
    for name, text in bench.TREES[profile].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    row = bench.cost(profile, tmp_path, 50.0, 0.2)
    assert (row["sensor"], row["kind"]) == (sensor, "measured")
    assert row["files_held"] == row["files_at_end"] > 0
    assert row["processes_started"] == 0


@pytest.mark.parametrize("bad", [{"share": 0.02}, {"files_at_end": 3}, {"processes_started": 1}])
def test_what_is_too_much_is_said(bad: dict[str, float]) -> None:
    row = {"rate_hz": 5.0, "share": 0.002, "files_held": 2, "files_at_end": 2, "processes_started": 0}
    assert bench.is_cheap(row)
    assert not bench.is_cheap(row | bad)


def test_it_runs_for_machines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PHASES_S", (0.5,))
    assert bench.main(["--only", "error", "--seeds", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["rate_hz"] for row in report["error"]] == [1, 5, 10, 20]
    assert all(row["ratio"] > 0 for row in report["error"])
