"""Answers with the personal model, and moves to the next one without a gap.

A model is loaded beside the one that serves, proven with its own probe on this device, and only then
takes over, in one assignment. What fails its proof never answers: the last good model goes on, and the
reason is kept and logged.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime as ort

from export.folder import CURRENT, PREVIOUS, load_artifact, resolve
from export.proof import RUNTIME_ERRORS, Parity, open_session, prove
from foundation.artifact import Manifest, Probe
from foundation.errors import DataError, ExportError
from foundation.parameters import Array

logger = logging.getLogger(__name__)

LARGEST_BATCH = 64


@dataclass(frozen=True, slots=True)
class Handle:
    """One proven model; never changed, so a request that holds it is answered by it alone."""

    manifest: Manifest
    session: ort.InferenceSession
    parity: Parity
    folder: Path
    run_ms: float
    """Median wall time of one batch-1 run when it was loaded."""

    @property
    def version(self) -> str:
        """The round that made it, as the protocol wants versions: text."""
        return str(self.manifest.round)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answers to one batch, all from one model.

    `logits` and `probabilities` are (batch, classes) and `indices` (batch,); for text there is a
    sequence axis after the batch.
    """

    logits: Array
    probabilities: Array
    indices: Array
    manifest: Manifest

    @property
    def labels(self) -> list[str]:
        """Names of the answers; for text, the character that follows each sample."""
        last = self.indices if self.indices.ndim == 1 else self.indices[:, -1]
        return [self.manifest.labels[i] for i in last]


@dataclass(frozen=True, slots=True)
class Reload:
    """What came of looking for a newer model."""

    changed: bool
    refusal: str | None = None
    """Why a newer artifact was not taken; `None` when there is none, or when it was taken."""


class Predictor:
    """Serves the current artifact of a folder, or one given artifact's folder.

    Threads may call `predict` while another calls `reload`. Raises `ExportError` or `ProofFailed` when
    neither the current artifact nor the previous one can be proven.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reloading = threading.Lock()
        self._refused: tuple[Path, str] | None = None
        self._handle = self._first()

    @property
    def handle(self) -> Handle:
        """The model that answers now."""
        return self._handle

    @property
    def manifest(self) -> Manifest:
        """What the model that answers now says about itself."""
        return self._handle.manifest

    def predict(self, x: Array) -> Prediction:
        """Answer a batch of raw samples (batch, *shape), or (batch, sequence) of ids for text.

        Raises `DataError` for what the model cannot take: another shape, an empty or too large batch,
        values that are not finite, ids outside of the vocabulary.
        """
        handle = self._handle
        logits = _run(handle.session, _checked(handle.manifest, x))
        if not np.isfinite(logits).all():
            raise DataError("the model has no finite answer for these values")
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = shifted / shifted.sum(-1, keepdims=True)
        return Prediction(logits, probabilities, logits.argmax(-1), handle.manifest)

    def reload(self) -> Reload:
        """Move to the folder's current artifact if it is another one and proves itself.

        Otherwise the model that answers stays, and the refusal says why; the same artifact is not tried
        again until the link moves.
        """
        with self._reloading:
            try:
                target = resolve(self._folder)
            except ExportError as error:
                return Reload(changed=False, refusal=str(error))
            if target == self._handle.folder:
                self._refused = None
                return Reload(changed=False)
            if self._refused is not None and self._refused[0] == target:
                return Reload(changed=False, refusal=self._refused[1])
            try:
                self._handle = load(target)
            except ExportError as error:
                self._refused = (target, str(error))
                logger.warning("artifact refused, the last good one serves on: %s", error)
                return Reload(changed=False, refusal=str(error))
            self._refused = None
            logger.info("artifact taken round=%s folder=%s", self._handle.version, target.name[:12])
            return Reload(changed=True)

    def _first(self) -> Handle:
        target = resolve(self._folder, CURRENT)
        try:
            return load(target)
        except ExportError as error:
            if not (self._folder / PREVIOUS).is_symlink():
                raise
            logger.warning("current artifact refused, trying the one before: %s", error)
            self._refused = (target, str(error))
            return load(resolve(self._folder, PREVIOUS))


def load(folder: Path) -> Handle:
    """Load one artifact's folder, check its hashes, prove its answers on this device, and warm it up.

    Raises `ExportError` for files that are not what they say, `ProofFailed` for answers that differ.
    """
    manifest, model, probe = load_artifact(folder)
    session = open_session(model)
    parity = prove(session, probe, manifest.tolerance)
    return Handle(manifest, session, parity, folder, _measured_ms(session, probe))


def _measured_ms(session: ort.InferenceSession, probe: Probe) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _run(session, probe.inputs[:1])
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def _run(session: ort.InferenceSession, x: Array) -> Array:
    output, name = session.get_outputs()[0].name, session.get_inputs()[0].name
    try:
        logits: Array = session.run([output], {name: x})[0]
    except RUNTIME_ERRORS as error:
        raise DataError(f"the model cannot run this input: {error}") from error
    return logits


def _checked(manifest: Manifest, x: Array) -> Array:
    """Return the batch in the type that the model takes, or say what is wrong with it."""
    text = manifest.input == "text"
    if x.ndim != 1 + len(manifest.shape) or (not text and x.shape[1:] != manifest.shape):
        wanted = ("batch", f"1 to {manifest.shape[0]}") if text else ("batch", *manifest.shape)
        raise DataError(f"the input has shape {x.shape}; the model takes ({', '.join(map(str, wanted))})")
    if not 1 <= len(x) <= LARGEST_BATCH:
        raise DataError(f"a batch has 1 to {LARGEST_BATCH} samples, not {len(x)}")
    return _ids(manifest, x) if text else _values(x)


def _ids(manifest: Manifest, x: Array) -> Array:
    if not 1 <= x.shape[1] <= manifest.shape[0]:
        raise DataError(f"a text has 1 to {manifest.shape[0]} characters, not {x.shape[1]}")
    if x.dtype.kind not in "iu":
        raise DataError(f"characters are whole numbers, not {x.dtype}")
    if x.min() < 0 or x.max() >= len(manifest.labels):
        raise DataError(f"characters are numbered 0 to {len(manifest.labels) - 1}")
    return x.astype(np.int64)


def _values(x: Array) -> Array:
    if x.dtype.kind not in "iuf":
        raise DataError(f"the input has to be numbers, not {x.dtype}")
    if not (np.abs(x) <= np.finfo(np.float32).max).all():
        raise DataError("the input has values that are not finite in float32")
    return x.astype(np.float32)
