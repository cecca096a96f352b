from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from export.__main__ import main
from export.cut import cut
from export.folder import load_artifact, probe_bytes, publish, resolve
from export.graph import build
from export.package import export_artifact
from export.proof import open_session, prove
from export.sign import DeviceKey, Keys
from foundation.artifact import Manifest, Probe
from foundation.energy import Kind
from foundation.errors import ExportError, ProofFailed
from foundation.parameters import Masks
from tests.export.reference import (
    SPECS,
    masks_for,
    normalisation_for,
    probe_for,
    raw_inputs,
    trained,
)

SPEC = SPECS["image-mean"]
KEPT = (9, 2, 30)
MASKS = masks_for(SPEC, KEPT)
PARAMETERS = trained(SPEC)
PROBE = probe_for(SPEC, PARAMETERS, MASKS)
LABELS = ("null", "eins", "zwei", "drei", "vier & <mehr>")


def export(
    folder: Path, *, round: int = 1, masks: Masks = MASKS, probe: Probe = PROBE, measure: bool = False
) -> Manifest:
    return export_artifact(
        SPEC, PARAMETERS, masks, normalisation_for(SPEC), LABELS, probe, folder,
        agent="agent-1", run="run-1", round=round, strategy="fedavg", accuracy=0.75,
        train_joules=12.5, train_joules_kind=Kind.MODELLED, measure_latency=measure,
    )  # fmt: skip


def test_manifest_says_what_was_exported(tmp_path: Path) -> None:
    manifest = export(tmp_path, measure=True)
    folder = tmp_path / manifest.sha256
    assert resolve(tmp_path) == folder
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "manifest.json", "probe.npz"}
    loaded, model, probe = load_artifact(folder)
    assert loaded == manifest
    assert len(model) == manifest.bytes == (folder / "model.onnx").stat().st_size
    assert (manifest.kept_units, manifest.hidden_units) == (KEPT, 64)
    assert manifest.dense_parameters == PARAMETERS.size - 3 * 64
    assert manifest.dense_parameters - manifest.parameters == sum(64 - k for k in KEPT) * (2 * 16 + 1)
    assert 0 < manifest.parity <= 1e-5
    assert manifest.latency_ms is not None
    assert manifest.dense_latency_ms is not None
    assert (manifest.train_joules, manifest.train_joules_kind) == (12.5, Kind.MODELLED)
    np.testing.assert_array_equal(probe.inputs, PROBE.inputs)
    assert prove(open_session(model), probe, manifest.tolerance).flips == 0
    stored = open_session(model).get_modelmeta().custom_metadata_map
    assert json.loads(stored["labels"]) == list(LABELS)
    assert (stored["agent"], stored["round"], stored["accuracy"]) == ("agent-1", "1", "0.75")


def test_cut_units_make_the_file_smaller_and_zeros_do_not(tmp_path: Path) -> None:
    manifest = export(tmp_path)
    assert manifest.bytes < 0.75 * manifest.dense_bytes
    rng = np.random.default_rng(0)
    zeroed = PARAMETERS.updated(
        {n: a * (rng.random(a.shape) < 0.25) for n, a in PARAMETERS.items() if ".ffl." in n and a.ndim == 2}
    )
    zeros, dense = (build(SPEC, p, normalisation_for(SPEC), metadata={}) for p in (zeroed, PARAMETERS))
    assert len(zeros) == len(dense)


def test_same_export_twice_gives_the_same_artifact(tmp_path: Path) -> None:
    first, second = export(tmp_path / "a"), export(tmp_path / "b")
    assert first == second
    again = export(tmp_path / "a", measure=True)
    assert again.sha256 == first.sha256
    assert load_artifact(resolve(tmp_path / "a"))[0] == again


def test_failed_proof_leaves_current_as_it_was(tmp_path: Path) -> None:
    good = export(tmp_path)
    with pytest.raises(ProofFailed, match="logits differ"):
        export(tmp_path, round=2, masks={})
    assert resolve(tmp_path).name == good.sha256
    assert load_artifact(resolve(tmp_path))[0] == good


def test_previous_is_kept_and_older_ones_are_swept(tmp_path: Path) -> None:
    made = [export(tmp_path, round=i).sha256 for i in range(4)]
    (tmp_path / ".incoming-left-by-a-kill").mkdir()
    made.append(export(tmp_path, round=4).sha256)
    assert resolve(tmp_path).name == made[4]
    assert resolve(tmp_path, "previous").name == made[3]
    present = {path.name for path in tmp_path.iterdir() if not path.is_symlink()}
    assert present == {".lock", made[3], made[4]}
    # Going back to the one before swaps the two links' roles and sweeps neither.
    assert export(tmp_path, round=3).sha256 == made[3]
    assert resolve(tmp_path, "previous").name == made[4]
    assert load_artifact(resolve(tmp_path, "previous"))[0].round == 4


def test_folder_that_cannot_be_written_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="could not be written"):
        export(tmp_path / "file")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path, at: int | None = None, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1 << bit
    path.write_bytes(bytes(content))


def relabel(path: Path) -> None:
    path.write_text(path.read_text().replace("eins", "zehn"))


def retolerate(path: Path) -> None:
    manifest = Manifest.model_validate_json(path.read_text())
    path.write_text(manifest.model_copy(update={"tolerance": 1e6}).model_dump_json())


def swap_probe(path: Path) -> None:
    path.write_bytes(probe_bytes(Probe(PROBE.inputs, PROBE.logits + np.float32(1))))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.onnx", truncate, "is not the model of its manifest"),
        ("model.onnx", flip, "is not the model of its manifest"),
        ("model.onnx", Path.unlink, "cannot be read"),
        ("probe.npz", truncate, "is not the probe"),
        ("probe.npz", flip, "is not the probe"),
        ("probe.npz", swap_probe, "is not the probe"),
        ("manifest.json", truncate, "is not a manifest"),
        ("manifest.json", relabel, "disagree about labels"),
        ("manifest.json", retolerate, "disagree about tolerance"),
        ("manifest.json", Path.unlink, "cannot be read"),
    ],
)
def test_damaged_artifact_is_refused(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / export(tmp_path).sha256
    damage(folder / name)
    with pytest.raises(ExportError, match=message):
        load_artifact(folder)


def test_any_single_flipped_bit_of_model_or_probe_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / export(tmp_path).sha256
    rng = np.random.default_rng(0)
    for name in ("model.onnx", "probe.npz"):
        good = (folder / name).read_bytes()
        for _ in range(40):
            flip(folder / name, int(rng.integers(len(good))), int(rng.integers(8)))
            with pytest.raises(ExportError):
                load_artifact(folder)
            (folder / name).write_bytes(good)
    assert load_artifact(folder)[0].agent == "agent-1"


def test_artifact_under_another_models_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / export(tmp_path).sha256
    renamed = folder.rename(tmp_path / ("0" * 64))
    with pytest.raises(ExportError, match="named after another model"):
        load_artifact(renamed)


def test_empty_folder_has_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no artifact"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("probe", "labels", "message"),
    [
        (replace(PROBE, inputs=PROBE.inputs.astype(np.float64)), LABELS, "inputs are float64"),
        (replace(PROBE, inputs=PROBE.inputs[:, :1]), LABELS, "inputs have shape"),
        (replace(PROBE, logits=PROBE.logits[:, :2]), LABELS, "logits have shape"),
        (replace(PROBE, logits=PROBE.logits * np.float32(np.inf)), LABELS, "not finite"),
        (PROBE, LABELS[:3], "5 classes"),
        (PROBE, ("same",) * 5, "5 classes"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    tmp_path: Path, probe: Probe, labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_artifact(
            SPEC, PARAMETERS, MASKS, normalisation_for(SPEC), labels, probe, tmp_path,
            agent="a", run="r", round=1, strategy="s",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


WRITER = """
import sys
from pathlib import Path
from export.folder import load_artifact, publish
sources = [Path(p) for p in sys.argv[2:]]
ready = [(load_artifact(s)[0], *((s / n).read_bytes() for n in ("model.onnx", "probe.npz"))) for s in sources]
print("ready", flush=True)
while True:
    for manifest, model, probe in ready:
        publish(Path(sys.argv[1]), manifest, model, probe)
"""


def test_kill_at_any_instant_leaves_a_valid_current(tmp_path: Path) -> None:
    sources = [
        str(tmp_path / f"source-{i}" / export(tmp_path / f"source-{i}", round=i).sha256) for i in range(4)
    ]
    shared = tmp_path / "artifacts"
    rng = np.random.default_rng(int(time.time()))
    seen = set()
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(shared), *sources],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.01 + float(rng.random()) * 0.05)
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdout.close()
        if (shared / "current").is_symlink():
            manifest, model, probe = load_artifact(resolve(shared))
            prove(open_session(model), probe, manifest.tolerance)
            seen.add(manifest.round)
        if (shared / "previous").is_symlink():
            load_artifact(resolve(shared, "previous"))
    assert seen
    last = export(shared, round=9)
    assert resolve(shared).name == last.sha256
    assert not list(shared.glob(".incoming-*"))
    assert sum(path.is_dir() and not path.is_symlink() for path in shared.iterdir()) <= 2


def test_two_writers_take_turns(tmp_path: Path) -> None:
    sources = [
        str(tmp_path / f"source-{i}" / export(tmp_path / f"source-{i}", round=i).sha256) for i in range(3)
    ]
    shared = tmp_path / "artifacts"
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(shared), *sources],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        manifest, model, probe = load_artifact(Path(sources[0]))
        for _ in range(20):
            publish(shared, manifest, model, probe_bytes(probe))
        assert child.poll() is None
    finally:
        child.kill()
        child.wait(10)
        if child.stdout:
            child.stdout.close()
    load_artifact(resolve(shared))


def test_command_line_exports_a_safetensors_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(dict(PARAMETERS), tmp_path / "parameters.safetensors")
    (tmp_path / "spec.json").write_text(SPEC.model_dump_json())
    (tmp_path / "probe.npz").write_bytes(probe_bytes(PROBE))
    (tmp_path / "normalisation.json").write_text(normalisation_for(SPEC).model_dump_json())
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    np.savez(tmp_path / "masks.npz", **MASKS)  # type: ignore[arg-type]
    files = [str(tmp_path / n) for n in ("parameters.safetensors", "spec.json", "probe.npz")]
    options = [
        "--masks", str(tmp_path / "masks.npz"), "--labels", str(tmp_path / "labels.json"),
        "--normalisation", str(tmp_path / "normalisation.json"),
    ]  # fmt: skip
    assert main([*files, str(tmp_path / "out"), *options, "--round", "4"]) == 0
    manifest = Manifest.model_validate_json(capsys.readouterr().out)
    assert (manifest.round, manifest.labels, manifest.kept_units) == (4, LABELS, KEPT)
    small = cut(PARAMETERS, MASKS)
    model = load_artifact(resolve(tmp_path / "out"))[1]
    x = raw_inputs(SPEC, 2)
    expected = open_session(build(SPEC, small, normalisation_for(SPEC), metadata={})).run(None, {"input": x})[
        0
    ]
    np.testing.assert_array_equal(open_session(model).run(None, {"input": x})[0], expected)
    # Without the masks the answers are others, and a file that is not there is another failure.
    assert main([*files, str(tmp_path / "out")]) == 3
    assert "refused: logits differ" in capsys.readouterr().err
    assert main([files[0], files[1], str(tmp_path / "nothing.npz"), str(tmp_path / "out")]) == 1
    assert "failed: " in capsys.readouterr().err


def test_command_line_signs_quantises_and_validates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(dict(PARAMETERS), tmp_path / "parameters.safetensors")
    (tmp_path / "spec.json").write_text(SPEC.model_dump_json())
    (tmp_path / "normalisation.json").write_text(normalisation_for(SPEC).model_dump_json())
    (tmp_path / "probe.npz").write_bytes(probe_bytes(probe_for(SPEC, PARAMETERS, {})))
    np.savez(tmp_path / "validation.npz", x=raw_inputs(SPEC, 6), y=np.zeros(6, np.int64))
    key = DeviceKey.load(tmp_path / "key", make=True)
    names = ("parameters.safetensors", "spec.json", "probe.npz", "out")
    words = [
        *(str(tmp_path / name) for name in names),
        "--normalisation", str(tmp_path / "normalisation.json"), "--opset", "23", "--probabilities",
        "--int8", "auto", "--key", str(tmp_path / "key"), "--validation",
    ]  # fmt: skip
    assert main([*words, str(tmp_path / "validation.npz")]) == 0
    manifest = Manifest.model_validate_json(capsys.readouterr().out)
    assert (manifest.opset, manifest.validation_examples) == (23, 6)
    assert manifest.int8 is not None
    loaded, model, _ = load_artifact(resolve(tmp_path / "out"), Keys([key]))
    assert loaded == manifest
    assert [output.name for output in open_session(model).get_outputs()] == ["logits", "probabilities"]
    assert main([*words, str(tmp_path / "probe.npz")]) == 1
    assert "failed: " in capsys.readouterr().err
