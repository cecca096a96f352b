"""FedAvg: the examples-weighted mean of what every device trained.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from coordinator.aggregate import in_order, shares_of, weighted_mean
from coordinator.strategies.base import RoundContext, State, Strategy
from foundation.messages import AgentCard, Assignment, Update
from foundation.parameters import WEIGHTS, Parameters, Role, role_of


class FedAvg(Strategy):
    """One phase over all roles; everything shared is averaged."""

    mergeable: ClassVar[bool] = True
    shared: ClassVar[frozenset[Role]] = WEIGHTS
    """Roles that travel and are averaged; the others stay on their device."""

    def begin(self, model: Parameters, seed: int) -> State:
        """Start from the initial model."""
        return State(0, model.only(self.shared).prefixed("model/"))

    def enroll(self, state: State, card: AgentCard, seed: int) -> State:
        """Know nothing about anyone."""
        return state

    def plan(self, state: State, context: RoundContext) -> Sequence[Assignment]:
        """Send the mean to everybody."""
        work = self.work(send=self.shared, keep=WEIGHTS - self.shared)
        mean = state.shared.under("model/")  # once: a thousand of the same would be a thousand lists of names
        return [context.assign(card.agent, work, mean) for card in context.present]

    def absorb(self, state: State, updates: Sequence[Update]) -> State:
        """Average by examples; without an update nothing changes but the count."""
        updates = in_order(updates)
        if not updates or not state.shared:
            return State(state.round + 1, state.shared, state.private)
        mean = weighted_mean((u.parameters.only(self.shared) for u in updates), shares_of(updates))
        return State(state.round + 1, state.shared.updated(mean.prefixed("model/")), state.private)

    def pools(self, name: str) -> bool:
        """Average all that is shared."""
        return role_of(name) in self.shared

    def personal(self, state: State, agent: str) -> Parameters:
        """Return the mean: everybody gets the same."""
        return state.shared.under("model/")


STRATEGY: type[Strategy] = FedAvg
