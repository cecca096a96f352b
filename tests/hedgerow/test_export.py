"""`hedgerow export`: what a coordinator can write of a device's model, and why it cannot write the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edge_agent.last_model import load
from export.folder import load_artifact, resolve
from export.proof import answers, open_session, prove
from foundation.artifact import Manifest
from hedgerow.cli import app
from hedgerow.simulate import simulate, simulation_of

WHOLE = ("fedavg", "fedprox", "fedtp", "pfedhn", "pfedla")
PARTS = {
    "fedper": "the head never left the device",
    "adaptive_pruning": "the head never left the device",
    "pfl_tpp": "the ffl and head never left the device",
    "local": "never left the device",
    "hedgerow": "mixes what it is sent with what it kept",
    "mh_pfedhn": "chose its model itself",
}


def simulated(folder: Path, strategy: str, *, artifacts: bool = True) -> Path:
    simulation = simulation_of(
        devices=2, rounds=2, partition="iid", limit=200, strategy=strategy, settings={"epochs": 1},
        model={"width": 16, "heads": 2, "ffl_ratio": 2}, profile="raspberry-pi-4b", artifacts=artifacts,
    )  # fmt: skip
    simulate(simulation, folder, workers=1)
    return folder


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["export", "--from", "simulation", *words])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("strategy", WHOLE)
def test_a_model_that_is_made_by_the_coordinator_is_exported_and_proven(
    tmp_path: Path, strategy: str
) -> None:
    folder = simulated(tmp_path / "s", strategy)
    out = tmp_path / "out"
    code, told, said = run("--device", "device-1", "--folder", str(folder), "-o", str(out), "--json")
    assert code == 0, said
    manifest = Manifest.model_validate_json(told)
    assert (manifest.agent, manifest.strategy, manifest.round) == ("device-1", strategy, 2)
    loaded, model, probe = load_artifact(resolve(out), agent="device-1")
    assert loaded == manifest
    assert prove(open_session(model), probe, manifest.tolerance).difference <= 1e-5
    assert manifest.accuracy is None, "nobody here knows how right it is on the device"
    assert manifest.latency_ms is None
    kept = load(folder / "device-1")
    assert manifest.normalisation == kept.facts.normalisation
    assert manifest.labels == kept.facts.labels


def test_the_average_of_two_devices_is_what_is_exported(tmp_path: Path) -> None:
    folder = simulated(tmp_path / "s", "fedavg")
    found = []
    for device in ("device-0", "device-1"):
        out = tmp_path / device
        code, _, said = run("--device", device, "--folder", str(folder), "-o", str(out))
        assert code == 0, said
        manifest, model, _ = load_artifact(resolve(out))
        mean, std = manifest.normalisation.mean[0], manifest.normalisation.std[0]
        scaled = np.random.default_rng(0).standard_normal((4, *manifest.shape)) * std + mean
        found.append(answers(open_session(model), scaled.astype(np.float32)))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


@pytest.mark.parametrize("strategy", PARTS)
def test_what_is_on_the_device_alone_is_exported_there(tmp_path: Path, strategy: str) -> None:
    folder = simulated(tmp_path / "s", strategy)
    code, _, said = run("--device", "device-1", "--folder", str(folder), "-o", str(tmp_path / "out"))
    assert code == 1
    assert PARTS[strategy] in said
    assert "hedgerow agent export" in said
    assert not (tmp_path / "out").exists()
    assert load(folder / "device-1").facts.strategy == strategy, "there it is whole"


def test_names_and_scales_that_are_not_known_are_said(tmp_path: Path) -> None:
    folder = simulated(tmp_path / "s", "fedavg", artifacts=False)
    out = str(tmp_path / "out")
    code, _, said = run("--device", "device-9", "--folder", str(folder), "-o", out)
    assert (code, "device-0" in said) == (2, True)
    done = CliRunner().invoke(
        app, ["export", "--from", "simulatoin", "--device", "device-1", "--folder", str(folder), "-o", out]
    )
    assert (done.exit_code, "simulation" in done.stderr) == (2, True)
    code, _, said = run("--device", "device-1", "--folder", str(tmp_path / "nothing"), "-o", out)
    assert (code, "there is no store" in said) == (2, True)
    code, _, said = run("--device", "device-1", "--folder", str(folder), "-o", out)
    assert code == 1
    assert "learned from its own data" in said
    scale = tmp_path / "scale.json"
    scale.write_text(json.dumps({"mean": [5.0], "std": [6.0]}))
    words = ("--device", "device-1", "--folder", str(folder), "-o", out, "--normalisation", str(scale))
    code, told, said = run(*words, "--probabilities", "--opset", "23")
    assert code == 0, said
    assert "exported device-1" in told
    manifest, model, _ = load_artifact(resolve(Path(out)))
    assert manifest.normalisation.mean == (5.0,)
    assert [o.name for o in open_session(model).get_outputs()] == ["logits", "probabilities"]
    scale.write_text("{")
    assert run(*words)[0] == 2
