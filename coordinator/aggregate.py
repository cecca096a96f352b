"""Means over updates: weighted by examples, and over those that kept a unit. numpy, no torch.

Sums run in float64 and in the order of the updates' agents, so the result does not depend on who was
heard first. One update is looked at after the other, so that no more than one of them must be in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from foundation.messages import Update
from foundation.parameters import Array, Parameters


def in_order(updates: Sequence[Update]) -> list[Update]:
    """Return updates sorted by agent."""
    return sorted(updates, key=lambda update: update.agent)


def shares_of(updates: Sequence[Update]) -> list[float]:
    """Return each update's share of all examples; equal shares when nobody has any."""
    total = sum(update.examples for update in updates)
    return [update.examples / total if total else 1 / len(updates) for update in updates]


def weighted_mean(arrays: Iterable[Mapping[str, Array]], weights: Sequence[float]) -> Parameters:
    """Return sum_i w_i a_i / sum_i w_i for every name of the first mapping; float32."""
    total = sum(weights)
    sums: dict[str, Array] | None = None
    for one, weight in zip(arrays, weights, strict=True):
        if sums is None:
            sums = {name: np.zeros(array.shape, np.float64) for name, array in one.items()}
        for name, mean in sums.items():
            mean += np.asarray(one[name], np.float64) * (weight / total)
    return Parameters((name, mean.astype(np.float32)) for name, mean in (sums or {}).items())


def mean_of_keepers(updates: Sequence[Update], weights: Sequence[float], old: Parameters) -> Parameters:
    """Average every FFL unit over the devices that kept it; a unit that nobody kept stays as it was.

    `old` holds the FFL arrays as they were sent. An update without a mask for a block kept all of it.
    `down.bias` belongs to no unit and is averaged over all.
    """
    sums = {name: np.zeros(before.shape, np.float64) for name, before in old.items()}
    counts = {name: np.zeros(before.shape, np.float64) for name, before in old.items()}
    for update, weight in zip(updates, weights, strict=True):
        for name, before in old.items():
            block, _, part = name.partition(".ffl.")
            held = _held(update, f"{block}.ffl", part, before.shape)
            sums[name] += np.where(held, np.asarray(update.parameters[name], np.float64), 0.0) * weight
            counts[name] += held * weight
    result: dict[str, Array] = {}
    for name, before in old.items():
        start, kept = np.asarray(before, np.float64).copy(), counts[name]
        result[name] = np.divide(sums[name], kept, out=start, where=kept > 0).astype(np.float32)
    return Parameters(result)


def _held(update: Update, block: str, part: str, shape: tuple[int, ...]) -> Array:
    mask = update.masks.get(block)
    if mask is None or part == "down.bias":
        return np.ones(shape, np.bool_)
    column = mask[:, None] if part == "up.weight" else mask
    return np.broadcast_to(column, shape)
