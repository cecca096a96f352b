"""What an energy sensor is, the bases to write one in a few lines, and how a profile's sensors are found.

A sensor is one small file in this folder, named as in the profile, whose `SENSOR` is the class. One that
knows watts inherits `PowerSensor` and writes `watts`; one that reads a hardware counter inherits
`CounterSensor` and writes `count`. Everything in a file system is reached through `root`, so that a test
can build a fake one.
"""

from __future__ import annotations

import importlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Protocol, Self

from foundation.energy import Kind, Scope
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile, SensorEntry

logger = logging.getLogger(__name__)


class EnergySensor(Protocol):
    """Something that knows how many joules went through since it was opened."""

    kind: Kind
    scope: Scope
    cumulative: bool
    """Whether a difference holds over any interval (a counter), or only between near samples."""
    idle_w: float | None
    """Watts of the idle device by this very sensor or model; `None` when nobody knows."""
    u_rel: float | None
    """Relative error bar of its joules at k = 2; `None` when nobody knows."""
    u_rel_net: float | None
    """The same for its joules above idle, where that is known apart from `u_rel` (a model's)."""
    offset_w: float
    """Error of each of its watts that does not grow with them, at k = 2: half a step of its converter."""
    cross_w: float
    """The square of its error bar is (u_rel J)² + (offset_w s)² + cross_w J s: what both errors have in
    common, below 0 where they make up for each other (a corrected sensor's), 0 where they are independent."""
    delay_s: float
    """How late it shows a change: half of the window that it averages over."""
    flags: tuple[str, ...]

    @property
    def sampled_w(self) -> float | None:
        """Watts of the last read; `None` for a counter, which misses nothing between two reads."""
        ...

    @property
    def name(self) -> str:
        """The name of its file, and of its entry in a profile."""
        ...

    @property
    def breaks(self) -> int:
        """How often joules were lost between two answers (a counter that was reset)."""
        ...

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        """Return a sensor if there is one here, else `None`; never raises, never blocks."""
        ...

    def joules(self, now_s: float) -> float | None:
        """Return joules since opened, never falling; `None` for an error, never 0 instead."""
        ...


class _Sensor(ABC):
    """What all sensors start with."""

    name: ClassVar[str]

    def __init__(self, kind: Kind, scope: Scope) -> None:
        self.kind = kind
        self.scope = scope
        self.cumulative = False
        self.idle_w: float | None = None
        self.u_rel: float | None = None
        self.u_rel_net: float | None = None
        self.offset_w = 0.0
        self.cross_w = 0.0
        self.delay_s = 0.0
        self.sampled_w: float | None = None
        self.flags: tuple[str, ...] = ()


class PowerSensor(_Sensor):
    """Turns watts at moments into joules: the trapezoid over the real times of the reads."""

    def __init__(self, scope: Scope, kind: Kind = Kind.MEASURED) -> None:
        super().__init__(kind, scope)
        self.breaks = 0
        self._joules = 0.0
        self._last: tuple[float, float] | None = None

    @abstractmethod
    def watts(self) -> float | None:
        """Return the watts of this moment; `None` for an error, never 0 instead."""

    def joules(self, now_s: float) -> float | None:
        """Add the trapezoid since the last good read; a power below 0 or not finite counts as an error."""
        watts = self.watts()
        if watts is None or not 0 <= watts < float("inf"):
            return None
        self.sampled_w = watts
        if self._last is not None and now_s > self._last[0]:
            self._joules += 0.5 * (watts + self._last[1]) * (now_s - self._last[0])
        if self._last is None or now_s >= self._last[0]:
            self._last = now_s, watts
        return self._joules


class CounterSensor(_Sensor):
    """Turns a hardware counter that wraps into joules that never fall."""

    def __init__(
        self, scope: Scope, *, joules_per_count: float, range_counts: int | None, max_w: float
    ) -> None:
        """Take the counter's unit, its range (`None`: unknown, so no wrap is believed) and the most watts."""
        super().__init__(Kind.MEASURED, scope)
        self.cumulative = True
        self.breaks = 0
        self._unit_j = joules_per_count
        self._range = range_counts
        self._max_w = max_w
        self._counts = 0
        self._last: tuple[float, int] | None = None

    @abstractmethod
    def count(self) -> int | None:
        """Return the raw counter; `None` for an error, never 0 instead."""

    def joules(self, now_s: float) -> float | None:
        """Add the counts since the last good read; a counter that fell has wrapped or was reset.

        A wrap is believed only if the energy it means could have flowed in that time: else the counter
        was reset, what was lost stays unknown, and `breaks` grows.
        """
        count = self.count()
        if count is None:
            return None
        if self._last is not None:
            then_s, before = self._last
            step = self._step(count, before, now_s - then_s)
            if step is None:
                self.breaks += 1
                logger.warning("energy counter was reset", extra={"sensor": self.name})
            else:
                self._counts += step
        self._last = now_s, count
        return self._counts * self._unit_j

    def _step(self, count: int, before: int, seconds: float) -> int | None:
        if count >= before:
            return count - before
        if self._range is None:
            return None
        wrapped = count + self._range - before
        return wrapped if 0 <= wrapped * self._unit_j <= self._max_w * seconds else None


class CounterSum(_Sensor):
    """Several counters that may be added: packages and their memory, the cards of a machine."""

    def __init__(self, scope: Scope, counters: Sequence[CounterSensor], u_rel: float | None) -> None:
        super().__init__(Kind.MEASURED, scope)
        self.cumulative = True
        self.u_rel = u_rel
        self._counters = counters

    @property
    def breaks(self) -> int:
        """Resets of any of them."""
        return sum(counter.breaks for counter in self._counters)

    def joules(self, now_s: float) -> float | None:
        """Return joules since opened; `None` while one does not answer: what it misses comes later."""
        each = [counter.joules(now_s) for counter in self._counters]
        known = [joules for joules in each if joules is not None]
        return sum(known) if len(known) == len(each) else None


def entry_of(profile: DeviceProfile, name: str) -> SensorEntry | None:
    """Return what the profile says of the sensor of that name; `None` if it does not list it."""
    return next((entry for entry in profile.sensor if entry.name == name), None)


def number_of(profile: DeviceProfile, name: str, key: str) -> float | None:
    """Return a number that the profile gives for a sensor; `None` where it is not there or not known."""
    entry = entry_of(profile, name)
    number = entry.numbers.get(key) if entry else None
    return number.v if number is not None and isinstance(number.v, float) else None


def relative_error(profile: DeviceProfile, name: str) -> float | None:
    """Return the relative error bar (k = 2) that the profile gives for a sensor."""
    return number_of(profile, name, "u_rel")


def half_step(profile: DeviceProfile, name: str) -> float:
    """Return the error (k = 2) of a converter with steps of the profile's `lsb_w`, uniform within a step."""
    return 2 * (number_of(profile, name, "lsb_w") or 0.0) / math.sqrt(12)


def sensor_names() -> tuple[str, ...]:
    """Return the names of all sensors: the files of this folder that have a `SENSOR`, sorted."""
    files = (entry.name for entry in resources.files(__package__).iterdir())
    stems = (name.removesuffix(".py") for name in files if name.endswith(".py") and name[0] != "_")
    return tuple(sorted(stem for stem in stems if hasattr(_module(stem), "SENSOR")))


def sensor_class(name: str) -> type[EnergySensor]:
    """Return the class a profile means by `name`; raises `SettingsError` with the names there are."""
    try:
        found: type[EnergySensor] = _module(name).SENSOR
    except (ModuleNotFoundError, AttributeError) as error:
        known = ", ".join(sensor_names())
        raise SettingsError(f"there is no energy sensor {name!r}; there are: {known}") from error
    return found


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def find_sensors(profile: DeviceProfile, root: Path = Path("/")) -> Sequence[EnergySensor]:
    """Return the profile's sensors that are here, corrected, in the profile's order of preference.

    Raises `SettingsError` if the profile names a sensor that does not exist.
    """
    classes = [sensor_class(entry.name) for entry in profile.sensor]
    probed = [found_by(cls, profile, root) for cls in classes]
    return [sensor for sensor in probed if sensor is not None]


def found_by(kind: type[EnergySensor], profile: DeviceProfile, root: Path) -> EnergySensor | None:
    """Return the sensor of this class if there is one here, with the profile's correction if it has one."""
    from edge_agent.energy.corrected import corrected  # which is a sensor itself

    sensor = kind.probe(profile, root)
    return None if sensor is None else corrected(sensor, profile.correction)
