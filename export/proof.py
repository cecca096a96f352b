"""Does a model give the answers that the trained model gave? onnxruntime and numpy only.

Used twice with the same code: at export, and on the device each time an artifact is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.form import opset_of
from export.runtime import ort, ort_errors
from foundation.artifact import Probe
from foundation.errors import ExportError, ProofFailed
from foundation.parameters import Array

LARGEST_BATCH = 64

# What onnxruntime raises; its errors have no common root but Exception.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


@dataclass(frozen=True, slots=True)
class Parity:
    """How close a model's logits are to the probe's."""

    difference: float
    """Largest absolute difference of two logits."""
    flips: int
    """Answers that differ although the probe prefers its own by more than the tolerance."""
    answers: int
    """Answers compared: one per sample, or one per position for text."""
    tolerance: float


def open_session(model: bytes, *, optimized: bool = False, write: Path | None = None) -> ort.InferenceSession:
    """Open a model from its bytes: CPU, one thread, no spinning.

    Bytes and not a path, so that what was hashed is what is run. One thread, as a small model gains
    nothing from two, and spinning would burn ten times the energy of the run itself. `write` is a file for
    the form that onnxruntime optimizes the model to; `optimized` says that the bytes are such a form. Raises
    `ProofFailed` when onnxruntime cannot open it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong is raised, and said once
    if optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if write is not None:
        options.optimized_model_filepath = str(write)
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise ProofFailed(
            f"onnxruntime {ort.__version__} cannot open the model{_of_opset(model)}: {error}"
        ) from error
    # The file's bytes would stay for as long as the session, for another try with other providers.
    session.disable_fallback()
    session._model_bytes = b""
    return session


def default_tolerance(probe: Probe) -> float:
    """Return the largest difference that float32 excuses: 1e-4, times the largest logit where above 1.

    Fresh models agree to 5e-6, and well-trained ones to about 1e-5. Training that sharpens attention makes
    float32 itself noisier (torch against its own double precision then differs by 3e-5 and more), and
    such a model must not be refused; a wrong graph is off by 1e-2 or more. What was seen is in the
    manifest as `parity`.
    """
    return 1e-4 * max(1.0, float(np.abs(probe.logits).max(initial=0.0)))


def prove(session: ort.InferenceSession, probe: Probe, tolerance: float) -> Parity:
    """Run the probe and compare every logit.

    An answer counts as flipped when another class wins although the probe prefers its own by more than
    `tolerance`; closer than that is a tie that no two float32 computations need to break the same way.
    Raises `ProofFailed` for a difference above `tolerance`, a flip, another shape, a value that is not
    finite, an empty probe, or a run that fails.
    """
    if len(probe.inputs) == 0 or len(probe.inputs) != len(probe.logits):
        raise ProofFailed(
            f"a probe of {len(probe.inputs)} inputs and {len(probe.logits)} answers proves nothing"
        )
    expected = np.asarray(probe.logits, np.float64)
    actual = answers(session, probe.inputs).astype(np.float64)
    if actual.shape != expected.shape:
        raise ProofFailed(f"the model answers with shape {actual.shape}, the probe with {expected.shape}")
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        raise ProofFailed("there are logits that are not finite")
    found = Parity(
        difference=float(np.abs(actual - expected).max()),
        flips=_flips(expected, actual, tolerance),
        answers=expected[..., 0].size,
        tolerance=tolerance,
    )
    if not found.difference <= tolerance or found.flips:
        raise ProofFailed(
            f"logits differ from the probe's by up to {found.difference:.3g} where {tolerance:.3g} is "
            f"allowed, and {found.flips} of {found.answers} answers flip"
        )
    return found


def answers(session: ort.InferenceSession, inputs: Array) -> Array:
    """Return a model's first output for any number of samples; raises `ProofFailed` for a run that fails."""
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    batches = [inputs[i : i + LARGEST_BATCH] for i in range(0, len(inputs), LARGEST_BATCH)]
    try:
        return np.concatenate([np.asarray(session.run([output], {name: batch})[0]) for batch in batches])
    except RUNTIME_ERRORS as error:
        raise ProofFailed(f"the model cannot run the probe: {error}") from error


def _of_opset(model: bytes) -> str:
    try:
        return f", which is of opset {opset_of(model)}"
    except ExportError:  # then it is no model, and the runtime's own words say so
        return ""


def _flips(expected: Array, actual: Array, tolerance: float) -> int:
    ours, theirs = actual.argmax(-1)[..., None], expected.argmax(-1)[..., None]
    preference = np.take_along_axis(expected, theirs, -1) - np.take_along_axis(expected, ours, -1)
    return int((preference > tolerance).sum())
