"""The processor's clock as cpufreq shows it: governor, allowed range, and what it runs at now."""

from __future__ import annotations

from pathlib import Path

from edge_agent.energy.files import NumberFile, text_of

CPUS = "sys/devices/system/cpu"
_KHZ = 1e-3


def policies_of(root: Path) -> list[Path]:
    """Return the folders of the clock domains, those of single cores where the kernel shows no others."""
    cpus = root / CPUS
    return sorted(cpus.glob("cpufreq/policy[0-9]*")) or sorted(cpus.glob("cpu[0-9]*/cpufreq"))


def governor(root: Path = Path("/")) -> str | None:
    """Return the governor, several joined by `+` where domains differ; `None` where nobody says."""
    said = [text for place in policies_of(root) if (text := text_of(place / "scaling_governor"))]
    return "+".join(dict.fromkeys(said))[:100] or None


def range_mhz(root: Path = Path("/")) -> tuple[float, float] | None:
    """Return the lowest and the highest clock that is allowed at present, over all domains."""
    places = policies_of(root)
    least = [khz for place in places if (khz := number_in(place / "scaling_min_freq"))]
    most = [khz for place in places if (khz := number_in(place / "scaling_max_freq"))]
    return (min(least) * _KHZ, max(most) * _KHZ) if least and most else None


def number_in(path: Path) -> int | None:
    """Return the number above 0 in a file; `None` where there is none."""
    try:
        number = int(text_of(path) or "")
    except ValueError:
        return None
    return number if number > 0 else None


class Clocks:
    """What the cores run at now, read through descriptors that stay open."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._domains = [
            (NumberFile(place / "scaling_cur_freq"), _cores(place)) for place in policies_of(root)
        ]

    def mhz(self) -> float | None:
        """Return the mean over all cores; `None` where a domain does not say."""
        cores, sum_khz = 0, 0.0
        for file, count in self._domains:
            khz = file.read()
            if khz is None or khz <= 0:
                return None
            cores, sum_khz = cores + count, sum_khz + count * khz
        return sum_khz / cores * _KHZ if cores else None


def _cores(place: Path) -> int:
    return len((text_of(place / "affected_cpus") or text_of(place / "related_cpus") or "0").split()) or 1
