"""The meter: one sampling thread, and the joules and seconds of every stage cut from its one stream.

A reading is a window of a cumulative count, not a guess afterwards: the sensor is read at a steady rate
and once more at every edge of a stage, and between two reads the power is taken as constant. Stages are
cut from that one stream, so they add up to the total. Beside the joules stand what the idle device would
have used, this process's share of the rest, error bars, and what happened to the board meanwhile.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias

from edge_agent.energy.board import Board
from edge_agent.energy.container import busy_is_hidden, in_container
from edge_agent.energy.idle import IdleBaseline
from edge_agent.energy.sensor import EnergySensor, find_sensors, found_by, sensor_class
from edge_agent.energy.timeline import Stretch, Timeline
from edge_agent.energy.track import Share, Track
from edge_agent.energy.uncertainty import PUBLISHED_IDLE, REPEATED_IDLE, Errors, Idle
from edge_agent.energy.utilisation import CpuShare, ProcessShare, Utilisation
from foundation.energy import EnergyReading, Kind, Ledger, Scope, Stage
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile

logger = logging.getLogger(__name__)

Places: TypeAlias = Mapping[tuple[Stage, Scope], EnergyReading]
"""Readings by stage and by where the meter sat."""

_GAP_PERIODS = 5
"""Samples further apart than this many periods do not say what happened between them."""
_SUSPENDED_S = 0.5
"""The clock that counts sleep ran ahead by so much: the machine was suspended."""
_CPU_S = 1.0
"""How often CPU times are read, beside the edges of stages."""
LOOK_AGAIN_S = 10.0
"""How often a sensor that was lost is looked for."""


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
        asleep: Callable[[], float] | None = None,
        share: Literal["device", "process"] = "device",
        agents_on_host: int = 1,
        base: Stage = Stage.IDLE,
        root: Path = Path("/"),
        threaded: bool = True,
        cpu: CpuShare | None = None,
        baseline: IdleBaseline | None = None,
        renewed: Callable[[], DeviceProfile] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """Take the sensors to use, best first (default: those of the profile that are here).

        The first one counts. A later one that models the same scope fills the holes of the first. With
        `share="process"` the idle power is divided by `agents_on_host` and what is above it is charged by
        CPU share. Without `threaded` nobody samples but the edges and whoever calls `sample`. `asleep`
        returns the seconds that this machine has been suspended (default: the kernel's, with the default
        clock), `cpu` its CPU times; `baseline` measures the idle power while the agent rests; `timeline`
        says when stages were, on a clock of its own. `renewed`
        returns the profile anew when a model says that it is outdated: its model counts from the next window.
        """
        if rate_hz <= 0 or agents_on_host < 1:
            raise SettingsError("the meter needs rate_hz above 0 and agents_on_host of at least 1")
        found = list(find_sensors(profile, root) if sensors is None else sensors)
        self._probe = _prober(profile, root, found[0]) if sensors is None and found else None
        self._renewed, self._root = renewed, root
        self._published = bool(found) and _give_published_idle(found[0], profile)
        if share == "process":
            u_rel = profile.model.relative_net if profile.model else None
            found = [ProcessShare(sensor, agents_on_host, u_rel=u_rel) for sensor in found]
            self._probe = None  # a share goes on from its own sums
        self._period_s = 1.0 / rate_hz
        gap_s = _GAP_PERIODS * self._period_s
        self._main = Track(found[0], gap_s) if found else None
        filler = next((s for s in found[1:] if s.kind is Kind.MODELLED and s.scope is found[0].scope), None)
        self._filler = Track(filler, gap_s) if filler else None
        self._shared = bool(found) and isinstance(found[0], ProcessShare)
        uncounted = self._shared or not found or busy_is_hidden(root)
        self._cpu = cpu or (None if uncounted else CpuShare())
        self._baseline = baseline or IdleBaseline()
        self._board = Board(root)
        self._host_scope = in_container(root)
        self._clock = clock
        self._asleep = asleep or (_suspended_seconds if clock is time.monotonic else lambda: 0.0)
        self._slept_s = 0.0
        self._base = base
        self._open: list[_Open] = []
        self._seconds: dict[Stage, float] = {}
        self._flags: dict[Stage, set[str]] = {}
        self._then_s: float | None = None
        self._looked_s = 0.0
        self._pending = _Pending()
        self._taken_j: float | None = 0.0
        self._taken: Places = {}
        self._lock = threading.RLock()
        self._threaded = threaded
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._cpu_s = 0.0
        self._timeline = timeline or Timeline()
        self.taken: tuple[Stretch, ...] = ()
        """When the stages of the window that was taken last were, on the timeline's clock."""

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
            self._timeline.open()
            self._slept_s = self._asleep()
            for track in self._tracks():
                track.open(self._then_s)
            if self._cpu is not None:
                self._cpu.read(self.current, 0.0)
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
            self._edge()
            self._open.append(mine)
        try:
            yield
        finally:
            with self._lock:
                self._edge()
                self._open.remove(mine)

    def switch(self, stage: Stage) -> None:
        """Set the base stage, which owns the time when no stage is open."""
        with self._lock:
            self._edge()
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
            self._timeline.mark(stage)
            self._seconds[stage] = self._seconds.get(stage, 0.0) + elapsed
            slept, self._slept_s = self._slept_s, self._asleep()
            suspended = self._slept_s - slept > _SUSPENDED_S
            for track in self._tracks():
                track.read(now, stage, elapsed, broken=suspended)
            if suspended:
                self._flag(stage, "suspend")
            self._pending.add(elapsed, self._main.latest_w if self._main is not None else None)
            if self._pending.seconds >= _CPU_S:
                self._rest(stage)
            self._look_again(now)

    def take(self) -> Ledger:
        """Return readings by stage since the last take and begin a new window; open stages go on."""
        with self._lock:
            ledger = self.peek()
            self._taken_j = _plus(self._taken_j, ledger)
            self._taken = _added(self._taken, ledger)
            self.taken = self._timeline.take()
            self._seconds.clear()
            self._flags.clear()
            for track in self._tracks():
                track.clear()
            if self._cpu is not None:
                self._cpu.clear()
            self._renew()
            return ledger

    def _renew(self) -> None:
        """Reckon with another model from here on, where the present one is of another power mode."""
        sensor = self._main.sensor if self._main is not None else None
        if self._main is None or self._renewed is None or not isinstance(sensor, Utilisation):
            return
        if not sensor.outdated:
            return
        profile = self._renewed()
        found = Utilisation.probe(profile, self._root)
        if found is not None:
            logger.info("power mode changed", extra={"flags": found.flags})
            self._probe = _prober(profile, self._root, found)
            self._main.replace(found)
            self.sample()

    def peek(self) -> Ledger:
        """Return readings by stage since the last take, and go on."""
        with self._lock:
            self._edge()
            return {stage: self._reading(stage, s) for stage, s in self._seconds.items() if s > 0}

    def since_start(self) -> Places:
        """Return readings over all windows, by stage and scope; an unknown part makes its sum unknown."""
        with self._lock:
            return _added(self._taken, self.peek())

    def watts(self) -> float | None:
        """Return the present power, a mean over about a second; `None` when nobody knows."""
        with self._lock:
            return self._main.watts(self._clock()) if self._main else None

    def _tracks(self) -> list[Track]:
        return [track for track in (self._main, self._filler) if track is not None]

    def _edge(self) -> None:
        """Sample, and note for the stage that ends here what happened to the board in it."""
        self.sample()
        if self._then_s is None:
            return
        if self._pending.seconds > 0:
            self._rest(self.current)
        for flag in self._board.flags():
            self._flag(self.current, flag)

    def _flag(self, stage: Stage, flag: str) -> None:
        self._flags.setdefault(stage, set()).add(flag)

    def _rest(self, stage: Stage) -> None:
        """Count CPU times of what is pending, and measure the idle power if this device rests."""
        pending, self._pending = self._pending, _Pending()
        busy = None if self._cpu is None else self._cpu.read(stage, pending.seconds)
        main = self._main
        if main is None or self._shared or main.sensor.kind is not Kind.MEASURED:
            return
        self._baseline.add(stage, pending.seconds, pending.joules, busy)
        if self._baseline.idle is not None:
            main.sensor.idle_w = self._baseline.idle.watts

    def _look_again(self, now: float) -> None:
        """Look for a sensor that was lost: its driver may be back, under another number."""
        main = self._main
        if main is None or main.failing_s is None or self._probe is None:
            return
        if now - max(main.failing_s, self._looked_s) < LOOK_AGAIN_S:
            return
        self._looked_s = now
        found = self._probe()
        if found is not None:
            logger.info("energy sensor found again", extra={"sensor": found.name})
            found.idle_w = main.sensor.idle_w
            main.replace(found)

    def _run(self) -> None:
        started = time.thread_time()
        stopping = self._stopping
        while not stopping.wait(self._period_s):
            self.sample()
            self._cpu_s = time.thread_time() - started

    def _reading(self, stage: Stage, seconds: float) -> EnergyReading:
        if self._main is None:
            return EnergyReading(seconds=seconds, flags=tuple(sorted(self._flags.get(stage, ()))))
        sensor, share = self._main.sensor, self._main.shares.get(stage) or Share()
        seen = min(share.seen_s, seconds)
        hole = seconds - seen
        if hole <= 1e-9 * seconds:  # rounding of the additions
            seen, hole = seconds, 0.0
        fill = _Fill(0.0, 0.0) if hole == 0 else self._fill(stage, hole, seen)
        known = fill is not None
        joules = None if fill is None else share.joules + fill.joules
        idle = self._idle() if known else None
        gross, net = self._error_bars(share, seen, seconds, joules, fill, idle)
        return EnergyReading(
            joules=joules,
            idle_joules=None if idle is None else idle.watts * seconds,
            seconds=seconds,
            kind=_kind(sensor.kind, seen / seconds) if known else Kind.NONE,
            scope=sensor.scope,
            sensor=sensor.name,
            coverage=seen / seconds,
            uncertainty_joules=gross,
            net_uncertainty_joules=net,
            process_joules=self._own(stage, seconds, joules, idle),
            flags=(*sensor.flags, *self._happened(stage, seconds, joules, hole, idle)),
        )

    def _idle(self) -> Idle | None:
        """Return the idle power by the best that is known: measured here, the sensor's own, published."""
        assert self._main is not None
        if self._baseline.idle is not None:
            return self._baseline.idle
        watts, kind = self._main.sensor.idle_w, self._main.sensor.kind
        if watts is None:
            return None
        error = PUBLISHED_IDLE * watts if self._published else 0.0 if kind is Kind.MODELLED else None
        return Idle(watts, REPEATED_IDLE * watts if error is None else error, same_sensor=not self._published)

    def _error_bars(
        self,
        share: Share,
        seen: float,
        seconds: float,
        joules: float | None,
        fill: _Fill | None,
        idle: Idle | None,
    ) -> tuple[float | None, float | None]:
        assert self._main is not None
        sensor = self._main.sensor
        if fill is None or joules is None or sensor.u_rel is None:
            return None, None
        errors = Errors(
            gain=sensor.u_rel,
            offset_j=sensor.offset_w * seen,
            sampling_j=share.spread.error(seen),
            edges_j=math.sqrt(share.edges),
            filled_j=fill.uncertainty,
            cross_j2=sensor.cross_w * share.joules * seen,
        )
        gross = errors.gross(share.joules)
        if idle is None:
            return gross, None
        if sensor.u_rel_net is not None:  # a model: what it says of the joules above idle
            above = max(0.0, joules - idle.watts * seconds)
            return gross, math.hypot(sensor.u_rel_net * above, fill.uncertainty)
        return gross, errors.net(joules, seconds, idle)

    def _own(self, stage: Stage, seconds: float, joules: float | None, idle: Idle | None) -> float | None:
        """Return this process tree's part of what is above idle."""
        if joules is None or idle is None:
            return None
        above = max(0.0, joules - idle.watts * seconds)
        if self._shared:
            return above
        part = None if self._cpu is None else self._cpu.of(stage)
        return None if part is None else part * above

    def _happened(
        self, stage: Stage, seconds: float, joules: float | None, hole: float, idle: Idle | None
    ) -> list[str]:
        """Return what a reader of this reading should know."""
        assert self._main is not None
        flags = self._flags.get(stage, set()) | self._share_flags(stage)
        if hole:
            flags = flags | {"gap" if joules is None else "gap_filled"}
        if self._host_scope and self.kind is Kind.MEASURED:
            flags = flags | {"host_scope"}
        if idle is not None and joules is not None:
            if joules < idle.watts * seconds * (1 - 1e-6):
                flags = flags | {"net_clamped"}
            if not idle.same_sensor:
                flags = flags | {"idle_published"}
            if self._baseline.drifted:
                flags = flags | {"idle_drift"}
        return sorted(flags)

    def _share_flags(self, stage: Stage) -> set[str]:
        assert self._main is not None
        share = self._main.shares.get(stage)
        return share.flags if share is not None else set()

    def _fill(self, stage: Stage, hole: float, seen: float) -> _Fill | None:
        """Return joules for the seconds the sensor did not see; `None` if nobody can say.

        A model of the same scope fills any hole. Without one, a hole of at most a tenth is taken to be
        like the rest of its stage, with an error bar as large as itself.
        """
        modelled = self._filler.shares.get(stage) if self._filler is not None else None
        if self._filler is not None and modelled is not None and modelled.seen_s > 0:
            u_rel = self._filler.sensor.u_rel
            joules = modelled.joules / modelled.seen_s * hole
            return _Fill(joules, joules * (1.0 if u_rel is None else u_rel))
        if self._main is not None and seen >= 9 * hole:
            joules = self._main.shares[stage].joules / seen * hole
            return _Fill(joules, joules)
        return None


@dataclass(eq=False, slots=True)
class _Open:
    """One open stage; told apart by identity, as the same stage can be open twice."""

    stage: Stage


@dataclass(slots=True)
class _Pending:
    """Time of the present stage whose CPU times are not read yet: reading them costs more than a sensor."""

    seconds: float = 0.0
    joules: float | None = 0.0

    def add(self, seconds: float, watts: float | None) -> None:
        """Add time, and its joules if all of them are known."""
        if seconds > 0:
            self.seconds += seconds
            self.joules = None if watts is None or self.joules is None else self.joules + watts * seconds


@dataclass(frozen=True, slots=True)
class _Fill:
    """Joules put into a hole, and their error bar at k = 2."""

    joules: float
    uncertainty: float


def _prober(profile: DeviceProfile, root: Path, sensor: EnergySensor) -> Callable[[], EnergySensor | None]:
    """Return what finds a sensor of the same class anew."""
    kind = sensor_class(sensor.name)
    return lambda: found_by(kind, profile, root)


def _give_published_idle(sensor: EnergySensor, profile: DeviceProfile) -> bool:
    """Let a measuring sensor start from the profile's idle power of the same scope, if there is one."""
    if sensor.kind is not Kind.MEASURED or sensor.idle_w is not None:
        return False
    for key, number in profile.power.items():
        if key.startswith("idle_w") and number.scope is sensor.scope and isinstance(number.v, float):
            sensor.idle_w = number.v
            return True
    return False


def _suspended_seconds() -> float:
    """Return the seconds that this machine has slept, which one of its clocks counts and one does not."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if clock is None else time.clock_gettime(clock) - time.clock_gettime(time.CLOCK_MONOTONIC)


def _kind(kind: Kind, coverage: float) -> Kind:
    """Return what a reading is called when a model has filled what the sensor did not see."""
    if coverage == 1 or kind is Kind.MODELLED:
        return kind
    return Kind.MIXED if coverage >= 0.5 else Kind.MODELLED


def _added(places: Places, ledger: Ledger) -> Places:
    """Return a window's readings added to those before it, where the meter sat at the same place."""
    result = dict(places)
    for stage, reading in ledger.items():
        key = stage, reading.scope
        result[key] = result[key] + reading if key in result else reading
    return result


def _plus(joules: float | None, ledger: Ledger) -> float | None:
    """Add a ledger's joules; an unknown part makes the sum unknown."""
    for reading in ledger.values():
        joules = None if joules is None or reading.joules is None else joules + reading.joules
    return joules
