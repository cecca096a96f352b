"""Figures as people read them: with their units, and a dash for what nobody knows."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from coordinator.web.models import number

DASH = "–"


def percent(value: object, digits: int = 1) -> str:
    """Write a share of 1 as per cent."""
    share = number(value)
    return DASH if share is None else f"{100 * share:.{digits}f} %"


def joules(value: object) -> str:
    """Write joules, kilojoules above ten thousand."""
    found = number(value)
    if found is None:
        return DASH
    if abs(found) >= 10_000:
        return f"{found / 1000:.1f} kJ"
    if abs(found) < 1:
        return f"{found:.2g} J"
    return f"{found:.0f} J" if abs(found) >= 100 else f"{found:.1f} J"


def seconds(value: object) -> str:
    """Write seconds as one reads them: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    found = number(value)
    if found is None or found < 0:
        return DASH
    if found < 10:
        return f"{found:.1f} s"
    minutes, rest = divmod(round(found), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(value: object) -> str:
    """Write bytes in powers of 1024."""
    found = number(value)
    if found is None or found < 0:
        return DASH
    step = 0 if found < 1024 else min(3, int(math.log(found, 1024)))
    return f"{found:.0f} B" if step == 0 else f"{found / 1024**step:.1f} {('KiB', 'MiB', 'GiB')[step - 1]}"


def figure(value: object) -> str:
    """Write a number without a unit to three significant digits."""
    found = number(value)
    return DASH if found is None else f"{found:.3g}"


def weblink(address: str) -> bool:
    """Whether an address that an agent told may become a link: no scheme but the web's."""
    return address.startswith(("http://", "https://"))


def ago(then: datetime | None, now: datetime) -> str:
    """Write how long ago something was."""
    if then is None:
        return "never"
    past = (now - then).total_seconds()
    if past < 5:
        return "now"
    # Coarse on purpose: a cell that changes every second would never stand still.
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if past >= length:
            return f"{past // length:.0f} {unit} ago"
    return f"{past // 5 * 5:.0f} s ago"


def clock_time(when: datetime | None) -> str:
    """Write a moment in UTC to the second."""
    return DASH if when is None else f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def moment(at: float) -> str:
    """Write UTC seconds since the epoch as a moment."""
    return clock_time(datetime.fromtimestamp(at, UTC))


def short(digest: str | None) -> str:
    """Write the first twelve digits of a digest."""
    return digest[:12] if digest else DASH
