"""When a device did what, in UTC by its own clock, and how far that clock is from the coordinator's.

What somebody else measured, such as a smart plug, is joined to a round by it: see coordinator/wall/.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Annotated

from pydantic import Field, model_validator

from foundation.energy import Stage
from foundation.frozen import Frozen

MOST_SPANS = 64
"""Spans of one round; where there were more, the shortest are told with their neighbours."""
MOST_S = 4e9
"""Beyond the year 2096 no clock is believed."""

Utc = Annotated[float, Field(ge=0, le=MOST_S)]
"""Seconds since the epoch."""


def steady_s() -> float:
    """Return seconds that neither a set clock nor, on Linux, the machine's sleep disturbs."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Span(Frozen):
    """A stretch of time in which a device was at one stage, but for moments."""

    stage: Stage
    """What most of it was."""
    also: tuple[Stage, ...] = Field((), max_length=len(Stage))
    """What else happened in it, too briefly or too often to be told apart."""
    start_s: Utc
    end_s: Utc

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_s - self.start_s

    @model_validator(mode="after")
    def _forwards(self) -> Span:
        if self.end_s < self.start_s:
            raise ValueError("a span ends before it starts")
        return self


class ClockOffset(Frozen):
    """The coordinator's clock minus the device's, from pairs of messages."""

    offset_s: float = Field(ge=-MOST_S, le=MOST_S)
    uncertainty_s: float = Field(ge=0, le=MOST_S)
    """Half the round trip of the best pair, and what clocks may drift since."""
    pairs: int = Field(ge=1)
    """Of which the best was kept."""


class Timing(Frozen):
    """A round's time on one device: everything since the update before."""

    spans: tuple[Span, ...] = Field(min_length=1, max_length=MOST_SPANS)
    """In order."""
    clock: ClockOffset

    @model_validator(mode="after")
    def _in_order(self) -> Timing:
        if any(now.start_s < before.end_s for before, now in pairwise(self.spans)):
            raise ValueError("spans overlap, or are not in order")
        return self
