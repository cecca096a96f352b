from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.cut import cut
from export.graph import INPUT, LOGITS, PROBABILITIES, build
from export.proof import open_session
from foundation.errors import ExportError
from foundation.normalisation import Normalisation
from foundation.parameters import Array, Parameters
from foundation.spec import ModelSpec
from tests.export.reference import SPECS, forward, masks_for, normalisation_for, raw_inputs, trained

KEPT = {"dense": None, "mixed": (40, 5, 17), "one": (1, 1, 1), "none": (0, 12, 0)}


def run(model: bytes, x: Array, output: str = LOGITS) -> Array:
    answer: Array = open_session(model).run([output], {INPUT: x})[0]
    return answer


def masks_of(spec: ModelSpec, case: str) -> dict[str, Array]:
    kept = KEPT[case]
    return {} if kept is None else masks_for(spec, tuple(min(k, spec.hidden) for k in kept))


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("name", SPECS)
def test_graph_computes_what_the_masked_reference_computes(name: str, case: str) -> None:
    spec = SPECS[name]
    parameters, masks, statistics = trained(spec), masks_of(spec, case), normalisation_for(spec)
    model = build(spec, cut(parameters, masks), statistics, metadata={})
    onnx.checker.check_model(model, full_check=True)
    for batch in (1, 7):
        x = raw_inputs(spec, batch, seed=batch)
        expected = forward(spec, parameters, masks, statistics, x)
        np.testing.assert_allclose(run(model, x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 4, 9])
def test_text_of_any_length_up_to_the_spec(length: int) -> None:
    spec = SPECS["text"]
    parameters = trained(spec)
    x = raw_inputs(spec, 3)[:, :length]
    model = build(spec, parameters, Normalisation(), metadata={})
    assert run(model, x).shape == (3, length, spec.classes)
    np.testing.assert_allclose(run(model, x), forward(spec, parameters, {}, Normalisation(), x), atol=1e-5)


def test_text_does_not_see_what_comes_later() -> None:
    spec = SPECS["text"]
    model = build(spec, trained(spec), Normalisation(), metadata={})
    x = raw_inputs(spec, 1)
    changed = x.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % spec.classes
    before, after = run(model, x), run(model, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 0.1


@pytest.mark.parametrize("name", ["image-mean", "image-cls", "series-mean", "series-cls"])
def test_folded_normalisation_equals_explicit(name: str) -> None:
    spec = SPECS[name]
    parameters, statistics, x = trained(spec), normalisation_for(spec), raw_inputs(spec, 5)
    folded = build(spec, parameters, statistics, metadata={}, fold=True)
    explicit = build(spec, parameters, statistics, metadata={}, fold=False)
    operators = [node.op_type for node in onnx.load_model_from_string(explicit).graph.node]
    assert operators[:2] == ["Sub", "Div"]
    assert len(onnx.load_model_from_string(folded).graph.node) == len(operators) - 2
    np.testing.assert_allclose(run(folded, x), run(explicit, x), rtol=0, atol=1e-5)


def test_normalisation_that_folding_would_blur_stays_explicit() -> None:
    spec = SPECS["series-mean"]
    parameters = trained(spec)
    far = Normalisation(mean=(1000.0, 9.81, 0.0), std=(0.5, 1.0, 1.0))
    model = build(spec, parameters, far, metadata={})
    assert "Sub" in {node.op_type for node in onnx.load_model_from_string(model).graph.node}
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, *spec.shape)) * far.std + far.mean).astype(np.float32)
    expected = forward(spec, parameters, {}, far, x)
    np.testing.assert_allclose(run(model, x), expected, rtol=0, atol=1e-5)
    blurred = run(build(spec, parameters, far, metadata={}, fold=True), x)
    assert np.abs(blurred - expected).max() > 1e-5  # why it is not folded


@pytest.mark.parametrize("opset", [17, 18, 20, 22])
def test_every_opset_gives_the_same_answers(opset: int) -> None:
    spec = SPECS["image-mean"]
    parameters, statistics, x = trained(spec), normalisation_for(spec), raw_inputs(spec, 3)
    model = build(spec, parameters, statistics, metadata={}, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, x), forward(spec, parameters, {}, statistics, x), atol=1e-5)


def test_default_profile_is_opset_17_ir_8_standard_operators_and_dynamic_batch() -> None:
    spec = SPECS["image-cls"]
    model = onnx.load_model_from_string(build(spec, trained(spec), Normalisation(), metadata={}))
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (8, [("", 17)])
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {node.domain for node in model.graph.node} == {""}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {"embed", "blocks.0.attention.qkv", "blocks.1.ffl.up", "blocks.2.ffl.down", "logits"} <= set(names)


def test_last_block_of_a_class_token_model_answers_for_that_token_only() -> None:
    spec = SPECS["image-cls"]
    model = onnx.load_model_from_string(build(spec, trained(spec), Normalisation(), metadata={}))
    names = ["blocks.1.ffl", "blocks.2.ffl"]
    for name in names:  # rows of (tokens x batch), or of the batch alone
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, (None, spec.width)))
    before, last = open_session(model.SerializeToString()).run(
        names, {"input": np.ones((3, *spec.shape), "f4")}
    )
    assert (len(before), len(last)) == (3 * spec.tokens, 3)


def test_probabilities_are_the_softmax_of_the_logits() -> None:
    spec = SPECS["series-mean"]
    model = build(spec, trained(spec), Normalisation(), metadata={}, probabilities=True)
    x = raw_inputs(spec, 4)
    exponentials = np.exp(run(model, x).astype(np.float64))
    expected = exponentials / exponentials.sum(-1, keepdims=True)
    np.testing.assert_allclose(run(model, x, PROBABILITIES), expected, atol=1e-6)


def test_same_model_gives_the_same_bytes() -> None:
    spec = SPECS["image-cls"]
    parameters, statistics = trained(spec), normalisation_for(spec)
    first = build(spec, parameters, statistics, metadata={"b": "2", "a": "1"})
    again = build(
        spec, Parameters(reversed(list(parameters.items()))), statistics, metadata={"a": "1", "b": "2"}
    )
    assert first == again


def test_block_without_units_multiplies_nothing() -> None:
    spec = SPECS["image-mean"]
    masks = masks_for(spec, (0, 3, 64))
    model = onnx.load_model_from_string(build(spec, cut(trained(spec), masks), Normalisation(), metadata={}))
    ffl = [node.op_type for node in model.graph.node if node.name.startswith("blocks.0.ffl")]
    assert ffl == ["Add"]
    assert all(0 not in tensor.dims for tensor in model.graph.initializer)


def broken(spec: ModelSpec) -> dict[str, tuple[Parameters, str]]:
    good = trained(spec)
    without = Parameters((n, a) for n, a in good.items() if n != "head.bias")
    nan = good["norm.bias"].copy()
    nan[1] = np.nan
    half = good["blocks.1.ffl.up.weight"][:5]
    wide = np.zeros((spec.hidden + 1,), np.float32)
    return {
        "missing": (without, "lack head.bias"),
        "nan": (good.updated({"norm.bias": nan}), "norm.bias has values that are not finite"),
        "shape": (good.updated({"position": good["position"][1:]}), "position has shape"),
        "halfcut": (good.updated({"blocks.1.ffl.up.weight": half}), "blocks.1.ffl.up.weight has shape"),
        "wide": (good.updated({"blocks.0.ffl.up.bias": wide}), "blocks.0.ffl.up.bias has shape"),
        "extra": (good.updated({"blocks.9.norm1.bias": nan}), "the spec has no blocks.9.norm1.bias"),
    }


@pytest.mark.parametrize("case", ["missing", "nan", "shape", "halfcut", "wide", "extra"])
def test_parameters_that_do_not_fit_are_refused_by_name(case: str) -> None:
    spec = SPECS["image-mean"]
    parameters, message = broken(spec)[case]
    with pytest.raises(ExportError, match=message):
        build(spec, parameters, Normalisation(), metadata={})


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (Normalisation(mean=(1.0,), std=(1.0,)), "1 channels"),
        (Normalisation(mean=(1.0, 1.0), std=(1.0, 0.0)), "deviation of 0"),
    ],
)
def test_normalisation_that_does_not_fit_is_refused(statistics: Normalisation, message: str) -> None:
    spec = SPECS["image-mean"]
    with pytest.raises(ExportError, match=message):
        build(spec, trained(spec), statistics, metadata={})


def test_unknown_opset_is_refused() -> None:
    spec = SPECS["text"]
    with pytest.raises(ExportError, match="opset 12"):
        build(spec, trained(spec), Normalisation(), metadata={}, opset=12)
