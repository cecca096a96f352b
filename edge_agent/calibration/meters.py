"""Meters to calibrate against: what they are called, how long they need, and their mean watts over a hold.

    mqtt:tasmota/PLUG, shelly:PREFIX, shelly1:ID    a smart plug over MQTT                 wall_ac   2 %
    sysfs:/sys/class/hwmon/hwmonN                   a meter that the kernel knows          board_dc  2 %
    csv:FILE                                        another instrument's log, afterwards   wall_ac   2 %
    manual                                          a person reads a display               wall_ac   2 %

Scope and accuracy (relative, k = 2) are what is taken without `--scope` and `--accuracy`.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

from edge_agent.calibration.logged import Log, read_log
from edge_agent.calibration.plug_reader import PlugReader
from edge_agent.energy.files import NumberFile
from foundation.calibration import MeterKind
from foundation.energy import Scope
from foundation.errors import SensorError, SettingsError
from foundation.mqtt import MqttSettings
from foundation.plug import PULSE_J, STALE_PERIODS, Plug, Reading, plug_of

HOW = "write mqtt:tasmota/PLUG, shelly:PREFIX, shelly1:ID, sysfs:/sys/class/hwmon/hwmonN, csv:FILE or manual"
FINE = 0.01
"""A counter's difference is taken where a step of it is less than this share of the hold's joules."""
PULSES = 50
"""A plug of the usual kind sees a pulse every twelve joules; so many make an error of 2 %."""
MOST_HOLD_S = 600.0
GAP_S = 2.0
"""Samples of a sampled meter further apart than this do not say what happened between them."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time on the monotonic clock, and what to add to get UTC."""

    start_s: float
    end_s: float
    utc_offset_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Seen:
    """Mean watts over a span that lies within the one that was asked for."""

    watts: float
    span: Span
    u_w: float
    """Error bar at k = 2 of resolution and scatter, without the meter's own error."""
    how: Literal["counter", "mean", "read"]
    samples: int


@dataclass(frozen=True, slots=True)
class Needs:
    """What a class of meters needs, in seconds, and what the hold-out error may be with it."""

    settle_s: float
    hold_s: float
    idle_s: float
    hold_out: float


NEEDS: dict[MeterKind, Needs] = {
    "plug": Needs(60, 60, 120, 0.05),
    "sysfs": Needs(60, 20, 120, 0.03),
    "csv": Needs(60, 60, 120, 0.05),
    "manual": Needs(60, 60, 120, 0.05),
}


class CalibrationMeter(Protocol):
    """What `calibrate` asks of a meter; opened with `with meter.opened():`."""

    name: str
    kind: MeterKind
    scope: Scope
    accuracy: float
    """Relative error of its watts at k = 2."""
    late: bool
    """Whether it can only be asked after the last hold."""

    def opened(self) -> AbstractContextManager[object]:
        """Return what holds its connection."""
        ...

    def check(self) -> None:
        """Raise `SensorError` if it does not answer, with what to look at."""
        ...

    def sample(self, now_s: float) -> None:
        """Read it now; called about ten times a second."""
        ...

    def watts(self) -> float | None:
        """Return about what it shows now, to choose the length of a hold; `None` where nobody knows."""
        ...

    def over(self, span: Span) -> Seen:
        """Return the mean over a span that has passed; raises `SensorError` if it did not see it."""
        ...


def least_hold_s(meter: CalibrationMeter, watts: float | None) -> float:
    """Return how long a hold must be: by the class of meter, and with a plug by its pulses."""
    least = NEEDS[meter.kind].hold_s
    if meter.kind != "plug" or not watts:
        return least
    return min(MOST_HOLD_S, max(least, PULSES * PULSE_J / watts))


class PlugMeter:
    """A smart plug: the difference of its counter where that is fine enough, else the mean of its watts."""

    kind: MeterKind = "plug"
    late = False

    def __init__(
        self,
        name: str,
        plug: Plug,
        broker: MqttSettings,
        *,
        scope: Scope = Scope.WALL_AC,
        accuracy: float = 0.02,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.scope, self.accuracy = name, scope, accuracy
        self._clock = clock
        self._broker = broker
        self._reader = PlugReader(plug, broker, clock=clock)

    def opened(self) -> AbstractContextManager[object]:
        """Return the connection to the broker."""
        return self._reader

    def check(self) -> None:
        """Wait for the first message that is not a retained one."""
        plug = self._reader.plug
        patience_s = STALE_PERIODS * plug.period_s
        deadline = self._clock() + patience_s
        while not self._reader.readings():
            if self._clock() > deadline:
                raise SensorError(
                    f"nothing came from the plug within {patience_s:g} s: it should speak on"
                    f" {' or '.join(plug.topics)} at {self._broker.address}. Is its MQTT on, is its topic"
                    " spelt so, and may this user read it?"
                )
            time.sleep(0.02)

    def sample(self, now_s: float) -> None:
        """Do nothing: it speaks by itself, or is asked by its reader."""

    def watts(self) -> float | None:
        """Return the watts of its last message."""
        return self._reader.plug.watts(self._clock())

    def over(self, span: Span) -> Seen:
        """Return the mean over a span, by counter or by watts."""
        readings = self._reader.readings()
        by_counter = counted(readings, span, self._reader.plug.step_j)
        return by_counter or averaged(readings, span, STALE_PERIODS * self._reader.plug.period_s)


def counted(readings: Sequence[Reading], span: Span, step_j: float | None) -> Seen | None:
    """Return the difference of a counter between its first and last step in a span.

    `None` where it did not step often or finely enough, or went backwards: then the watts must do.
    """
    known = [(r.time_s, r.joules) for r in readings if r.joules is not None]
    inside = [now for before, now in pairwise(known) if now[1] != before[1] and _within(span, now[0])]
    falls = any(now[1] < before[1] for before, now in pairwise(known) if _within(span, now[0]))
    if len(inside) < 2 or falls or step_j is None:
        return None
    (start_s, first), (end_s, last) = inside[0], inside[-1]
    joules, seconds = last - first, end_s - start_s
    if seconds < 0.5 * span.seconds or step_j > FINE * joules:
        return None
    part = Span(start_s, end_s, span.utc_offset_s)
    return Seen(joules / seconds, part, step_j / seconds, "counter", len(inside))


def averaged(readings: Sequence[Reading], span: Span, stale_s: float) -> Seen:
    """Return the mean of watts over a span; each holds until the next, as a plug speaks when they change.

    Raises `SensorError` if the plug was silent for longer than `stale_s`.
    """
    known = [(r.time_s, r.watts) for r in readings if r.watts is not None and r.time_s <= span.end_s]
    before = [pair for pair in known if pair[0] <= span.start_s]
    pairs = [*before[-1:], *(pair for pair in known if pair[0] > span.start_s)]
    times = [max(span.start_s, pair[0]) for pair in pairs] + [span.end_s]
    if not pairs or any(
        end - start > stale_s for start, end in pairwise([*[p[0] for p in pairs], span.end_s])
    ):
        raise SensorError(
            f"the plug was silent for more than {stale_s:g} s during a hold: is its WLAN good, is its"
            " telemetry period too long?"
        )
    joules = sum(w * (end - start) for (start, end), (_, w) in zip(pairwise(times), pairs, strict=True))
    seconds = span.end_s - times[0]
    if seconds < 0.5 * span.seconds:
        raise SensorError("the plug's first message came late in a hold: hold longer")
    watts = joules / seconds
    scatter = 2 * statistics.pstdev([w for _, w in pairs]) / len(pairs) ** 0.5
    return Seen(watts, Span(times[0], span.end_s, span.utc_offset_s), scatter, "mean", len(pairs))


class SysfsMeter:
    """A meter that the kernel shows in hwmon: its energy counter, its watts, or volts times amperes."""

    kind: MeterKind = "sysfs"
    late = False

    def __init__(
        self, name: str, folder: Path, *, scope: Scope = Scope.BOARD_DC, accuracy: float = 0.02
    ) -> None:
        self.name, self.scope, self.accuracy = name, scope, accuracy
        self._folder = folder
        self._energy = NumberFile(folder / "energy1_input")
        self._power = NumberFile(folder / "power1_input")
        self._volts = NumberFile(folder / "in1_input")
        self._amperes = NumberFile(folder / "curr1_input")
        self._counts: list[tuple[float, int]] = []
        self._samples: list[tuple[float, float]] = []

    def opened(self) -> AbstractContextManager[object]:
        """Return nothing in particular: files need no connection."""
        return nullcontext()

    def check(self) -> None:
        """Read it once."""
        if self._read_count() is None and self._read_watts() is None:
            raise SensorError(
                f"{self._folder} has neither energy1_input nor power1_input, nor in1_input and curr1_input,"
                " that answers: `cat /sys/class/hwmon/hwmon*/name` shows which is the meter"
            )

    def sample(self, now_s: float) -> None:
        """Read it; a reading that fails is a gap."""
        count, watts = self._read_count(), self._read_watts()
        if count is not None:
            self._counts.append((now_s, count))
        if watts is not None:
            self._samples.append((now_s, watts))

    def watts(self) -> float | None:
        """Return the last watts."""
        return self._samples[-1][1] if self._samples else None

    def over(self, span: Span) -> Seen:
        """Return the counter's difference where it has one and it is fine enough, else the mean of watts."""
        counts = [Reading(time_s, None, 1e-6 * count) for time_s, count in self._counts]
        step_j = 1e-6 * math.gcd(*(now - was for (_, was), (_, now) in pairwise(self._counts)))
        return counted(counts, span, step_j) or mean_of(self._samples, span, GAP_S, self.name)

    def _read_count(self) -> int | None:
        """Return microjoules."""
        count = self._energy.read()
        return None if count is None or count < 0 else count

    def _read_watts(self) -> float | None:
        watts = self._power.read()
        if watts is not None:
            return watts * 1e-6 if watts >= 0 else None
        volts, amperes = self._volts.read(), self._amperes.read()
        return None if volts is None or amperes is None else max(0.0, volts * amperes * 1e-6)


class CsvMeter:
    """The log of another instrument on this machine's UTC clock, read when the last hold is over."""

    kind: MeterKind = "csv"
    late = True

    def __init__(
        self,
        name: str,
        file: Path,
        *,
        scope: Scope = Scope.WALL_AC,
        accuracy: float = 0.02,
        wait_s: float = 3600.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take the file, how long to wait for it to be complete, and whom to tell what is waited for."""
        self.name, self.scope, self.accuracy = name, scope, accuracy
        self._file, self._wait_s, self._say = file, wait_s, say
        self._log: Log | None = None

    def opened(self) -> AbstractContextManager[object]:
        """Return nothing in particular."""
        return nullcontext()

    def check(self) -> None:
        """Read what is there already; a file that is not there yet may come later."""
        if self._file.exists():
            read_log(self._file)

    def sample(self, now_s: float) -> None:
        """Do nothing: it is read afterwards."""

    def watts(self) -> float | None:
        """Return nothing: it is read afterwards."""
        return None

    def over(self, span: Span) -> Seen:
        """Return the mean over a span, once the file reaches its end."""
        offset = span.utc_offset_s
        log = self._reaching(span.end_s + offset)
        start = bisect_left(log.times_s, span.start_s + offset)
        end = bisect_right(log.times_s, span.end_s + offset)
        times = [time_s - offset for time_s in log.times_s[start:end]]
        spacing = statistics.median([b - a for a, b in pairwise(times)]) if len(times) > 2 else 0.0
        samples = list(zip(times, log.watts[start:end], strict=True))
        return mean_of(samples, span, max(GAP_S, 3 * spacing), self.name)

    def _reaching(self, utc_s: float) -> Log:
        """Return the log, waiting for it where it ends before a time."""
        deadline = time.monotonic() + self._wait_s
        while self._log is None or not self._log.times_s or self._log.times_s[-1] < utc_s:
            said = time.strftime("%H:%M:%S UTC", time.gmtime(utc_s))
            self._log = read_log(self._file) if self._file.exists() else None
            if self._log is not None and self._log.times_s and self._log.times_s[-1] >= utc_s:
                break
            if time.monotonic() >= deadline:
                raise SensorError(
                    f"{self._file} does not reach {said}, the end of the last hold: its column time_s must be"
                    " seconds since 1970 on this machine's clock (UTC)"
                )
            self._say(f"waiting for {self._file} to reach {said}")
            time.sleep(min(0.5, max(0.01, deadline - time.monotonic())))
        return self._log


class ManualMeter:
    """A person who reads a display at the end of every hold, while the load still runs."""

    kind: MeterKind = "manual"
    late = False

    def __init__(
        self,
        name: str = "manual",
        *,
        scope: Scope = Scope.WALL_AC,
        accuracy: float = 0.02,
        ask: Callable[[str], str] | None = None,
    ) -> None:
        self.name, self.scope, self.accuracy = name, scope, accuracy
        self._ask = ask or _from_terminal

    def opened(self) -> AbstractContextManager[object]:
        """Return nothing in particular."""
        return nullcontext()

    def check(self) -> None:
        """Trust the person."""

    def sample(self, now_s: float) -> None:
        """Do nothing."""

    def watts(self) -> float | None:
        """Return nothing: nobody was asked yet."""
        return None

    def over(self, span: Span) -> Seen:
        """Ask until a number comes; raises `SensorError` at the end of the input."""
        question = f"watts on the meter, mean over the last {span.seconds:.0f} s: "
        while True:
            try:
                text = self._ask(question).strip().removesuffix("W").strip().replace(",", ".")
            except EOFError as error:
                raise SensorError("no watts were typed: the input has ended") from error
            watts = _typed(text)
            if watts is not None:
                step = 10.0 ** -len(text.partition(".")[2])
                return Seen(watts, span, step / 2, "read", 1)
            question = f"{text[:40]!r} is no number of watts; again: "


def mean_of(samples: Sequence[tuple[float, float]], span: Span, gap_s: float, name: str) -> Seen:
    """Return the trapezoid's mean of samples in a span; raises `SensorError` for gaps above `gap_s`."""
    inside = [(time_s, watts) for time_s, watts in samples if _within(span, time_s)]
    times = [span.start_s, *(time_s for time_s, _ in inside), span.end_s]
    widest = max(end - start for start, end in pairwise(times))
    if len(inside) < 3 or widest > gap_s:
        raise SensorError(
            f"{name} has {len(inside)} samples in a hold of {span.seconds:.1f} s, with up to {widest:.1f} s"
            " between them: at least 3 are needed, and none missing"
        )
    joules = sum((a[1] + b[1]) / 2 * (b[0] - a[0]) for a, b in pairwise(inside))
    start_s, end_s = inside[0][0], inside[-1][0]
    scatter = 2 * statistics.pstdev([watts for _, watts in inside]) / len(inside) ** 0.5
    part = Span(start_s, end_s, span.utc_offset_s)
    return Seen(joules / part.seconds, part, scatter, "mean", len(inside))


def meter_of(
    text: str,
    broker: MqttSettings,
    *,
    scope: Scope | None = None,
    accuracy: float | None = None,
    wait_s: float = 3600.0,
    say: Callable[[str], None] = lambda _: None,
) -> CalibrationMeter:
    """Return the meter of that name; raises `SettingsError` that shows how meters are named."""
    scheme, _, rest = text.partition(":")
    meter: CalibrationMeter
    if text == "manual":
        meter = ManualMeter()
    elif scheme == "csv" and rest:
        meter = CsvMeter(text, Path(rest), wait_s=wait_s, say=say)
    elif scheme == "sysfs" and rest:
        meter = SysfsMeter(text, Path(rest))
    elif scheme in ("mqtt", "shelly", "shelly1"):
        meter = PlugMeter(text, plug_of(text), broker)
    else:
        raise SettingsError(f"there is no meter {text!r}: {HOW}")
    meter.scope, meter.accuracy = scope or meter.scope, accuracy or meter.accuracy
    return meter


def _within(span: Span, time_s: float) -> bool:
    return span.start_s <= time_s <= span.end_s


def _typed(text: str) -> float | None:
    try:
        watts = float(text)
    except ValueError:
        return None
    return watts if 0 <= watts < 1e5 else None


def _from_terminal(question: str) -> str:
    sys.stderr.write(question)
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
