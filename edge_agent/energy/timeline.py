"""When which stage had the time: stretches on a clock that counts sleep, merged where they touch, bounded.

Stretches shorter than a second, which no plug can see, go to a neighbour, and so do the shortest ones where
there are too many; touching ones with the same main stage are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from foundation.energy import Stage
from foundation.timing import MOST_SPANS, steady_s

BRIEF_S = 1.0
HELD = 4 * MOST_SPANS
"""Stretches that are kept before they are thinned."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some time, and how many seconds of it each stage had."""

    start_s: float
    end_s: float
    stages: dict[Stage, float]

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_s - self.start_s

    @property
    def stage(self) -> Stage:
        """The stage that had most of it."""
        return max(self.stages, key=lambda stage: self.stages[stage])

    @property
    def also(self) -> tuple[Stage, ...]:
        """The other ones."""
        return tuple(stage for stage in self.stages if stage is not self.stage)

    def with_next(self, other: Stretch) -> Stretch:
        """Return this and the one that follows as one."""
        stages = dict(self.stages)
        for stage, seconds in other.stages.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
        return Stretch(self.start_s, other.end_s, stages)


class Timeline:
    """Takes the time as it passes; who calls it from several threads holds a lock, as the meter does."""

    def __init__(self, clock: Callable[[], float] = steady_s) -> None:
        self.clock = clock
        self._then_s: float | None = None
        self._stretches: list[Stretch] = []

    def open(self) -> None:
        """Begin now."""
        self._then_s = self.clock()

    def mark(self, stage: Stage) -> None:
        """Give the time since the last call to `stage`."""
        now = self.clock()
        if self._then_s is not None and now > self._then_s:
            _append(self._stretches, Stretch(self._then_s, now, {stage: now - self._then_s}))
            if len(self._stretches) > HELD:
                self._stretches = thinned(self._stretches)
        self._then_s = now

    def take(self) -> tuple[Stretch, ...]:
        """Return at most `MOST_SPANS` stretches since the last take, and begin anew."""
        taken, self._stretches = thinned(self._stretches), []
        return tuple(taken)


def thinned(stretches: Iterable[Stretch], most: int = MOST_SPANS, brief_s: float = BRIEF_S) -> list[Stretch]:
    """Return the same time in at most `most` stretches, none of them brief but where there is but one."""
    found: list[Stretch] = []
    for stretch in stretches:
        _append(found, stretch)
    while len(found) > 1:
        place = min(range(len(found)), key=lambda i: found[i].seconds)
        if found[place].seconds >= brief_s and len(found) <= most:
            break
        # To the longer neighbour: there it matters least.
        after = place + 1 < len(found) and (place == 0 or found[place + 1].seconds > found[place - 1].seconds)
        first = place if after else place - 1
        joined = found[first].with_next(found[first + 1])
        rest = found[first + 2 :]
        del found[first:]
        for stretch in (joined, *rest[:1]):
            _append(found, stretch)
        found += rest[1:]
    return found


def _append(stretches: list[Stretch], stretch: Stretch) -> None:
    """Put a stretch at the end, as part of the last one where both are mainly of one stage."""
    if stretches and stretches[-1].stage is stretch.stage:
        stretches[-1] = stretches[-1].with_next(stretch)
    else:
        stretches.append(stretch)
