"""The wall beside the devices: what smart plugs said of rounds, and what the devices' own meters said.

Two meters at two places: their joules are never added, and neither corrects the other. One over the other is
what power supplies lose, where both are right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from coordinator.ledger.entries import Book, Entry, grouped
from coordinator.ledger.sums import Joules, Split, is_known, split
from coordinator.wall.join import WallRecord
from foundation.energy import Kind, Scope
from foundation.frozen import Frozen


class WallMissing(Frozen):
    """An update without joules at the wall."""

    round: int
    why: str


class WallDevice(Frozen):
    """One device behind its plug, over the rounds that the plug saw."""

    agent: str
    plugs: tuple[str, ...]
    rounds: tuple[int, ...]
    """Those with joules at the wall."""
    energy: Split
    """At the wall."""
    own: Split
    """Of the same rounds, by the device's own sensor or model."""
    own_over_wall: float | None
    """The device's own joules over the wall's; `None` where one of them is of several kinds or scopes."""
    flags: tuple[str, ...]
    missing: tuple[WallMissing, ...]
    implausible: bool = False
    """Whether the wall is below what the board measured by more than both error bars: one is wrong."""


class WallLedger(Frozen):
    """All devices behind plugs."""

    devices: tuple[WallDevice, ...]
    records: tuple[WallRecord, ...]
    """Of every update: its whole time, and its stretches of a minute and more."""


def wall_ledger(book: Book, profiles: Mapping[str, str | None]) -> WallLedger | None:
    """Return what plugs said of a run; `None` where it had none."""
    if not book.wall:
        return None
    own = grouped(book.entries, lambda entry: (entry.agent, entry.round))
    by_agent = grouped(book.wall, lambda record: record.agent)
    devices = tuple(_device(agent, records, own, profiles) for agent, records in sorted(by_agent.items()))
    return WallLedger(devices=devices, records=book.wall)


def _device(
    agent: str,
    records: Sequence[WallRecord],
    entries: Mapping[tuple[str, int], list[Entry]],
    profiles: Mapping[str, str | None],
) -> WallDevice:
    seen = [record for record in records if is_known(record.reading)]
    energy = split(seen, profiles)
    own = split((e for r in seen for e in entries.get((agent, r.round), ())), profiles)
    one, other = _only(energy), _only(own)
    both = one is not None and other is not None and one.joules > 0
    return WallDevice(
        agent=agent,
        plugs=tuple(dict.fromkeys(record.plug for record in records)),
        rounds=tuple(record.round for record in seen),
        energy=energy,
        own=own,
        own_over_wall=other.joules / one.joules if both and one and other else None,
        flags=tuple(dict.fromkeys(flag for record in records for flag in record.reading.flags)),
        missing=tuple(
            WallMissing(round=r.round, why=r.why or "it cannot say")
            for r in records
            if not is_known(r.reading)
        ),
        implausible=both and one is not None and other is not None and _below(one, other),
    )


def _only(found: Split) -> Joules | None:
    """Return the joules where they are of one kind and scope, and all known."""
    try:
        return found.only()
    except ValueError:
        return None


def _below(wall: Joules, own: Joules) -> bool:
    """Whether a plug says less than a whole board measured behind it."""
    whole = own.kind is Kind.MEASURED and own.scope in (Scope.BOARD_DC, Scope.MODULE, Scope.WALL_AC)
    bars = (wall.uncertainty_joules, own.uncertainty_joules)
    known = [bar for bar in bars if bar is not None]
    return whole and len(known) == 2 and own.joules - wall.joules > math.hypot(*known)
