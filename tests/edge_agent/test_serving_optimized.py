"""A kept optimized form shortens a start; whatever is wrong with it, the model itself answers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.serving import optimized
from edge_agent.serving.optimized import ENDING, Forms, Head
from edge_agent.serving.predictor import Predictor, Rules
from export import folder as artifacts
from export.folder import load_artifact, resolve
from export.proof import open_session
from export.sign import DEVICE_KEY, TRUSTED, DeviceKey
from foundation.artifact import Manifest
from foundation.errors import ExportError
from tests.export.reference import SPECS, raw_inputs
from tests.processes import until
from tests.served import expected, publish, serving

X = raw_inputs(SPECS["image-mean"], 3)
ALWAYS = Rules(optimized="on")


def vault_of(folder: Path, *, signed: bool = True) -> tuple[Path, Manifest]:
    """A vault's artifacts with one model, and its manifest."""
    root = folder / "vault" / "artifacts"
    manifest = publish(root)
    if signed:
        key = DeviceKey.load(root.parent / DEVICE_KEY, make=True)
        files = artifacts.read_files(root / manifest.sha256)
        artifacts.publish(root, manifest, files["model.onnx"], files["probe.npz"], key)
    return root, manifest


def form_of(root: Path, manifest: Manifest) -> Path:
    return root / f"{manifest.sha256}{ENDING}"


def kept(root: Path, rules: Rules = ALWAYS) -> None:
    predictor = Predictor(root, rules)
    assert predictor.keeps_none
    predictor.keep()
    assert not predictor.keeps_none


def answers_right(root: Path, rules: Rules = ALWAYS) -> bool:
    """Whether the form was opened; the answers are the model's in any case."""
    predictor = Predictor(root, rules)
    np.testing.assert_allclose(predictor.predict(X).logits, expected("image-mean", X), rtol=0, atol=1e-4)
    return predictor.handle.optimized


@pytest.mark.parametrize("signed", [True, False])
def test_a_form_is_kept_and_opened_at_the_next_start(tmp_path: Path, signed: bool) -> None:
    root, manifest = vault_of(tmp_path, signed=signed)
    assert not answers_right(root)
    kept(root)
    assert form_of(root, manifest).is_file()
    assert answers_right(root)
    assert not answers_right(root, Rules(optimized="off"))


def test_auto_keeps_what_pays_and_remembers_what_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, manifest = vault_of(tmp_path)
    monkeypatch.setattr(optimized, "_timed", lambda *_: (10.0, 9.0))
    kept(root, Rules())
    assert form_of(root, manifest).stat().st_size < 1000, "the line alone"
    assert not answers_right(root, Rules())
    monkeypatch.setattr(optimized, "_timed", lambda *_: pytest.fail("it is known"))
    kept(root, Rules())
    form_of(root, manifest).unlink()
    monkeypatch.setattr(optimized, "_timed", lambda *_: (10.0, 6.0))
    kept(root, Rules())
    assert answers_right(root, Rules())


def test_what_was_made_for_another_device_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, manifest = vault_of(tmp_path)
    kept(root)
    before = form_of(root, manifest).read_bytes()
    monkeypatch.setattr(optimized, "made_for", lambda: {"onnxruntime": "another"})
    assert not answers_right(root)
    assert not form_of(root, manifest).exists()
    kept(root)
    assert form_of(root, manifest).read_bytes() != before
    assert answers_right(root)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    root, manifest = vault_of(tmp_path_factory.mktemp("damaged"))
    kept(root)
    return root, form_of(root, manifest), form_of(root, manifest).read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_form_is_not_opened(damaged: tuple[Path, Path, bytes], data: st.DataObject) -> None:
    root, path, whole = damaged
    head = whole.index(b"\n") + 1
    place = data.draw(st.integers(0, head + 200) | st.integers(0, len(whole) - 1), "place")
    place = min(place, len(whole) - 1)
    if data.draw(st.booleans(), "cut"):
        path.write_bytes(whole[:place])
    else:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert not answers_right(root)
    assert not path.exists(), "it is made anew"


def test_a_form_without_the_devices_key_is_not_opened(tmp_path: Path) -> None:
    root, manifest = vault_of(tmp_path)
    kept(root)
    line, _, form = form_of(root, manifest).read_bytes().partition(b"\n")
    forged = Head.model_validate_json(line).sealed(DeviceKey(bytes(32)))
    form_of(root, manifest).write_bytes(forged.model_dump_json().encode() + b"\n" + form)
    assert not answers_right(root)


def test_a_form_of_another_model_does_not_prove_itself(tmp_path: Path) -> None:
    root, manifest = vault_of(tmp_path)
    other = tmp_path / "other"
    publish(other, seed=5)
    open_session(load_artifact(resolve(other))[1], write=tmp_path / "form.onnx")
    form = (tmp_path / "form.onnx").read_bytes()
    key = DeviceKey.load(root.parent / DEVICE_KEY)
    sha = hashlib.sha256(form).hexdigest()
    head = Head(model=manifest.sha256, made_for=optimized.made_for(), form=sha).sealed(key)
    form_of(root, manifest).write_bytes(head.model_dump_json().encode() + b"\n" + form)
    assert not answers_right(root)
    assert not form_of(root, manifest).exists()


def test_none_is_kept_where_nobody_here_could_seal_it(tmp_path: Path) -> None:
    root, manifest = vault_of(tmp_path, signed=False)
    trusted = root.parent / TRUSTED
    trusted.mkdir()
    (trusted / "coordinator.pub").write_text("ab" * 32)
    forms = Forms(root, "on")
    assert forms.keep(manifest.sha256, b"", lambda _: None) is None
    assert forms.open(manifest.sha256) is None


def test_forms_of_artifacts_that_are_gone_go_too(tmp_path: Path) -> None:
    root, first = vault_of(tmp_path, signed=False)
    kept(root)
    form_of(root, first).rename(gone := root / f"{'0' * 64}{ENDING}")
    kept(root)
    assert not gone.exists()
    assert form_of(root, first).exists()


def test_a_disk_that_refuses_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, manifest = vault_of(tmp_path)

    def refuse(*_: object) -> None:
        raise ExportError("no space left")

    monkeypatch.setattr(optimized, "update", refuse)
    kept(root)
    assert "no space left" in caplog.text
    assert not form_of(root, manifest).exists()
    assert not answers_right(root)


def test_a_serving_process_keeps_it_for_the_next_one(tmp_path: Path) -> None:
    root, manifest = vault_of(tmp_path)
    with serving(root, "--watch", "0.05", "--optimized", "on"):
        until(form_of(root, manifest).is_file)
    assert answers_right(root)
