"""Joules against accuracy: what was spent by the time a model was so good.

Accuracy as sent in round r is that of the model which the rounds before r made, so their joules stand beside
it; accuracy after is that of the end of round r, and stands beside all joules until then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from coordinator.ledger.entries import Book, Entry, Turn, grouped
from coordinator.ledger.sums import Joules, Split, Tally
from foundation.energy import Kind, Scope
from foundation.frozen import Frozen

Model = Literal["sent", "after"]
MODELS: tuple[Model, ...] = ("sent", "after")


class PerPoint(Frozen):
    """Joules of one kind and scope for each percentage point of mean accuracy above where the run began."""

    kind: Kind
    scope: Scope
    joules: float
    uncertainty_joules: float | None = None


class AccuracyPoint(Frozen):
    """One model (`sent` or `after`) of one round, as a mean over the devices that told."""

    round: int
    model: Model
    accuracy: float
    devices: int
    spent: Split
    """Of all devices, from the start of the run: before this round for `sent`, with it for `after`."""
    per_point: tuple[PerPoint, ...] = ()
    """Empty when nothing was gained yet."""


class Reached(Frozen):
    """When an accuracy was first reached, and what had been spent by then."""

    agent: str | None
    """`None`: the mean over devices, with the joules of all of them."""
    model: Model
    round: int | None
    """`None` when it never was."""
    spent: Split | None = None


class AccuracyLedger(Frozen):
    """Joules against accuracy over a run."""

    start: float | None
    """Mean accuracy as sent in the run's first round, where gains are counted from; `None` if nobody told."""
    points: tuple[AccuracyPoint, ...]
    target: float | None = None
    reached: tuple[Reached, ...] = ()
    """Of `target`: the mean, then every device, as sent and after."""


def accuracy_ledger(book: Book, profiles: Mapping[str, str | None], target: float | None) -> AccuracyLedger:
    """Return joules against accuracy; `target` between 0 and 1 asks when it was reached."""
    means = _points(book.turns, book.entries, profiles)
    start = means[0].accuracy if means and means[0].model == "sent" else None
    points = [point.model_copy(update={"per_point": _per_point(point, start)}) for point in means]
    reached: list[Reached] = []
    if target is not None:
        reached += _reached(None, points, target)
        entries = grouped(book.entries, lambda entry: entry.agent)
        for agent, turns in sorted(grouped(book.turns, lambda turn: turn.agent).items()):
            reached += _reached(agent, _points(turns, entries.get(agent, ()), profiles), target)
    return AccuracyLedger(start=start, points=tuple(points), target=target, reached=tuple(reached))


def _points(
    turns: Iterable[Turn], entries: Iterable[Entry], profiles: Mapping[str, str | None]
) -> list[AccuracyPoint]:
    """Return both models of every round, in order, where anybody told."""
    told = grouped(turns, lambda turn: turn.round)
    spent = grouped(entries, lambda entry: entry.round)
    tally, found = Tally(profiles), []
    for number in sorted(told.keys() | spent.keys()):
        before = tally.split()
        tally.add(spent.get(number, ()))
        here = told.get(number, [])
        found += _point(number, "sent", [turn.accuracy_sent for turn in here], before)
        found += _point(number, "after", [turn.accuracy for turn in here], tally.split())
    return found


def _point(
    number: int, model: Model, accuracies: Sequence[float | None], spent: Split
) -> list[AccuracyPoint]:
    """Return the point of one model; none when nobody told its accuracy."""
    known = [value for value in accuracies if value is not None]
    if not known:
        return []
    mean = math.fsum(known) / len(known)
    return [AccuracyPoint(round=number, model=model, accuracy=mean, devices=len(known), spent=spent)]


def _per_point(point: AccuracyPoint, start: float | None) -> tuple[PerPoint, ...]:
    gained = 0.0 if start is None else 100 * (point.accuracy - start)
    if gained <= 0:
        return ()
    return tuple(_over(part, gained) for part in point.spent.parts)


def _over(part: Joules, points: float) -> PerPoint:
    bar = part.uncertainty_joules
    return PerPoint(
        kind=part.kind,
        scope=part.scope,
        joules=part.joules / points,
        uncertainty_joules=None if bar is None else bar / points,
    )


def _reached(agent: str | None, points: Sequence[AccuracyPoint], target: float) -> list[Reached]:
    found = []
    for model in MODELS:
        first = next((p for p in points if p.model == model and p.accuracy >= target), None)
        found.append(
            Reached(
                agent=agent,
                model=model,
                round=first.round if first else None,
                spent=first.spent if first else None,
            )
        )
    return found
