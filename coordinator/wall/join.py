"""Joins what a plug said to the times of a round: joules at the wall, with what they may be off by.

Two ways, of which the one with the smaller error bar is taken: the plug's own total, straight between the
readings at which it changed, and its watts: their mean between two readings in a row, and where it is quiet
the last ones, as it speaks when they change. In both, an edge is where the device says it was, moved by its
clock's offset; what the clock's error and the plug's delay may cost is what the figure changes by when all
edges are moved by them. Error bars are at k = 2.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pydantic import Field

from coordinator.store.records import PlugReading
from foundation.energy import EnergyReading, Kind, Scope, Stage
from foundation.frozen import Frozen
from foundation.plug import PULSE_J
from foundation.timing import Timing

LAG_S = 1.0
"""A plug measures once a second, and tells it a moment later."""
PHASE_S = 60.0
"""A plug says nothing of what was shorter, but for the round as a whole."""
LEAST_SEEN = 0.9
"""Share of the time that it must have spoken in, as with any meter: the rest is taken to be like it."""
IN_A_ROW_S = 2.0
"""Readings that are nearer come one after another, whatever they say."""
STEP = 2 / math.sqrt(12)
"""Error bar of a figure that is uniform within a step, in steps."""

How = Literal["counter", "watts"]


class WallPhase(Frozen):
    """One stretch of a round that was long enough."""

    stage: Stage
    """What most of it was."""
    also: tuple[Stage, ...] = ()
    reading: EnergyReading


class WallRecord(Frozen):
    """What one device drew from the wall in the time of one update; beside its own figures, never in them."""

    agent: str
    round: int
    plug: str
    start_s: float | None = None
    """UTC by the coordinator's clock; `None` where the device told no times."""
    clock_offset_s: float | None = None
    """The coordinator's clock minus the device's."""
    clock_uncertainty_s: float | None = None
    reading: EnergyReading
    """All of the time; `Kind.NONE` where the plug cannot say."""
    how: How | None = None
    """By the plug's total, or by its watts."""
    phases: tuple[WallPhase, ...] = Field((), max_length=64)
    why: str | None = None
    """Why there is no figure."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """A sum that grows with time, straight between its knots."""

    times: Sequence[float]
    sums: Sequence[float]

    def at(self, time_s: float) -> float:
        """Return the sum at a time; before the first knot and after the last it stands still."""
        place = bisect_left(self.times, time_s)
        if place == 0 or place == len(self.times):
            return self.sums[0] if place == 0 else self.sums[-1]
        (t0, t1), (s0, s1) = self.times[place - 1 : place + 1], self.sums[place - 1 : place + 1]
        return s0 + (s1 - s0) * (time_s - t0) / (t1 - t0)

    def between(self, start_s: float, end_s: float) -> float:
        """Return what it grew by."""
        return self.at(end_s) - self.at(start_s)

    def around(self, time_s: float) -> tuple[float, float]:
        """Return the knots that a time lies between."""
        place = min(max(1, bisect_left(self.times, time_s)), len(self.times) - 1)
        return self.times[place - 1], self.times[place]

    def holds(self, start_s: float, end_s: float) -> bool:
        """Whether both times are between knots."""
        return len(self.times) > 1 and self.times[0] <= start_s and end_s <= self.times[-1]


@dataclass(frozen=True, slots=True)
class _Figure:
    joules: float
    error_j: float
    coverage: float
    how: How


class Series:
    """What a plug said over some time, in order."""

    def __init__(
        self,
        readings: Sequence[PlugReading],
        *,
        silent_s: float,
        accuracy: float,
        step_j: float | None,
        step_w: float | None,
    ) -> None:
        """Take readings; the plug is silent where two of them are further apart than `silent_s`.

        `accuracy` is the relative error of its watts, `step_j` and `step_w` the finest steps of its figures.
        """
        self._silent_s, self._accuracy = silent_s, accuracy
        self._step_j = max(PULSE_J, step_j or 0.0)
        self._step_w = step_w or 0.0
        self._watts = [(r.at, r.watts) for r in readings if r.watts is not None]
        self._power, self._seen = _power(self._watts, silent_s)
        self._falls, self._total = _total([(r.at, r.joules) for r in readings if r.joules is not None])

    def over(self, start_s: float, end_s: float, clock_s: float) -> tuple[EnergyReading, How | None]:
        """Return the joules between two times (UTC, known to `clock_s`); kind `none` if it cannot say.

        Flags: `total_fell` where the plug's total went backwards, `gap_filled` and `gap` as a meter's.
        """
        fell = any(start_s <= time_s <= end_s for time_s in self._falls)
        flags = ["total_fell"] if fell else []
        moved_s = clock_s + LAG_S
        ways = [self._by_total(start_s, end_s, moved_s), self._by_watts(start_s, end_s, moved_s)]
        found = min((way for way in ways if way is not None), key=lambda way: way.error_j, default=None)
        seconds = end_s - start_s
        if found is None:
            gap = EnergyReading(seconds=seconds, scope=Scope.WALL_AC, sensor="plug", flags=(*flags, "gap"))
            return gap, None
        whole = found.coverage == 1
        reading = EnergyReading(
            joules=found.joules,
            seconds=seconds,
            kind=Kind.MEASURED if whole else Kind.MIXED,
            scope=Scope.WALL_AC,
            sensor="plug",
            coverage=found.coverage,
            uncertainty_joules=found.error_j,
            flags=(*flags, *(() if whole else ("gap_filled",))),
        )
        return reading, found.how

    def _by_total(self, start_s: float, end_s: float, moved_s: float) -> _Figure | None:
        curve = next((part for part in self._total if part.holds(start_s, end_s)), None)
        if curve is None:
            return None
        joules = curve.between(start_s, end_s)
        errors = (
            self._accuracy * joules,
            math.sqrt(2) * STEP * self._step_j,
            self._moved(curve, start_s, end_s, moved_s),
            self._inside(curve, start_s),
            self._inside(curve, end_s),
        )
        return _Figure(joules, math.hypot(*errors), 1.0, "counter")

    def _by_watts(self, start_s: float, end_s: float, moved_s: float) -> _Figure | None:
        seconds = end_s - start_s
        if len(self._watts) < 2 or seconds <= 0:
            return None
        seen = self._seen.between(start_s, end_s)
        coverage = 1.0 if seconds - seen <= 1e-9 * seconds else seen / seconds
        if coverage < LEAST_SEEN:
            return None
        known = self._power.between(start_s, end_s)
        filled = 0.0 if coverage == 1 else known / seen * (seconds - seen)
        gaps = [late - early for early, late in map(self._power.around, (start_s, end_s))]
        errors = (
            self._accuracy * known,
            STEP * self._step_w * seen,
            self._sampling(start_s, end_s, seen),
            self._moved(self._power, start_s, end_s, moved_s + max(gaps) / 2),
            filled,
        )
        return _Figure(known + filled, math.hypot(*errors), coverage, "watts")

    def _moved(self, curve: _Curve, start_s: float, end_s: float, by_s: float) -> float:
        """Return what the figure changes by when both edges are moved; where nothing was heard, all of it."""
        joules, most = curve.between(start_s, end_s), max((watts for _, watts in self._watts), default=0.0)
        unheard = max(0.0, curve.times[0] - (start_s - by_s)) + max(0.0, end_s + by_s - curve.times[-1])
        changes = [abs(curve.between(start_s + s, end_s + s) - joules) for s in (-by_s, by_s)]
        return max(changes) + most * min(unheard, 2 * by_s)

    def _inside(self, curve: _Curve, edge_s: float) -> float:
        """Return what the total may be off by at an edge: nobody knows when it grew between two readings."""
        early, late = curve.around(edge_s)
        inside = [watts for time_s, watts in self._watts if early <= time_s <= late]
        if len(inside) < 2 or late - early > self._silent_s:
            return curve.between(early, late)
        return (max(inside) - min(inside)) * (late - early) / 2

    def _sampling(self, start_s: float, end_s: float, seen_s: float) -> float:
        """Return 2 s T / sqrt(n), with s from the steps between neighbours: slow changes are not missed."""
        first = bisect_right(self._watts, (start_s, math.inf)) - 1
        last = bisect_left(self._watts, (end_s, -math.inf)) + 1
        steps = [now[1] - before[1] for before, now in pairwise(self._watts[max(0, first) : last])]
        if not steps:
            return 0.0
        variance = math.fsum(step * step for step in steps) / (2 * len(steps))
        return 2 * math.sqrt(variance) * seen_s / math.sqrt(len(steps) + 1)


def joined(agent: str, number: int, plug: str, timing: Timing, series: Series) -> WallRecord:
    """Return what a plug's series says of a round's time on its device."""
    offset, clock_s = timing.clock.offset_s, timing.clock.uncertainty_s
    start_s, end_s = timing.spans[0].start_s + offset, timing.spans[-1].end_s + offset
    reading, how = series.over(start_s, end_s, clock_s)
    phases = tuple(
        WallPhase(
            stage=span.stage,
            also=span.also,
            reading=series.over(span.start_s + offset, span.end_s + offset, clock_s)[0],
        )
        for span in timing.spans
        if span.seconds >= PHASE_S
    )
    silent = "the plug was silent in more than a tenth of the time, or for too long at its edges"
    return WallRecord(
        agent=agent,
        round=number,
        plug=plug,
        start_s=start_s,
        clock_offset_s=offset,
        clock_uncertainty_s=clock_s,
        reading=reading,
        how=how,
        phases=phases,
        why=silent if how is None else None,
    )


def not_joined(agent: str, number: int, plug: str, why: str) -> WallRecord:
    """Return the record of an update that cannot be joined."""
    nothing = EnergyReading(seconds=0.0, scope=Scope.WALL_AC, sensor="plug")
    return WallRecord(agent=agent, round=number, plug=plug, reading=nothing, why=why)


def _power(watts: Sequence[tuple[float, float]], silent_s: float) -> tuple[_Curve, _Curve]:
    """Return joules by watts and seconds that were seen, both by time."""
    times, joules, seen = [time_s for time_s, _ in watts], [0.0], [0.0]
    for (t0, w0), (t1, w1) in pairwise(watts):
        heard_s = t1 - t0 if t1 - t0 <= silent_s else 0.0
        mean = 0.5 * (w0 + w1) if heard_s <= IN_A_ROW_S else w0
        joules.append(joules[-1] + mean * heard_s)
        seen.append(seen[-1] + heard_s)
    return _Curve(times, joules), _Curve(times, seen)


def _total(counts: Sequence[tuple[float, float]]) -> tuple[list[float], list[_Curve]]:
    """Return when the total fell, and the total by time, cut there.

    Knots are where it changed: a message that tells of something else has the old total with it.
    """
    falls: list[float] = []
    parts: list[tuple[list[float], list[float]]] = [([], [])]
    last: float | None = None
    for time_s, joules in counts:
        if last is not None and joules < last:
            falls.append(time_s)
            parts.append(([], []))
        if joules != last:
            parts[-1][0].append(time_s)
            parts[-1][1].append(joules)
        last = joules
    return falls, [_Curve(times, sums) for times, sums in parts if len(times) > 1]
