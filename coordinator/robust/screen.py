"""Which updates of a round are far outside, and why: they are quarantined.

An update's size is the root mean square of its changes; its direction is the cosine between its changes of
averaged arrays and the sum of everybody else's, each at length 1, so that nobody leads it. Only updates that
hold the same arrays are compared. The rules, all ours:

    huge       size > `huge` times the median of the others' sizes
    too large  log size > m + `outlier` s,  m the median of the others' log sizes
               and s = 1.4826 times the median of |log size - m|, at least 0.5
    away       cosine < -0.2 and cosine < m - `outlier` s, the same of everybody's cosines, s 0.1 to 0.15

1.4826 times the median absolute deviation estimates a standard deviation; the floors keep a round in which
everybody happens to agree from casting out who is a little off. At least three others are needed; where there
are fewer, the median sizes of the rounds before stand in for them, and where those are not enough either,
nobody is judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.robust.blocks import blocks
from coordinator.robust.changes import size_of
from coordinator.settings import Robust
from foundation.messages import Update
from foundation.parameters import Array, Parameters

WITNESSES = 3
"""Others that are needed to judge one."""
SPREAD = 0.5
"""Smallest spread of the logarithm of sizes: a factor of 1.65."""
ANGLES = (0.1, 0.15)
"""Smallest and largest spread of cosines; a larger one is the work of those who point away."""
AWAY = -0.2
"""Cosine above which nobody points away: honest devices with odd data come down to about 0."""
DEVIATION = 1.4826


@dataclass(frozen=True, slots=True)
class Judged:
    """What was found: whom to quarantine and why, and the median size of the others."""

    quarantined: Mapping[str, str]
    size: float | None
    """Root mean square change; `None` where nobody changed anything."""


def judged(
    settings: Robust,
    updates: Sequence[Update],
    changes: Sequence[Parameters],
    pooled: Sequence[str],
    history: Sequence[float] = (),
) -> Judged:
    """Return who is far outside. `pooled` are names of averaged arrays, `history` sizes of earlier rounds.

    `changes` may make each one when it is asked for: only directions need several of them at once.
    """
    sizes: list[float] = []
    names: list[frozenset[str]] = []
    for update, change in zip(updates, changes, strict=True):
        sizes.append(size_of(update, change))
        names.append(frozenset(change))
    reasons: dict[str, str] = {}
    for alike in _alike(names):
        for i in alike:
            others = [sizes[j] for j in alike if j != i and sizes[j] > 0]
            reason = _too_large(settings, sizes[i], others, history)
            if reason is not None:
                reasons[updates[i].agent] = reason
        rest = [i for i in alike if updates[i].agent not in reasons and sizes[i] > 0]
        if settings.outlier is not None and len(rest) > WITNESSES:
            averaged = [name for name in pooled if name in names[rest[0]]]
            own, theirs = [updates[i] for i in rest], [changes[i] for i in rest]
            for agent, reason in _turned_away(settings.outlier, own, theirs, averaged).items():
                reasons[agent] = reason
    left = [size for u, size in zip(updates, sizes, strict=True) if u.agent not in reasons and size > 0]
    return Judged(reasons, float(np.median(left)) if left else None)


def _alike(names: Sequence[frozenset[str]]) -> list[list[int]]:
    """Return the places of those that hold the same arrays, group by group; who holds none is in none."""
    groups: dict[frozenset[str], list[int]] = {}
    for i, own in enumerate(names):
        if own:
            groups.setdefault(own, []).append(i)
    return list(groups.values())


def _too_large(
    settings: Robust, size: float, others: Sequence[float], history: Sequence[float]
) -> str | None:
    known = list(others) if len(others) >= WITNESSES else [*others, *(h for h in history if h > 0)]
    if size == 0 or len(known) < WITNESSES:
        return None
    middle = float(np.median(known))
    if settings.huge is not None and not size <= settings.huge * middle:
        return f"its change is {size / middle:.3g} times the median of the others'"
    if settings.outlier is None:
        return None
    logs = np.log(known)
    centre = float(np.median(logs))
    spread = max(SPREAD, DEVIATION * float(np.median(np.abs(logs - centre))))
    distance = (math.log(size) - centre) / spread
    if distance <= settings.outlier:
        return None
    times = size / middle
    return f"its change is {times:.3g} times the median of the others', {distance:.1f} deviations away"


def _turned_away(
    outlier: float, updates: Sequence[Update], changes: Sequence[Parameters], names: Sequence[str]
) -> dict[str, str]:
    if not names:
        return {}
    found = cosines(updates, changes, names)
    centre = float(np.median(found))
    spread = float(np.clip(DEVIATION * np.median(np.abs(found - centre)), *ANGLES))
    return {
        update.agent: (
            f"its change points away from the others' (cosine {cosine:.2f}, the median is {centre:.2f},"
            f" {(centre - cosine) / spread:.1f} deviations away)"
        )
        for update, cosine in zip(updates, found, strict=True)
        if cosine < AWAY and cosine < centre - outlier * spread
    }


def cosines(updates: Sequence[Update], changes: Sequence[Parameters], names: Sequence[str]) -> Array:
    """Return the cosine of each update's change with the sum of all others', each at length 1."""
    own = np.zeros(len(updates))
    for block in blocks(updates, changes, names):
        own[list(block.members)] += np.square(block.values, dtype=np.float64).sum(axis=1)
    scales = np.divide(1.0, np.sqrt(own), out=np.zeros(len(updates)), where=own > 0)
    inner, square = np.zeros(len(updates)), 0.0
    for block in blocks(updates, changes, names):
        places = list(block.members)
        units = block.values * scales[places, None]
        total = units.sum(axis=0)
        inner[places] += units @ total
        square += float(total @ total)
    # u_i (S - u_i) / |S - u_i| with S the sum of all: without its own part, on which everybody agrees.
    length = np.sqrt(np.maximum(square - 2 * inner + 1, 0))
    result: Array = np.divide(
        inner - 1, length, out=np.zeros(len(updates)), where=(length > 1e-9) & (own > 0)
    )
    return result
