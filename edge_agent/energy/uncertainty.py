"""Error bars of joules at k = 2: how far a gain, an offset, sampling, edges and holes may lead astray.

The terms are independent of each other and add in quadrature. What windows of one sensor share (its gain)
is the same in all of them, so windows add linearly: see `foundation.energy.EnergyReading`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

REPEATED_IDLE = 0.02
"""How well an idle power measured by the same sensor in the same session repeats, relative (our choice)."""
PUBLISHED_IDLE = 0.25
"""Relative error of an idle power that somebody else measured on another board, at the least (our choice)."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Watts of the idle device, and how they are known."""

    watts: float
    error_w: float
    same_sensor: bool
    """Measured by the sensor whose readings it is taken from, since the meter started: gain is common."""


@dataclass(slots=True)
class Spread:
    """How much sampled powers vary within one stage: what lies between two samples is not seen."""

    count: int = 0
    _mean: float = 0.0
    _squares: float = 0.0
    _products: float = 0.0
    _last: float | None = None
    _first: float = field(default=0.0)

    def add(self, watts: float) -> None:
        """Take one sample (Welford's recurrence)."""
        if self._last is None:
            self._first = watts
        else:
            self._products += (watts - self._first) * (self._last - self._first)
        self._last = watts
        self.count += 1
        step = watts - self._mean
        self._mean += step / self.count
        self._squares += step * (watts - self._mean)

    def error(self, seconds: float) -> float:
        """Return the joules by which the integral over `seconds` may be off: 2 sd T / sqrt(n_eff).

        n_eff = min(n, n (1 - r) / (1 + r)) with r the correlation of neighbours: slow changes are seen less
        often than there are samples.
        """
        if self.count < 2 or self._squares <= 0:
            return 0.0
        variance = self._squares / (self.count - 1)
        shifted = self._mean - self._first
        covariance = self._products / (self.count - 1) - shifted * shifted
        r = min(0.99, max(-0.99, covariance / variance))
        effective = max(1.0, min(float(self.count), self.count * (1 - r) / (1 + r)))
        return 2 * math.sqrt(variance) * seconds / math.sqrt(effective)


@dataclass(frozen=True, slots=True)
class Errors:
    """What is known of one window's errors, in joules but for the relative gain."""

    gain: float
    """Relative."""
    offset_j: float = 0.0
    sampling_j: float = 0.0
    edges_j: float = 0.0
    filled_j: float = 0.0
    """Of what a model, or the rest of the stage, put into holes."""
    cross_j2: float = 0.0
    """What gain and offset have in common, J²; below 0 where they make up for each other."""

    def gross(self, joules: float) -> float:
        """Return the error bar of all joules; `joules` are those the sensor saw."""
        line = max(0.0, (self.gain * joules) ** 2 + self.offset_j**2 + self.cross_j2)
        return math.hypot(math.sqrt(line), self.sampling_j, self.edges_j, self.filled_j)

    def net(self, joules: float, seconds: float, idle: Idle) -> float:
        """Return the error bar of the joules above `idle`.

        The same sensor's gain works on the difference alone and its offset cancels; of an idle power from
        elsewhere everything stays (0.4 W above 2.7 W idle at a gain of 5 %: 14 % against 51 %).
        """
        rest = math.hypot(self.sampling_j, self.edges_j, self.filled_j, idle.error_w * seconds)
        if idle.same_sensor:
            return math.hypot(self.gain * (joules - idle.watts * seconds), rest)
        return math.hypot(self.gain * joules, self.offset_j, rest)
