"""Rules that make one change of many, of which some may be hostile: median, trimmed mean, Krum.

Median and trimmed mean by coordinate: Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed
Learning: Towards Optimal Statistical Rates", ICML 2018. Krum and multi-Krum: Blanchard, El Mhamdi, Guerraoui
and Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NIPS 2017. Theirs count
every device once, and so do these: a device's number of examples is its own word. Ours is that a coordinate
counts only those that have it, and that Krum's distances are per coordinate that both have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from coordinator.robust.blocks import Block, Rule, blocks, combined
from foundation.messages import Update
from foundation.parameters import Array, Parameters


def median(block: Block) -> Array:
    """Return the median of each coordinate; 0 where nobody has it."""
    return _middle(block, np.maximum(0, (block.held.sum(axis=0) - 1) // 2))


def trimmed(share: float) -> Rule:
    """Return the rule that leaves out that share of the values at either end, and takes the mean.

    Of n values floor(share n + 1/2) go at either end, and as many as leave one or two at most.
    """

    def rule(block: Block) -> Array:
        count = block.held.sum(axis=0)
        most = np.maximum(0, (count - 1) // 2)
        return _middle(block, np.minimum(np.floor(share * count + 0.5), most))

    return rule


def _middle(block: Block, cut: Array) -> Array:
    """Return the mean of each coordinate's values but for the `cut` smallest and largest."""
    count = block.held.sum(axis=0)
    # What a device does not have goes last, and is never reached.
    ordered = np.sort(np.where(block.held, block.values, np.float32(np.inf)), axis=0)
    place = np.arange(len(ordered))[:, None]
    taken = (place >= cut) & (place < count - cut)
    total = np.where(taken, ordered, np.float32(0)).sum(axis=0, dtype=np.float64)
    return _mean(total, taken)


def mean_over(chosen: Sequence[int]) -> Rule:
    """Return the rule that takes the plain mean over some updates, by their places; 0 where none has it."""

    def rule(block: Block) -> Array:
        taken = block.held & np.isin(block.members, list(chosen))[:, None]
        total = np.where(taken, block.values, np.float32(0)).sum(axis=0, dtype=np.float64)
        return _mean(total, taken)

    return rule


def _mean(total: Array, taken: Array) -> Array:
    result: Array = (total / np.maximum(1, taken.sum(axis=0))).astype(np.float32)
    return result


def distances(updates: Sequence[Update], changes: Sequence[Parameters], names: Sequence[str]) -> Array:
    """Return mean squared distances (n, n) over the coordinates that both have; inf where there are none."""
    count = len(updates)
    squares, both = np.zeros((count, count)), np.zeros((count, count))
    for block in blocks(updates, changes, names):
        place = np.ix_(block.members, block.members)
        held = block.held.astype(np.float64)
        values = np.where(block.held, block.values, np.float32(0)).astype(np.float64)
        own = (values**2) @ held.T
        squares[place] += own + own.T - 2 * values @ values.T
        both[place] += held @ held.T
    result: Array = np.full((count, count), np.inf)
    np.divide(np.maximum(squares, 0), both, out=result, where=both > 0)
    return result


def krum(between: Array, hostile: float, *, multi: bool) -> list[int]:
    """Return the places that Krum chooses: one, or with `multi` the n - f nearest to their neighbours.

    f = ceil(`hostile` n) may be hostile, and at most n - 3; a score is the sum of the n - f - 2 smallest
    distances to others. Blanchard et al. prove it for n > 2f + 2. Equal scores go by place.
    """
    count = len(between)
    f = max(0, min(math.ceil(hostile * count - 1e-9), count - 3))
    nearest = max(1, count - f - 2)
    others = between.copy()
    np.fill_diagonal(others, np.inf)
    scores = np.sort(others, axis=1)[:, :nearest].sum(axis=1)
    ranked = [int(i) for i in np.argsort(scores, kind="stable")]
    return sorted(ranked[: count - f]) if multi else ranked[:1]


def consensus(
    rule: str,
    hostile: float,
    updates: Sequence[Update],
    changes: Sequence[Parameters],
    names: Sequence[str],
) -> Parameters:
    """Return what the rule of that name makes of everybody's changes; raises `ValueError` for another."""
    if rule == "median":
        return combined(updates, changes, names, median)
    if rule == "trimmed_mean":
        return combined(updates, changes, names, trimmed(hostile))
    if rule not in ("krum", "multi_krum"):
        raise ValueError(f"no rule {rule!r}")
    chosen = krum(distances(updates, changes, names), hostile, multi=rule == "multi_krum")
    return combined(updates, changes, names, mean_over(chosen))
