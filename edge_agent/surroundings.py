"""What the system's files say of the device's surroundings: on mains or on battery, and how hot."""

from __future__ import annotations

from pathlib import Path

from edge_agent.energy.files import text_of

SUPPLIES = "sys/class/power_supply"
ZONES = "sys/class/thermal"


def on_mains(root: Path = Path("/")) -> bool:
    """Whether the device runs on mains; one without a battery of its own does.

    A battery in a mouse or a headset is none. A charger that is online counts, even where the battery gives
    as well; with a charger that is offline it does not matter what the battery says.
    """
    supplies = sorted((root / SUPPLIES).glob("*"))
    batteries = [s for s in supplies if _is(s, "type", "battery") and not _is(s, "scope", "device")]
    lines = [s for s in supplies if not _is(s, "type", "battery") and text_of(s / "online") is not None]
    if not batteries or not all(_is(line, "online", "0") for line in lines):
        return True
    return not lines and not any(_is(battery, "status", "discharging") for battery in batteries)


def hottest_c(root: Path = Path("/")) -> float | None:
    """Return the temperature of the hottest thermal zone in °C; `None` where none can be read."""
    return max(temperatures(root), default=None)


def temperatures(root: Path = Path("/")) -> list[float]:
    """Return the temperatures of all thermal zones that answer, in °C."""
    found = []
    for zone in sorted((root / ZONES).glob("thermal_zone*")):
        try:
            found.append(int(text_of(zone / "temp") or "") / 1000)
        except ValueError:
            continue  # a zone that is switched off has no answer; the others have
    return found


def _is(supply: Path, file: str, word: str) -> bool:
    return (text_of(supply / file) or "").lower() == word
