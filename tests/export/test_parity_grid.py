"""Exported against torch, over all that exports differ in: at most 1e-5 apart, no answer flips."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from edge_agent.training.pruning import compacted
from export.cut import cut
from export.graph import build
from export.proof import answers, open_session
from export.verify import attention_runs
from foundation.nn.bridge import tensor_of, to_module
from foundation.parameters import Array, Masks, Parameters
from foundation.spec import ModelSpec, initial_parameters
from tests.export.reference import masks_for, normalisation_for, raw_inputs

INPUTS = {
    "image": {"input": "image", "shape": (3, 8, 8), "classes": 5, "pool": "cls"},
    "series": {"input": "series", "shape": (32, 2), "classes": 4},
    "text": {"input": "text", "shape": (12,), "classes": 17},
}
DEPTHS = (1, 2, 8)
OPSETS = (17, 20, 23)
BATCHES = (1, 7, 32)
WIDTH, HIDDEN = 16, 64


def spec_of(kind: str, depth: int) -> ModelSpec:
    return ModelSpec(**INPUTS[kind], width=WIDTH, depth=depth, heads=4)  # type: ignore[arg-type]


def parameters_of(spec: ModelSpec) -> Parameters:
    """The initial model with nothing left at 0 or 1: also the biases of units that go have to go."""
    rng = np.random.default_rng(5)
    start = initial_parameters(spec, 5)
    moved = {n: (a + 0.05 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in start.items()}
    return Parameters(moved)


def kept(depth: int) -> dict[str, tuple[int, ...]]:
    some = tuple(5 + 7 * (i % 8) for i in range(depth))
    return {
        "one": (1,) * depth,
        "some": some,
        "full": (HIDDEN,) * depth,
        "a layer gone": (*some[:-1], 0),
    }


def masked(parameters: Parameters, masks: Masks) -> Parameters:
    """Silence the units of the dense model that go; their rows and biases stay as they were."""
    return parameters.updated(
        {f"{block}.down.weight": parameters[f"{block}.down.weight"] * mask for block, mask in masks.items()}
    )


def torch_logits(spec: ModelSpec, parameters: Parameters, x: Array, *, double: bool = False) -> Array:
    statistics = normalisation_for(spec)
    model = to_module(spec, parameters)
    if spec.input == "text":
        seen = torch.from_numpy(x)
    else:
        seen = tensor_of(statistics.apply(x, spec.input))
        seen = seen.double() if double else seen
    with torch.inference_mode():
        found: Array = (model.double() if double else model)(seen).numpy()
    return found


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", INPUTS)
def test_exported_models_answer_as_torch_does(kind: str, depth: int) -> None:
    spec = spec_of(kind, depth)
    parameters, x = parameters_of(spec), raw_inputs(spec, max(BATCHES), seed=depth)
    for case, units in kept(depth).items():
        masks = masks_for(spec, units)
        expected = torch_logits(spec, masked(parameters, masks), x)
        for opset in OPSETS:
            model = build(
                *(spec, cut(parameters, masks), normalisation_for(spec)),
                metadata={},
                opset=opset,
                attention=attention_runs(opset),
            )
            session = open_session(model)
            for batch in BATCHES:
                found = answers(session, x[:batch])
                where = f"{case}, opset {opset}, batch {batch}"
                assert np.abs(found - expected[:batch]).max() <= 1e-5, where
                assert (found.argmax(-1) == expected[:batch].argmax(-1)).all(), where


@pytest.mark.parametrize("kind", INPUTS)
def test_masked_compacted_and_exported_are_one_function(kind: str) -> None:
    spec = spec_of(kind, 2)
    parameters, x = parameters_of(spec), raw_inputs(spec, 7)
    masks = masks_for(spec, (3, 20))
    one = torch_logits(spec, masked(parameters, masks), x, double=True)
    two = torch_logits(spec, compacted(parameters, masks), x, double=True)
    three = answers(
        open_session(build(spec, cut(parameters, masks), normalisation_for(spec), metadata={})), x
    )
    np.testing.assert_allclose(one, two, atol=1e-12)
    np.testing.assert_allclose(three, two, atol=1e-5)


@pytest.mark.parametrize("kind", INPUTS)
def test_1024_inputs_and_no_flip(kind: str) -> None:
    spec = spec_of(kind, 2)
    parameters, x = parameters_of(spec), raw_inputs(spec, 1024, seed=3)
    expected = torch_logits(spec, parameters, x, double=True)
    for opset in OPSETS:
        model = build(
            *(spec, parameters, normalisation_for(spec)),
            metadata={}, opset=opset, attention=attention_runs(opset),
        )  # fmt: skip
        found = answers(open_session(model), x)
        assert np.abs(found - expected).max() <= 1e-5
        first, second = np.sort(expected, -1)[..., -1], np.sort(expected, -1)[..., -2]
        clear = first - second > 2e-5  # closer than that is a tie that rounding decides
        assert (found.argmax(-1) == expected.argmax(-1))[clear].all()


def test_attention_is_one_operator_from_opset_23_on_where_it_runs() -> None:
    spec = spec_of("text", 2)
    for opset in OPSETS:
        model = build(
            *(spec, parameters_of(spec), normalisation_for(spec)),
            metadata={}, opset=opset, attention=attention_runs(opset),
        )  # fmt: skip
        onnx.checker.check_model(model, full_check=True)
        found = [node.op_type for node in onnx.load_model_from_string(model).graph.node].count("Attention")
        assert found == (spec.depth if attention_runs(opset) else 0)
    assert not attention_runs(17)
