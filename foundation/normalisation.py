"""How raw values become what the model was trained on; learned on the device, stored in its model."""

from __future__ import annotations

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
        axes = tuple(i for i in range(x.ndim) if i != (1 if kind == "image" else x.ndim - 1))
        values = np.asarray(x, np.float64)
        std = values.std(axis=axes)
        # A channel that never changes says nothing; dividing by 1 keeps it finite.
        std = np.where(std < 1e-6, 1.0, std)
        return cls(mean=tuple(map(float, values.mean(axis=axes))), std=tuple(map(float, std)))

    def apply(self, x: Array, kind: str) -> Array:
        """Return float32 samples as the model sees them; text passes unchanged."""
        if not self.mean:
            return x
        shape = (1, -1, 1, 1) if kind == "image" else (1, 1, -1)
        mean = np.asarray(self.mean, np.float32).reshape(shape)
        std = np.asarray(self.std, np.float32).reshape(shape)
        return (np.asarray(x, np.float32) - mean) / std
