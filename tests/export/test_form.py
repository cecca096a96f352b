"""What a device does not even open: outside data, foreign operators, other opsets, another device's model."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export import form
from export.folder import load_artifact, probe_bytes, publish, resolve
from export.graph import build
from export.package import export_artifact
from export.proof import open_session
from foundation.artifact import Manifest
from foundation.errors import ExportError, FormRefused, ProofFailed
from tests.export.reference import SPECS, normalisation_for, probe_for, trained

SPEC = SPECS["series-mean"]
PARAMETERS = trained(SPEC)
MODEL = build(SPEC, PARAMETERS, normalisation_for(SPEC), metadata={})


def artifact(folder: Path, model: bytes | None = None, **facts: object) -> Path:
    probe = probe_for(SPEC, PARAMETERS, {})
    manifest = export_artifact(
        *(SPEC, PARAMETERS, {}, normalisation_for(SPEC), ("a", "b", "c"), probe, folder),
        agent="kitchen", run="r", round=1, strategy="fedavg", measure_latency=False,
    )  # fmt: skip
    if model is not None:
        digest = hashlib.sha256(model).hexdigest()
        manifest = Manifest(**(manifest.model_dump() | {"sha256": digest, "bytes": len(model)}))
        publish(folder, manifest, model, probe_bytes(probe))
    return resolve(folder)


def test_an_artifact_of_this_device_loads_and_another_ones_does_not(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    assert load_artifact(folder, agent="kitchen")[0].agent == "kitchen"
    with pytest.raises(FormRefused, match="made for 'kitchen', and this is 'cellar'"):
        load_artifact(folder, agent="cellar")


def test_data_outside_of_the_file_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    model = onnx.load_model_from_string((artifact(tmp_path) / "model.onnx").read_bytes())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(FormRefused, match=f"keeps {tensor.name} outside of its file"):
        load_artifact(artifact(tmp_path, model.SerializeToString()))


def test_a_tensor_inside_of_a_branch_is_found_too() -> None:
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1])
    tensor.external_data.add(key="location", value="elsewhere")
    inner = helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "inner", [], [])
    model = onnx.load_model_from_string(MODEL)
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    assert "hidden" in next(form.complaints(model.SerializeToString()))


def test_foreign_operators_are_refused_by_name(tmp_path: Path) -> None:
    model = onnx.load_model_from_string((artifact(tmp_path) / "model.onnx").read_bytes())
    model.graph.node[3].domain = "com.example"
    model.graph.node[3].op_type = "Surprise"
    with pytest.raises(FormRefused, match=r"com\.example\.Surprise"):
        load_artifact(artifact(tmp_path, model.SerializeToString()))


def test_another_opset_than_the_manifests_is_refused(tmp_path: Path) -> None:
    model = onnx.load_model_from_string((artifact(tmp_path) / "model.onnx").read_bytes())
    model.opset_import[0].version = 18
    with pytest.raises(FormRefused, match="of opset 18, and its manifest says 17"):
        load_artifact(artifact(tmp_path, model.SerializeToString()))


def test_an_opset_that_this_runtime_does_not_have_is_named() -> None:
    model = onnx.load_model_from_string(MODEL)
    model.opset_import[0].version = 999
    with pytest.raises(ProofFailed, match=r"onnxruntime \d.*opset 999"):
        open_session(model.SerializeToString())


def test_our_own_models_have_nothing_to_complain_of() -> None:
    for name, spec in SPECS.items():
        model = build(spec, trained(spec), normalisation_for(spec), metadata={})
        assert list(form.complaints(model)) == [], name
        assert form.opset_of(model) == 17


@given(st.binary(max_size=200))
def test_whatever_the_bytes_they_are_judged_or_refused(content: bytes) -> None:
    with contextlib.suppress(ExportError):
        assert all(isinstance(text, str) for text in form.complaints(content))
        form.opset_of(content)


@given(st.lists(st.tuples(st.integers(0, len(MODEL) - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_model_with_other_bytes_is_judged_or_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray(MODEL)
    for at, byte in changes:
        content[at] = byte
    with contextlib.suppress(ExportError):
        list(form.complaints(bytes(content)))


def test_graphs_within_graphs_have_a_bound() -> None:
    inner = helper.make_graph([], "g", [], [])
    for _ in range(20):
        inner = helper.make_graph([helper.make_node("If", ["c"], ["z"], then_branch=inner)], "g", [], [])
    model = onnx.ModelProto(graph=inner)
    with pytest.raises(ExportError, match="parts deep"):
        list(form.complaints(model.SerializeToString()))
