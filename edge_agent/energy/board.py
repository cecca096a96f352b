"""What changes a board's power and speed under a measurement: throttling, low voltage, mains or battery.

Read at the edges of stages, counters through descriptors that stay open; on a machine that shows none of it
nothing is read. `root` is the root of a file system, so that a test can build one.
"""

from __future__ import annotations

from pathlib import Path

from edge_agent.energy.files import NumberFile, text_of
from edge_agent.surroundings import SUPPLIES, on_mains

PI_BITS = "sys/devices/platform/soc/soc:firmware/get_throttled"
UNDER_VOLTAGE, CAPPED, THROTTLED, SOFT_LIMIT = 1, 2, 4, 8
"""The Raspberry Pi firmware's bits of this moment; the same ones 16 higher say that it has happened."""
NOW = UNDER_VOLTAGE | CAPPED | THROTTLED | SOFT_LIMIT
EVER = NOW << 16


def throttle_bits(text: str) -> int | None:
    """Return the firmware's bits from sysfs ("50005") or vcgencmd ("throttled=0x50005"), else `None`."""
    try:
        return int(text.strip().rpartition("=")[2], 16)
    except ValueError:
        return None


def firmware_bits(root: Path) -> int | None:
    """Return the Raspberry Pi firmware's bits; `None` where nothing says."""
    return throttle_bits(text_of(root / PI_BITS) or "")


class Board:
    """The present state of one board."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root if (root / PI_BITS).exists() else None
        counters = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
        self._counters = [NumberFile(path) for path in sorted(counters)]
        self._supplied = root if any((root / SUPPLIES).glob("*")) else None
        self._throttled = self._count()
        self._on_mains = self._mains()

    def flags(self) -> tuple[str, ...]:
        """Return what happened since the last call, or holds now, as flags of a reading."""
        found = []
        bits = firmware_bits(self._root) if self._root is not None else None
        if bits is not None and bits & UNDER_VOLTAGE:
            found.append("under_voltage")
        count, before = self._count(), self._throttled
        self._throttled = count
        if (bits is not None and bits & (CAPPED | THROTTLED | SOFT_LIMIT)) or count > before:
            found.append("throttled")
        mains, had = self._mains(), self._on_mains
        self._on_mains = mains
        if mains != had:
            found.append("supply_changed")
        return tuple(found)

    def _mains(self) -> bool:
        """Whether the board runs on mains, by the rule of the owner's limits; one without supplies does."""
        return self._supplied is None or on_mains(self._supplied)

    def _count(self) -> int:
        """Return how often x86 cores were throttled, as far as they say."""
        return sum(count for file in self._counters if (count := file.read()) is not None)
