"""The agent signs what it exports and keeps its last whole model; `hedgerow agent export` writes it again."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from edge_agent import export_again
from edge_agent.export_again import main
from edge_agent.last_model import FILE, Facts, LastModel, load, save
from edge_agent.samples import LocalData
from export.folder import load_artifact, resolve
from export.proof import answers, open_session, prove
from export.sign import Keys, check
from foundation.artifact import Manifest, Probe
from foundation.errors import DataError, ExportError
from foundation.parameters import Parameters
from foundation.transport import MemoryBroker
from tests.edge_agent.test_agent import agent_on, assignment, coordinator_on, until
from tests.export.reference import SPECS, masks_for, normalisation_for, probe_for, trained
from tests.toys import toy_data

SPEC = SPECS["image-cls"]
MASKS = masks_for(SPEC, (7, 0, 30))


def model() -> LastModel:
    facts = Facts(
        agent="kitchen", run="r", round=3, strategy="fedper", spec=SPEC,
        normalisation=normalisation_for(SPEC), labels=tuple("abcd"), accuracy=0.5,
    )  # fmt: skip
    return LastModel(facts, trained(SPEC), MASKS, probe_for(SPEC, trained(SPEC), MASKS))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "agent.toml"
    lines = (f'vault = "{tmp_path}/vault"', "[data]", 'kind = "npz"', f'path = "{tmp_path}/d.npz"')
    file.write_text("\n".join(('agent = "kitchen"', *lines)))
    (tmp_path / "vault").mkdir()
    return file


@pytest.mark.anyio
@pytest.mark.parametrize("exports", [True, False])
async def test_an_agent_signs_its_artifacts_and_keeps_its_last_model(tmp_path: Path, exports: bool) -> None:
    broker, data = MemoryBroker(), toy_data(0)
    work = assignment().model_copy(update={"export": exports, "last": True})
    async with coordinator_on(broker) as coordinator, agent_on(broker, tmp_path, lambda: data):
        await coordinator.ask(work)
        await until(lambda: bool(coordinator.updates))
    vault = tmp_path / "d0"
    kept = load(vault)
    assert (kept.facts.agent, kept.facts.run, kept.facts.round) == ("d0", work.run, 1)
    update = coordinator.updates[0]
    assert update.problem is None
    assert (update.artifact is None) is not exports
    if not exports:
        assert not (vault / "signing.key").exists()
        return
    assert stat.S_IMODE((vault / "signing.key").stat().st_mode) == 0o600
    keys = Keys.beside(vault / "artifacts")
    assert keys is not None
    manifest, _, probe = load_artifact(resolve(vault / "artifacts"), keys, agent="d0")
    assert manifest == update.artifact
    assert manifest.validation_examples == len(data.validation.y)
    assert check(resolve(vault / "artifacts"), keys).name == "d0"
    np.testing.assert_array_equal(probe.logits, kept.probe.logits)


def test_what_was_kept_is_what_comes_back(tmp_path: Path) -> None:
    whole = model()
    save(tmp_path, whole)
    again = load(tmp_path)
    assert again.facts == whole.facts
    assert list(again.parameters) == list(whole.parameters)
    for name, array in whole.parameters.items():
        np.testing.assert_array_equal(again.parameters[name], array)
    assert {n: m.tolist() for n, m in again.masks.items()} == {n: m.tolist() for n, m in MASKS.items()}


def test_the_command_exports_without_training(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "vault", model())
    data = toy_data(0, spec=SPEC)
    monkeypatch.setattr(export_again, "load_data", lambda *_: data)
    out = tmp_path / "out"
    assert main(["--config", str(config), "-o", str(out), "--json", "--opset", "20"]) == 0
    manifest = Manifest.model_validate_json(capsys.readouterr().out)
    assert (manifest.agent, manifest.round, manifest.opset) == ("kitchen", 3, 20)
    assert manifest.kept_units == (7, 0, 30)
    assert manifest.int8 is not None, "auto is the default, and 8 validation examples are too few"
    assert not manifest.int8.used
    keys = Keys.beside(tmp_path / "vault" / "artifacts")
    assert keys is not None
    loaded, content, probe = load_artifact(resolve(out), keys)
    prove(open_session(content), probe, loaded.tolerance)
    found = answers(open_session(content), np.asarray(data.validation.x)).argmax(-1)
    assert manifest.validation == pytest.approx((found == data.validation.y).mean())


def test_a_person_reads_what_came_of_it(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "vault", model())

    def unusable(*_: object) -> LocalData:
        raise DataError("the sensor is gone")

    monkeypatch.setattr(export_again, "load_data", unusable)
    assert main(["--config", str(config), "-o", str(tmp_path / "out"), "--int8", "on"]) == 0
    told = capsys.readouterr()
    assert "exported kitchen, run r, round 3" in told.out
    assert "8-bit weights: yes, asked for" in told.out
    assert "no validation: the sensor is gone" in told.err


def test_without_a_model_the_error_says_when_there_is_one(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config), "-o", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "holds no whole model yet" in capsys.readouterr().err
    save(tmp_path / "vault", model())
    path = tmp_path / "vault" / FILE
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    assert main(arguments) == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    whole = model()
    save(tmp_path, LastModel(whole.facts, Parameters(), {}, Probe(np.zeros(1), np.zeros(1))))
    assert load(tmp_path).parameters == {}
    from edge_agent.vault import write_arrays

    write_arrays(tmp_path / FILE, {"x": np.zeros(1)}, {"facts": {"agent": "kitchen"}})
    with pytest.raises(ExportError, match="another version"):
        load(tmp_path)
