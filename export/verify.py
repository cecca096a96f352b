"""Checks a model that was just written: its form, its answers and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
import onnx
from onnx import TensorProto, helper

from export import form
from export.graph import INPUT, LOGITS, PROBABILITIES
from export.proof import LARGEST_BATCH, RUNTIME_ERRORS, Parity, answers, open_session, prove
from export.runtime import ort
from foundation.artifact import Probe
from foundation.errors import ProofFailed
from foundation.memory import give_back
from foundation.parameters import Array


@dataclass(frozen=True, slots=True)
class Validation:
    """Raw samples (n, *shape) that were not trained on, and the right answers: (n,) or (n, sequence)."""

    x: Array
    y: Array


def check(model: bytes, probe: Probe, tolerance: float) -> Parity:
    """Check a model's form with the onnx checker, then its answers against the probe.

    Raises `ProofFailed` for anything that is not a self-contained model of standard operators with our
    input and outputs, and for answers that differ (see `export.proof.prove`). The first sample also goes
    through alone, so that a graph that only works at one batch size is found here.
    """
    _check_form(model)
    session = open_session(model)
    for complaint in _complaints(session):
        raise ProofFailed(complaint)
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
    opened = {}
    for model in sorted((first, second), key=len, reverse=True):
        opened[model] = open_session(model)
        give_back()  # opening takes twice what stays, so the larger one comes first
    sessions = (opened[first], opened[second])
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


def accuracy_of(session: ort.InferenceSession, validation: Validation) -> float | None:
    """Return the share of right answers, `None` without samples; `ProofFailed` for a run that fails."""
    if not len(validation.y):
        return None
    wanted = np.int64 if "int64" in session.get_inputs()[0].type else np.float32
    right = 0
    for i in range(0, len(validation.y), LARGEST_BATCH):
        x, y = validation.x[i : i + LARGEST_BATCH], validation.y[i : i + LARGEST_BATCH]
        right += int((answers(session, np.asarray(x, wanted)).argmax(-1) == y).sum())
    return right / validation.y.size


def attention_runs(opset: int) -> bool:
    """Whether this onnxruntime has the operator `Attention` of an opset (23 and later), and computes it."""
    if opset < 23:
        return False
    q, k, v = ("q", "k", "v")
    node = helper.make_node("Attention", [q, k, v], ["y"], q_num_heads=2, kv_num_heads=2, scale=1.0)
    shape = (1, 3, 4)
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (q, k, v)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name in (q, k, v)}
    try:
        session = open_session(model.SerializeToString())
        found = np.asarray(session.run(None, values)[0])
    except ProofFailed:
        return False
    except RUNTIME_ERRORS:
        return False
    first, second, third = (values[n].reshape(3, 2, 2).transpose(1, 0, 2) for n in (q, k, v))
    weights = np.exp(first @ second.transpose(0, 2, 1))
    expected = (weights / weights.sum(-1, keepdims=True) @ third).transpose(1, 0, 2).reshape(shape)
    return bool(np.abs(found - expected).max() < 1e-5)


def _check_form(model: bytes) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ProofFailed(f"the onnx checker refuses the model: {error}") from error
    for complaint in form.complaints(model):
        raise ProofFailed(complaint)


def _complaints(session: ort.InferenceSession) -> Iterator[str]:
    """Yield what the checker allows and we do not: other names than ours."""
    if (inputs := [i.name for i in session.get_inputs()]) != [INPUT]:
        yield f"the model's inputs are {inputs}, not {[INPUT]}"
    outputs = [o.name for o in session.get_outputs()]
    if outputs not in ([LOGITS], [LOGITS, PROBABILITIES]):
        yield f"the model's outputs are {outputs}, not {[LOGITS]}"
