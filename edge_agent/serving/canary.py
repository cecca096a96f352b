"""A few samples of the device's own, on which a new model is compared with the one that serves.

They are of the validation part, raw and with their labels, in `vault/canary.npz`: beside the artifacts and
not among them, so that an artifact can be copied without them. Both models answer the same samples. With
64 of them two accuracies differ by several points by chance alone, so not these are compared but what was
lost against what was won: under equal models each is as likely as the other (the sign test, one-sided).
"""

from __future__ import annotations

import io
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.samples import LocalData
from foundation.artifact import Manifest
from foundation.parameters import Array

logger = logging.getLogger(__name__)

FILE = "canary.npz"
SAMPLES = 64
LARGEST_BYTES = 8 << 20
"""Of the samples together: large images make fewer."""
CHANCE = 0.05
"""A new model is refused when equal ones would look like this, or worse, less often than that."""
_SEED = 20240607
_LARGEST_FILE = LARGEST_BYTES + (1 << 20)


@dataclass(frozen=True, slots=True)
class Canary:
    """Raw samples x (n, *shape) and labels y (n,), or (n, T) for text; names of the labels."""

    x: Array
    y: Array
    labels: tuple[str, ...]

    def fits(self, manifest: Manifest) -> bool:
        """Whether a model answers such samples with such labels."""
        return self.labels == manifest.labels and self.x.shape[1:] == manifest.shape


def choose(data: LocalData, samples: int = SAMPLES) -> Canary | None:
    """Return the canary set of a device's data, the same for the same data; `None` without validation."""
    part = data.validation
    each = max(1, int(part.x[:1].nbytes))
    count = min(samples, len(part), max(1, LARGEST_BYTES // each))
    if count < 1:
        return None
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(part))[:count])
    return Canary(np.asarray(part.x[rows]), np.asarray(part.y[rows], np.int64), tuple(data.labels))


def to_bytes(canary: Canary) -> bytes:
    """Return a canary set as an npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, x=canary.x, y=canary.y, labels=np.asarray(canary.labels, np.str_))
    return buffer.getvalue()


def read(path: Path) -> Canary | None:
    """Return the canary set of a file; `None` where there is none, and with a warning where it is none."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read, nothing is compared: %s", path, error)
        return None
    return parse(content)


def parse(content: bytes) -> Canary | None:
    """Return the canary set of a file's bytes; `None`, with a warning, where they are none."""
    try:
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"more than {_LARGEST_FILE} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            x, y, labels = arrays["x"], arrays["y"], arrays["labels"]
        if not (len(x) == len(y) > 0 and x.dtype.kind in "iuf" and y.dtype.kind in "iu"):
            raise ValueError("no samples with whole numbers as labels")
        return Canary(x, y.astype(np.int64), tuple(str(label) for label in labels.tolist()))
    except Exception as error:  # numpy and zipfile raise whatever the bytes make them stumble over
        logger.warning("%s is not a canary set, nothing is compared: %s", FILE, error)
        return None


def hits(logits: Array, y: Array) -> Array:
    """Return the share of right answers of each sample (n,): 0 or 1, for text over its positions."""
    right: Array = (logits.argmax(-1) == y).astype(np.float64)
    return right if right.ndim == 1 else right.reshape(len(right), -1).mean(1)


def worse(new: Array, old: Array, drop: float | None) -> str | None:
    """Return why a model with these hits must not replace one with those, or `None` if it may.

    `drop` is what its owner allows, in points of accuracy; `None` allows what chance explains.
    """
    accuracy, before = float(new.mean()), float(old.mean())
    lost, won = int((new < old).sum()), int((new > old).sum())
    if accuracy >= before:
        return None
    chance = tail(lost + won, lost)
    if (chance >= CHANCE) if drop is None else (100 * (before - accuracy) <= drop):
        return None
    allowed = "chance explains less" if drop is None else f"{drop:g} points less are allowed"
    return (
        f"worse on {len(new)} canary samples of this device: {accuracy:.1%} right, the model that serves"
        f" {before:.1%} ({lost} lost, {won} won, p = {chance:.2g}; {allowed})"
    )


def tail(pairs: int, lost: int) -> float:
    """Return how likely it is that a fair coin shows at least `lost` heads in `pairs` throws."""
    heads = sum(math.comb(pairs, k) for k in range(lost, pairs + 1))
    return heads / float(1 << pairs)
