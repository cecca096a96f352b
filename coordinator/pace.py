"""How long a round waits: soft deadlines from what devices took lately, and who is still at work."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.settings import RunSettings
from coordinator.store.records import RoundRecord, UpdateRecord
from coordinator.strategies.base import load_strategy

ROUNDS = 5
"""Closed rounds that are looked back on."""


def age_s(opened: float, now: float, most_s: float) -> float:
    """Return how long ago (seconds) a round was opened, by a clock that may have been set meanwhile.

    A round from the future, or older than it may become, is as old as if it had been opened now.
    """
    age = now - opened
    return age if 0 <= age < most_s else 0.0


def answer_s(rounds: Sequence[RoundRecord], updates: Iterable[UpdateRecord]) -> float | None:
    """Return what a device took to answer, seconds: the median over devices of each one's own median.

    From the opening of a round until its update was stored, late ones included. `None` without any.
    """
    opened: Mapping[int, float] = {record.round: record.opened.timestamp() for record in rounds}
    took: dict[str, list[float]] = {}
    for update in updates:
        if update.round in opened:
            seconds = update.received.timestamp() - opened[update.round]
            took.setdefault(update.agent, []).append(max(0.0, seconds))
    return statistics.median(map(statistics.median, took.values())) if took else None


def late_reason(run: RunSettings, rounds: int) -> str | None:
    """Return why an update that is so many rounds late cannot be merged; `None` when it can."""
    if run.staleness is None:
        return ""
    if not load_strategy(run.strategy, run.settings).mergeable:
        return f", and {run.strategy} cannot merge late updates"
    if rounds > run.stale_rounds:
        return f", and {rounds} rounds late are more than {run.stale_rounds}"
    return None


@dataclass
class Busy:
    """Agents at work on a round that is closed: asked again, they would call that work off.

    Not for ever: until that would be too late, in rounds or by a second deadline.
    """

    clock: Callable[[], float]
    """The clock that deadlines are on."""
    _work: dict[str, tuple[int, float]] = field(default_factory=dict)

    def add(self, agent: str, round: int, until: float) -> None:
        """An agent may still answer a closed round, until then."""
        self._work[agent] = (round, until)

    def done(self, agent: str, round: int | None = None) -> None:
        """An agent is free: it answered or refused that round, or is gone."""
        if agent in self._work and (round is None or self._work[agent][0] == round):
            del self._work[agent]

    def rounds(self, first: int = 0) -> dict[str, int]:
        """Return who is at work, and on which round, from round `first` on."""
        now = self.clock()
        self._work = {a: work for a, work in self._work.items() if work[1] > now and work[0] >= first}
        return {agent: round for agent, (round, _) in self._work.items()}
