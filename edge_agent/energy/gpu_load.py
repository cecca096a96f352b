"""How busy the GPU is: a Jetson's load file, or NVIDIA's library for cards in a PC."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent.energy.files import NumberFile
from edge_agent.energy.nvml import cards

FILES = (
    "sys/devices/gpu.0/load",
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/*.gp10b/load",
    "sys/devices/platform/*.gv11b/load",
    "sys/devices/platform/*.ga10b/load",
    "sys/devices/platform/*.gpu/load",
    "sys/devices/platform/bus@0/*.gpu/load",
)
"""Thousandths; the place differs by release."""


class GpuLoad:
    """The share of time in which the GPU was busy lately, 0 to 1."""

    def __init__(self, read: Callable[[], float | None], name: str) -> None:
        self.name = name
        self._read = read

    def share(self) -> float | None:
        """Return the share; `None` for an error, never 0 instead."""
        share = self._read()
        return None if share is None or not 0 <= share <= 1 else share


def gpu_load(root: Path = Path("/"), library: Any = None) -> GpuLoad | None:
    """Return what says how busy the GPU is; `None` where there is none, or nothing says."""
    places = [path for pattern in FILES for path in sorted(root.glob(pattern))]
    if places:
        file = NumberFile(places[0])
        return GpuLoad(lambda: _thousandths(file.read()), str(places[0]))
    return _cards(root, library)


def _thousandths(number: int | None) -> float | None:
    return None if number is None else number / 1000


def _cards(root: Path, library: Any) -> GpuLoad | None:
    found = cards(root, library)
    if found is None:
        return None
    nvml, handles = found

    def read() -> float | None:
        try:
            busy = [nvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]
        except nvml.NVMLError:
            return None
        return float(sum(busy) / (100 * len(busy)))

    return GpuLoad(read, "nvml")
