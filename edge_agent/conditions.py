"""Under what conditions a round was done: power mode, clock, heat, throttling, threads."""

from __future__ import annotations

import threading
from pathlib import Path

from edge_agent.energy.clocks import governor, range_mhz
from edge_agent.energy.files import NumberFile
from edge_agent.energy.power_mode import power_mode
from edge_agent.energy.throttling import Throttling
from edge_agent.surroundings import ZONES
from foundation.messages import DeviceState


def in_words(state: DeviceState) -> str:
    """Return what is known of a state as a person reads it; empty where nothing is."""
    told = []
    if state.power_mode is not None:
        told.append(f"power mode {state.power_mode}")
    if state.governor is not None:
        told.append(f"governor {state.governor}")
    if state.least_mhz is not None and state.most_mhz is not None:
        told.append(f"{state.least_mhz:.0f} to {state.most_mhz:.0f} MHz")
    if state.end_c is not None and state.most_c is not None:
        told.append(f"{state.end_c:.0f} °C (at most {state.most_c:.0f})")
    if state.throttle_events is not None:
        told.append(f"throttled {state.throttle_events} times since")
    return ", ".join(told)


class Conditions:
    """Watches one round at a time: `begin`, `look` now and then, `end`. From any thread."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Find what there is to read below `root`."""
        self._root = root
        self._zones = [
            NumberFile(zone / "temp") for zone in sorted((root / ZONES).glob("thermal_zone[0-9]*"))
        ]
        self._throttling = Throttling(root)
        self._lock = threading.Lock()
        self._threads: int | None = None
        self._own: int | None = None
        self._eased: str | None = None
        self._start_c = self._most_c = self._degrees()
        self._events_before = self._throttling.look()

    def begin(self, threads: int | None = None, own: int | None = None, eased: str | None = None) -> None:
        """Begin a round on so many threads of arithmetic; `eased` says why they are fewer than its `own`."""
        with self._lock:
            self._threads, self._own, self._eased = threads, own, eased
            self._start_c = self._most_c = self._degrees()
            self._events_before = self._throttling.look()

    def look(self) -> None:
        """Look how hot it is, and whether the processor is slowed."""
        with self._lock:
            self._seen()

    def end(self) -> DeviceState:
        """Return what was seen since `begin`; what nobody says is `None`."""
        with self._lock:
            degrees, clock = self._seen(), range_mhz(self._root)
            events, before = self._throttling.look(), self._events_before
            return DeviceState(
                power_mode=power_mode(self._root),
                governor=governor(self._root),
                least_mhz=clock[0] if clock else None,
                most_mhz=clock[1] if clock else None,
                start_c=self._start_c,
                end_c=degrees,
                most_c=self._most_c,
                throttle_events=None if events is None else events - (before or 0),
                threads=self._threads,
                own_threads=self._own,
                eased=self._eased,
            )

    def _seen(self) -> float | None:
        self._throttling.look()
        degrees = self._degrees()
        known = [value for value in (degrees, self._most_c) if value is not None]
        self._most_c = max(known, default=None)
        return degrees

    def _degrees(self) -> float | None:
        """Return the temperature of the hottest zone that answers, in °C."""
        read = (zone.read() for zone in self._zones)
        # A zone without a sensor behind it shows absolute zero, or millions.
        known = [milli / 1000 for milli in read if milli is not None and -60_000 < milli < 250_000]
        return max(known, default=None)
