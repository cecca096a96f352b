"""NVIDIA graphics cards in a PC or server: the driver's own energy counter, all cards together.

Needs the optional `nvidia-ml-py` (`pip install 'hedgerow[nvml]'`). The counter knows the cards alone, neither
processor nor memory of the machine; on Jetsons there is none (see ina3221.py).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar, Self

from edge_agent.energy.sensor import CounterSensor, CounterSum, relative_error
from foundation.energy import Scope
from foundation.profile import DeviceProfile

MOST_W = 2000.0


class _Card(CounterSensor):
    """One card's counter of millijoules; it begins with the driver and does not wrap."""

    name: ClassVar[str] = "nvml"

    def __init__(self, library: Any, handle: Any) -> None:
        super().__init__(Scope.GPU_BOARD, joules_per_count=1e-3, range_counts=None, max_w=MOST_W)
        self._library, self._handle = library, handle

    def count(self) -> int | None:
        """Return millijoules."""
        try:
            return int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._library.NVMLError:
            return None


class Nvml(CounterSum):
    """All cards of the machine."""

    name: ClassVar[str] = "nvml"

    def __init__(self, library: Any, handles: list[Any], u_rel: float | None) -> None:
        super().__init__(Scope.GPU_BOARD, [_Card(library, handle) for handle in handles], u_rel)

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path, library: Any = None) -> Self | None:
        """Return a sensor if library, driver and a card with a counter are there, on the real machine."""
        found = cards(root, library)
        if found is None:
            return None
        try:
            sensor = cls(*found, relative_error(profile, cls.name))
        except found[0].NVMLError:
            return None
        return sensor if sensor.joules(0.0) is not None else None


def cards(root: Path, library: Any = None) -> tuple[Any, list[Any]] | None:
    """Return NVIDIA's library and the handles of its cards; `None` without library, driver or cards."""
    if library is None and not (root / "dev/nvidiactl").exists():
        return None
    try:
        library = library or importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
        handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
    except library.NVMLError:
        return None
    return (library, handles) if handles else None


SENSOR = Nvml
