"""8-bit weights: the same function as far as 8 bits go, and taken only where every condition holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export import quantise
from export.folder import load_artifact, resolve
from export.graph import build
from export.package import export_artifact
from export.proof import answers, open_session, prove
from export.quantise import Candidate, Choice, dynamic, judged, tolerance_of
from export.verify import Validation, check
from foundation.artifact import Int8, Manifest, Probe
from foundation.errors import ExportError, ProofFailed
from foundation.parameters import Array
from foundation.spec import ModelSpec
from tests.export.reference import SPECS, normalisation_for, probe_for, raw_inputs, trained

SPEC = SPECS["image-mean"]
PARAMETERS = trained(SPEC)
FLOAT = build(SPEC, PARAMETERS, normalisation_for(SPEC), metadata={"who": "me"})
PROBE = probe_for(SPEC, PARAMETERS, {})


def validation(count: int = 60, wrong: int = 0) -> Validation:
    """Samples with the float model's own answers, the first few of them turned wrong."""
    x = raw_inputs(SPEC, count, seed=11)
    y = answers(open_session(FLOAT), x).argmax(-1)
    y[:wrong] = (y[:wrong] + 1) % SPEC.classes
    return Validation(x, y)


def candidate(**changes: object) -> Candidate:
    # Wide enough for random weights; what is measured is set by each test.
    whole = Candidate(FLOAT, FLOAT, PROBE, 100.0, validation())
    return replace(whole, **changes)  # type: ignore[arg-type]


def measured(monkeypatch: pytest.MonkeyPatch, *, ratio: float, accuracies: tuple[float, float]) -> None:
    """Say what clock and validation say, int8 first."""
    found = iter(accuracies)
    monkeypatch.setattr(quantise, "latency", lambda *_: (ratio, 1.0))
    monkeypatch.setattr(quantise, "accuracy_of", lambda *_: next(found))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("largest", quantise.RANGES)
def test_every_kind_of_model_stays_what_it_was_within_8_bits(name: str, largest: int) -> None:
    spec = SPECS[name]
    parameters = trained(spec)
    model = build(spec, parameters, normalisation_for(spec), metadata={"a": "b"})
    small = dynamic(model, largest=largest)
    x = raw_inputs(spec, 5)
    before = answers(open_session(model), x)
    if largest == 64:
        after = answers(open_session(small), x)
    else:  # which overflows in onnxruntime on processors without an 8-bit dot product
        after = ReferenceEvaluator(small).run(None, {"input": x})[0]
    scale = np.abs(before).max()
    assert 0 < np.abs(after - before).max() < 0.25 * scale
    onnx.checker.check_model(small, full_check=True)
    assert dynamic(model, largest=largest) == small
    assert {p.key: p.value for p in onnx.load_model_from_string(small).metadata_props} == {"a": "b"}


def test_weights_are_8_bits_and_no_float_copy_is_left() -> None:
    spec = ModelSpec(input="image", shape=(1, 8, 8), classes=4, width=64, depth=2, heads=4)
    model = build(spec, trained(spec), normalisation_for(spec), metadata={})
    small = dynamic(model)
    assert len(small) < 0.4 * len(model)
    graph = onnx.load_model_from_string(small).graph
    left = {"position", "embed.weight.T"}  # added, and the first product of raw values
    matrices = [t for t in graph.initializer if len(t.dims) == 2 and t.name not in left]
    assert {t.data_type for t in matrices} == {TensorProto.INT8}
    assert [n.op_type for n in graph.node].count("MatMulInteger") == len(matrices)


def gemm(matrix: Array, bias: Array, **attributes: float) -> bytes:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["logits"], **attributes)
    graph = helper.make_graph(
        [helper.make_node("Tanh", ["input"], ["x"]), node],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ("batch", 6))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("batch", 3))],
        [numpy_helper.from_array(matrix, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_a_bias_and_a_column_of_zeros(transposed: int) -> None:
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((6, 3)).astype(np.float32), rng.standard_normal(3).astype(np.float32)
    w[:, 1] = 0
    x = rng.standard_normal((4, 6)).astype(np.float32)
    model = gemm(np.ascontiguousarray(w.T) if transposed else w, b, transB=transposed)
    found = answers(open_session(dynamic(model, largest=64)), x)
    np.testing.assert_allclose(found, np.tanh(x) @ w + b, atol=0.1)
    np.testing.assert_array_equal(found[:, 1], np.full(4, b[1]))


def test_what_cannot_be_written_in_integers_stays() -> None:
    scaled = gemm(np.ones((6, 3), np.float32), np.ones(3, np.float32), alpha=0.5)
    with pytest.raises(ExportError, match="nothing to quantise"):
        dynamic(scaled)


def test_channels_of_other_scales_survive_as_the_first_product_stays_float() -> None:
    spec = SPECS["series-mean"]  # 120 +- 64 beside -0.8 +- 0.25, scaled inside of the first product
    model = build(spec, trained(spec), normalisation_for(spec), metadata={})
    operators = [n.op_type for n in onnx.load_model_from_string(dynamic(model)).graph.node]
    assert operators.index("MatMul") < operators.index("DynamicQuantizeLinear")


def test_the_range_that_answers_closer_on_this_processor_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, ratio=0.5, accuracies=(1.0, 1.0))
    figures, model = judged(candidate(), insist=False)
    assert figures.parity is not None
    for largest in quantise.RANGES:
        other = answers(open_session(dynamic(FLOAT, largest=largest)), PROBE.inputs)
        assert figures.parity <= np.abs(other - PROBE.logits).max() + 1e-6
    assert model in [dynamic(FLOAT, largest=r) for r in quantise.RANGES]


@pytest.mark.parametrize(
    ("ratio", "accuracies", "why"),
    [
        (0.5, (0.900, 0.904), None),
        (0.5, (0.900, 0.906), "accuracy drops by 0.6 points"),
        (0.97, (0.9, 0.9), "no gain here: 0.97"),
        (0.95, (0.9, 0.9), None),
    ],
)
def test_auto_wants_accuracy_and_gain(
    monkeypatch: pytest.MonkeyPatch, ratio: float, accuracies: tuple[float, float], why: str | None
) -> None:
    measured(monkeypatch, ratio=ratio, accuracies=accuracies)
    figures, _ = judged(candidate(), insist=False)
    assert figures.used is (why is None)
    assert (why or "faster here") in figures.why
    assert (figures.latency_ms, figures.float_latency_ms) == (ratio, 1.0)
    assert (figures.accuracy, figures.float_accuracy) == accuracies
    assert figures.bytes is not None
    assert figures.float_bytes == len(FLOAT) > figures.bytes


@pytest.mark.parametrize("part", [None, validation(49)])
def test_auto_does_not_even_try_without_enough_validation(part: Validation | None) -> None:
    figures, model = judged(candidate(validation=part), insist=False)
    assert not figures.used
    assert "prove nothing" in figures.why
    assert (figures.latency_ms, figures.bytes, model) == (None, None, FLOAT)


def test_a_probe_that_is_not_kept_ends_auto_and_is_an_error_where_int8_is_insisted_on() -> None:
    figures, _ = judged(candidate(tolerance=1e-6), insist=False)
    assert not figures.used
    assert "logits differ" in figures.why
    with pytest.raises(ProofFailed, match="logits differ"):
        judged(candidate(tolerance=1e-6), insist=True)


def export(folder: Path, int8: Choice, part: Validation | None = None) -> Manifest:
    calm = Probe(PROBE.inputs, PROBE.logits)
    return export_artifact(
        *(SPEC, PARAMETERS, {}, normalisation_for(SPEC), tuple("abcde"), calm, folder),
        agent="a", run="r", round=1, strategy="s", int8=int8, validation=part, measure_latency=False,
    )  # fmt: skip


def test_an_8_bit_artifact_proves_itself_with_its_own_tolerance(tmp_path: Path) -> None:
    plain, eight = export(tmp_path / "a", "off", validation()), export(tmp_path / "b", "on", validation())
    assert plain.int8 is None
    assert plain.validation == 1.0
    assert isinstance(eight.int8, Int8)
    assert (eight.int8.used, eight.int8.why) == (True, "asked for")
    assert eight.tolerance == tolerance_of(PROBE) > plain.tolerance
    assert eight.bytes == eight.int8.bytes < plain.bytes
    assert eight.dense_bytes == plain.bytes
    assert eight.validation == eight.int8.accuracy
    assert eight.validation_examples == 60
    manifest, model, probe = load_artifact(resolve(tmp_path / "b"))
    assert manifest == eight
    assert prove(open_session(model), probe, manifest.tolerance).difference == pytest.approx(eight.parity)
    with pytest.raises(ProofFailed):
        check(model, probe, plain.tolerance)


def test_auto_that_says_no_exports_what_off_does(tmp_path: Path) -> None:
    off, auto = export(tmp_path / "a", "off"), export(tmp_path / "b", "auto")
    assert auto.sha256 == off.sha256
    assert auto.int8 is not None
    assert not auto.int8.used
