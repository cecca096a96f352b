"""INA3221: the power monitor of Jetson modules, three rails a chip, on JetPack 4 and on 5 and later.

Rails are found by their names, never by hwmon's or iio's numbers, which change from boot to boot. Which rail
is the module's total, which are parts of it and which belong to the carrier board differs from module to
module and stands in the profile: `labels` gives each rail's part, `total`, `part` or `ignored`. Totals are
added.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from edge_agent.energy.files import NumberFile, text_of
from edge_agent.energy.sensor import PowerSensor, entry_of, half_step, number_of, relative_error
from foundation.energy import Scope
from foundation.profile import DeviceProfile

PLACES = ("sys/bus/i2c/devices/*", "sys/bus/i2c/drivers/ina3221/*", "sys/bus/i2c/drivers/ina3221x/*")
LOOK_AGAIN_S = 10.0
AVERAGED_S = 0.2
"""The chip averages up to 1,024 conversions; what it was set to is not shown everywhere, so we take this."""
PARTS_EVERY = 50
"""Reads between two looks at the parts: a register takes half a millisecond over I2C."""
SLACK = 1.05
"""A part may read this much more than the total: gains differ, and they are not read at one moment."""
TOO_MUCH = 3.0
"""So many times the profile's full load is no power but a wrong shunt in a device tree."""


@dataclass(frozen=True, slots=True)
class Rail:
    """One channel: milliwatts, or millivolts and milliamperes."""

    files: tuple[NumberFile, ...]

    def watts(self) -> float | None:
        """Return watts; `None` for an error."""
        values = [file.read() for file in self.files]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return known[0] * 1e-3 if len(known) == 1 else known[0] * known[1] * 1e-6


def rails_of(root: Path) -> dict[str, Rail]:
    """Return all rails by name, wherever the driver of this JetPack shows them; NC is not connected."""
    rails: dict[str, Rail] = {}
    for place in PLACES:
        for label in sorted(root.glob(f"{place}/iio:device*/rail_name_*")):
            number = label.name.removeprefix("rail_name_")
            rails |= _named(label, NumberFile(label.parent / f"in_power{number}_input"))
        for label in sorted(root.glob(f"{place}/hwmon/hwmon*/in[123]_label")):
            number = label.name[2]
            volts = NumberFile(label.parent / f"in{number}_input")
            rails |= _named(label, volts, NumberFile(label.parent / f"curr{number}_input"))
    return rails


def _named(label: Path, *files: NumberFile) -> dict[str, Rail]:
    name = text_of(label)
    return {name: Rail(files)} if name and name != "NC" else {}


class Ina3221(PowerSensor):
    """The module's total rail, or the sum of those that make it up."""

    name: ClassVar[str] = "ina3221"

    def __init__(
        self,
        root: Path,
        labels: Mapping[str, str],
        scope: Scope,
        *,
        most_w: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(scope)
        self.delay_s = AVERAGED_S / 2
        self._root, self._labels, self._most_w, self._clock = root, labels, most_w, clock
        self._rails = rails_of(root)
        self._looked_s = clock()
        self._reads = 0

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        """Return a sensor if the profile says which rails are the total and they read as they should."""
        entry = entry_of(profile, cls.name)
        if entry is None:
            return None
        full = profile.model.full_w if profile.model else None
        most = number_of(profile, cls.name, "max_w") or (TOO_MUCH * full if full else None)
        sensor = cls(root, entry.labels, entry.scope or Scope.MODULE, most_w=most)
        sensor.u_rel = relative_error(profile, cls.name)
        sensor.offset_w = half_step(profile, cls.name)
        return sensor if sensor.watts() is not None else None

    def watts(self) -> float | None:
        """Return the total's watts; `None` for an error and for what cannot be."""
        total = self._sum("total")
        if total is None:
            self._look_again()
            return None
        if self._reads % PARTS_EVERY == 0 and not self._plausible(total):
            return None
        self._reads += 1
        return total

    def parts(self) -> dict[str, float]:
        """Return the watts of the parts that answer, by name: shown, never added to the total."""
        names = [name for name, role in self._labels.items() if role == "part" and name in self._rails]
        watts = {name: self._rails[name].watts() for name in names}
        return {name: value for name, value in watts.items() if value is not None}

    def _sum(self, role: str) -> float | None:
        names = [name for name, its in self._labels.items() if its == role]
        each = [self._rails[name].watts() for name in names if name in self._rails]
        known = [watts for watts in each if watts is not None]
        return sum(known) if names and len(known) == len(names) else None

    def _plausible(self, total: float) -> bool:
        wrong = []
        if self._most_w is not None and total > self._most_w:
            wrong.append("implausible_watts")
        totals = sum(role == "total" for role in self._labels.values())
        if totals == 1 and any(watts > SLACK * total + 0.05 for watts in self.parts().values()):
            wrong.append("rail_exceeds_total")
        self.flags = tuple(wrong)
        return not wrong

    def _look_again(self) -> None:
        now = self._clock()
        if now - self._looked_s >= LOOK_AGAIN_S:
            self._looked_s, self._reads = now, 0
            self._rails = rails_of(self._root)


SENSOR = Ina3221
