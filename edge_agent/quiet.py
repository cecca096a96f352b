"""Quiet hours: stretches of the local day, such as 22:00-06:30, read and asked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timedelta

DAY_MIN = 24 * 60
_STRETCH = re.compile(r"\s*(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})\s*", re.ASCII)


def stretch(text: str) -> tuple[int, int]:
    """Return its start and its end in minutes of the day; an end before the start lies past midnight.

    Raises `ValueError` in words for what is no stretch of a day.
    """
    found = _STRETCH.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no stretch of a day: write it like 22:00-06:30")
    hour, minute, end_hour, end_minute = map(int, found.groups())
    start, end = 60 * hour + minute, 60 * end_hour + end_minute
    if minute > 59 or end_minute > 59 or start >= DAY_MIN or end > DAY_MIN:
        raise ValueError(f"{text!r} holds no time of day: hours go to 23, minutes to 59, the end to 24:00")
    if start == end:
        raise ValueError(f"{text!r} begins where it ends: write 00:00-24:00 for the whole day")
    return start, end


class QuietHours:
    """Several stretches together; what is quiet is decided minute by minute."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._quiet = bytearray(DAY_MIN)
        for start, end in map(stretch, texts):
            for minute in range(start, end if end > start else end + DAY_MIN):
                self._quiet[minute % DAY_MIN] = 1

    def holds(self, now: datetime) -> bool:
        """Whether it is quiet at this local time."""
        return bool(self._quiet[60 * now.hour + now.minute])

    def ends(self, now: datetime) -> datetime | None:
        """Return when the quiet of `now` ends, in its own time zone; `None` when it never does, or is not."""
        if not self.holds(now):
            return None
        minute = 60 * now.hour + now.minute
        for ahead in range(1, DAY_MIN):
            if not self._quiet[(minute + ahead) % DAY_MIN]:
                return now.replace(second=0, microsecond=0) + timedelta(minutes=ahead)
        return None
