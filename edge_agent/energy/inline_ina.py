"""An INA219, INA226, INA238 or a relative of theirs in the supply line: the whole board, at its DC input.

The kernel shows it as a hwmon device; microwatts where the driver knows the shunt, or millivolts and
milliamperes. It is found by the driver's name. Two of them cannot be told apart: then there is no sensor.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import ClassVar, Self

from edge_agent.energy.files import NumberFile, text_of
from edge_agent.energy.sensor import PowerSensor, entry_of, relative_error
from foundation.energy import Scope
from foundation.profile import DeviceProfile

logger = logging.getLogger(__name__)

DRIVER = re.compile(r"ina2(\d\d|xx)")
SHUNT = 0.02
"""Error bar of a shunt and its amplifier at k = 2, where the profile says nothing: 1 % typical."""


class InlineIna(PowerSensor):
    """One meter between supply and board."""

    name: ClassVar[str] = "inline_ina"

    def __init__(self, root: Path, folder: Path) -> None:
        super().__init__(Scope.BOARD_DC)
        self._root = root
        self._open(folder)

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        """Return a sensor if the profile lists one and exactly one is there and answers."""
        entry, found = entry_of(profile, cls.name), meters_of(root)
        if entry is None or not found:
            return None
        if len(found) > 1:
            logger.warning("several in-line meters, none used", extra={"found": [str(f) for f in found]})
            return None
        sensor = cls(root, found[0])
        sensor.scope = entry.scope or Scope.BOARD_DC
        sensor.u_rel = relative_error(profile, cls.name) or SHUNT
        return sensor if sensor.watts() is not None else None

    def watts(self) -> float | None:
        """Return watts at the board's input; `None` for an error. A renumbered device is found again."""
        watts = self._power.read()
        if watts is not None:
            return watts * 1e-6
        volts, amperes = self._volts.read(), self._amperes.read()
        if volts is not None and amperes is not None:
            return volts * amperes * 1e-6
        found = meters_of(self._root)
        if len(found) == 1:
            self._open(found[0])
        return None

    def _open(self, folder: Path) -> None:
        self._power = NumberFile(folder / "power1_input")
        self._volts = NumberFile(folder / "in1_input")
        self._amperes = NumberFile(folder / "curr1_input")


def meters_of(root: Path) -> list[Path]:
    """Return the hwmon folders of all meters of this family."""
    folders = sorted((root / "sys/class/hwmon").glob("hwmon*"))
    return [folder for folder in folders if DRIVER.fullmatch(text_of(folder / "name") or "")]


SENSOR = InlineIna
