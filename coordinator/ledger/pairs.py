"""The same device on both sides: rounds with cut units against dense ones, and one run against another.

Figures of one sensor share its gain, which cancels in a ratio: what is left is how far rounds differ among
themselves, 2 s / sqrt(n) at k = 2. Two sensors keep their own error bars as well. Only joules of one kind at
one scope are compared; what cannot be compared is told with the reason.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from coordinator.ledger.entries import Book, Entry, Turn, grouped
from coordinator.ledger.sums import is_known
from foundation.energy import Kind, Scope, Stage
from foundation.frozen import Frozen

K2 = 2.0
"""Error bars are this many standard deviations."""
SEVERAL = "several"

How: TypeAlias = tuple[Kind, Scope, str]
"""Kind, scope and sensor; seconds alone have `Kind.NONE`."""


class Ratio(Frozen):
    """One mean over the other."""

    ratio: float
    uncertainty: float | None = None
    """Half-width at k = 2; `None` with fewer than two rounds on a side."""
    gain_cancels: bool = True
    """Whether both sides are of one sensor; without it their own error bars are in here."""


class Side(Frozen):
    """The training of some rounds of one device."""

    rounds: tuple[int, ...]
    joules: float | None
    seconds: float
    steps: float | None
    """Of the optimizer; `None` when the device did not tell for one of them."""
    units_kept: float
    """Mean share of the FFL units at the end of these rounds."""


class DensePruned(Frozen):
    """What training costs one device when units are gone, by one way of knowing it."""

    agent: str
    kind: Kind
    scope: Scope
    sensor: str
    flags: tuple[str, ...] = ()
    dense: Side
    pruned: Side
    per: Literal["step", "round"]
    """What is compared: a step of the optimizer, or a round where steps were not told."""
    joules: Ratio | None
    """Pruned over dense; `None` when joules are unknown."""
    seconds: Ratio | None


class RunPair(Frozen):
    """One device in two runs, paired by round: this run over the other."""

    agent: str
    stage: Stage | None
    """`None`: all stages."""
    kind: Kind
    scope: Scope
    sensor: str
    rounds: tuple[int, ...]
    joules: Ratio | None
    seconds: Ratio | None


class Missing(Frozen):
    """Why a device is not compared."""

    agent: str
    why: str


class Pruning(Frozen):
    """Dense against pruned, on every device."""

    devices: tuple[DensePruned, ...] = ()
    missing: tuple[Missing, ...] = ()


class Against(Frozen):
    """This run against another."""

    run: str
    devices: tuple[RunPair, ...] = ()
    missing: tuple[Missing, ...] = ()


# --- dense against pruned --------------------------------------------------------------------------


def pruning(book: Book) -> Pruning:
    """Return the training of rounds that ended with all FFL units against rounds that ended with fewer.

    A round in which the first units were cut counts as pruned, though it began dense: savings are not less
    than they are told.
    """
    found: list[DensePruned] = []
    missing: list[Missing] = []
    trained = grouped((e for e in book.entries if e.stage is Stage.TRAIN), lambda e: e.agent)
    for agent, turns in sorted(grouped(book.turns, lambda turn: turn.agent).items()):
        kept = {turn.round: share for turn in turns if (share := _kept(book, turn)) is not None}
        dense = {number for number, share in kept.items() if share == 1}
        why = _why_not(book, kept, dense)
        if why is not None:
            missing.append(Missing(agent=agent, why=why))
            continue
        steps = {turn.round: turn.steps for turn in turns}
        pairs = list(_dense_pruned(agent, trained.get(agent, []), kept, dense, steps))
        found += pairs
        if not pairs:
            missing.append(Missing(agent=agent, why="dense and pruned rounds were not known in the same way"))
    return Pruning(devices=tuple(found), missing=tuple(missing))


def _kept(book: Book, turn: Turn) -> float | None:
    """Return the share of FFL units at the end of a round; `None` where it is not known."""
    spec, kept = book.spec, turn.kept_units
    if spec is None or len(kept) != spec.depth or max(kept) > spec.hidden:
        return None
    return sum(kept) / (spec.depth * spec.hidden)


def _why_not(book: Book, kept: Mapping[int, float], dense: set[int]) -> str | None:
    if book.spec is None:
        return "the run's model cannot be read"
    if not kept:
        return "its kept units are not told, or not of the run's model"
    whole = f"{book.spec.depth} x {book.spec.hidden} FFL units"
    if not dense:
        return f"no round with all {whole}: dense rounds are in another run, see --against"
    return f"no round with fewer than {whole}" if len(dense) == len(kept) else None


def _dense_pruned(
    agent: str,
    entries: Sequence[Entry],
    kept: Mapping[int, float],
    dense: set[int],
    steps: Mapping[int, float | None],
) -> Iterator[DensePruned]:
    """Give a comparison for every way of knowing that both sides have."""
    for (kind, scope, sensor), these in grouped(entries, _how).items():
        sides = [
            [entry for entry in these if entry.round in kept and (entry.round in dense) is whole]
            for whole in (True, False)
        ]
        if not all(sides):
            continue
        told = all(steps.get(entry.round) for side in sides for entry in side)
        joules = [[_per(entry, entry.reading.joules, steps, told) for entry in side] for side in sides]
        seconds = [[_per(entry, entry.reading.seconds, steps, told) for entry in side] for side in sides]
        yield DensePruned(
            agent=agent,
            kind=kind,
            scope=scope,
            sensor=sensor,
            flags=tuple(dict.fromkeys(flag for entry in these for flag in entry.reading.flags)),
            dense=_side(sides[0], kept, steps),
            pruned=_side(sides[1], kept, steps),
            per="step" if told else "round",
            joules=None if kind is Kind.NONE else _means_ratio(joules[1], joules[0]),
            seconds=_means_ratio(seconds[1], seconds[0]),
        )


def _how(entry: Entry) -> How:
    r = entry.reading
    return (r.kind, r.scope, r.sensor) if is_known(r) else (Kind.NONE, Scope.UNKNOWN, "none")


def _per(entry: Entry, value: float | None, steps: Mapping[int, float | None], told: bool) -> float:
    return (value or 0.0) / ((steps.get(entry.round) or 1.0) if told else 1.0)


def _side(entries: Sequence[Entry], kept: Mapping[int, float], steps: Mapping[int, float | None]) -> Side:
    joules = [entry.reading.joules for entry in entries]
    known = [value for value in joules if value is not None]
    told = [count for entry in entries if (count := steps.get(entry.round))]
    return Side(
        rounds=tuple(entry.round for entry in entries),
        joules=math.fsum(known) if len(known) == len(joules) else None,
        seconds=math.fsum(entry.reading.seconds for entry in entries),
        steps=math.fsum(told) if len(told) == len(entries) else None,
        units_kept=statistics.fmean(kept[entry.round] for entry in entries),
    )


def _means_ratio(mine: Sequence[float], theirs: Sequence[float]) -> Ratio | None:
    """Return the ratio of two means over different rounds of one sensor; `None` over nothing."""
    over, under = statistics.fmean(mine), statistics.fmean(theirs)
    if over <= 0 or under <= 0:
        return None
    bars = [_spread(mine), _spread(theirs)]
    known = [bar for bar in bars if bar is not None]
    relative = [bar / mean for bar, mean in zip(known, (over, under), strict=False)]
    ratio = over / under
    return Ratio(ratio=ratio, uncertainty=ratio * math.hypot(*relative) if len(known) == 2 else None)


def _spread(values: Sequence[float]) -> float | None:
    """Return the error bar of a mean from how far its values lie apart; `None` for fewer than two."""
    return K2 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# --- one run against another -----------------------------------------------------------------------


class _Window(Frozen):
    """One device's stage, or all of its stages, in one round."""

    how: tuple[Kind, Scope, str]
    joules: float | None
    bar: float | None
    seconds: float


def against(book: Book, other: Book, name: str) -> Against:
    """Return every device of both runs in the rounds that both have, `book` over `other`, called `name`."""
    pairs: list[RunPair] = []
    missing: list[Missing] = []
    mine, theirs = _windows(book), _windows(other)
    for agent in sorted({turn.agent for turn in book.turns}):
        if agent not in theirs or agent not in mine:
            missing.append(Missing(agent=agent, why=f"it has no readings in both {book.run} and {name}"))
            continue
        found = [
            _paired(agent, stage, mine[agent].get(stage, {}), theirs[agent].get(stage, {}))
            for stage in (Stage.TRAIN, None)
        ]
        pairs += [one for one in found if isinstance(one, RunPair)]
        missing += [one for one in found if isinstance(one, Missing)]
    return Against(run=name, devices=tuple(pairs), missing=tuple(missing))


def _windows(book: Book) -> dict[str, dict[Stage | None, dict[int, _Window]]]:
    """Return windows by agent, stage (`None`: all) and round."""
    found: dict[str, dict[Stage | None, dict[int, _Window]]] = {}
    for (agent, number), entries in grouped(book.entries, lambda e: (e.agent, e.round)).items():
        stages = found.setdefault(agent, {})
        training = [entry for entry in entries if entry.stage is Stage.TRAIN]
        for stage, these in ((Stage.TRAIN, training), (None, entries)):
            if these:
                stages.setdefault(stage, {})[number] = _window(these)
    return found


def _window(entries: Sequence[Entry]) -> _Window:
    """Add the stages of one device in one round; of several ways of knowing nothing is known."""
    hows = {_how(entry) for entry in entries}
    seconds = math.fsum(entry.reading.seconds for entry in entries)
    how = hows.pop()
    if hows or how[0] is Kind.NONE:
        return _Window(how=(Kind.NONE, Scope.UNKNOWN, "none"), joules=None, bar=None, seconds=seconds)
    bars = [entry.reading.uncertainty_joules for entry in entries]
    known = [bar for bar in bars if bar is not None]
    return _Window(
        how=how,
        joules=math.fsum(entry.reading.joules or 0.0 for entry in entries),
        bar=math.fsum(known) if len(known) == len(bars) else None,
        seconds=seconds,
    )


def _paired(
    agent: str, stage: Stage | None, mine: Mapping[int, _Window], theirs: Mapping[int, _Window]
) -> RunPair | Missing:
    both = sorted(mine.keys() & theirs.keys())
    what = stage or "all stages"
    if not both:
        return Missing(agent=agent, why=f"{what}: no round that both runs have")
    pairs = [(mine[number], theirs[number]) for number in both]
    kinds = {window.how[:2] for pair in pairs for window in pair}
    if len(kinds) > 1:
        there = " and ".join(sorted(f"{kind} at {scope}" for kind, scope in kinds))
        return Missing(agent=agent, why=f"{what}: {there} are not compared")
    ((kind, scope),) = kinds
    sensors = {window.how[2] for pair in pairs for window in pair}
    return RunPair(
        agent=agent,
        stage=stage,
        kind=kind,
        scope=scope,
        sensor=sensors.pop() if len(sensors) == 1 else SEVERAL,
        rounds=tuple(both),
        joules=None if kind is Kind.NONE else _joules_ratio(pairs),
        seconds=_rounds_ratio([(a.seconds, b.seconds) for a, b in pairs]),
    )


def _joules_ratio(pairs: Sequence[tuple[_Window, _Window]]) -> Ratio | None:
    ratio = _rounds_ratio([(a.joules or 0.0, b.joules or 0.0) for a, b in pairs])
    if ratio is None or all(a.how == b.how for a, b in pairs):
        return ratio
    bars = [_relative(window for window, _ in pairs), _relative(window for _, window in pairs)]
    known = [bar for bar in bars if bar is not None]
    spread = ratio.uncertainty
    bar = math.hypot(spread, *(ratio.ratio * one for one in known)) if spread is not None else None
    return Ratio(ratio=ratio.ratio, uncertainty=bar if len(known) == 2 else None, gain_cancels=False)


def _relative(windows: Iterable[_Window]) -> float | None:
    """Return the relative error bar of one side, whose windows share their bias."""
    windows = list(windows)
    bars = [window.bar for window in windows if window.bar is not None]
    total = math.fsum(window.joules or 0.0 for window in windows)
    return math.fsum(bars) / total if len(bars) == len(windows) and total > 0 else None


def _rounds_ratio(pairs: Sequence[tuple[float, float]]) -> Ratio | None:
    """Return the mean of the rounds' own ratios; rounds that took nothing on a side have none."""
    ratios = [a / b for a, b in pairs if a > 0 and b > 0]
    return Ratio(ratio=statistics.fmean(ratios), uncertainty=_spread(ratios)) if ratios else None
