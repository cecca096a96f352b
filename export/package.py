"""From a trained model to a proven artifact on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export import folder as artifacts
from export import metadata
from export.cut import count, cut, widths
from export.graph import OPSET, build
from export.proof import Parity, default_tolerance, open_session
from export.quantise import Candidate, Choice, judged, tolerance_of
from export.sign import Key
from export.verify import Validation, accuracy_of, attention_runs, check, latency
from foundation.artifact import Int8, Manifest, Probe
from foundation.energy import Kind
from foundation.errors import ExportError
from foundation.memory import give_back
from foundation.normalisation import Normalisation
from foundation.parameters import Array, Masks, Parameters
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
    probabilities: bool = False,
    validation: Validation | None = None,
    int8: Choice = "off",
    key: Key | None = None,
    measure_latency: bool = True,
) -> Manifest:
    """Cut, write, prove and publish a model below `folder`, and return its manifest.

    `parameters` have the dense shapes of `spec.layout`, `masks` say which units stay, and the probe has
    raw inputs with the logits that the trained (masked) model gave. `tolerance` is the largest absolute
    difference of a logit; `None` takes `export.proof.default_tolerance`. Latency is measured against the
    same model without any unit cut, which is written in memory only.

    With `validation`, the manifest says what the model as exported answers rightly of it. `int8` says
    whether weights become 8-bit integers: "auto" where that is proven to pay (export/quantise.py). From
    opset 23 on, attention is one operator where this onnxruntime computes it. `probabilities` adds a second
    output. With `key`, the artifact is signed in the agent's name.

    Raises `ExportError` when something does not fit together or the disk refuses, and `ProofFailed` when
    the model does not answer as the probe does; in both cases `current` is what it was.
    """
    if len(labels) != spec.classes or len(set(labels)) != spec.classes:
        raise ExportError(f"{spec.classes} classes need as many different labels, not {len(set(labels))}")
    check_probe(spec.input, spec.shape, labels, probe)
    small = cut(parameters, masks)
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
    attention = attention_runs(opset)

    def write(values: Parameters, facts: Mapping[str, str]) -> bytes:
        return build(
            *(spec, values, normalisation),
            metadata={**facts, "spec": spec.model_dump_json()},
            opset=opset,
            probabilities=probabilities,
            attention=attention,
        )

    return publish(
        draft,
        lambda facts: write(small, facts),
        probe,
        folder,
        dense=lambda facts: write(parameters, facts),
        validation=validation,
        int8=int8,
        key=key,
        measure_latency=measure_latency,
    )


Write = Callable[[Mapping[str, str]], bytes]
"""Writes a model with these facts in its metadata."""


def publish(
    draft: Manifest,
    write: Write,
    probe: Probe,
    folder: Path,
    *,
    dense: Write | None = None,
    validation: Validation | None = None,
    int8: Choice = "off",
    key: Key | None = None,
    measure_latency: bool = True,
) -> Manifest:
    """Prove, measure, sign and publish what `write` writes; return the draft with all that was found.

    `dense` writes what the model is compared with; without it, it is compared with itself in float32.
    Raises `ExportError` and `ProofFailed` as `export_artifact` does.
    """
    probe_file = artifacts.probe_bytes(probe)
    facts = _facts(draft, probe_file)
    model = float_model = write(facts)
    # Before the proof, whose checker alone takes 9 MB for good: the uncut model is the largest thing here.
    compared = _Compared(dense or write, facts, probe.inputs[:1], measure_latency)
    found = compared.with_(model)
    parity = check(model, probe, draft.tolerance)
    judgement = None
    if int8 != "off":
        draft, model, parity, judgement = _quantised(
            draft, write, float_model, parity, probe_file, probe, validation, int8
        )
        if model is not float_model:
            found = compared.with_(model)
    manifest = draft.model_copy(
        update={
            "sha256": hashlib.sha256(model).hexdigest(),
            "bytes": len(model),
            "parity": parity.difference,
            **found,
            "validation": accuracy_of(open_session(model), validation) if validation else None,
            "validation_examples": len(validation.y) if validation else None,
            "int8": judgement,
        }
    )
    artifacts.publish(folder, manifest, model, probe_file, key)
    logger.info(
        "artifact written round=%d sha256=%s bytes=%d dense_bytes=%d parity=%.2g int8=%s",
        *(manifest.round, manifest.sha256[:12], manifest.bytes, manifest.dense_bytes, manifest.parity),
        judgement.used if judgement else False,
    )
    return manifest


@dataclass(frozen=True, slots=True)
class _Compared:
    """The model that an artifact is compared with: written for that, and not kept."""

    write: Write
    facts: Mapping[str, str]
    sample: Array
    measured: bool

    def with_(self, model: bytes) -> dict[str, float | int | None]:
        """Return its size, and both latencies where they are measured, as the manifest names them."""
        dense = self.write(self.facts)
        size = len(dense)
        give_back()
        own_ms, dense_ms = latency(model, dense, self.sample) if self.measured else (None, None)
        del dense
        give_back()
        return {"dense_bytes": size, "latency_ms": own_ms, "dense_latency_ms": dense_ms}


def _quantised(
    draft: Manifest,
    write: Write,
    float_model: bytes,
    parity: Parity,
    probe_file: bytes,
    probe: Probe,
    validation: Validation | None,
    int8: Choice,
) -> tuple[Manifest, bytes, Parity, Int8]:
    """Return draft, model, parity and judgement: the 8-bit model's if it is to be used, else as they were."""
    eight = draft.model_copy(update={"tolerance": tolerance_of(probe)})
    source = write(_facts(eight, probe_file))
    judgement, model = judged(
        Candidate(float_model, source, probe, eight.tolerance, validation), insist=int8 == "on"
    )
    if not judgement.used:
        return draft, float_model, parity, judgement
    return eight, model, check(model, probe, eight.tolerance), judgement


def _facts(draft: Manifest, probe_file: bytes) -> dict[str, str]:
    return {
        **metadata.of_manifest(draft),
        metadata.PROBE_SHA256: hashlib.sha256(probe_file).hexdigest(),
    }


def check_probe(input: str, shape: tuple[int, ...], labels: Sequence[str], probe: Probe) -> None:
    """Raise `ExportError` for labels that repeat, or a probe of another type or shape than the model's."""
    if len(set(labels)) != len(labels):
        raise ExportError(f"there are {len(labels)} labels, and {len(set(labels))} different ones")
    wanted, text = (np.int64, True) if input == "text" else (np.float32, False)
    inputs, logits = probe.inputs, probe.logits
    if inputs.dtype != wanted:
        raise ExportError(f"the probe's inputs are {inputs.dtype}; the model takes {np.dtype(wanted)}")
    if inputs.ndim != 1 + len(shape) or (inputs.shape[1:] != shape and not text):
        raise ExportError(f"the probe's inputs have shape {inputs.shape[1:]}; the spec says {shape}")
    answers = (*inputs.shape, len(labels)) if text else (len(inputs), len(labels))
    if logits.shape != answers:
        raise ExportError(f"the probe's logits have shape {logits.shape}; {answers} fits its inputs")
    if not (np.isfinite(inputs).all() and np.isfinite(logits).all()):
        raise ExportError("the probe has values that are not finite")
