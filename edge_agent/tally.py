"""Joules of today's work: what the meter counts, kept by local day through restarts."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from edge_agent.energy.meter import Meter
from foundation.durable import write_whole
from foundation.energy import RESTING, EnergyReading, Kind, Ledger, Stage

logger = logging.getLogger(__name__)

DAYS_KEPT = 4
"""Days in the file: a board without a clock begins in 1970 at every start, and must find today again."""
LEAST_SAVED_J = 1.0


class Tally:
    """Counts the joules of work, by kind and local day; waiting and idling are nobody's work.

    The meter may be asked and emptied by others through this alone, as a window that was emptied elsewhere
    would be counted as nothing. All methods may be called from any thread.
    """

    def __init__(
        self, meter: Meter, file: Path, clock: Callable[[], datetime], *, saved_j: float = LEAST_SAVED_J
    ) -> None:
        """Go on from `file`; it is written again at every `take`, and when `saved_j` joules came since."""
        self._meter, self._file, self._clock, self._saved_j = meter, file, clock, saved_j
        self._lock = threading.Lock()
        self._days = _read(file)
        self._seen: dict[Stage, float] = {}
        self._unsaved = 0.0
        self.unknown_s = 0.0
        """Seconds of work since the start whose joules nobody knows: they are not in the sums."""

    def take(self) -> Ledger:
        """Return the meter's readings since the last take, and keep the count."""
        with self._lock:
            ledger = self._meter.take()
            self._count(ledger)
            self.unknown_s += sum(r.seconds for s, r in ledger.items() if s not in RESTING and _unknown(r))
            self._seen.clear()
            self._save()
            return ledger

    def today(self) -> Mapping[Kind, float]:
        """Return the joules of today's work by kind, the work in hand included."""
        with self._lock:
            self._count(self._meter.peek())
            if self._unsaved >= self._saved_j:
                self._save()
            return dict(self._days.get(self._day(), {}))

    def save(self) -> None:
        """Write the count down."""
        with self._lock:
            self._count(self._meter.peek())
            self._save()

    def _day(self) -> str:
        return self._clock().date().isoformat()

    def _count(self, ledger: Ledger) -> None:
        """Add what came since it was last looked; a window's joules never go down."""
        for stage, reading in ledger.items():
            if stage in RESTING or reading.joules is None:
                continue
            more = reading.joules - self._seen.get(stage, 0.0)
            if more > 0:
                day = self._days.setdefault(self._day(), {})
                day[reading.kind] = day.get(reading.kind, 0.0) + more
                self._seen[stage] = reading.joules
                self._unsaved += more

    def _save(self) -> None:
        if not self._unsaved:
            return
        while len(self._days) > DAYS_KEPT:
            del self._days[next(iter(self._days))]  # the one that came first
        told = {day: {str(kind): joules for kind, joules in sums.items()} for day, sums in self._days.items()}
        write_whole(self._file, json.dumps(told).encode())
        self._unsaved = 0.0


def _unknown(reading: EnergyReading) -> bool:
    return reading.joules is None and reading.seconds > 0


def _read(file: Path) -> dict[str, dict[Kind, float]]:
    """Return joules by kind and day; a file that is none counts as nothing, and the log says so."""
    if not file.exists():
        return {}
    try:
        told = json.loads(file.read_text())
        return {
            str(day): {Kind(kind): _joules(value) for kind, value in sums.items()}
            for day, sums in told.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("count of joules unreadable, begun anew", extra={"error": str(error)})
        return {}


def _joules(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no number of joules")
    return float(value)
