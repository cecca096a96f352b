"""Joules over seconds: how we know them, and where the meter sits. Values only, no measuring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TypeAlias

from pydantic import Field

from foundation.frozen import Frozen


class Kind(StrEnum):
    """How a number of joules is known."""

    MEASURED = "measured"
    MIXED = "mixed"
    MODELLED = "modelled"
    NONE = "none"


class Scope(StrEnum):
    """Where the meter sits; readings of different scopes are never added."""

    WALL_AC = "wall_ac"
    BOARD_DC = "board_dc"
    MODULE = "module"
    RAIL_SUM = "rail_sum"
    RAIL = "rail"
    GPU_BOARD = "gpu_board"
    UNKNOWN = "unknown"


class Stage(StrEnum):
    """What a device does at a moment; exactly one at a time, so stages add up to the total."""

    WAIT = "wait"
    RECEIVE = "receive"
    TRAIN = "train"
    PRUNE = "prune"
    EVALUATE = "evaluate"
    EXPORT = "export"
    SEND = "send"
    INFER = "infer"
    IDLE = "idle"


RESTING = frozenset({Stage.WAIT, Stage.IDLE})
"""Stages that are no work: what they take is nobody's to budget."""


class EnergyReading(Frozen):
    """Joules and seconds of one window, with how they are known."""

    joules: float | None = None
    """Gross; `None` when nobody knows, and then the time is still known."""
    idle_joules: float | None = None
    """What the device would have used doing nothing, by the same sensor or model."""
    seconds: float = Field(ge=0)
    kind: Kind = Kind.NONE
    scope: Scope = Scope.UNKNOWN
    sensor: str = "none"
    coverage: float = Field(0.0, ge=0, le=1)
    """Share of the window that the sensor saw."""
    uncertainty_joules: float | None = None
    """Half-width of the error bar at k = 2."""
    net_uncertainty_joules: float | None = None
    """The same for what is above idle; narrower where one sensor measured both, as its gain is common."""
    process_joules: float | None = None
    """The agent's own part of what is above idle, by its share of the busy CPU time; idle is not divided."""
    flags: tuple[str, ...] = ()

    @property
    def net_joules(self) -> float | None:
        """What is above idle, never below 0; `None` when one of the two is unknown."""
        if self.joules is None or self.idle_joules is None:
            return None
        return max(0.0, self.joules - self.idle_joules)

    def __add__(self, other: EnergyReading) -> EnergyReading:
        """Add two windows of one device: measured and modelled make mixed; two scopes are an error.

        Joules of a window that nobody knows make the sum unknown, not smaller. Uncertainties add
        linearly, as windows of one sensor or one model share their bias.
        """
        if self.seconds == 0 and self.kind is Kind.NONE:
            return other
        if other.seconds == 0 and other.kind is Kind.NONE:
            return self
        if Kind.NONE not in (self.kind, other.kind) and self.scope is not other.scope:
            raise ValueError(f"a reading at {self.scope} cannot be added to one at {other.scope}")
        seconds = self.seconds + other.seconds
        seen = self.coverage * self.seconds + other.coverage * other.seconds
        return EnergyReading(
            joules=_sum(self.joules, other.joules),
            idle_joules=_sum(self.idle_joules, other.idle_joules),
            seconds=seconds,
            kind=_joined(self.kind, other.kind),
            scope=other.scope if self.kind is Kind.NONE else self.scope,
            sensor=self.sensor if self.sensor == other.sensor else "several",
            coverage=min(1.0, seen / seconds) if seconds else 0.0,
            uncertainty_joules=_sum(self.uncertainty_joules, other.uncertainty_joules),
            net_uncertainty_joules=_sum(self.net_uncertainty_joules, other.net_uncertainty_joules),
            process_joules=_sum(self.process_joules, other.process_joules),
            flags=tuple(dict.fromkeys((*self.flags, *other.flags))),
        )


Ledger: TypeAlias = Mapping[Stage, EnergyReading]
"""Readings by stage."""


def total(readings: Iterable[EnergyReading]) -> EnergyReading:
    """Add readings of one device and one scope."""
    result = EnergyReading(seconds=0.0)
    for reading in readings:
        result = result + reading
    return result


def split_by_kind(readings: Iterable[EnergyReading]) -> dict[Kind, float]:
    """Return joules by kind, the only form in which totals over devices are shown."""
    sums: dict[Kind, list[float]] = {}
    for reading in readings:
        if reading.joules is not None:
            sums.setdefault(reading.kind, []).append(reading.joules)
    return {kind: math.fsum(values) for kind, values in sums.items()}


def in_words(joules: Mapping[Kind, float]) -> str:
    """Return joules by kind as a person reads them: `41.2 J measured, 3.1 J modelled`."""
    told = [f"{value:.1f} J {kind}" for kind, value in sorted(joules.items()) if value]
    return ", ".join(told) or "0 J"


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _joined(a: Kind, b: Kind) -> Kind:
    if a is b:
        return a
    return Kind.NONE if Kind.NONE in (a, b) else Kind.MIXED
