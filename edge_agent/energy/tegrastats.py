"""A log that `tegrastats --interval 200 --logfile FILE` writes on a Jetson: for where the chip is hidden.

A container may not see the power monitor while its host can write this log. The line's form changed with
JetPack: `VDD_IN 3056/3056`, then `VDD_IN 5299mW/5299mW`, then with a third figure; the first is always that
of the moment, in milliwatts. Nobody starts the program here.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Self

from edge_agent.energy.sensor import PowerSensor, entry_of, half_step, relative_error
from foundation.energy import Scope
from foundation.profile import DeviceProfile

LOG = "run/tegrastats.log"
CHIP = "ina3221"
"""The rails and their parts are the power monitor's own."""
STALE_S = 3.0
TAIL = 4096
RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?:/\d+(?:mW)?)?(?=\s|$)")


def rails_of(line: str) -> dict[str, float]:
    """Return watts by rail of one line; empty where there are none."""
    return {name: int(milliwatts) * 1e-3 for name, milliwatts in RAIL.findall(line)}


class Tegrastats(PowerSensor):
    """The total rail, or the sum of those that make it up, from the log's last whole line."""

    name: ClassVar[str] = "tegrastats"

    def __init__(
        self, log: Path, labels: Mapping[str, str], scope: Scope, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(scope)
        self._log, self._clock = log, clock
        self._totals = [name for name, role in labels.items() if role == "total"]

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        """Return a sensor if the profile lists one, says which rails are the total, and the log is fresh."""
        entry, chip = entry_of(profile, cls.name), entry_of(profile, CHIP)
        if entry is None or chip is None:
            return None
        sensor = cls(root / LOG, chip.labels, chip.scope or Scope.MODULE)
        sensor.u_rel = relative_error(profile, cls.name) or relative_error(profile, CHIP)
        sensor.offset_w = half_step(profile, CHIP)
        return sensor if sensor.watts() is not None else None

    def watts(self) -> float | None:
        """Return the last line's watts; `None` if it is old, cut short, or a rail of the total is missing."""
        try:
            with self._log.open("rb") as file:
                if self._clock() - os.fstat(file.fileno()).st_mtime > STALE_S:
                    return None
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
                lines = file.read(TAIL).decode(errors="replace").split("\n")
        except OSError:
            return None
        rails = (
            rails_of(lines[-2]) if len(lines) > 1 else {}
        )  # what follows the last end of line is not whole
        known = [rails[name] for name in self._totals if name in rails]
        return sum(known) if known and len(known) == len(self._totals) else None


SENSOR = Tegrastats
