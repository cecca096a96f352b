"""Who can afford this round: in full, with less work, or not at all, and why. Pure rules.

What a round will cost is what the device's last rounds took, scaled by optimizer steps. Threads are lowered
where its history shows that more local epochs fit so; what fewer threads cost is tried where a budget of
joules does not hold and nothing is known of it. Then local epochs are cut, to one in every phase. Where a
budget for a round does not pay for all epochs, more FFL units are to go as well, down to the density floor of
the device's profile, so that in time all may fit again. That promise rests on multiply-adds and counts
nothing in this round's prediction; what it brings is in the next history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from coordinator.easing import Ease, epochs_of, fewest_epochs, gone_of
from coordinator.settings import Budget
from coordinator.spending import Cost, Rates, Today
from foundation.energy import in_words
from foundation.work import LocalWork

STEP = 0.01
"""Shares of units to go are rounded up to this: history has noise, and a target should stand still."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is known when a device is judged."""

    budget: Budget
    work: LocalWork
    examples: int
    export: bool
    rates: Rates | None
    """`None` while it has not trained a model of this size."""
    today: Today
    tomorrow: float
    """When the next day begins, UTC seconds since the epoch."""
    ffl_share: float = 0.0
    """Share of FFL units in the multiply-adds of a dense step, 0 to 1."""
    density_floor: float = 0.1
    """Smallest share of the units that the device's profile would leave."""
    threads: int | None = None
    """Threads that `rates` are of; `None` where nobody told, or the device cannot be asked for fewer."""
    own_threads: int | None = None
    """How many the device uses of itself."""
    fewer: Mapping[int, Rates] = field(default_factory=dict)
    """Its rates with fewer threads, as far as they are known."""

    def cost(self, epochs: int) -> Cost:
        """Return what so many local epochs will cost; only with rates."""
        assert self.rates is not None
        per_epoch = math.ceil(self.examples / self.work.batch_size)
        return self.rates.of(epochs * per_epoch, export=self.export)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided; empty for a device that is asked in full."""

    ease: Ease | None = None
    skip: str | None = None
    """Why it is not asked."""
    until: float | None = None
    """When it may be again (UTC seconds); `None` when no time will change it."""
    unknown: str | None = None
    """Why a budget cannot hold, in words."""


@dataclass(frozen=True, slots=True)
class _Cap:
    """One bound on a round."""

    what: Literal["joules", "seconds"]
    most: float
    words: str
    passing: bool = False
    """Whether it is another one tomorrow."""

    def holds(self, cost: Cost) -> bool:
        """Whether the cost is within; what nobody knows cannot be bounded."""
        value = cost.joules if self.what == "joules" else cost.seconds
        return value is None or value <= self.most


def decide(case: Case) -> Verdict:
    """Return whether a device is asked in full, with less, or not at all."""
    budget, today = case.budget, case.today
    if budget == Budget():
        return Verdict()
    day = budget.joules_per_day
    if day is not None and today.sum >= day:
        spent = f"today's {number(day)} J are spent ({in_words(today.joules)}), until 00:00 UTC"
        return Verdict(skip=spent, until=case.tomorrow)
    if case.rates is None:
        return Verdict(unknown="it is asked in full: nothing is known yet of what a round costs it")
    verdict = _fitted(case, _caps(case))
    unknown = _unknown(case)
    return Verdict(verdict.ease, verdict.skip, verdict.until, unknown)


def number(value: float) -> str:
    """Write joules or seconds to three digits at least, without exponents."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _unknown(case: Case) -> str | None:
    budget = case.budget
    if (budget.joules is None and budget.joules_per_day is None) or case.rates is None:
        return None
    if case.cost(epochs_of(case.work)).joules is None:
        return "its budget of joules cannot hold: nobody knows its joules"
    if budget.joules_per_day is not None and case.today.unknown:
        return "its budget of today holds in part: some of today's updates do not tell their joules"
    return None


def _caps(case: Case) -> list[_Cap]:
    budget, caps = case.budget, []
    if budget.joules is not None:
        caps.append(_Cap("joules", budget.joules, f"the budget is {number(budget.joules)} J a round"))
    if budget.deadline_s is not None:
        text = f"the budget is {number(budget.deadline_s)} s a round"
        caps.append(_Cap("seconds", budget.deadline_s, text))
    if (day := budget.joules_per_day) is not None:
        left = day - case.today.sum
        caps.append(_Cap("joules", day, f"the budget is {number(day)} J a day"))
        caps.append(_Cap("joules", left, f"{number(left)} of today's {number(day)} J are left", passing=True))
    return caps


def _fitted(case: Case, caps: list[_Cap]) -> Verdict:
    """Return the most work that is within all caps, on as many threads as do not make it less."""
    whole, fewest = epochs_of(case.work), fewest_epochs(case.work)
    chosen, epochs = case, _most(case, caps)
    for threads, rates in sorted(case.fewer.items(), reverse=True):
        if epochs == whole or not whole:
            break
        other = replace(case, rates=rates, threads=threads)
        more = _most(other, caps)
        if more is not None and (epochs is None or more > epochs):
            chosen, epochs = other, more
    if epochs is not None:
        return Verdict(ease=_ease(case, chosen, caps, epochs))
    least = case.cost(fewest)
    cap = next(cap for cap in caps if not cap.holds(least))
    work = f"{fewest} of {_epochs(whole)}" if whole else "an evaluation"
    reason = f"it {_needs(case, least, cap)} for {work}, {cap.words}"
    if cap.passing:
        return Verdict(skip=f"{reason}, until 00:00 UTC", until=case.tomorrow)
    return Verdict(skip=reason)


def _most(case: Case, caps: list[_Cap]) -> int | None:
    """Return the most local epochs that are within all caps; `None` if not even the fewest are."""
    for epochs in range(epochs_of(case.work), fewest_epochs(case.work) - 1, -1):
        if all(cap.holds(case.cost(epochs)) for cap in caps):
            return epochs
    return None


def _ease(usual: Case, case: Case, caps: list[_Cap], epochs: int) -> Ease | None:
    """Return how to ask for so many epochs at the rates of `case`, which may be those of fewer threads."""
    whole, gone = epochs_of(case.work), _gone(case, caps)
    told: list[str] = []
    most = None
    full = case.cost(whole)
    threads = _threads(usual, case, caps, epochs, told)
    if epochs < whole:
        cap = next(cap for cap in caps if not cap.holds(full))
        told.append(f"{epochs} of {_epochs(whole)}: the whole round {_needs(case, full, cap)}, {cap.words}")
        most = epochs
    if gone is not None:
        told.append(f"{gone:.0%} of the FFL units are to go and not {gone_of(case.work):.0%}")
    return Ease(epochs=most, gone=gone, threads=threads, reason="; ".join(told)) if told else None


def _threads(usual: Case, case: Case, caps: list[_Cap], epochs: int, told: list[str]) -> int | None:
    """Return how many threads to ask for at most, if not for all, and tell why."""
    own, threads = usual.own_threads, case.threads
    if own is None or threads is None:
        return None
    if case is not usual:
        before = usual.cost(epochs_of(usual.work))
        cap = next(cap for cap in caps if not cap.holds(before))
        whole = f"with {usual.threads} the whole round {_needs(usual, before, cap)}, {cap.words}"
        told.append(f"{_of(threads, own)}: {whole}")
    elif threads < own:
        if _surely_fits(case, caps, own / threads):
            return None
        told.append(f"{_of(threads, own)}: with more nothing is known any longer")
    elif _worth_trying(case, caps, epochs):
        threads = threads // 2
        told.append(f"{_of(threads, own)}: to learn what that saves")
    return threads if threads < own else None


def _surely_fits(case: Case, caps: list[_Cap], times: float) -> bool:
    """Whether the whole round fits even if more threads cost so many times the joules; they save time."""
    whole = case.cost(epochs_of(case.work))
    dearer = Cost(None if whole.joules is None else whole.joules * times, whole.seconds)
    return all(cap.holds(dearer) for cap in caps)


def _worth_trying(case: Case, caps: list[_Cap], epochs: int) -> bool:
    """Whether half the threads might make more epochs fit: nobody knows yet, and there is time for it."""
    whole, threads = case.cost(epochs_of(case.work)), case.threads or 1
    short = any(cap.what == "joules" and not cap.holds(whole) for cap in caps)
    if case.fewer or threads < 2 or not short:
        return False
    slower = case.cost(epochs)
    slower = Cost(slower.joules, slower.seconds * threads / (threads // 2))
    return all(cap.holds(slower) for cap in caps if cap.what == "seconds")


def _of(threads: int, own: int) -> str:
    return f"{threads} of {own} threads"


def _gone(case: Case, caps: list[_Cap]) -> float | None:
    """Return the share of FFL units to go so that all epochs fit in time; `None` to leave it as it is.

    Rates are first scaled to the dense model: otherwise every unit that went would ask for its return. What
    is left of a day changes with the hour, so it does not count here.
    """
    rates, own = case.rates, gone_of(case.work)
    if rates is None or own is None or rates.kept is None or not case.ffl_share:
        return None
    rest = 1 - case.ffl_share
    fixed = rates.of(0, export=case.export)
    whole = case.cost(epochs_of(case.work))
    density = 1.0
    for cap in caps:
        free, all_of_it = _value(fixed, cap), _value(whole, cap)
        if cap.passing or free is None or all_of_it is None or all_of_it <= free:
            continue
        dense = (all_of_it - free) / (rest + case.ffl_share * rates.kept)
        density = min(density, ((cap.most - free) / dense - rest) / case.ffl_share)
    wanted = math.ceil((1 - density) / STEP - 1e-9) * STEP
    gone = min(wanted, 1 - case.density_floor)
    return round(gone, 4) if gone > own + 1e-9 else None


def _value(cost: Cost, cap: _Cap) -> float | None:
    return cost.joules if cap.what == "joules" else cost.seconds


def _needs(case: Case, cost: Cost, cap: _Cap) -> str:
    if cap.what == "seconds":
        return f"takes about {number(cost.seconds)} s"
    assert case.rates is not None
    assert cost.joules is not None
    return f"needs about {number(cost.joules)} J ({case.rates.kind})"


def _epochs(count: int) -> str:
    return f"{count} local epoch{'' if count == 1 else 's'}"
