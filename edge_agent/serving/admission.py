"""From an artifact's folder to a model that may answer here, or the reason why not, by name."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from edge_agent.serving.optimized import Forms, Head
from export.folder import load_artifact
from export.proof import RUNTIME_ERRORS, Parity, open_session, prove
from export.runtime import ort
from export.sign import Keys
from foundation.artifact import Manifest, Probe
from foundation.errors import DataError, ExportError, ProofFailed
from foundation.parameters import Array

logger = logging.getLogger(__name__)

_WARM_UPS = 5


@dataclass(frozen=True, slots=True)
class Handle:
    """One proven model; never changed, so a request that holds it is answered by it alone."""

    manifest: Manifest
    session: ort.InferenceSession
    parity: Parity
    folder: Path
    run_ms: float
    """Median wall time of one batch-1 run when it was loaded."""
    sample: Array
    """One raw sample of its probe (1, *shape), to measure with."""
    optimized: bool = False
    """Whether it was opened from the form that this device keeps of it."""

    @property
    def version(self) -> str:
        """The round that made it, as the protocol wants versions: text."""
        return str(self.manifest.round)


def load(folder: Path, agent: str | None = None, forms: Forms | None = None) -> Handle:
    """Load one artifact's folder, check it, prove its answers on this device, and warm it up.

    With `agent`, it has to be that agent's. `forms` are the optimized forms that are kept of models; without
    one, or with one that does not prove itself, the model itself is opened. Raises `ExportError` for files
    that are not what they say and for a model that was made for another device or in an opset that is not
    run here, `ProofFailed` for answers that differ.
    """
    # The one place where artifacts come in: all is checked on the bytes that are run.
    manifest, model, probe = load_artifact(folder, Keys.beside(folder), agent=agent)
    kept = None if forms is None else _kept(forms, manifest, probe)
    session, parity = kept or _opened(manifest, model, probe)
    sample = probe.inputs[:1]
    times = [_timed(session, sample) for _ in range(_WARM_UPS)]
    return Handle(manifest, session, parity, folder, 1e3 * median(times), sample, kept is not None)


def keep(folder: Path, forms: Forms, agent: str | None = None) -> Head | None:
    """Make the optimized form of an artifact that was loaded, and keep it; raises as `load` does."""
    manifest, model, probe = load_artifact(folder, Keys.beside(folder), agent=agent)
    return forms.keep(manifest.sha256, model, lambda session: prove(session, probe, manifest.tolerance))


def _opened(manifest: Manifest, model: bytes, probe: Probe) -> tuple[ort.InferenceSession, Parity]:
    try:
        session = open_session(model)
    except ProofFailed as error:
        raise ProofFailed(f"the model of opset {manifest.opset} is not opened here: {error}") from error
    return session, prove(session, probe, manifest.tolerance)


def _kept(forms: Forms, manifest: Manifest, probe: Probe) -> tuple[ort.InferenceSession, Parity] | None:
    session = forms.open(manifest.sha256)
    if session is None:
        return None
    try:
        return session, prove(session, probe, manifest.tolerance)
    except ProofFailed as error:
        logger.warning("the optimized form of %s is not used: %s", manifest.sha256[:12], error)
        forms.drop(manifest.sha256)
        return None


def owner_of(folder: Path) -> str | None:
    """Return the agent in whose vault a folder of artifacts lies; `None` where it lies in none."""
    try:
        name = json.loads((folder.parent / "identity.json").read_text())["agent"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{folder.parent / 'identity.json'} does not say whose vault this is: {error}"
        ) from error
    return str(name)


def run(handle: Handle, x: Array) -> Array:
    """Return the logits of a batch that was checked.

    Raises `DataError` for what the model cannot run, and for an answer that is not finite.
    """
    logits = _run(handle.session, x)
    if not np.isfinite(logits).all():
        raise DataError("the model has no finite answer for these values")
    return logits


def side_by_side(first: Handle, second: Handle, pairs: int = 15) -> float:
    """Return the first model's time for one sample as a multiple of the second's: medians, taking turns."""
    spent = [
        (_timed(first.session, first.sample), _timed(second.session, second.sample)) for _ in range(pairs)
    ]
    return median(a for a, _ in spent) / median(b for _, b in spent)


def _timed(session: ort.InferenceSession, x: Array) -> float:
    start = time.perf_counter()
    _run(session, x)
    return time.perf_counter() - start


def _run(session: ort.InferenceSession, x: Array) -> Array:
    output, name = session.get_outputs()[0].name, session.get_inputs()[0].name
    try:
        logits: Array = session.run([output], {name: x})[0]
    except RUNTIME_ERRORS as error:
        raise DataError(f"the model cannot run this input: {error}") from error
    return logits
