"""Sums of joules, always split by how they are known and where the meter sat, with their error bars (k = 2).

Measured, mixed and modelled joules are never added, nor are two scopes: nothing here returns one number over
them. Error bars of windows of one device add up, as they share their bias. Over devices, those of measured
joules add in quadrature; modelled ones add up among devices of one profile, whose model errs alike, and in
quadrature beyond. Mixed joules are partly modelled, so theirs add like modelled ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from pydantic import Field

from foundation.energy import EnergyReading, Kind, Scope
from foundation.frozen import Frozen

KNOWN = (Kind.MEASURED, Kind.MIXED, Kind.MODELLED)


class Told(Protocol):
    """A reading of one device."""

    @property
    def agent(self) -> str:
        """The device."""
        ...

    @property
    def reading(self) -> EnergyReading:
        """Joules over seconds."""
        ...


class Joules(Frozen):
    """Joules of one kind at one scope."""

    kind: Kind
    scope: Scope
    joules: float
    idle_joules: float | None = None
    """What the devices would have used doing nothing; `None` when that is not known for all of it."""
    process_joules: float | None = None
    """The agents' own part of what is above idle, by CPU time; `None` when it is not known for all of it."""
    uncertainty_joules: float | None = None
    """Half-width of the error bar at k = 2; `None` when that of a part is not known."""
    seconds: float
    readings: int = Field(ge=1)


class Unknown(Frozen):
    """Readings whose joules nobody knows; their seconds are known."""

    readings: int = 0
    seconds: float = 0.0


class Split(Frozen):
    """Joules by kind, each by scope. There is no sum of it."""

    measured: tuple[Joules, ...] = ()
    mixed: tuple[Joules, ...] = ()
    modelled: tuple[Joules, ...] = ()
    unknown: Unknown = Unknown()

    @property
    def parts(self) -> tuple[Joules, ...]:
        """What is known, by kind and scope."""
        return (*self.measured, *self.mixed, *self.modelled)

    @property
    def seconds(self) -> float:
        """Seconds of all readings; time is measured whatever the joules are."""
        return math.fsum([*(part.seconds for part in self.parts), self.unknown.seconds])

    def only(self) -> Joules:
        """Return the joules when they are of one kind and one scope, and all known.

        Raises `ValueError` that says what there is otherwise.
        """
        if len(self.parts) == 1 and not self.unknown.readings:
            return self.parts[0]
        there = [f"{part.kind} at {part.scope}" for part in self.parts]
        if self.unknown.readings:
            there.append(f"{self.unknown.readings} readings without joules")
        raise ValueError(
            f"no one number: there are {', '.join(there) or 'no readings'}, which are never added"
        )

    def __float__(self) -> NoReturn:
        raise TypeError("joules of several kinds and scopes are no one number: take the parts, or only()")


@dataclass(slots=True)
class _Sum:
    """A running sum of one device."""

    joules: float = 0.0
    idle: float | None = 0.0
    own: float | None = 0.0
    bar: float | None = 0.0
    seconds: float = 0.0
    readings: int = 0

    def add(self, reading: EnergyReading) -> None:
        self.joules += reading.joules or 0.0
        self.idle = _plus(self.idle, reading.idle_joules)
        self.own = _plus(self.own, reading.process_joules)
        self.bar = _plus(self.bar, reading.uncertainty_joules)
        self.seconds += reading.seconds
        self.readings += 1


@dataclass(slots=True)
class Tally:
    """Takes entries one by one and gives their split at any moment."""

    profiles: Mapping[str, str | None]
    """By agent; agents that are not here count as one more profile."""
    _sums: dict[tuple[Kind, Scope], dict[str, _Sum]] = field(default_factory=dict)
    _unknown: _Sum = field(default_factory=_Sum)

    def add(self, entries: Iterable[Told]) -> None:
        """Count these entries in."""
        for entry in entries:
            reading = entry.reading
            if is_known(reading):
                devices = self._sums.setdefault((reading.kind, reading.scope), {})
                devices.setdefault(entry.agent, _Sum()).add(reading)
            else:
                self._unknown.add(reading)

    def split(self) -> Split:
        """Return everything so far."""
        found = {kind: tuple(self._of(kind)) for kind in KNOWN}
        return Split(
            measured=found[Kind.MEASURED],
            mixed=found[Kind.MIXED],
            modelled=found[Kind.MODELLED],
            unknown=Unknown(readings=self._unknown.readings, seconds=self._unknown.seconds),
        )

    def _of(self, kind: Kind) -> Iterator[Joules]:
        for scope in Scope:
            devices = self._sums.get((kind, scope))
            if devices:
                sums = devices.values()
                yield Joules(
                    kind=kind,
                    scope=scope,
                    joules=math.fsum(s.joules for s in sums),
                    idle_joules=_total(s.idle for s in sums),
                    process_joules=_total(s.own for s in sums),
                    uncertainty_joules=self._bar(kind, devices),
                    seconds=math.fsum(s.seconds for s in sums),
                    readings=sum(s.readings for s in sums),
                )

    def _bar(self, kind: Kind, devices: Mapping[str, _Sum]) -> float | None:
        if kind is Kind.MEASURED:
            return _in_quadrature(s.bar for s in devices.values())
        alike: dict[str | None, list[float | None]] = {}
        for agent, s in devices.items():
            alike.setdefault(self.profiles.get(agent), []).append(s.bar)
        return _in_quadrature(_total(bars) for bars in alike.values())


def is_known(reading: EnergyReading) -> bool:
    """Whether anybody knows a reading's joules."""
    return reading.joules is not None and reading.kind is not Kind.NONE


def split(entries: Iterable[Told], profiles: Mapping[str, str | None]) -> Split:
    """Return the split of these entries; `profiles` by agent say whose model is the same."""
    tally = Tally(profiles)
    tally.add(entries)
    return tally.split()


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _total(values: Iterable[float | None]) -> float | None:
    """Return the sum; `None` when one is not known."""
    values = list(values)
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _in_quadrature(bars: Iterable[float | None]) -> float | None:
    bars = list(bars)
    known = [bar for bar in bars if bar is not None]
    return math.hypot(*known) if len(known) == len(bars) else None
