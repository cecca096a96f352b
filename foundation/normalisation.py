"""How raw values become what the model was trained on; learned on the device, stored in its model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from foundation.frozen import Frozen
from foundation.parameters import Array


class Normalisation(Frozen):
    """Per-channel `(x - mean) / std`; an empty normalisation (text) leaves values as they are.

    Channel means the first axis of an image sample (C, H, W) and the last of a series sample (T, C).
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def learn(cls, x: Array, kind: str) -> Normalisation:
        """Learn mean and standard deviation from training samples of shape (n, *sample)."""
        if kind == "text":
            return cls()
        channel = 1 if kind == "image" else x.ndim - 1
        axes = tuple(i for i in range(x.ndim) if i != channel)
        values = len(x) * math.prod(x.shape[1:]) / x.shape[channel]
        none = np.zeros(x.shape[channel])
        mean = sum((block.sum(axis=axes) for block in _blocks(x)), none) / values
        around = mean.reshape([-1 if i == channel else 1 for i in range(x.ndim)])
        std = np.sqrt(sum((np.square(block - around).sum(axis=axes) for block in _blocks(x)), none) / values)
        # A channel that never changes says nothing; dividing by 1 keeps it finite.
        std = np.where(std < 1e-6, 1.0, std)
        return cls(mean=tuple(map(float, mean)), std=tuple(map(float, std)))

    def apply(self, x: Array, kind: str) -> Array:
        """Return float32 samples as the model sees them; text passes unchanged."""
        if not self.mean:
            return x
        shape = (1, -1, 1, 1) if kind == "image" else (1, 1, -1)
        mean = np.asarray(self.mean, np.float32).reshape(shape)
        std = np.asarray(self.std, np.float32).reshape(shape)
        return (np.asarray(x, np.float32) - mean) / std


def _blocks(x: Array) -> Iterator[Array]:
    """Yield rows in float64, a few megabytes at a time: as float64, bytes take eight times their size."""
    step = max(1, 500_000 // max(1, math.prod(x.shape[1:])))
    for start in range(0, len(x), step):
        yield x[start : start + step].astype(np.float64)
