"""How often something slowed the processor, or the supply was too weak for it.

x86 cores and a Jetson's over-current guard count it themselves. A Raspberry Pi says what holds now and
whether it ever happened since the start: what was not and then is counts once, however often it came.
"""

from __future__ import annotations

from pathlib import Path

from edge_agent.energy.board import EVER, NOW, PI_BITS, firmware_bits
from edge_agent.energy.files import NumberFile

COUNTERS = (
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",
    "sys/class/hwmon/hwmon*/oc[0-9]*_event_cnt",
)


class Throttling:
    """Counts from when it was made."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root if (root / PI_BITS).exists() else None
        files = [NumberFile(path) for pattern in COUNTERS for path in sorted(root.glob(pattern))]
        self._counters = {file: file.read() for file in files}
        self._bits = self._read_bits()
        self._events = 0

    @property
    def known(self) -> bool:
        """Whether anything here would say."""
        return self._root is not None or any(count is not None for count in self._counters.values())

    def look(self) -> int | None:
        """Return how many events there were so far; `None` where nothing says."""
        for file, before in self._counters.items():
            count = file.read()
            if count is not None:
                # A counter that fell began anew: what it shows has happened since.
                fell = before is not None and count < before
                self._events += 0 if before is None else count if fell else count - before
                self._counters[file] = count
        bits = self._read_bits()
        if bits is not None:
            before_bits = self._bits or 0
            began = bits & ~before_bits
            happened = (began & EVER) >> 16 & ~before_bits  # what held before was counted when it began
            self._events += ((began | happened) & NOW).bit_count()
            self._bits = bits
        return self._events if self.known else None

    def _read_bits(self) -> int | None:
        return None if self._root is None else firmware_bits(self._root)
