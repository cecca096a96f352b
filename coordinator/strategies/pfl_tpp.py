"""PFL-TPP: FedTP's generated attention, with FFLs that devices prune by learned thresholds.

"Personalized Federated Learning with Transformer Personalization and Pruning" (TMLCN 2026) and its
forerunner PFL-TPS (ICC 2025). Only their abstracts could be read; what they leave open is our choice and
listed in docs/algorithms.md: thresholds per hidden unit, averaged over devices by examples; FFL weights
stay on the device (`own`), or are averaged over those that kept a unit, or over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from coordinator.aggregate import mean_of_keepers, shares_of, weighted_mean
from coordinator.strategies.base import RoundContext, State, Strategy
from coordinator.strategies.fedtp import ATTENTION, FedTP
from foundation.messages import Update
from foundation.parameters import EVERYTHING, Parameters, Role, role_of
from foundation.work import LocalWork, Phase, Term, ThresholdPruning

FFL = frozenset({Role.FFL})
THRESHOLD = frozenset({Role.THRESHOLD})


class PflTpp(FedTP):
    """Attention generated, thresholds averaged, FFL weights by policy."""

    personal_head: bool = True
    ffl: Literal["own", "mean_of_keepers", "mean"] = "own"
    uplink: Literal["full", "topk", "embed"] = "full"
    """What teaches the hypernetwork: the whole attention change, its `topk` share, or nothing: with `embed`
    attention stands still on the device, as what it learned there would be replaced by the next one."""
    target: float = Field(0.9, ge=0, lt=1)
    """Share of FFL units that should be gone."""
    floor: int = Field(4, ge=1)
    warm_up: int = Field(1, ge=0)
    """Rounds before thresholds move."""
    threshold_rate: float = Field(0.1, gt=0)
    every: int = Field(4, ge=1)
    max_drop: float = Field(0.3, gt=0, le=1)
    regulariser: float = Field(1.0, ge=0)
    task_gradient: bool = True
    importance: Literal["norms", "random"] = "norms"
    """`random` keeps units by lot: the control for which ones are kept."""
    lean: bool = False
    """Train attention and stem in the first local epoch only; later ones start from cached activations."""

    def own(self) -> frozenset[Role]:
        """The head and the FFLs, where they are personal."""
        return super().own() | (FFL if self.ffl == "own" else frozenset())

    def begin(self, model: Parameters, seed: int) -> State:
        """Start as FedTP does, with thresholds at 0."""
        state = super().begin(model, seed)
        thresholds = model.only(THRESHOLD).prefixed("model/")
        return State(0, state.shared.updated(thresholds))

    def usual_work(self, context: RoundContext) -> LocalWork:
        """Return FedTP's work with threshold pruning, once warm."""
        sent = self.generated() if self.learns() else frozenset()
        return self.work(
            phases=self._phases(),
            terms=(self._pruning(active=context.round > self.warm_up),),
            send=self.averaged() | THRESHOLD | sent,
            change=sent,
            topk=self.topk if self.uplink == "topk" else 1.0,
            keep=self.own(),
        )

    def first_terms(self) -> tuple[Term, ...]:
        """Let a newcomer begin with the units that the mean thresholds leave, and cut none itself."""
        return (self._pruning(active=False),)

    def pools(self, name: str) -> bool:
        """Average thresholds as well."""
        return role_of(name) in self.averaged() | THRESHOLD

    def mean(self, state: State, updates: Sequence[Update]) -> Parameters:
        """Return means of thresholds and the rest, and of FFLs by their policy."""
        shares = shares_of(updates)
        roles = self.averaged() | THRESHOLD
        if self.ffl != "mean_of_keepers":
            return weighted_mean((u.parameters.only(roles) for u in updates), shares)
        mean = weighted_mean((u.parameters.only(roles - FFL) for u in updates), shares)
        return mean.updated(mean_of_keepers(updates, shares, state.shared.under("model/").only(FFL)))

    def learns(self) -> bool:
        """Whether attention comes back."""
        return self.uplink != "embed"

    def _pruning(self, *, active: bool) -> ThresholdPruning:
        return ThresholdPruning(
            target=self.target,
            floor=self.floor,
            threshold_rate=self.threshold_rate,
            every=self.every,
            max_drop=self.max_drop,
            regulariser=self.regulariser,
            task_gradient=self.task_gradient,
            importance=self.importance,
            active=active,
        )

    def _phases(self) -> tuple[Phase, ...]:
        moving = EVERYTHING - ATTENTION if self.uplink == "embed" else EVERYTHING
        whole = Phase(train=moving, epochs=self.epochs, learning_rate=self.learning_rate)
        if not self.lean or self.epochs < 2:
            return (whole,)
        first = whole.model_copy(update={"epochs": 1})
        rest = EVERYTHING - ATTENTION - {Role.REST}
        return (first, Phase(train=rest, epochs=self.epochs - 1, learning_rate=self.learning_rate))


STRATEGY: type[Strategy] = PflTpp
