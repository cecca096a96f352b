"""From the updates of a round to those that its strategy absorbs: bounded, and combined by a rule.

Strategies stay as they are. A rule other than the mean makes one change of everybody's for each array that
the strategy averages (`Strategy.pools`), and that change takes the place of every device's own: the mean of
equals is what the rule said, and so is the mean over the keepers of a unit. Arrays that are for one device
alone, such as what a hypernetwork generates, stay that device's own, and only their size is bounded.
"""

from __future__ import annotations

import statistics
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import overload

from coordinator.robust import screen
from coordinator.robust.changes import base_of, changes_of, norm_of, restated
from coordinator.robust.rules import consensus
from coordinator.settings import Robust
from coordinator.strategies.base import State, Strategy
from foundation.messages import Assignment, Update
from foundation.parameters import Parameters


@dataclass(frozen=True, slots=True)
class Round:
    """The updates of a round beside what they answer, sorted by agent."""

    assignments: tuple[Assignment, ...]
    updates: tuple[Update, ...]
    weights: tuple[float, ...]
    """Of every update's change, 1 but for those that came late."""

    @classmethod
    def of(
        cls,
        assignments: Sequence[Assignment],
        updates: Sequence[Update],
        number: int | None = None,
        staleness: float | None = None,
    ) -> Round:
        """Match updates with the assignments they answer, or would answer now.

        An update of a round before `number` is late by s rounds, and its change weighs (1 + s)^-`staleness`
        (Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", arXiv 1903.03934, polynomial). What
        came as a change is a change of what is there now, as in FedBuff (Nguyen et al., AISTATS 2022); what
        came as values is a step towards them from what is there now, as in FedAsync.
        """
        asked = {assignment.agent: assignment for assignment in assignments}
        ordered = sorted(updates, key=lambda update: (update.agent, update.round))
        weights = [
            1.0 if number is None or staleness is None else float((1 + number - u.round) ** -staleness)
            for u in ordered
        ]
        return cls(tuple(asked[update.agent] for update in ordered), tuple(ordered), tuple(weights))

    def without(self, agents: Container[str]) -> Round:
        """Return the round without what these agents sent."""
        left = [i for i, update in enumerate(self.updates) if update.agent not in agents]
        return Round(
            tuple(self.assignments[i] for i in left),
            tuple(self.updates[i] for i in left),
            tuple(self.weights[i] for i in left),
        )

    def bases(self) -> list[Parameters]:
        """Return what every device started from; one copy where many started from the same."""
        initial: dict[int, Parameters] = {}
        found = []
        for assignment in self.assignments:
            if assignment.work.initial:
                seed = assignment.model_seed
                initial[seed] = initial.get(seed) or base_of(assignment)
                found.append(initial[seed])
            else:
                found.append(base_of(assignment))
        return found

    def changes(self, bases: Sequence[Parameters]) -> list[Parameters]:
        """Return everybody's changes."""
        return [changes_of(u, a, b) for u, a, b in zip(self.updates, self.assignments, bases, strict=True)]


def judged(
    settings: Robust, strategy: Strategy, round: Round, history: Sequence[float] = ()
) -> screen.Judged:
    """Return whom of a round to quarantine, and why."""
    pooled = _pooled(strategy, [update.parameters for update in round.updates])
    return screen.judged(settings, round.updates, _OneByOne(round), pooled, history)


class _OneByOne(Sequence[Parameters]):
    """Everybody's changes, each made when it is asked for, so that only one is there at a time."""

    def __init__(self, round: Round) -> None:
        self._round, self._bases = round, round.bases()

    def __len__(self) -> int:
        return len(self._bases)

    @overload
    def __getitem__(self, place: int) -> Parameters: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Parameters]: ...

    def __getitem__(self, place: int | slice) -> Parameters | Sequence[Parameters]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return changes_of(self._round.updates[place], self._round.assignments[place], self._bases[place])


def settled(settings: Robust, strategy: Strategy, state: State, round: Round) -> list[Update]:
    """Return what is absorbed of a round: the same updates, with what the settings make of their changes.

    Pure, as planning and absorbing are: a round that is made again comes out the same.
    """
    late = any(weight != 1 for weight in round.weights)
    if not (settings.combines or late) or not round.updates:
        return list(round.updates)
    bases = round.bases()
    changes = round.changes(bases)
    scales = clipped(settings, strategy, state, round, changes)
    bounded = [_scaled(c, s * w) for c, s, w in zip(changes, scales, round.weights, strict=True)]
    if settings.rule != "mean":
        names = _pooled(strategy, bounded)
        agreed = consensus(settings.rule, settings.hostile, round.updates, bounded, names)
        bounded = [_replaced(change, agreed) for change in bounded]
    found = []
    for i, update in enumerate(round.updates):
        if bounded[i] is not changes[i]:
            update = restated(update, round.assignments[i], bases[i], bounded[i])
        found.append(update)
    return _counted(settings, found)


def clipped(
    settings: Robust, strategy: Strategy, state: State, round: Round, changes: Sequence[Parameters]
) -> list[float]:
    """Return by how much each update's changes are scaled down, 0 to 1; 1 leaves them.

    Where a strategy pulls changes back through a hypernetwork, the pull on what all share is bounded too:
    a small change may pull hard, depending on where the device's embedding stands.
    """
    norms = [norm_of(change) for change in changes]
    scales = [1.0] * len(norms)
    if settings.clip_norm is not None:
        scales = [min(1.0, settings.clip_norm / norm) if norm else 1.0 for norm in norms]
    if settings.clip is None:
        return scales
    scales = _within(settings.clip, norms, scales)
    pulls = strategy.pulls(state, round.updates)
    known = [u.agent in pulls for u in round.updates]
    found = [pulls.get(u.agent, 0.0) for u in round.updates]
    within = _within(settings.clip, found, [1.0] * len(found))
    return [min(s, w) if k else s for s, w, k in zip(scales, within, known, strict=True)]


def _within(factor: float, norms: Sequence[float], scales: Sequence[float]) -> list[float]:
    """Return scales under which no norm is above `factor` times the median of those that are not 0."""
    some = [norm for norm in norms if norm > 0]
    if not some:
        return list(scales)
    bound = factor * statistics.median(some)
    return [min(s, bound / norm) if norm > 0 else s for norm, s in zip(norms, scales, strict=True)]


def _scaled(change: Parameters, scale: float) -> Parameters:
    if scale == 1.0:
        return change
    return Parameters((name, array * array.dtype.type(scale)) for name, array in change.items())


def _replaced(change: Parameters, agreed: Parameters) -> Parameters:
    return Parameters((name, agreed.get(name, array)) for name, array in change.items())


def _pooled(strategy: Strategy, arrays: Sequence[Parameters]) -> list[str]:
    names = dict.fromkeys(name for some in arrays for name in some)
    return [name for name in names if strategy.pools(name)]


def _counted(settings: Robust, updates: Sequence[Update]) -> list[Update]:
    """Return the updates with no more examples than a device may claim."""
    if settings.examples is None:
        return list(updates)
    most = max(1, int(settings.examples * statistics.median_low(u.examples for u in updates)))
    return [u if u.examples <= most else u.model_copy(update={"examples": most}) for u in updates]
