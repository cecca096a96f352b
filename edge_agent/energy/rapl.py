"""RAPL: the energy counters of x86 packages, through the kernel's powercap files.

A package holds its `core` and `uncore`; `dram` is beside it; `psys` holds everything. So what may be added is
all packages and their dram, or psys alone. `intel-rapl-mmio` shows a package a second time. The counters wrap
(in minutes, on a large AMD processor), and only root may read them since CVE-2020-8694.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from edge_agent.energy.files import NumberFile, text_of
from edge_agent.energy.sensor import CounterSensor, CounterSum, relative_error
from foundation.energy import Scope
from foundation.profile import DeviceProfile

FOLDER = "sys/class/powercap"
UPDATE_S = 0.001
"""The counters move about a thousand times a second."""
MOST_W = 1000.0
"""No package draws more: a counter that fell by more than this explains was reset, and has not wrapped."""


class _Zone(CounterSensor):
    """One counter of microjoules."""

    name: ClassVar[str] = "rapl"

    def __init__(self, folder: Path) -> None:
        most = text_of(folder / "max_energy_range_uj")
        # The largest value is given; the next step is 0.
        span = int(most) + 1 if most is not None and most.isdigit() else None
        super().__init__(Scope.RAIL, joules_per_count=1e-6, range_counts=span, max_w=MOST_W)
        self._file = NumberFile(folder / "energy_uj")

    def count(self) -> int | None:
        """Return microjoules."""
        return self._file.read()


class Rapl(CounterSum):
    """The sum of the zones that may be added."""

    name: ClassVar[str] = "rapl"

    def __init__(self, zones: list[Path], scope: Scope, u_rel: float | None) -> None:
        super().__init__(scope, [_Zone(folder) for folder in zones], u_rel)
        self.delay_s = UPDATE_S / 2
        self.folders = zones

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        """Return a sensor of psys, or else of all packages and their dram; `None` if one is not readable."""
        zones = zones_of(root)
        whole = [folder for folder, name in zones.items() if name == "psys"]
        parts = [folder for folder, name in zones.items() if name.startswith("package") or name == "dram"]
        for chosen, scope in ((whole, Scope.MODULE), (parts, Scope.RAIL_SUM)):
            if chosen and all(NumberFile(folder / "energy_uj").read() is not None for folder in chosen):
                return cls(chosen, scope, relative_error(profile, cls.name))
        return None


def zones_of(root: Path) -> dict[Path, str]:
    """Return the folders of all zones that count, with their names; no MMIO twins, none that is off."""
    base = root / FOLDER
    found = {folder.name: folder for folder in [*base.glob("intel-rapl:*"), *base.glob("intel-rapl:*/*:*")]}
    names = {folder: text_of(folder / "name") for _, folder in sorted(found.items())}
    return {f: name for f, name in names.items() if name is not None and text_of(f / "enabled") != "0"}


SENSOR = Rapl
