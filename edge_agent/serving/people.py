"""The request for people: JSON, a picture or an .npy file in; label, probability and top 3 out."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from edge_agent.serving import pictures
from edge_agent.serving.protocol import numbers
from edge_agent.serving.runner import Ran
from foundation.artifact import Manifest
from foundation.errors import WireError
from foundation.parameters import Array

MOST_PROBABLE = 20
"""Probabilities that are listed per sample."""
TOP = 3


class _People(BaseModel):
    inputs: list[object]


def samples(body: bytes, manifest: Manifest) -> Array:
    """Decode `{"inputs": [...]}`: one sample or several, or strings for text.

    Raises `WireError` when there is no such list or it is not numbers of one shape.
    """
    try:
        inputs = _People.model_validate_json(body).inputs
    except ValidationError as error:
        message = error.errors(include_input=False, include_url=False)[0]["msg"]
        raise WireError(f'send {{"inputs": [...]}} with one or several samples: {message}') from error
    if manifest.input == "text" and inputs and all(isinstance(text, str) for text in inputs):
        inputs = [_characters(str(text), manifest) for text in inputs]
    return _batch(numbers(inputs), manifest)


def array(body: bytes, manifest: Manifest) -> Array:
    """Decode an .npy file with one sample or several; raises `WireError`."""
    return _batch(pictures.npy(body), manifest)


def answer(ran: Ran) -> dict[str, object]:
    """Return what people are told: who answers, how long it took, and every sample's likeliest labels."""
    prediction = ran.prediction
    m = prediction.manifest
    return {
        "model": {
            "agent": m.agent,
            "run": m.run,
            "round": m.round,
            "strategy": m.strategy,
            "sha256": m.sha256,
            "accuracy": m.accuracy,
            "accuracy_sent": m.accuracy_sent,
            "kept_units": m.kept_units,
            "hidden_units": m.hidden_units,
            "bytes": m.bytes,
            "dense_bytes": m.dense_bytes,
            "train_joules": m.train_joules,
            "train_joules_kind": m.train_joules_kind,
        },
        "run_ms": round(1e3 * ran.run_s, 3),
        "predictions": [
            _one(label, values, m.labels)
            for label, values in zip(prediction.labels, prediction.probabilities, strict=True)
        ],
    }


def _one(label: str, probabilities: Array, labels: tuple[str, ...]) -> dict[str, object]:
    """Return one sample's answer; for text, what follows its last character."""
    values = probabilities if probabilities.ndim == 1 else probabilities[-1]
    likeliest = (-values).argsort(kind="stable")[:MOST_PROBABLE]
    return {
        "label": label,
        "probability": float(values.max()),
        "top": [{"label": labels[i], "probability": float(values[i])} for i in likeliest[:TOP]],
        "probabilities": {labels[i]: float(values[i]) for i in likeliest},
    }


def _batch(x: Array, manifest: Manifest) -> Array:
    """Add the batch axis to what is one sample."""
    return x[None] if x.ndim == len(manifest.shape) else x


def _characters(text: str, manifest: Manifest) -> object:
    known = {label: i for i, label in enumerate(manifest.labels)}
    if unknown := [c for c in text if c not in known]:
        raise WireError(f"the model does not know the character {unknown[0]!r}")
    return [known[c] for c in text]
