"""One sensor's stream: its joules shared out over the stages that had the time between two reads."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.energy.sensor import EnergySensor
from edge_agent.energy.uncertainty import Spread
from foundation.energy import Stage

logger = logging.getLogger(__name__)

_WATTS_S = 1.0
"""The present power is the mean over about this long."""
SLOW_S = 0.05
"""A read that takes longer says little about the moment at which it began."""


@dataclass(slots=True)
class Share:
    """What one stage has of a stream."""

    joules: float = 0.0
    seen_s: float = 0.0
    spread: Spread = field(default_factory=Spread)
    edges: float = 0.0
    """Sum of squares of what its edges may have cost it, in joules."""
    flags: set[str] = field(default_factory=set)


class Track:
    """The stream of one sensor, cut into the stages that had the time."""

    def __init__(
        self, sensor: EnergySensor, gap_s: float, timer: Callable[[], float] = time.perf_counter
    ) -> None:
        """Take reads further apart than `gap_s` as a hole, unless the sensor counts; `timer` times reads."""
        self.sensor = sensor
        self.shares: dict[Stage, Share] = {}
        self.latest_w: float | None = None
        """Mean power since the read before, if the last read could be joined to it."""
        self.failing_s: float | None = None
        """When the sensor ceased to answer."""
        self._gap_s = gap_s
        self._timer = timer
        self._unread: dict[Stage, float] = {}
        self._last: _Point | None = None
        self._before: tuple[Stage, float] | None = None
        self._recent: deque[_Point] = deque()

    def open(self, now: float) -> None:
        """Read for the first time; what was before is not of interest."""
        self._unread.clear()
        self._lost()
        self._last = self._point(now, None)

    def clear(self) -> None:
        """Forget the sums and go on from the last good read."""
        self.shares.clear()
        self._unread.clear()

    def replace(self, sensor: EnergySensor) -> None:
        """Go on with another sensor of the same kind: the time until its first read is a hole."""
        self.sensor = sensor
        self._last = None
        self._lost()

    def share(self, stage: Stage) -> Share:
        """Return what `stage` has so far."""
        return self.shares.setdefault(stage, Share())

    def read(self, now: float, stage: Stage, elapsed: float, *, broken: bool = False) -> None:
        """Give `elapsed` seconds to `stage`, and all time since the last good read its joules.

        `broken` time, such as a suspended machine's, is not joined to what was before: it stays a hole.
        """
        if elapsed > 0:
            self._unread[stage] = self._unread.get(stage, 0.0) + elapsed
        self.latest_w = None
        if self._last is not None and now == self._last.time_s:
            return  # two edges at one moment: no time to share joules over
        point = self._point(now, stage)
        if point is None:
            return  # the next good read decides about this time
        last, self._last = self._last, point
        spans, self._unread = self._unread, {}
        if last is None or broken or not spans or not self._joined(last, point):
            self._lost()
        else:
            self.latest_w = (point.joules - last.joules) / (point.time_s - last.time_s)
            self._shared_out(last, point, spans)
        self._remember(point)

    def watts(self, now: float) -> float | None:
        """Return the mean power of the recent reads; `None` without two that are recent."""
        if len(self._recent) < 2 or now - self._recent[-1].time_s > self._gap_s:
            return None
        first, last = self._recent[0], self._recent[-1]
        return (last.joules - first.joules) / (last.time_s - first.time_s)

    def _lost(self) -> None:
        self._recent.clear()
        self._before = None
        self.latest_w = None

    def _shared_out(self, last: _Point, point: _Point, spans: dict[Stage, float]) -> None:
        watts = (point.joules - last.joules) / (point.time_s - last.time_s)
        for owner, seconds in spans.items():
            share = self.share(owner)
            share.joules += watts * seconds
            share.seen_s += seconds
            if point.watts is not None:
                share.spread.add(point.watts)
        owner, level = next(reversed(spans)), watts if point.watts is None else point.watts
        if self._before is not None and self._before[0] is not owner:
            # A sensor that averages shows an edge late: what one stage lost by it, the other one has.
            step = abs(level - self._before[1]) * self.sensor.delay_s
            for stage in (owner, self._before[0]):
                self.share(stage).edges += step * step
            if last.watts is not None:
                self.share(owner).spread.add(last.watts)
        self._before = owner, level

    def _point(self, now: float, stage: Stage | None) -> _Point | None:
        began = self._timer()
        try:
            joules = self.sensor.joules(now)
        except Exception:
            # A sensor promises not to raise; one that does must not take the training down with it.
            if self.failing_s is None:
                logger.exception("energy sensor raised", extra={"sensor": self.sensor.name})
                self.failing_s = now
            return None
        if joules is None:
            if self.failing_s is None:
                logger.warning("energy sensor does not answer", extra={"sensor": self.sensor.name})
                self.failing_s = now
            return None
        if self.failing_s is not None:
            logger.info("energy sensor answers again", extra={"sensor": self.sensor.name})
            self.failing_s = None
        if stage is not None and self._timer() - began > SLOW_S:
            self.share(stage).flags.add("slow_read")
        return _Point(now, joules, self.sensor.breaks, self.sensor.sampled_w)

    def _joined(self, last: _Point, point: _Point) -> bool:
        """Whether the joules between two reads are all the joules of the time between them."""
        seconds = point.time_s - last.time_s
        near = self.sensor.cumulative or seconds <= self._gap_s
        return seconds > 0 and near and point.breaks == last.breaks and point.joules >= last.joules

    def _remember(self, point: _Point) -> None:
        self._recent.append(point)
        while len(self._recent) > 2 and point.time_s - self._recent[1].time_s >= _WATTS_S:
            self._recent.popleft()


@dataclass(frozen=True, slots=True)
class _Point:
    """A good read: cumulative joules at a time, and how often the count was broken until then."""

    time_s: float
    joules: float
    breaks: int
    watts: float | None
    """What the sensor sampled; `None` for a counter."""
