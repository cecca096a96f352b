"""What a served model is: `model.onnx`, a manifest, and a probe that proves it.

On disk an artifact is a folder `artifacts/<sha256 of model.onnx>/` with `model.onnx`, `manifest.json`
and `probe.npz`; `artifacts/current` is a link that is replaced atomically.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foundation.energy import Kind
from foundation.frozen import Frozen
from foundation.normalisation import Normalisation
from foundation.parameters import Array


class Int8(Frozen):
    """Whether a model's weights are 8-bit integers, and what speaks for it on the exporting device."""

    used: bool
    why: str
    latency_ms: float | None = None
    float_latency_ms: float | None = None
    """Median of one batch-1 run, one thread, the two interleaved."""
    bytes: int | None = None
    float_bytes: int | None = None
    accuracy: float | None = None
    float_accuracy: float | None = None
    """On the device's validation part."""
    parity: float | None = None
    """Largest absolute difference of a logit from the probe's."""


class Manifest(Frozen):
    """What an artifact says about itself."""

    schema_version: int = 1
    agent: str
    run: str
    round: int
    strategy: str
    sha256: str
    """Of the bytes of model.onnx."""
    bytes: int
    dense_bytes: int
    """Bytes of the same model exported without any unit cut, written in the same way."""
    parameters: int
    dense_parameters: int
    input: Literal["image", "series", "text"]
    shape: tuple[int, ...]
    """Shape of one raw sample, without the batch axis."""
    labels: tuple[str, ...]
    normalisation: Normalisation
    """Already inside the graph: clients send raw values."""
    kept_units: tuple[int, ...]
    hidden_units: int
    opset: int
    tolerance: float
    """Largest absolute difference allowed between the artifact's logits and the probe's."""
    parity: float
    """Largest absolute difference that was seen at export."""
    accuracy_sent: float | None = None
    accuracy: float | None = None
    """On the device's own held-out test part."""
    latency_ms: float | None = None
    dense_latency_ms: float | None = None
    """Median of one batch-1 run on the exporting device, one thread, pruned and dense interleaved."""
    train_joules: float | None = None
    """Of all local training of this run on this device."""
    train_joules_kind: Kind = Kind.NONE
    validation: float | None = None
    """Accuracy of this very model, as exported, on the device's validation part."""
    validation_examples: int | None = None
    int8: Int8 | None = None
    """`None` where 8-bit weights were not asked for."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Raw inputs (n, *shape) and the logits that the trained model gave for them."""

    inputs: Array
    logits: Array
