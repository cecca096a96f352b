"""The ledger of a run: totals, devices, stages, rounds, and what follows from them; JSON as it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from coordinator.ledger.accuracy import AccuracyLedger, accuracy_ledger
from coordinator.ledger.entries import Book, Entry, Skipped, Turn, grouped
from coordinator.ledger.pairs import Against, Pruning, against, pruning
from coordinator.ledger.radiated import Fixed, Radiation, cell, with_radiated
from coordinator.ledger.sums import Split, is_known, split
from coordinator.ledger.wall import WallLedger, wall_ledger
from coordinator.store.records import RunState
from foundation.energy import Stage
from foundation.frozen import Frozen


class Bytes(Frozen):
    """Bytes of several updates; `None` when those of one are not known."""

    payload_down: int | None
    """Payload with the parts' headers."""
    payload_up: int | None
    interface_received: int | None
    """All that the network interface saw, other programs' included."""
    interface_sent: int | None


class Conditions(Frozen):
    """Under what conditions a device's rounds were done, as far as it tells; each round's are in `turns`."""

    power_modes: tuple[str, ...] = ()
    """In the order in which they came."""
    governors: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    """Threads of arithmetic, from few to many."""
    most_c: float | None = None
    """The hottest that any thermal zone was seen."""
    throttle_events: int | None = None
    """Over the rounds of which it is known."""


class DeviceLedger(Frozen):
    """One device over the run."""

    agent: str
    profile: str | None
    sensors: tuple[str, ...]
    flags: tuple[str, ...]
    updates: int
    energy: Split
    seconds: float
    coverage: float | None
    """Share of the seconds with known joules that a sensor saw; `None` without any."""
    bytes: Bytes
    conditions: Conditions
    radiated_j: float | None


class StageLedger(Frozen):
    """One stage over all devices and rounds."""

    stage: Stage
    energy: Split
    seconds: float


class RoundLedger(Frozen):
    """One round over all devices."""

    round: int
    closed: bool
    agents: int
    """That the round was opened for."""
    updates: int
    """That came, unreadable ones as well."""
    energy: Split
    seconds: float
    bytes: Bytes
    radiated_j: float | None


class EnergyReport(Frozen):
    """Everything that is known of what a run cost its devices.

    Joules come split by how they are known (measured, mixed, modelled) and by where the meter sits (scope);
    kinds and scopes are never added. Error bars are half-widths at k = 2. What agents used that did not
    answer a round is nowhere in here.
    """

    run: str
    strategy: str
    state: RunState
    planned: int
    """Rounds that the run is to have."""
    total: Split
    seconds: float
    """Of all devices together."""
    devices: tuple[DeviceLedger, ...]
    stages: tuple[StageLedger, ...]
    rounds: tuple[RoundLedger, ...]
    accuracy: AccuracyLedger
    pruning: Pruning
    against: Against | None
    radiated: Radiation | None
    wall: WallLedger | None = None
    """What smart plugs said, beside all this and in none of its sums; `None` without plugs."""
    skipped: tuple[Skipped, ...]
    """What could not be read and is in no figure."""
    entries: tuple[Entry, ...]
    turns: tuple[Turn, ...]


def energy_report(
    book: Book,
    *,
    accuracy: float | None = None,
    other: Book | None = None,
    other_name: str | None = None,
    radio_km: float | None = None,
) -> EnergyReport:
    """Return the ledger of a run.

    `accuracy` (0 to 1) asks what it took to reach it, `other` is a run to stand against, under `other_name`
    where its own would not tell it apart, `radio_km` the distance of a radio for radiated energy; a run with
    a simulated cell has its own. Raises `SettingsError` for a distance that cannot be.
    """
    profiles = {agent: book.profile(agent) for agent in {turn.agent for turn in book.turns}}
    uplink = Fixed.at(radio_km) if radio_km is not None else cell(book)
    turns, radiated = (book.turns, None) if uplink is None else with_radiated(book.turns, uplink)
    return EnergyReport(
        run=book.run,
        strategy=book.record.strategy,
        state=book.record.state,
        planned=book.record.rounds,
        total=(total := split(book.entries, profiles)),
        seconds=total.seconds,
        devices=_devices(book.entries, turns, profiles),
        stages=_stages(book.entries, profiles),
        rounds=_rounds(book, turns, profiles),
        accuracy=accuracy_ledger(book, profiles, accuracy),
        pruning=pruning(book),
        against=None if other is None else against(book, other, other_name or other.run),
        radiated=radiated,
        wall=wall_ledger(book, profiles),
        skipped=book.skipped,
        entries=book.entries,
        turns=turns,
    )


def _devices(
    entries: Sequence[Entry], turns: Sequence[Turn], profiles: Mapping[str, str | None]
) -> tuple[DeviceLedger, ...]:
    read = grouped(entries, lambda entry: entry.agent)
    return tuple(
        _device(agent, read.get(agent, []), told, profiles)
        for agent, told in sorted(grouped(turns, lambda turn: turn.agent).items())
    )


def _device(
    agent: str, entries: Sequence[Entry], turns: Sequence[Turn], profiles: Mapping[str, str | None]
) -> DeviceLedger:
    energy = split(entries, profiles)
    readings = [entry.reading for entry in entries]
    known = [reading for reading in readings if is_known(reading)]
    time = math.fsum(reading.seconds for reading in known)
    seen = math.fsum(reading.coverage * reading.seconds for reading in known)
    return DeviceLedger(
        agent=agent,
        profile=profiles.get(agent),
        sensors=tuple(dict.fromkeys(reading.sensor for reading in known)),
        flags=tuple(dict.fromkeys(flag for reading in readings for flag in reading.flags)),
        updates=len(turns),
        energy=energy,
        seconds=energy.seconds,
        coverage=seen / time if time > 0 else None,
        bytes=_bytes(turns),
        conditions=_conditions(turns),
        radiated_j=_floats(turn.radiated_j for turn in turns),
    )


def _conditions(turns: Sequence[Turn]) -> Conditions:
    states = [turn.state for turn in turns if turn.state is not None]
    events = [state.throttle_events for state in states if state.throttle_events is not None]
    return Conditions(
        power_modes=tuple(dict.fromkeys(s.power_mode for s in states if s.power_mode is not None)),
        governors=tuple(dict.fromkeys(s.governor for s in states if s.governor is not None)),
        threads=tuple(sorted({s.threads for s in states if s.threads is not None})),
        most_c=max((s.most_c for s in states if s.most_c is not None), default=None),
        throttle_events=sum(events) if events else None,
    )


def _stages(entries: Sequence[Entry], profiles: Mapping[str, str | None]) -> tuple[StageLedger, ...]:
    read = grouped(entries, lambda entry: entry.stage)
    found = []
    for stage in Stage:
        if stage in read:
            energy = split(read[stage], profiles)
            found.append(StageLedger(stage=stage, energy=energy, seconds=energy.seconds))
    return tuple(found)


def _rounds(book: Book, turns: Sequence[Turn], profiles: Mapping[str, str | None]) -> tuple[RoundLedger, ...]:
    read = grouped(book.entries, lambda entry: entry.round)
    told = grouped(turns, lambda turn: turn.round)
    found = []
    for row in book.rounds:
        here, energy = told.get(row.round, []), split(read.get(row.round, []), profiles)
        found.append(
            RoundLedger(
                round=row.round,
                closed=row.state == "closed",
                agents=len(row.agents),
                updates=book.received.get(row.round, 0),
                energy=energy,
                seconds=energy.seconds,
                bytes=_bytes(here),
                radiated_j=_floats(turn.radiated_j for turn in here),
            )
        )
    return tuple(found)


def _bytes(turns: Iterable[Turn]) -> Bytes:
    turns = list(turns)

    def added(get: Callable[[Turn], int | None]) -> int | None:
        known = [count for turn in turns if (count := get(turn)) is not None]
        return sum(known) if known and len(known) == len(turns) else None

    return Bytes(
        payload_down=added(lambda turn: turn.down_bytes),
        payload_up=added(lambda turn: turn.up_bytes),
        interface_received=added(lambda turn: turn.interface_received_bytes),
        interface_sent=added(lambda turn: turn.interface_sent_bytes),
    )


def _floats(values: Iterable[float | None]) -> float | None:
    values = list(values)
    known = [value for value in values if value is not None]
    return math.fsum(known) if known and len(known) == len(values) else None
