"""The meter: one sampling thread, and the joules and seconds of every stage cut from its one stream.

A reading is a window of a cumulative count, not a guess afterwards: the sensor is read at a steady rate
and once more at every edge of a stage, and between two reads the power is taken as constant. Stages are
cut from that one stream, so they add up to the total.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from edge_agent.energy.sensor import EnergySensor, find_sensors
from edge_agent.energy.utilisation import ProcessShare
from foundation.energy import EnergyReading, Kind, Ledger, Scope, Stage
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile

logger = logging.getLogger(__name__)

_GAP_PERIODS = 5
"""Samples further apart than this many periods do not say what happened between them."""
_WATTS_S = 1.0
"""The present power is the mean over about this long."""


class Meter:
    """Measures one device, or one process's share of it, stage by stage.

    At any moment exactly one stage owns the time: the innermost open one, or the base stage. Stages may
    be opened from any thread. Usable as a context manager; all methods may be called from any thread.
    """

    def __init__(
        self,
        profile: DeviceProfile,
        sensors: Sequence[EnergySensor] | None = None,
        *,
        rate_hz: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        share: Literal["device", "process"] = "device",
        agents_on_host: int = 1,
        base: Stage = Stage.IDLE,
        root: Path = Path("/"),
        threaded: bool = True,
    ) -> None:
        """Take the sensors to use, best first (default: those of the profile that are here).

        The first one counts. A later one that models the same scope fills the holes of the first. With
        `share="process"` the idle power is divided by `agents_on_host` and what is above it is charged by
        CPU share. Without `threaded` nobody samples but the edges and whoever calls `sample`.
        """
        if rate_hz <= 0 or agents_on_host < 1:
            raise SettingsError("the meter needs rate_hz above 0 and agents_on_host of at least 1")
        found = find_sensors(profile, root) if sensors is None else sensors
        if share == "process":
            u_rel = profile.model.relative_net if profile.model else None
            found = [ProcessShare(sensor, agents_on_host, u_rel=u_rel) for sensor in found]
        self._period_s = 1.0 / rate_hz
        gap_s = _GAP_PERIODS * self._period_s
        self._main = _Track(found[0], gap_s) if found else None
        filler = next((s for s in found[1:] if s.kind is Kind.MODELLED and s.scope is found[0].scope), None)
        self._filler = _Track(filler, gap_s) if filler else None
        self._clock = clock
        self._base = base
        self._open: list[_Open] = []
        self._seconds: dict[Stage, float] = {}
        self._then_s: float | None = None
        self._taken_j: float | None = 0.0
        self._lock = threading.RLock()
        self._threaded = threaded
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._cpu_s = 0.0

    @property
    def kind(self) -> Kind:
        """How joules are known here, as long as the sensor answers."""
        return self._main.sensor.kind if self._main else Kind.NONE

    @property
    def scope(self) -> Scope:
        """Where the meter sits."""
        return self._main.sensor.scope if self._main else Scope.UNKNOWN

    @property
    def source(self) -> str:
        """Name of the sensor, or "none"."""
        return self._main.sensor.name if self._main else "none"

    @property
    def cpu_s(self) -> float:
        """CPU seconds that the sampling thread has used itself."""
        return self._cpu_s

    @property
    def current(self) -> Stage:
        """The stage that owns the time now."""
        with self._lock:
            return self._open[-1].stage if self._open else self._base

    @property
    def joules_total(self) -> float | None:
        """Joules since the meter was made, over all windows; `None` once a part of them is unknown."""
        with self._lock:
            return _plus(self._taken_j, self.peek())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to measure; time before this is not counted. Raises `RuntimeError` if it runs already."""
        with self._lock:
            if self._then_s is not None:
                raise RuntimeError("the meter runs already")
            self._then_s = self._clock()
            for track in self._tracks():
                track.open(self._then_s)
            self._stopping = threading.Event()
            if self._threaded:
                self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Close the window and end the thread; what was measured can still be taken. Twice is harmless."""
        with self._lock:
            self.sample()
            self._then_s = None
            thread, self._thread = self._thread, None
        self._stopping.set()
        if thread is not None:
            thread.join(timeout=5.0)

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Let `stage` own the time while this is open, unless another is opened inside or beside it."""
        mine = _Open(stage)
        with self._lock:
            self.sample()
            self._open.append(mine)
        try:
            yield
        finally:
            with self._lock:
                self.sample()
                self._open.remove(mine)

    def switch(self, stage: Stage) -> None:
        """Set the base stage, which owns the time when no stage is open."""
        with self._lock:
            self.sample()
            self._base = stage

    def sample(self) -> None:
        """Read the sensor now; the thread does it at its rate, and every edge of a stage does it."""
        with self._lock:
            if self._then_s is None:
                return
            now = self._clock()
            elapsed = max(0.0, now - self._then_s)  # a clock that steps back gives no time
            self._then_s = now
            stage = self.current
            self._seconds[stage] = self._seconds.get(stage, 0.0) + elapsed
            for track in self._tracks():
                track.read(now, stage, elapsed)

    def take(self) -> Ledger:
        """Return readings by stage since the last take and begin a new window; open stages go on."""
        with self._lock:
            ledger = self.peek()
            self._taken_j = _plus(self._taken_j, ledger)
            self._seconds.clear()
            for track in self._tracks():
                track.clear()
            return ledger

    def peek(self) -> Ledger:
        """Return readings by stage since the last take, and go on."""
        with self._lock:
            self.sample()
            return {stage: self._reading(stage, s) for stage, s in self._seconds.items() if s > 0}

    def watts(self) -> float | None:
        """Return the present power, a mean over about a second; `None` when nobody knows."""
        with self._lock:
            return self._main.watts(self._clock()) if self._main else None

    def _tracks(self) -> list[_Track]:
        return [track for track in (self._main, self._filler) if track is not None]

    def _run(self) -> None:
        started = time.thread_time()
        stopping = self._stopping
        while not stopping.wait(self._period_s):
            self.sample()
            self._cpu_s = time.thread_time() - started

    def _reading(self, stage: Stage, seconds: float) -> EnergyReading:
        if self._main is None:
            return EnergyReading(seconds=seconds)
        sensor, joules = self._main.sensor, self._main.joules.get(stage, 0.0)
        seen = min(self._main.seen.get(stage, 0.0), seconds)
        hole = seconds - seen
        if hole <= 1e-9 * seconds:  # rounding of the additions
            seen, hole = seconds, 0.0
        fill = _Fill(0.0, 0.0) if hole == 0 else self._fill(stage, hole, seen)
        known = fill is not None
        idle = sensor.idle_w * seconds if known and sensor.idle_w is not None else None
        bars = None if fill is None or sensor.u_rel is None else sensor.u_rel * joules + fill.uncertainty
        return EnergyReading(
            joules=None if fill is None else joules + fill.joules,
            idle_joules=idle,
            seconds=seconds,
            kind=_kind(sensor.kind, seen / seconds) if known else Kind.NONE,
            scope=sensor.scope,
            sensor=sensor.name,
            coverage=seen / seconds,
            uncertainty_joules=bars,
            flags=(*sensor.flags, *(() if hole == 0 else ("gap_filled",) if known else ("gap",))),
        )

    def _fill(self, stage: Stage, hole: float, seen: float) -> _Fill | None:
        """Return joules for the seconds the sensor did not see; `None` if nobody can say.

        A model of the same scope fills any hole. Without one, a hole of at most a tenth is taken to be
        like the rest of its stage, with an error bar as large as itself.
        """
        if self._filler is not None and self._filler.seen.get(stage, 0.0) > 0:
            u_rel = self._filler.sensor.u_rel
            joules = self._filler.joules[stage] / self._filler.seen[stage] * hole
            return _Fill(joules, joules * (1.0 if u_rel is None else u_rel))
        if self._main is not None and seen >= 9 * hole:
            joules = self._main.joules[stage] / seen * hole
            return _Fill(joules, joules)
        return None


@dataclass(eq=False, slots=True)
class _Open:
    """One open stage; told apart by identity, as the same stage can be open twice."""

    stage: Stage


@dataclass(frozen=True, slots=True)
class _Fill:
    """Joules put into a hole, and their error bar at k = 2."""

    joules: float
    uncertainty: float


class _Track:
    """One sensor's stream: its joules shared out over the stages that had the time between two reads."""

    def __init__(self, sensor: EnergySensor, gap_s: float) -> None:
        self.sensor = sensor
        self.joules: dict[Stage, float] = {}
        self.seen: dict[Stage, float] = {}
        self._gap_s = gap_s
        self._unread: dict[Stage, float] = {}
        self._last: _Point | None = None
        self._recent: deque[_Point] = deque()
        self._failing = False

    def open(self, now: float) -> None:
        """Read for the first time; what was before is not of interest."""
        self._unread.clear()
        self._recent.clear()
        self._last = self._point(now)

    def clear(self) -> None:
        """Forget the sums and go on from the last good read."""
        self.joules.clear()
        self.seen.clear()
        self._unread.clear()

    def read(self, now: float, stage: Stage, elapsed: float) -> None:
        """Give `elapsed` seconds to `stage`, and all time since the last good read its joules."""
        self._unread[stage] = self._unread.get(stage, 0.0) + elapsed
        if self._last is not None and now == self._last.time_s:
            return  # two edges at one moment: no time to share joules over
        point = self._point(now)
        if point is None:
            return  # the next good read decides about this time
        last, self._last = self._last, point
        spans, self._unread = self._unread, {}
        if last is None or not self._joined(last, point):
            self._recent.clear()
        else:
            watts = (point.joules - last.joules) / (point.time_s - last.time_s)
            for owner, seconds in spans.items():
                self.joules[owner] = self.joules.get(owner, 0.0) + watts * seconds
                self.seen[owner] = self.seen.get(owner, 0.0) + seconds
        self._remember(point)

    def watts(self, now: float) -> float | None:
        """Return the mean power of the recent reads; `None` without two that are recent."""
        if len(self._recent) < 2 or now - self._recent[-1].time_s > self._gap_s:
            return None
        first, last = self._recent[0], self._recent[-1]
        return (last.joules - first.joules) / (last.time_s - first.time_s)

    def _point(self, now: float) -> _Point | None:
        try:
            joules = self.sensor.joules(now)
        except Exception:
            # A sensor promises not to raise; one that does must not take the training down with it.
            if not self._failing:
                logger.exception("energy sensor raised", extra={"sensor": self.sensor.name})
            joules = None
            self._failing = True
        if joules is None:
            if not self._failing:
                logger.warning("energy sensor does not answer", extra={"sensor": self.sensor.name})
            self._failing = True
            return None
        if self._failing:
            logger.info("energy sensor answers again", extra={"sensor": self.sensor.name})
        self._failing = False
        return _Point(now, joules, self.sensor.breaks)

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


def _kind(kind: Kind, coverage: float) -> Kind:
    """Return what a reading is called when a model has filled what the sensor did not see."""
    if coverage == 1 or kind is Kind.MODELLED:
        return kind
    return Kind.MIXED if coverage >= 0.5 else Kind.MODELLED


def _plus(joules: float | None, ledger: Ledger) -> float | None:
    """Add a ledger's joules; an unknown part makes the sum unknown."""
    for reading in ledger.values():
        joules = None if joules is None or reading.joules is None else joules + reading.joules
    return joules
