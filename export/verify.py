"""Checks a model that was just written: its form, its answers and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import onnx

from export.graph import INPUT, LOGITS, PROBABILITIES
from export.proof import RUNTIME_ERRORS, Parity, open_session, prove
from foundation.artifact import Probe
from foundation.errors import ProofFailed
from foundation.parameters import Array


def check(model: bytes, probe: Probe, tolerance: float) -> Parity:
    """Check a model's form with the onnx checker, then its answers against the probe.

    Raises `ProofFailed` for anything that is not a self-contained model of standard operators with our
    input and outputs, and for answers that differ (see `export.proof.prove`). The first sample also goes
    through alone, so that a graph that only works at one batch size is found here.
    """
    _check_form(model)
    session = open_session(model)
    prove(session, Probe(probe.inputs[:1], probe.logits[:1]), tolerance)
    return prove(session, probe, tolerance)


def latency(
    first: bytes,
    second: bytes,
    sample: Array,
    *,
    repeats: int = 100,
    budget_s: float = 2.0,
    clock: Callable[[], float] = time.thread_time,
) -> tuple[float, float]:
    """Return the median milliseconds of one run of each of two models on the same sample.

    `sample` has a batch axis of 1. The models take turns, so that what else happens on the device falls
    on both, and the clock counts this thread's CPU time, which a busy neighbour does not lengthen. Stops
    after `repeats` pairs or `budget_s` seconds of that time, after at least five pairs. Raises
    `ProofFailed` when a model cannot be opened or cannot run the sample.
    """
    sessions = [open_session(model) for model in (first, second)]
    times: tuple[list[float], list[float]] = ([], [])
    try:
        for _ in range(5):  # the first runs allocate
            for session in sessions:
                session.run([LOGITS], {INPUT: sample})
        begin = clock()
        while len(times[1]) < 5 or (len(times[1]) < repeats and clock() - begin < budget_s):
            for session, spent in zip(sessions, times, strict=True):
                start = clock()
                session.run([LOGITS], {INPUT: sample})
                spent.append(clock() - start)
    except RUNTIME_ERRORS as error:
        raise ProofFailed(f"the model cannot run one sample: {error}") from error
    return 1e3 * median(times[0]), 1e3 * median(times[1])


def _check_form(model: bytes) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ProofFailed(f"the onnx checker refuses the model: {error}") from error
    for complaint in _complaints(onnx.load_model_from_string(model)):
        raise ProofFailed(complaint)


def _complaints(model: onnx.ModelProto) -> Iterator[str]:
    """Yield what the checker allows and we do not: foreign operators, outside data, other names."""
    if domains := {o.domain for o in model.opset_import} - {"", "ai.onnx"}:
        yield f"the model uses operators of {sorted(domains)}"
    outside = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        yield f"the model keeps {outside[0]} outside of its file"
    if (inputs := [i.name for i in model.graph.input]) != [INPUT]:
        yield f"the model's inputs are {inputs}, not {[INPUT]}"
    outputs = [o.name for o in model.graph.output]
    if outputs not in ([LOGITS], [LOGITS, PROBABILITIES]):
        yield f"the model's outputs are {outputs}, not {[LOGITS]}"
