"""A battery that is being discharged: then, and only then, what leaves it is what the device draws.

Firmware filters these values over seconds: good for minutes, not for a stage of a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from edge_agent.energy.files import text_of
from edge_agent.energy.sensor import PowerSensor, relative_error
from foundation.energy import Scope
from foundation.profile import DeviceProfile

FOLDER = "sys/class/power_supply"
FILTER_S = 30.0
"""Firmware averages over up to this long."""
FILTERED = 0.10
"""Error bar at k = 2, where the profile says nothing."""


class Battery(PowerSensor):
    """All batteries of the device together."""

    name: ClassVar[str] = "battery"

    def __init__(self, root: Path) -> None:
        super().__init__(Scope.BOARD_DC)
        self.delay_s = FILTER_S / 2
        self._root = root

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        """Return a sensor if a battery is being discharged now."""
        sensor = cls(root)
        sensor.u_rel = relative_error(profile, cls.name) or FILTERED
        return sensor if sensor.watts() is not None else None

    def watts(self) -> float | None:
        """Return watts out of the batteries; `None` on mains, and if one that is discharged does not say."""
        folders = sorted((self._root / FOLDER).glob("BAT*"))
        drawn = [_watts(folder) for folder in folders if text_of(folder / "status") == "Discharging"]
        known = [watts for watts in drawn if watts is not None]
        return sum(known) if known and len(known) == len(drawn) else None


def _watts(folder: Path) -> float | None:
    power = _number(folder / "power_now")
    if power is not None:
        return abs(power) * 1e-6
    current, voltage = _number(folder / "current_now"), _number(folder / "voltage_now")
    # Some firmware counts current out of the battery as negative.
    return None if current is None or voltage is None else abs(current) * voltage * 1e-12


def _number(path: Path) -> int | None:
    try:
        return int(text_of(path) or "")
    except ValueError:
        return None


SENSOR = Battery
