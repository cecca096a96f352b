"""Whom a round asks: who fits, who wants to take part, who can afford it; and why the others are left out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coordinator.budgets import Case, Verdict, decide
from coordinator.cost import forward_cost
from coordinator.live import Live
from coordinator.planning import Course, comparable, context_of, planned
from coordinator.roster import Roster
from coordinator.settings import Budget, BudgetSettings
from coordinator.spending import LOOKED_AT, history_of, today_of
from coordinator.store.records import UpdateRecord
from coordinator.store.sql import Store
from coordinator.strategies.base import RoundContext, State, Strategy
from foundation.errors import RoundError, SettingsError
from foundation.messages import AgentCard
from foundation.profile import AgentDefaults, DeviceProfile
from foundation.spec import ModelSpec
from foundation.work import LocalWork

DAY_S = 86_400
TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found before a round is opened."""

    allowed: tuple[AgentCard, ...]
    """Who may be asked, sorted by name."""
    verdicts: Mapping[str, Verdict]
    """What was decided for those with a budget."""
    skipped: Mapping[str, str]
    """Everybody else, with the reason."""
    passing: bool
    """Whether some of them will be allowed at some time without anybody's doing."""

    def without(self, busy: Mapping[str, int]) -> Choice:
        """Return the choice without agents that are at work, given with the rounds they are at."""
        found = {c.agent: busy[c.agent] for c in self.allowed if c.agent in busy}
        if not found:
            return self
        reasons = {agent: f"it is still at work on round {round}" for agent, round in found.items()}
        return replace(
            self,
            allowed=tuple(card for card in self.allowed if card.agent not in found),
            skipped={**self.skipped, **reasons},
            passing=True,
        )


@dataclass
class Selection:
    """Looks at roster, budgets and history; `clock` (UTC seconds) says which day it is."""

    roster: Roster
    store: Store
    live: Live
    budgets: BudgetSettings
    clock: Callable[[], float] = time.time
    _told: set[tuple[str, str, str]] = field(default_factory=set)

    async def choice(self, course: Course, strategy: Strategy, state: State, number: int) -> Choice:
        """Return who may be asked now.

        Raises `RoundError` when nobody's data fit, or everybody joins later.
        """
        run, unequal = course.settings, strategy.unequal
        skipped = {}
        for agent in self.roster.entries:
            reason = self.roster.reason_against(agent, course.spec, course.labels, unequal=unequal)
            if reason is not None:
                skipped[agent] = reason
        present = self.roster.present(course.spec, course.labels, unequal=unequal)
        resting = self.roster.resting(course.spec, course.labels, unequal=unequal)
        if not present and not resting:
            raise RoundError("no agent's data fit this run's model")
        joined = [card for card in present if run.late.get(card.agent, 1) <= number]
        if not joined and not resting:
            raise RoundError(f"every agent is to join after round {number}: leave some out of run.late")
        verdicts = await asyncio.to_thread(self._verdicts, course, strategy, state, joined, number)
        skipped |= {agent: v.skip for agent, v in verdicts.items() if v.skip is not None}
        allowed = tuple(card for card in joined if card.agent not in skipped)
        passing = bool(resting) or any(v.until is not None for v in verdicts.values())
        return Choice(allowed, verdicts, skipped, passing)

    async def changed(self, choice: Choice) -> None:
        """Wait until it is worth choosing again: another day, or somebody came, went or has another card."""
        days = (v.until for v in choice.verdicts.values() if v.until is not None)
        until, before = min(days, default=math.inf), self._here()
        while self.clock() < until and self._here() == before:
            await asyncio.sleep(TICK_S)

    def _here(self) -> list[tuple[str, bool, AgentCard | None]]:
        return [(agent, entry.online, entry.card) for agent, entry in self.roster.entries.items()]

    def tell_unknown(self, run: str, number: int, verdicts: Mapping[str, Verdict]) -> None:
        """Say, once in the life of this process, of which devices a budget cannot hold."""
        for agent, verdict in sorted(verdicts.items()):
            if verdict.unknown is not None and (run, agent, verdict.unknown) not in self._told:
                self._told.add((run, agent, verdict.unknown))
                text = f"{agent}: {verdict.unknown}"
                self.live.emit("budget_unknown", text, run=run, round=number, agent=agent)

    def _verdicts(
        self, course: Course, strategy: Strategy, state: State, cards: Sequence[AgentCard], number: int
    ) -> dict[str, Verdict]:
        """Return what everybody with a budget can afford of the work that this round would ask."""
        budgets = {card.agent: self.budgets.of(card.agent, card.profile) for card in cards}
        budgets = {agent: budget for agent, budget in budgets.items() if budget != Budget()}
        if not budgets:
            return {}
        for card in cards:
            state = strategy.enroll(state, card, course.settings.seed)
        context = context_of(course, cards, number)
        work = {a.agent: a.work for a in planned(strategy, state, context)[0] if a.agent in budgets}
        return self._judged(context, budgets, work)

    def _judged(
        self, context: RoundContext, budgets: Mapping[str, Budget], work: Mapping[str, LocalWork]
    ) -> dict[str, Verdict]:
        spec, now = context.spec, self.clock()
        midnight = now - now % DAY_S
        runs = comparable(self.store.runs(), context.run)
        past = _by_agent(self.store.latest_of(runs, list(work), LOOKED_AT))
        today = _by_agent(self.store.updates_since(midnight, list(work)))
        verdicts = {}
        for card in context.present:
            if card.agent not in work:
                continue
            known = history_of(past.get(card.agent, ()), spec.depth * spec.hidden)
            able = "threads" in card.terms
            verdicts[card.agent] = decide(
                Case(
                    budget=budgets[card.agent],
                    work=work[card.agent],
                    examples=card.examples,
                    export=context.export,
                    rates=known.rates,
                    today=today_of(today.get(card.agent, ())),
                    tomorrow=midnight + DAY_S,
                    ffl_share=ffl_share(spec),
                    density_floor=density_floor(card.profile),
                    threads=known.threads if able else None,
                    own_threads=known.own if able else None,
                    fewer=known.fewer if able else {},
                )
            )
        return verdicts


def ffl_share(spec: ModelSpec) -> float:
    """Return the share of FFL units in a dense model's multiply-adds, 0 to 1."""
    cost = forward_cost(spec)
    return cost.ffl / (cost.body + cost.ffl + cost.head)


def density_floor(profile: str) -> float:
    """Return the smallest share of FFL units that a device's profile would leave.

    A profile of the device's own is not known here, and counts as one that says nothing.
    """
    try:
        return DeviceProfile.load(profile).agent.density_floor
    except SettingsError:
        return AgentDefaults().density_floor


def _by_agent(records: Sequence[UpdateRecord]) -> dict[str, list[UpdateRecord]]:
    found: dict[str, list[UpdateRecord]] = {}
    for record in records:
        found.setdefault(record.agent, []).append(record)
    return found
