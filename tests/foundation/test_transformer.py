"""One model three times: masked reference, compacted torch, exported ONNX; the same answers to 1e-5."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_agent.training.pruning import compacted
from export.cut import cut
from export.graph import build
from export.proof import open_session
from foundation.nn.bridge import to_module, to_parameters
from foundation.nn.transformer import Transformer, loss_of
from foundation.spec import initial_parameters
from tests.export.reference import SPECS, forward, masks_for, normalisation_for, raw_inputs, trained
from tests.toys import SPEC, same


@pytest.mark.parametrize("kept", [None, (32, 1, 7), (1, 1, 1)], ids=["dense", "mixed", "one-unit"])
@pytest.mark.parametrize("name", SPECS)
def test_masked_equals_compacted_equals_onnx(name: str, kept: tuple[int, ...] | None) -> None:
    spec = SPECS[name]
    parameters, normalisation = trained(spec), normalisation_for(spec)
    masks = masks_for(spec, tuple(min(k, spec.hidden) for k in kept)) if kept else {}
    x = raw_inputs(spec, 5)
    reference = forward(spec, parameters, masks, normalisation, x)
    model = to_module(spec, compacted(parameters, masks))
    inputs = torch.from_numpy(x if spec.input == "text" else normalisation.apply(x, spec.input))
    with torch.no_grad():
        compact = model(inputs).numpy()
    graph = build(spec, cut(parameters, masks), normalisation, metadata={})
    served = open_session(graph).run(["logits"], {"input": x})[0]
    scale = max(1.0, float(np.abs(reference).max()))
    assert np.abs(compact - reference).max() < 1e-5 * scale
    assert np.abs(served - reference).max() < 1e-5 * scale
    assert np.abs(served - compact).max() < 1e-5 * scale


def test_text_sees_no_character_to_its_right() -> None:
    spec = SPECS["text"]
    model = to_module(spec, trained(spec))
    x = torch.from_numpy(raw_inputs(spec, 1))
    changed = x.clone()
    changed[0, 5] = (changed[0, 5] + 1) % spec.classes
    with torch.no_grad():
        a, b = model(x), model(changed)
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-6)
    assert not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)


def test_bridge_there_and_back_is_the_same() -> None:
    parameters = initial_parameters(SPEC, 0)
    back = to_parameters(to_module(SPEC, parameters))
    weights = {n: a for n, a in parameters.items() if not n.endswith("threshold")}
    assert same(back, weights)
    assert list(back) == list(weights), "names come in the order of the layout"


def test_the_module_does_not_write_into_the_parameters() -> None:
    parameters = initial_parameters(SPEC, 0)
    model = to_module(SPEC, parameters)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same(parameters, initial_parameters(SPEC, 0))


def test_a_width_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="positive FFL widths"):
        Transformer(SPEC, [0, 4])
    with pytest.raises(ValueError, match="2 blocks"):
        Transformer(SPEC, [4])


def test_the_loss_counts_every_position_of_a_text() -> None:
    logits = torch.randn(2, 3, 5)
    targets = torch.randint(0, 5, (2, 3))
    single = [loss_of(logits[i, t][None], targets[i, t][None]) for i in range(2) for t in range(3)]
    assert torch.allclose(loss_of(logits, targets), torch.stack(single).mean())
