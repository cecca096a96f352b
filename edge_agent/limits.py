"""What the owner of a device allows: joules a day, mains only, a temperature, quiet hours.

Outside its limits a device says so on its card and refuses what comes nevertheless. Work that was begun is
finished, but for heat: well above the limit it is called off. Near that limit it is done on fewer threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from edge_agent.energy.meter import Meter
from edge_agent.quiet import QuietHours
from edge_agent.settings import LimitSettings
from edge_agent.surroundings import hottest_c, on_mains
from edge_agent.tally import LEAST_SAVED_J, Tally
from foundation.energy import Kind, in_words
from foundation.messages import Unavailable

logger = logging.getLogger(__name__)

MARGIN_C = 5.0
"""Work in hand is called off so far above the limit; after it was too hot, work is taken so far below. From
there on, it is begun on half of the threads."""


def local_now() -> datetime:
    """Return the time in this device's zone."""
    return datetime.now().astimezone()


class Limits:
    """Looks whether this device may work now; a limit that is not set costs nothing."""

    def __init__(
        self,
        settings: LimitSettings,
        meter: Meter,
        vault: Path,
        *,
        root: Path = Path("/"),
        clock: Callable[[], datetime] = local_now,
    ) -> None:
        """Count joules into a file of the `vault`; `root` holds `sys/`, `clock` gives local time."""
        self.settings = settings
        self._meter, self._root, self._clock = meter, root, clock
        self._quiet = QuietHours(settings.quiet_hours)
        self._now: Unavailable | None = None
        self._said: set[str] = set()
        most = settings.joules_per_day
        self.tally = (
            None
            if most is None
            else Tally(meter, vault / "joules.json", clock, saved_j=max(LEAST_SAVED_J, most / 100))
        )

    def look(self) -> Unavailable | None:
        """Return why no work is taken now; the same object while the same reason goes on."""
        found = self._joules() or self._mains() or self._heat() or self._hours()
        before = self._now
        if found is None or before is None or (found.cause, found.until) != (before.cause, before.until):
            self._now = found
        return self._now

    def threads(self, usual: int) -> tuple[int, str | None]:
        """Return how many of so many threads to work with, and why they are fewer.

        Near the limit of heat it is half of them: slower and cooler work before none at all.
        """
        most, found = self.settings.max_temperature_c, self._hottest()
        if most is None or found is None or found <= most - MARGIN_C or usual < 2:
            return usual, None
        return usual // 2, f"it is warm: {found:.1f} °C, the limit is {most:g} °C"

    def too_hot(self) -> str | None:
        """Return why work in hand must end, in words, or `None` while it may go on."""
        most, found = self.settings.max_temperature_c, self._hottest()
        if most is None or found is None or found <= most + MARGIN_C:
            return None
        return f"{found:.1f} °C is more than {MARGIN_C:.0f} above the limit of {most:g} °C"

    def problem(self) -> str | None:
        """Return which limits cannot hold here, in words; each is in the log once."""
        found = []
        if self.tally is not None:
            if self._meter.kind is Kind.NONE:
                found.append("joules_per_day cannot hold: nobody knows this device's joules")
            elif self.tally.unknown_s:
                found.append("joules_per_day holds in part: of some work nobody knows the joules")
        if self.settings.max_temperature_c is not None and hottest_c(self._root) is None:
            found.append("max_temperature_c cannot hold: no thermal zone can be read")
        for text in found:
            if text not in self._said:
                self._said.add(text)
                logger.warning(text)
        return "limits: " + "; ".join(found) if found else None

    def _joules(self) -> Unavailable | None:
        most = self.settings.joules_per_day
        if most is None or self.tally is None:
            return None
        today = self.tally.today()
        if sum(today.values()) < most:
            return None
        now = self._clock()
        tomorrow = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        # Kinds are added here and nowhere else: the limit is its owner's, and the words tell them apart.
        reason = f"today's {most:g} J are spent ({in_words(today)})"
        return Unavailable(cause="joules", reason=reason, until=tomorrow)

    def _mains(self) -> Unavailable | None:
        if not self.settings.only_on_mains or on_mains(self._root):
            return None
        return Unavailable(cause="mains", reason="it runs on battery, and works on mains only")

    def _heat(self) -> Unavailable | None:
        most, found = self.settings.max_temperature_c, self._hottest()
        if most is None or found is None:
            return None
        was = self._now is not None and self._now.cause == "heat"
        if found <= (most - MARGIN_C if was else most):
            return None
        return Unavailable(cause="heat", reason=f"it is too hot: {found:.1f} °C, the limit is {most:g} °C")

    def _hottest(self) -> float | None:
        return None if self.settings.max_temperature_c is None else hottest_c(self._root)

    def _hours(self) -> Unavailable | None:
        now = self._clock()
        if not self._quiet.holds(now):
            return None
        return Unavailable(cause="quiet", reason="it has quiet hours", until=self._quiet.ends(now))
