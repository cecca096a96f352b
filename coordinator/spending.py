"""What devices' rounds took: from stored updates to rates by optimizer step, and to the joules of today."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.store.records import UpdateRecord, state_of
from coordinator.web.models import UpdateView
from foundation.energy import RESTING, EnergyReading, Kind, Scope, Stage, split_by_kind, total

ROUNDS = 3
"""Rounds of training that a prediction rests on: the last ones, as pruning makes them cheaper."""
LOOKED_AT = 4 * ROUNDS
"""Updates among which they are looked for: a device may have rested in between."""
_TRAINING = frozenset({Stage.TRAIN, Stage.PRUNE})


@dataclass(frozen=True, slots=True)
class Cost:
    """Joules and seconds of work."""

    joules: float | None
    """`None` when nobody knows."""
    seconds: float

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """Return this and `times` the other; an unknown part makes the sum unknown."""
        known = self.joules is not None and other.joules is not None
        joules = (self.joules or 0.0) + times * (other.joules or 0.0)
        return Cost(joules if known else None, self.seconds + times * other.seconds)


NOTHING = Cost(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device's last rounds cost."""

    step: Cost
    """Of one optimizer step, cutting included."""
    fixed: Cost
    """Of a round beside its training: receiving, evaluating, sending."""
    export: Cost
    """Of an export; nothing while none was seen."""
    kind: Kind
    """How its joules are known."""
    kept: float | None
    """Share of the FFL units that were there in these rounds; `None` where nobody told."""
    scope: Scope = Scope.UNKNOWN
    """Where the meter sat."""

    def of(self, steps: int, *, export: bool = False) -> Cost:
        """Return what a round with so many optimizer steps will cost."""
        whole = self.fixed.plus(self.step, steps)
        return whole.plus(self.export) if export else whole


@dataclass(frozen=True, slots=True)
class History:
    """What a device's last rounds cost it, by threads of arithmetic."""

    rates: Rates | None
    """With all its own threads, or, where that is no longer known, with the most of `fewer`."""
    threads: int | None = None
    """How many `rates` are of; `None` where it did not tell."""
    own: int | None = None
    """How many it uses of itself."""
    fewer: Mapping[int, Rates] = field(default_factory=dict)
    """With fewer than `threads`."""


@dataclass(frozen=True, slots=True)
class Today:
    """Joules of today's work so far."""

    joules: Mapping[Kind, float]
    unknown: int = 0
    """Updates of today whose joules nobody knows."""

    @property
    def sum(self) -> float:
        """All kinds together: for a budget, and for nothing else."""
        return sum(self.joules.values())


@dataclass(frozen=True, slots=True)
class _Round:
    """One round of training that is over."""

    steps: int
    training: EnergyReading
    fixed: EnergyReading
    export: EnergyReading
    kept: float | None


def rates_of(updates: Sequence[UpdateRecord], units: int) -> Rates | None:
    """Return the rates of a device from its last updates, newest first; `None` while it has not trained.

    Each is the median of the last `ROUNDS` rounds in which it trained. Joules count only where the meter sat
    at the same place as in the newest of them. `units` are the FFL units of the dense model.
    """
    told = (_round(UpdateView.of(record), units) for record in updates)
    rounds = [one for one in told if one is not None][:ROUNDS]
    if not rounds:
        return None
    scope = rounds[0].training.scope

    def median(reading: Callable[[_Round], EnergyReading], per_step: bool = False) -> Cost:
        parts = [(reading(one), one.steps if per_step else 1) for one in rounds]
        parts = [(part, n) for part, n in parts if part.seconds > 0]
        known = [part.joules / n for part, n in parts if part.joules is not None and part.scope is scope]
        if not parts:
            return NOTHING
        seconds = statistics.median(part.seconds / n for part, n in parts)
        return Cost(statistics.median(known) if known else None, seconds)

    kinds = {one.training.kind for one in rounds if one.training.scope is scope}
    kept = [one.kept for one in rounds if one.kept is not None]
    step = median(lambda one: one.training, per_step=True)
    kind = kinds.pop() if len(kinds) == 1 else Kind.MIXED
    return Rates(
        step=step,
        fixed=median(lambda one: one.fixed),
        export=median(lambda one: one.export),
        kind=Kind.NONE if step.joules is None else kind,
        kept=statistics.median(kept) if kept else None,
        scope=scope,
    )


def history_of(updates: Sequence[UpdateRecord], units: int) -> History:
    """Return the rates of a device from its last updates, newest first, apart by threads of arithmetic.

    A device that does not tell its threads has one history.
    """
    by_threads: dict[int, list[UpdateRecord]] = {}
    own = None
    for record in updates:
        state = state_of(record.summary.get("state"))
        if state is None or state.threads is None:
            continue
        own = own or state.own_threads
        by_threads.setdefault(state.threads, []).append(record)
    known = {n: rates_of(records, units) for n, records in by_threads.items() if own and n <= own}
    rates = {threads: found for threads, found in known.items() if found is not None}
    if own is None or not rates:
        return History(rates_of(updates, units))
    most = max(rates)
    of_all = rates.pop(most)
    # What another meter said, or a model, cannot be compared.
    alike = {n: r for n, r in rates.items() if (r.kind, r.scope) == (of_all.kind, of_all.scope)}
    return History(of_all, most, own, alike)


def today_of(updates: Iterable[UpdateRecord]) -> Today:
    """Return the joules of work that a device's updates of today tell of."""
    joules: dict[Kind, float] = {}
    unknown = 0
    for view in map(UpdateView.of, updates):
        readings = [reading for stage, reading in view.ledger.items() if stage not in RESTING]
        unknown += any(reading.joules is None and reading.seconds > 0 for reading in readings)
        for kind, value in split_by_kind(readings).items():
            joules[kind] = joules.get(kind, 0.0) + value
    return Today(joules, unknown)


def _round(view: UpdateView, units: int) -> _Round | None:
    """Return what an update tells of its round; `None` when it did not train."""
    steps = int(view.metric("steps") or 0)
    training = _of(view, _TRAINING)
    if steps < 1 or training.seconds <= 0:
        return None
    rest = frozenset(Stage) - RESTING - _TRAINING - {Stage.EXPORT}
    widths = [view.metric("kept_sent"), float(sum(view.kept_units)) if view.kept_units else None]
    known = [width for width in widths if width is not None]
    kept = statistics.fmean(known) / units if known and units else None
    return _Round(steps, training, _of(view, rest), _of(view, frozenset({Stage.EXPORT})), kept)


def _of(view: UpdateView, stages: frozenset[Stage]) -> EnergyReading:
    """Return the sum over some stages; joules of meters in two places are no sum, so nobody knows them."""
    readings = [reading for stage, reading in view.ledger.items() if stage in stages]
    try:
        return total(readings)
    except ValueError:
        return EnergyReading(seconds=sum(reading.seconds for reading in readings), scope=Scope.UNKNOWN)
