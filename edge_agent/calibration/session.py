"""Runs the load steps and writes down, over one and the same time, what meter, processor and own sensor said.

The utilisation of a step is what /proc counted, not what was meant. Meters answer for a stretch of time that
lies within the hold (between two steps of a counter, say); utilisation is taken over exactly that stretch.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from edge_agent.calibration import host
from edge_agent.calibration.clock_pins import ClockPins, Domain
from edge_agent.calibration.loads import Load, Running, commands, usable_cores
from edge_agent.calibration.meters import NEEDS, CalibrationMeter, Span, least_hold_s
from edge_agent.energy.board import firmware_bits
from edge_agent.energy.clocks import Clocks
from edge_agent.energy.gpu_load import GpuLoad
from edge_agent.energy.link import Link
from edge_agent.energy.sensor import EnergySensor
from edge_agent.energy.utilisation import machine_busy_seconds
from edge_agent.surroundings import temperatures
from foundation.calibration import DeviceFacts, Step
from foundation.errors import SensorError

logger = logging.getLogger(__name__)

RATE_HZ = 10.0
CLOCK_SLACK_S = 0.5
"""UTC may move so far against the monotonic clock during a hold before the hold is of no use."""

Tell = Callable[[Load, str, float, float], None]
"""Told of a load: what happens (`settle`, `hold`), seconds done, seconds in all."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each step; `None`: what the meter needs."""

    settle_s: float | None = None
    hold_s: float | None = None
    idle_s: float | None = None
    exact: bool = False
    """Whether `hold_s` stands even where the meter needs longer at these watts."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A hold that is over."""

    load: Load
    span: Span
    start: datetime
    settle_s: float
    least_s: float
    temperature_c: float | None
    throttled: bool | None
    most_mhz: float | None


class Timeline:
    """A count that never falls, by time; its rate between any two times."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._counts: list[float] = []

    def add(self, time_s: float, count: float | None) -> None:
        """Note a count; an error is left out."""
        if count is not None:
            self._times.append(time_s)
            self._counts.append(count)

    def rate(self, start_s: float, end_s: float) -> float | None:
        """Return the mean rate; `None` where a time is not between two counts."""
        start, end = self._at(start_s), self._at(end_s)
        return None if start is None or end is None or end_s <= start_s else (end - start) / (end_s - start_s)

    def _at(self, time_s: float) -> float | None:
        place = bisect_left(self._times, time_s)
        if place >= len(self._times) or (place == 0 and self._times[0] != time_s):
            return None
        if self._times[place] == time_s:
            return self._counts[place]
        (t0, t1), (c0, c1) = self._times[place - 1 : place + 1], self._counts[place - 1 : place + 1]
        return c0 + (c1 - c0) * (time_s - t0) / (t1 - t0)


class Watch:
    """Samples processor, GPU, own sensor and meter ten times a second; `with Watch(...) as watch:`."""

    def __init__(
        self,
        meter: CalibrationMeter,
        sensor: EnergySensor | None,
        clocks: Clocks | None = None,
        gpu: GpuLoad | None = None,
        link: Link | None = None,
    ) -> None:
        self.busy, self.joules = Timeline(), Timeline()
        self.sent, self.received = Timeline(), Timeline()
        """Megabits."""
        self._link = link
        self.cycles, self.gpu = Timeline(), Timeline()
        """Busy seconds times MHz, and busy seconds of the GPU."""
        self._clocks, self._gpu = clocks or Clocks(Path("/nonexistent")), gpu
        self._last: tuple[float, float] | None = None
        self._cycles = self._gpu_s = 0.0
        self.breaks: list[float] = []
        """When the own sensor lost count."""
        self._meter, self._sensor = meter, sensor
        self._seen_breaks = sensor.breaks if sensor else 0
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="calibrate", daemon=True)

    def __enter__(self) -> Watch:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(5.0)

    def check(self) -> None:
        """Raise what ended the sampling."""
        if self._failure is not None:
            raise SensorError(f"sampling failed: {self._failure!r}") from self._failure

    def sample(self) -> float:
        """Read everything now; returns the time."""
        with self._lock:
            now = time.monotonic()
            busy = machine_busy_seconds()
            self.busy.add(now, busy)
            self._speed(now, busy)
            mbit = self._link.mbit() if self._link else None
            self.sent.add(now, mbit[0] if mbit else None)
            self.received.add(now, mbit[1] if mbit else None)
            if self._sensor is not None:
                self.joules.add(now, self._sensor.joules(now))
                if self._sensor.breaks != self._seen_breaks:
                    self._seen_breaks = self._sensor.breaks
                    self.breaks.append(now)
            self._meter.sample(now)
            return now

    def _speed(self, now: float, busy: float | None) -> None:
        """Add up the clock over the busy time, and the GPU's busy share; what is not known is a hole."""
        mhz, share = self._clocks.mhz(), self._gpu.share() if self._gpu else None
        last, self._last = self._last, None if busy is None else (now, busy)
        if busy is None:
            return
        last = last or (now, busy)
        if mhz is not None:
            self._cycles += mhz * max(0.0, busy - last[1])
            self.cycles.add(now, self._cycles)
        if share is not None:
            self._gpu_s += share * (now - last[0])
            self.gpu.add(now, self._gpu_s)

    def mhz(self, start_s: float, end_s: float) -> float | None:
        """Return the mean clock of the busy cores; `None` where nobody says."""
        cycles, busy = self.cycles.rate(start_s, end_s), self.busy.rate(start_s, end_s)
        return cycles / busy if cycles and busy else None

    def _run(self) -> None:
        try:
            while not self._stopping.wait(1 / RATE_HZ):
                self.sample()
        except Exception as error:  # raised again by check(), in the thread that waits for the end of a hold
            self._failure = error


class Session:
    """One calibration's measurements."""

    def __init__(
        self,
        meter: CalibrationMeter,
        sensor: EnergySensor | None,
        *,
        timing: Timing,
        threads: int,
        root: Path = Path("/"),
        tell: Tell = lambda *_: None,
        domains: Sequence[Domain] = (),
        gpu: GpuLoad | None = None,
        link: Link | None = None,
    ) -> None:
        """Take the clock domains that loads may be held down in, and what says how busy GPU and link are."""
        self._domains, self._gpu, self._link = domains, gpu, link
        self._meter, self._sensor, self._timing = meter, sensor, timing
        self._threads, self._root, self._tell = threads, root, tell
        self._cores = psutil.cpu_count() or 1
        self._bits: int | None = None

    def run(self, loads: Sequence[Load]) -> tuple[Step, ...]:
        """Carry out all loads and return what was seen; raises `SensorError` where the meter saw nothing.

        The meter must be open. What was started is ended, whatever happens.
        """
        self._bits = firmware_bits(self._root)
        before = host.facts(self._root)
        watching = Watch(self._meter, self._sensor, Clocks(self._root), self._gpu, self._link)
        with ClockPins(self._domains) as pins, watching as watch:
            done: list[_Held] = []
            steps: list[Step] = []
            for load in loads:
                most_mhz = pins.hold(load.clock)
                with Running(commands(load, usable_cores(), self._threads)) as running:
                    held = self._hold(load, running, watch, most_mhz)
                    if self._meter.late:
                        done.append(held)
                    else:
                        steps.append(self._seen(held, watch))
            pins.hold(1.0)
            seen = (*steps, *(self._seen(held, watch) for held in done))
        self._unchanged(before)
        return seen

    def _unchanged(self, before: DeviceFacts) -> None:
        """Raise `SensorError` where the device is another one now: no one model describes both."""
        now = host.facts(self._root)
        for what in ("power_mode", "governor", "cores", "least_mhz", "most_mhz"):
            was, found = getattr(before, what), getattr(now, what)
            if was != found:
                raise SensorError(
                    f"{what} changed from {was} to {found} meanwhile: let nobody set it, and calibrate again"
                )

    def _hold(self, load: Load, running: Running, watch: Watch, most_mhz: float | None) -> _Held:
        needs = NEEDS[self._meter.kind]
        settle_s = needs.settle_s if self._timing.settle_s is None else self._timing.settle_s
        self._wait(load, "settle", settle_s, running, watch)
        least_s = least_hold_s(self._meter, self._meter.watts())
        before = firmware_bits(self._root) if self._bits is None else self._bits
        start_s, start_utc = watch.sample(), time.time()
        self._wait(load, "hold", self._hold_s(load, least_s), running, watch)
        end_s, end_utc = watch.sample(), time.time()
        if abs((end_utc - start_utc) - (end_s - start_s)) > CLOCK_SLACK_S and self._meter.late:
            raise SensorError(
                "the clock was set during a hold, so the log cannot be placed: wait until it is synchronised"
            )
        degrees = temperatures(self._root)
        return _Held(
            load,
            Span(start_s, end_s, end_utc - end_s),
            datetime.fromtimestamp(start_utc, UTC),
            settle_s,
            least_s,
            max(degrees) if degrees else None,
            host.throttled_between(before, firmware_bits(self._root)),
            most_mhz,
        )

    def _hold_s(self, load: Load, least_s: float) -> float:
        if self._timing.hold_s is not None:
            return self._timing.hold_s if self._timing.exact else max(least_s, self._timing.hold_s)
        if load.block == "idle":
            idle_s = NEEDS[self._meter.kind].idle_s if self._timing.idle_s is None else self._timing.idle_s
            return max(least_s, idle_s)
        return least_s

    def _wait(self, load: Load, what: str, seconds: float, running: Running, watch: Watch) -> None:
        start = time.monotonic()
        while (done := time.monotonic() - start) < seconds:
            self._tell(load, what, done, seconds)
            running.check()
            watch.check()
            time.sleep(min(0.1, seconds - done))

    def _seen(self, held: _Held, watch: Watch) -> Step:
        """Ask the meter about a hold, and the timelines about the stretch that it answers for."""
        seen = self._meter.over(held.span)
        part = seen.span
        busy = watch.busy.rate(part.start_s, part.end_s)
        if busy is None:
            raise SensorError("the processor's times could not be read during a hold")
        broken = any(part.start_s <= time_s <= part.end_s for time_s in watch.breaks)
        return Step(
            name=held.load.name,
            block=held.load.block,
            hold_out=held.load.hold_out,
            start=held.start,
            settle_s=held.settle_s,
            seconds=part.seconds,
            hold_s=held.span.seconds,
            least_hold_s=held.least_s,
            utilisation=min(1.0, max(0.0, busy / self._cores)),
            watts=seen.watts,
            u_w=seen.u_w,
            how=seen.how,
            samples=seen.samples,
            mhz=watch.mhz(part.start_s, part.end_s),
            most_mhz=held.most_mhz,
            up_mbit_s=watch.sent.rate(part.start_s, part.end_s),
            down_mbit_s=watch.received.rate(part.start_s, part.end_s),
            gpu=_within_one(watch.gpu.rate(part.start_s, part.end_s)),
            sensor_w=None if broken else watch.joules.rate(part.start_s, part.end_s),
            temperature_c=held.temperature_c,
            throttled=held.throttled,
        )


def _within_one(share: float | None) -> float | None:
    return None if share is None else min(1.0, max(0.0, share))
