"""From a trained model to a proven artifact on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export import folder as artifacts
from export import metadata
from export.cut import count, cut, widths
from export.graph import OPSET, build
from export.proof import default_tolerance
from export.verify import check, latency
from foundation.artifact import Manifest, Probe
from foundation.energy import Kind
from foundation.errors import ExportError
from foundation.normalisation import Normalisation
from foundation.parameters import Masks, Parameters
from foundation.spec import ModelSpec

logger = logging.getLogger(__name__)


def export_artifact(
    spec: ModelSpec,
    parameters: Parameters,
    masks: Masks,
    normalisation: Normalisation,
    labels: Sequence[str],
    probe: Probe,
    folder: Path,
    *,
    agent: str,
    run: str,
    round: int,
    strategy: str,
    accuracy_sent: float | None = None,
    accuracy: float | None = None,
    train_joules: float | None = None,
    train_joules_kind: Kind = Kind.NONE,
    tolerance: float | None = None,
    opset: int = OPSET,
    measure_latency: bool = True,
) -> Manifest:
    """Cut, write, prove and publish a model below `folder`, and return its manifest.

    `parameters` have the dense shapes of `spec.layout`, `masks` say which units stay, and the probe has
    raw inputs with the logits that the trained (masked) model gave. `tolerance` is the largest absolute
    difference of a logit; `None` takes `export.proof.default_tolerance`. Latency is measured against the
    same model without any unit cut, which is written in memory only.

    Raises `ExportError` when something does not fit together or the disk refuses, and `ProofFailed` when
    the model does not answer as the probe does; in both cases `current` is what it was.
    """
    _check_inputs(spec, labels, probe)
    small = cut(parameters, masks)
    probe_file = artifacts.probe_bytes(probe)
    draft = Manifest(
        agent=agent,
        run=run,
        round=round,
        strategy=strategy,
        sha256="",
        bytes=0,
        dense_bytes=0,
        parameters=count(small),
        dense_parameters=count(parameters),
        input=spec.input,
        shape=spec.shape,
        labels=tuple(labels),
        normalisation=normalisation,
        kept_units=widths(small),
        hidden_units=spec.hidden,
        opset=opset,
        tolerance=default_tolerance(probe) if tolerance is None else tolerance,
        parity=0.0,
        accuracy_sent=accuracy_sent,
        accuracy=accuracy,
        train_joules=train_joules,
        train_joules_kind=train_joules_kind,
    )
    facts = {
        **metadata.of_manifest(draft),
        metadata.PROBE_SHA256: hashlib.sha256(probe_file).hexdigest(),
        "spec": spec.model_dump_json(),
    }
    model = build(spec, small, normalisation, metadata=facts, opset=opset)
    dense = build(spec, parameters, normalisation, metadata=facts, opset=opset)
    parity = check(model, probe, draft.tolerance)
    pruned_ms, dense_ms = latency(model, dense, probe.inputs[:1]) if measure_latency else (None, None)
    manifest = draft.model_copy(
        update={
            "sha256": hashlib.sha256(model).hexdigest(),
            "bytes": len(model),
            "dense_bytes": len(dense),
            "parity": parity.difference,
            "latency_ms": pruned_ms,
            "dense_latency_ms": dense_ms,
        }
    )
    artifacts.publish(folder, manifest, model, probe_file)
    logger.info(
        "artifact written round=%d sha256=%s bytes=%d dense_bytes=%d parity=%.2g",
        *(round, manifest.sha256[:12], manifest.bytes, manifest.dense_bytes, manifest.parity),
    )
    return manifest


def _check_inputs(spec: ModelSpec, labels: Sequence[str], probe: Probe) -> None:
    if len(labels) != spec.classes or len(set(labels)) != spec.classes:
        raise ExportError(f"{spec.classes} classes need as many different labels, not {len(set(labels))}")
    wanted, text = (np.int64, True) if spec.input == "text" else (np.float32, False)
    inputs, logits = probe.inputs, probe.logits
    if inputs.dtype != wanted:
        raise ExportError(f"the probe's inputs are {inputs.dtype}; the model takes {np.dtype(wanted)}")
    if inputs.ndim != 1 + len(spec.shape) or (inputs.shape[1:] != spec.shape and not text):
        raise ExportError(f"the probe's inputs have shape {inputs.shape[1:]}; the spec says {spec.shape}")
    answers = (*inputs.shape, spec.classes) if text else (len(inputs), spec.classes)
    if logits.shape != answers:
        raise ExportError(f"the probe's logits have shape {logits.shape}; {answers} fits its inputs")
    if not (np.isfinite(inputs).all() and np.isfinite(logits).all()):
        raise ExportError("the probe has values that are not finite")
