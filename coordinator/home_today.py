"""Joules of a device's day, counted from what it tells of its own meter, and kept across restarts.

A device tells joules since its program started. What is between two tellings is added to the day of the later
one; nothing is guessed. Not counted, so that a day is never too large: what a device used before it was first
heard, between its last telling and the end of its program, and over a midnight that nobody heard. A device
whose meter becomes another (another kind, another source) starts anew, as two meters are never added.
"""

from __future__ import annotations

import logging
from datetime import datetime, time
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from foundation.durable import write_whole
from foundation.energy import Kind
from foundation.errors import SettingsError
from foundation.frozen import Frozen
from foundation.topics import checked_name

logger = logging.getLogger(__name__)

FILE = "home_assistant.json"
"""In the coordinator's folder."""
MIDNIGHT_GAP_S = 60.0
"""A midnight between two tellings this close is crossed at constant power; further apart, nobody knows."""
MAX_BYTES = 16 * 2**20
"""Of the file; a larger one is not ours."""


class Day(Frozen):
    """What is counted of one device's day."""

    kind: Kind
    source: str
    """Of the meter whose joules these are: its kind, and the sensor's name."""
    told: float = Field(ge=0)
    """The device's own count at the last telling, J."""
    at: float
    """When that was, UTC seconds since the epoch."""
    since: float
    """What `joules` are counted from, UTC seconds since the epoch: midnight, or later."""
    joules: float = Field(0.0, ge=0)
    seconds: float = Field(0.0, ge=0)
    """Seconds that `joules` are of; less than the day where something is not counted."""


class Known(Frozen):
    """One device that Home Assistant was told of."""

    online: float
    """When it was last online, UTC seconds since the epoch."""
    day: Day | None = None


class Memory(Frozen):
    """What has to outlive the program: whom Home Assistant knows and under which topics, and the days."""

    federation: str
    prefix: str
    devices: dict[str, Known] = Field(default_factory=dict)

    @field_validator("devices")
    @classmethod
    def _names_that_fit_a_topic(cls, devices: dict[str, Known]) -> dict[str, Known]:
        for name in devices:
            try:
                checked_name(name, "agent")
            except SettingsError as error:
                raise ValueError(str(error)) from error
        return devices


def midnight(now: float) -> float:
    """Return when the local day of `now` began; both in UTC seconds since the epoch."""
    day = datetime.fromtimestamp(now).date()
    return datetime.combine(day, time.min).timestamp()


def counted(before: Day | None, joules: float, kind: Kind, source: str, now: float) -> Day:
    """Return the day after a telling of `joules` since the device's program started.

    A count that fell is that of a new program, which has used all of it since the last telling.
    """
    if before is None or (before.kind, before.source) != (kind, source):
        return Day(kind=kind, source=source, told=joules, at=now, since=now)
    fell = joules < before.told
    gained = joules if fell else joules - before.told
    seconds = 0.0 if fell else max(0.0, now - before.at)  # a new program does not say since when it runs
    began, day = midnight(now), before
    if before.at < began:
        gap = now - before.at
        near = gap <= MIDNIGHT_GAP_S
        share = (now - began) / gap if near else 0.0
        day = before.model_copy(update={"joules": 0.0, "seconds": 0.0, "since": began if near else now})
        gained, seconds = gained * share, seconds * share
    news = {"told": joules, "at": now, "joules": day.joules + gained, "seconds": day.seconds + seconds}
    return day.model_copy(update=news)


def of_today(day: Day | None, now: float) -> Day | None:
    """Return `day` if it is the present one: before its first telling nobody knows a day's joules."""
    return day if day is not None and day.at >= midnight(now) else None


def read(folder: Path) -> Memory | None:
    """Return what was kept, `None` where nothing was; what cannot be read is told in the log and lost."""
    file = folder / FILE
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"over {MAX_BYTES} bytes")
        return Memory.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # pydantic's is a ValueError
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        logger.error("%s cannot be read (%s): joules of today begin anew", file, why)
        return None


def write(folder: Path, memory: Memory) -> None:
    """Keep `memory` so that it survives a power cut; raises `OSError`."""
    write_whole(folder / FILE, memory.model_dump_json().encode())
