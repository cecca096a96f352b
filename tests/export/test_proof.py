from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from export.cut import cut
from export.graph import build
from export.proof import default_tolerance, open_session, prove
from export.verify import check, latency
from foundation.artifact import Probe
from foundation.errors import ProofFailed
from foundation.parameters import Masks, Parameters
from foundation.spec import ModelSpec
from tests.export.reference import SPECS, masks_for, normalisation_for, probe_for, trained

SPEC = SPECS["image-mean"]
MASKS = masks_for(SPEC, (9, 2, 30))


@pytest.fixture(scope="module")
def parameters() -> Parameters:
    return trained(SPEC)


@pytest.fixture(scope="module")
def probe(parameters: Parameters) -> Probe:
    return probe_for(SPEC, parameters, MASKS)


def built(parameters: Parameters, masks: Masks = MASKS, spec: ModelSpec = SPEC) -> bytes:
    return build(spec, cut(parameters, masks), normalisation_for(spec), metadata={})


def test_true_model_is_proven(parameters: Parameters, probe: Probe) -> None:
    parity = check(built(parameters), probe, 1e-5)
    assert 0 < parity.difference <= 1e-5
    assert (parity.flips, parity.answers, parity.tolerance) == (0, 8, 1e-5)


def test_text_is_compared_at_every_position() -> None:
    spec = SPECS["text"]
    parameters = trained(spec)
    model = build(spec, parameters, normalisation_for(spec), metadata={})
    assert check(model, probe_for(spec, parameters, {}), 1e-5).answers == 8 * 9


def test_probe_larger_than_one_batch(parameters: Parameters) -> None:
    probe = probe_for(SPEC, parameters, MASKS, count=70)
    assert prove(open_session(built(parameters)), probe, 1e-5).answers == 70


def wrong_models(parameters: Parameters) -> dict[str, bytes]:
    norm = parameters["blocks.1.norm2.weight"]
    qkv = parameters["blocks.0.attention.qkv.weight"]
    other = masks_for(SPEC, (9, 2, 30), seed=5)
    return {
        "uncut": built(parameters, {}),
        "other units": built(parameters, other),
        "no normalisation": build(
            SPEC, cut(parameters, MASKS), normalisation_for(SPECS["text"]), metadata={}
        ),
        "small step": built(parameters.updated({"blocks.1.norm2.weight": norm * np.float32(1.002)})),
        "query and key swapped": built(
            parameters.updated({"blocks.0.attention.qkv.weight": np.vstack([qkv[16:32], qkv[:16], qkv[32:]])})
        ),
    }


@pytest.mark.parametrize(
    "case", ["uncut", "other units", "no normalisation", "small step", "query and key swapped"]
)
def test_wrong_model_is_refused(parameters: Parameters, probe: Probe, case: str) -> None:
    with pytest.raises(ProofFailed, match="logits differ from the probe's"):
        check(wrong_models(parameters)[case], probe, default_tolerance(probe))


def test_flip_of_a_close_answer_is_a_tie_and_of_a_clear_one_is_not(
    parameters: Parameters, probe: Probe
) -> None:
    session = open_session(built(parameters))
    first, second = np.argsort(-probe.logits[0])[:2]
    gap = float(probe.logits[0, first] - probe.logits[0, second])
    swapped = probe.logits.copy()
    swapped[0, [first, second]] = swapped[0, [second, first]]
    assert prove(session, Probe(probe.inputs, swapped), gap * 1.001).flips == 0
    half = probe.logits.copy()  # both moved towards each other and past it: no difference above tolerance
    half[0, first], half[0, second] = probe.logits[0, second], probe.logits[0, second] + gap
    with pytest.raises(ProofFailed, match="1 of 8 answers flip"):
        prove(session, Probe(probe.inputs, half), gap * 0.999)


@pytest.mark.parametrize("count", [0, 3])
def test_probe_that_proves_nothing_is_refused(parameters: Parameters, probe: Probe, count: int) -> None:
    with pytest.raises(ProofFailed, match="proves nothing"):
        check(built(parameters), Probe(probe.inputs[:0], probe.logits[:count]), 1e-5)


def test_not_a_number_is_never_within_tolerance(parameters: Parameters, probe: Probe) -> None:
    logits = probe.logits.copy()
    logits[2, 0] = np.nan
    with pytest.raises(ProofFailed, match="not finite"):
        check(built(parameters), Probe(probe.inputs, logits), 1e9)


def test_answers_of_another_shape_are_refused(parameters: Parameters, probe: Probe) -> None:
    with pytest.raises(ProofFailed, match="answers with shape"):
        check(built(parameters), Probe(probe.inputs, probe.logits[:, :3]), 1.0)
    with pytest.raises(ProofFailed, match="cannot run the probe"):
        check(built(parameters), Probe(probe.inputs[:, :1], probe.logits), 1.0)


def test_tolerance_grows_with_the_logits() -> None:
    assert default_tolerance(Probe(np.zeros((1, 2)), np.array([[0.5, -0.1]]))) == pytest.approx(1e-4)
    assert default_tolerance(Probe(np.zeros((1, 2)), np.array([[2.0, -30.0]]))) == pytest.approx(3e-3)


@pytest.mark.parametrize("content", [b"", b"not a model at all", bytes(200)])
def test_what_is_no_model_is_refused(probe: Probe, content: bytes) -> None:
    with pytest.raises(ProofFailed, match="checker refuses"):
        check(content, probe, 1e-5)
    with pytest.raises(ProofFailed, match="cannot open"):
        open_session(content)


def test_truncated_model_is_refused(parameters: Parameters, probe: Probe) -> None:
    model = built(parameters)
    for share in (0.2, 0.5, 0.99):
        with pytest.raises(ProofFailed):
            check(model[: int(len(model) * share)], probe, 1e-5)


def test_foreign_parts_are_refused(parameters: Parameters, probe: Probe) -> None:
    foreign = onnx.load_model_from_string(built(parameters))
    foreign.opset_import.add(domain="com.microsoft", version=1)
    with pytest.raises(ProofFailed, match=r"com\.microsoft"):
        check(foreign.SerializeToString(), probe, 1e-5)
    renamed = onnx.load_model_from_string(built(parameters))
    renamed.graph.input[0].name = "x"
    renamed.graph.node[0].input[0] = "x"
    with pytest.raises(ProofFailed, match="inputs are"):
        check(renamed.SerializeToString(), probe, 1e-5)


def test_latency_takes_turns_and_reports_medians(parameters: Parameters, probe: Probe) -> None:
    # A clock that stands still but for what each run takes: 1, 3, 1, 3, ... ms, and one outlier of 1 s.
    steps = itertools.chain([0.0, 0.0, 0.0, 1.0, 0.0, 0.003], itertools.cycle([0.0, 0.0, 0.001, 0.0, 0.003]))
    now = itertools.accumulate(steps)
    one, other = latency(
        built(parameters), built(parameters, {}), probe.inputs[:1], repeats=9, clock=lambda: next(now)
    )
    assert (one, other) == (pytest.approx(1.0), pytest.approx(3.0))


def test_latency_of_an_input_that_cannot_run_is_refused(parameters: Parameters, probe: Probe) -> None:
    with pytest.raises(ProofFailed, match="one sample"):
        latency(built(parameters), built(parameters), probe.inputs[:1, :1])
