"""The Raspberry Pi 5's power chip: volts and amperes of its twelve rails, through the firmware's mailbox.

It is what `vcgencmd pmic_read_adc` prints, asked for without starting a process. The sum of the rails is less
than the board draws (USB, HATs and losses are not in it); the profile says by which line one gets from one to
the other. Rails are read one after the other and fluctuate: one reading alone is no good sample of the sum.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

from edge_agent.energy.sensor import PowerSensor, entry_of, number_of
from foundation.energy import Scope
from foundation.profile import DeviceProfile

logger = logging.getLogger(__name__)

READING = re.compile(r"^\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=(-?\d+(?:\.\d+)?)[AV]\s*$", re.MULTILINE)
COMMAND = b"pmic_read_adc"
GENCMD = 0x00030080
"""Property tag of the mailbox that takes a command's text and gives the answer's."""
ANSWER = 1024
PROPERTY = 3 << 30 | struct.calcsize("P") << 16 | 100 << 8
"""`_IOWR(100, 0, char *)`, the request that hands a message over and back."""
PUBLISHED = 0.10
"""Error bar at k = 2 with the published line, fitted on one board."""

Ask = Callable[[], str | None]


def rails_of(text: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return watts by rail of an answer, and the rails of which only current or only voltage came.

    Rails that have a voltage alone (the input, the clock's battery) are no loads and are left out silently.
    """
    amperes: dict[str, float] = {}
    volts: dict[str, float] = {}
    for rail, unit, value in READING.findall(text):
        (amperes if unit == "A" else volts)[rail] = float(value)
    watts = {rail: amperes[rail] * volts[rail] for rail in amperes if rail in volts}
    return watts, tuple(rail for rail in amperes if rail not in volts)


class Pi5Pmic(PowerSensor):
    """The sum of the rails, and the profile's line from there to the board."""

    name: ClassVar[str] = "pi5_pmic"

    def __init__(self, ask: Ask, *, gain: float = 1.0, offset_w: float = 0.0) -> None:
        super().__init__(Scope.RAIL_SUM)
        self._ask, self._gain, self._offset_w = ask, gain, offset_w

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path, ask: Ask | None = None) -> Self | None:
        """Return a sensor if the profile lists one and the mailbox answers."""
        entry = entry_of(profile, cls.name)
        if entry is None:
            return None
        gain, offset = (number_of(profile, cls.name, key) for key in ("gain", "offset_w"))
        sensor = cls(ask or Mailbox(root).ask, gain=gain or 1.0, offset_w=offset or 0.0)
        sensor.scope = entry.scope or Scope.RAIL_SUM
        sensor.u_rel = number_of(profile, cls.name, "u_rel") or PUBLISHED
        return sensor if sensor.watts() is not None else None

    def watts(self) -> float | None:
        """Return the board's watts by the profile's line; `None` without an answer."""
        text = self._ask()
        if text is None:
            return None
        watts, broken = rails_of(text)
        self.flags = ("pmic_rail_missing",) if broken else ()
        return self._gain * sum(watts.values()) + self._offset_w if watts else None


class Mailbox:
    """The firmware's property interface, `/dev/vcio` or on newer kernels `/dev/vcio_gencmd`."""

    def __init__(self, root: Path) -> None:
        self._places = [root / "dev/vcio_gencmd", root / "dev/vcio"]
        self._descriptor: int | None = None

    def ask(self) -> str | None:
        """Return the answer's text; `None` where there is no mailbox, no right to it, or it refuses."""
        try:
            if self._descriptor is None:
                place = next((place for place in self._places if place.exists()), None)
                if place is None:
                    return None
                self._descriptor = os.open(place, os.O_RDWR | os.O_CLOEXEC)
            letter = bytearray(message_of(COMMAND))
            fcntl.ioctl(self._descriptor, PROPERTY, letter)
        except OSError:
            self._close()
            return None
        return answer_of(bytes(letter))

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self._close()


def message_of(command: bytes) -> bytes:
    """Return a property message: size, request, tag, size of its value, 0, error and text, end."""
    text = command.ljust(ANSWER, b"\0")
    tag = struct.pack("<IIII", GENCMD, ANSWER, 0, 0) + text
    return struct.pack("<II", 8 + len(tag) + 4, 0) + tag + struct.pack("<I", 0)


def answer_of(message: bytes) -> str | None:
    """Return the text of an answered message; `None` if the firmware reports an error."""
    if len(message) < 24:
        return None
    (code,), (error,) = struct.unpack_from("<I", message, 4), struct.unpack_from("<I", message, 20)
    if code != 0x80000000 or error:
        return None
    return message[24:].split(b"\0", 1)[0].decode("ascii", errors="replace")


SENSOR = Pi5Pmic
