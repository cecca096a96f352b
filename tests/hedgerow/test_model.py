"""`hedgerow model report`: what is measured is told with its kind, what is not known is told as unknown."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console
from typer.testing import CliRunner

from edge_agent import benchmark
from edge_agent.benchmark import LARGE, SMALL, Report, per_thousand, report
from edge_agent.energy.meter import Meter
from edge_agent.last_model import Facts, LastModel, save
from export.folder import load_artifact, resolve
from export.package import export_artifact
from foundation.energy import EnergyReading, Kind, Scope
from foundation.errors import ExportError
from foundation.profile import DeviceProfile
from hedgerow.cli import app
from hedgerow.model import WIDTH, show
from tests.edge_agent.test_serving import damage, labels_of, publish
from tests.export.reference import SPECS, masks_for, normalisation_for, probe_for, trained

Measure = Callable[..., Report]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few runs of each: what is counted is tested here, not how fast this machine is."""
    monkeypatch.setattr(benchmark, "RUNS", {SMALL: 4, LARGE: 2})
    for name, value in (("STARTS", 1), ("BATCH_S", 0.01), ("BATCH_RUNS", 3)):
        monkeypatch.setattr(benchmark, name, value)


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    def measured(profile: str = "unknown-linux", folder: Path = tmp_path / "artifacts") -> Report:
        said: list[str] = []
        with Meter(DeviceProfile.load(profile)) as meter:
            found = report(folder, tmp_path / "scratch", meter, profile, said.append)
        assert len(said) >= 5, "what takes long says where it is"
        return found

    return measured


def publish_known(folder: Path, name: str = "series-mean") -> None:
    spec = SPECS[name]
    parameters, masks = trained(spec), masks_for(spec, (9, 2, 30))
    export_artifact(
        spec, parameters, masks, normalisation_for(spec), labels_of(spec),
        probe_for(spec, parameters, masks), folder,
        agent="d0", run="r", round=4, strategy="fedavg", accuracy=0.75,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["series-mean", "text", "image-cls"])
def test_pruned_and_dense_are_measured_in_the_same_way(tmp_path: Path, measure: Measure, name: str) -> None:
    publish_known(tmp_path / "artifacts", name)
    found = measure()
    sides = {side.name: side for side in found.sides}
    assert [*sides] == ["dense", "pruned", "int8"]
    for side in (sides["dense"], sides["pruned"]):
        assert side.latency.keys() == {SMALL, LARGE}
        assert all(0 < one.p50_ms <= (one.p99_ms or 0) and one.runs for one in side.latency.values())
        assert side.per_second
        assert side.rss_bytes
        assert side.start_s
    assert (sides["dense"].bytes or 0) > (sides["pruned"].bytes or 0)
    assert sides["dense"].hidden_units == 3 * SPECS[name].hidden
    assert sides["pruned"].hidden_units == 41
    assert (sides["pruned"].accuracy, sides["dense"].accuracy) == (0.75, None)
    assert sides["pruned"].parity is not None
    assert sides["pruned"].parity < 1e-5
    assert sides["dense"].parity is None, "nobody trained it"
    assert (found.agent, found.run, found.round) == ("d0", "r", 4)
    assert Report.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(("round", "own"), [(4, True), (5, False)])
def test_the_uncut_model_has_the_devices_own_weights_where_they_are_kept(
    tmp_path: Path, measure: Measure, round: int, own: bool
) -> None:
    vault, spec = tmp_path / "vault", SPECS["series-mean"]
    publish_known(vault / "artifacts")
    parameters, masks = trained(spec), masks_for(spec, (9, 2, 30))
    facts = Facts(
        agent="d0", run="r", round=round, strategy="fedavg", spec=spec, normalisation=normalisation_for(spec),
        labels=labels_of(spec),
    )  # fmt: skip
    save(vault, LastModel(facts, parameters, masks, probe_for(spec, parameters, masks)))
    dense = measure(folder=vault / "artifacts").sides[0]
    assert (dense.name, dense.accuracy, dense.parity) == ("dense", None, None)
    said = next(text for text in dense.remarks if "weights" in text)
    assert ("own weights" in said, "round 5" in said) == (own, not own)
    model = load_artifact(resolve(tmp_path / "scratch" / "dense"))[1]
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(model).graph.initializer}
    whole = parameters["blocks.1.ffl.up.weight"].T
    assert np.array_equal(found["blocks.1.ffl.up.weight.T"], whole) == own


@pytest.mark.parametrize(
    ("profile", "kind"), [("unknown-linux", Kind.NONE), ("raspberry-pi-4b", Kind.MODELLED)]
)
def test_joules_have_their_kind_and_bar_or_are_unknown(
    tmp_path: Path, measure: Measure, profile: str, kind: Kind
) -> None:
    publish_known(tmp_path / "artifacts")
    for side in measure(profile).sides[:2]:
        energy = side.energy
        assert energy is not None
        assert energy.kind is kind
        assert (energy.joules is None) == (kind is Kind.NONE)
        assert (energy.uncertainty_joules is None) == (kind is Kind.NONE)
        assert energy.runs >= 3
        assert energy.seconds == pytest.approx(0.01, rel=0.1) or energy.seconds > 0.01  # two clocks


def test_joules_are_those_of_a_thousand() -> None:
    reading = EnergyReading(
        joules=6.0, idle_joules=4.0, seconds=2.5, kind=Kind.MEASURED, scope=Scope.BOARD_DC, sensor="s",
        coverage=1.0, uncertainty_joules=0.3, net_uncertainty_joules=0.2, flags=("gap",),
    )  # fmt: skip
    found = per_thousand(reading, 500)
    assert (found.joules, found.net_joules) == (12.0, 4.0)
    assert (found.uncertainty_joules, found.net_uncertainty_joules) == (0.6, 0.4)
    assert (found.kind, found.scope, found.runs, found.seconds) == (Kind.MEASURED, "board_dc", 500, 2.5)


@pytest.mark.parametrize(
    ("seconds", "runs", "enough"), [(0.005, 9, False), (0.02, 2, False), (0.02, 3, True), (21.0, 1, True)]
)
def test_a_reading_is_long_enough_and_ends(seconds: float, runs: int, enough: bool) -> None:
    assert benchmark._enough(seconds, runs) is enough


def test_without_onnx_the_manifest_says_what_it_knows(
    tmp_path: Path, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_known(tmp_path / "artifacts")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dense = measure().sides[0]
    assert dense.name == "dense"
    assert dense.latency[SMALL].runs == 0
    assert dense.latency[SMALL].p99_ms is None
    assert "measured at export" in dense.remarks[0]
    assert dense.energy is None


def test_8_bit_weights_are_measured_where_they_can_be_written(
    tmp_path: Path, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_known(tmp_path / "artifacts")
    writer = ModuleType("export.quantise")

    def nothing(model: bytes) -> bytes:
        raise ExportError("there is nothing to quantise")

    # What is written is another module's concern; here it is the model itself, or a reasoned no.
    monkeypatch.setitem(sys.modules, "export.quantise", writer)
    monkeypatch.setattr(writer, "dynamic", lambda model: model, raising=False)
    small = measure().sides[2]
    assert small.latency.keys() == {SMALL, LARGE}
    assert small.energy is not None
    assert small.parity is not None
    assert (small.rss_bytes, small.accuracy) == (None, None), "neither served nor tested"
    monkeypatch.setattr(writer, "dynamic", nothing)
    assert measure(folder=tmp_path / "artifacts").sides[2].remarks == (
        "not written: there is nothing to quantise",
    )


def test_a_server_that_cannot_start_leaves_its_figures_unknown(
    tmp_path: Path, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_known(tmp_path / "artifacts")
    monkeypatch.setattr(benchmark.sys, "executable", "/bin/false")
    for side in measure().sides[:2]:
        assert (side.rss_bytes, side.start_s) == (None, None)
        assert "the server cannot be measured" in side.remarks[0]


def test_the_table_fits_and_has_every_figure(tmp_path: Path, measure: Measure) -> None:
    publish_known(tmp_path / "artifacts")
    found = measure("raspberry-pi-4b")
    out = io.StringIO()
    show(found, Console(file=out, width=WIDTH))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text
    for row in ("file, kB", "p99, ms", "samples a second", "server: memory, MB", "accuracy here"):
        assert row in text
    assert "modelled" in text
    assert "± at k = 2" in text
    assert "int8: " in text


def test_the_command_speaks_json_and_says_what_is_wrong(tmp_path: Path) -> None:
    publish_known(tmp_path / "vault" / "artifacts")
    config = tmp_path / "agent.toml"
    config.write_text('agent = "d0"\nvault = "vault"\nprofile = "unknown-linux"\n[data]\nkind = "builtin"\n')
    run = CliRunner().invoke
    done = run(app, ["model", "report", "--config", str(config), "--json"])
    assert done.exit_code == 0, done.output
    assert [side["name"] for side in json.loads(done.stdout)["sides"]] == ["dense", "pruned", "int8"]
    assert run(app, ["model", "report"]).exit_code == 2
    assert run(app, ["model", "report", str(tmp_path), "--config", str(config)]).exit_code == 2
    empty = run(app, ["model", "report", str(tmp_path)])
    assert empty.exit_code == 1
    assert "there is no artifact" in empty.output


def test_a_damaged_artifact_is_not_measured(tmp_path: Path, measure: Measure) -> None:
    damage(tmp_path / "artifacts" / publish(tmp_path / "artifacts").sha256)
    with pytest.raises(ExportError, match="is not the model of its manifest"):
        measure()
