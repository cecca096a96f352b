"""Hedgerow, our own: gates mix the average and what a device kept; little is trained, and little sent.

For every role r (attention, FFL, rest, head) a device starts a round from

    s_r = (1 - g_r) (a_r + R_r) + g_r p_r                                                          (1)

with a the average, R a personal residual of low rank that a hypernetwork generates (attention's alone, and
only if asked for: coordinator/residual.py), p what the device kept of the round before, g_r its gate. It
trains little: on FFLs pruned by learned thresholds (see pfl_tpp), one epoch in the first round, and not at
all in the round after one in which its training loss was next to nothing. It sends (a + R) - trained, in few
bits. The coordinator's average descends with momentum along the mean of that, FFL units along the mean over
those who kept them. Units that nobody kept are not sent down again.

Special cases: all gates 0 is `fedavg`; the head's 1 and the others' 0 `fedper`; all 1 `local` (with `target`
and `rest` 0, `schedule` constant and `server_momentum` 0). `fedtp` differs in that its attention is moved by
the hypernetwork's step alone. What was tried and left out is in docs/evidence.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from coordinator import residual
from coordinator.aggregate import in_order, mean_of_keepers, shares_of, weighted_mean
from coordinator.hypernet import Adam, Shape
from coordinator.strategies.adaptive_pruning import AdaptivePruning, measured
from coordinator.strategies.base import RoundContext, State, Strategy
from foundation.messages import AgentCard, Assignment, Update
from foundation.parameters import EVERYTHING, WEIGHTS, Array, Parameters, Role
from foundation.work import Blend, Encoding, LocalWork, Phase, Term, ThresholdPruning

ATTENTION = frozenset({Role.ATTENTION})
FFL = frozenset({Role.FFL})
LEAN = frozenset({Role.FFL, Role.HEAD, Role.THRESHOLD})
"""What goes on moving in lean rounds."""
JOINED = "joined"
"""Of an agent: how many rounds were over when it joined, (1,)."""
RESTS = "rests"
"""Of an agent: times in a row that it had converged, and rounds that it still sits out, (2,)."""
OWN: dict[Role, float] = {Role.HEAD: 1.0}
"""First gates: FedPer's."""
SLOWEST = 0.05
"""Share of the learning rate that is left at the end of a cosine schedule."""

Gate = Annotated[float, Field(ge=0, le=1)]


class Hedgerow(Strategy):
    """Average, keep, mix by gates; prune; train little and send few bits."""

    mergeable: ClassVar[bool] = True

    epochs: int = Field(2, ge=0, le=1000)
    first_epochs: int = Field(1, ge=0, le=1000)
    """Local epochs of a device's first round: an average of models that went far apart is worth little."""
    learning_rate: float = Field(3e-3, gt=0)
    encoding: Encoding = "int8"
    encoding_down: Encoding = "int8"
    schedule: Literal["constant", "cosine"] = "cosine"
    """How the learning rate goes down over the run's rounds."""
    gates: dict[Role, Gate] = Field(default_factory=lambda: dict(OWN))
    """Gate of each role at first: 0 (and no entry) takes the average, 1 what the device kept."""
    gate_rate: float = Field(0.0, ge=0, le=1)
    """Largest step of a gate in a round, along the loss on the validation part; 0 leaves them as they are."""
    gate_samples: int = Field(32, ge=1)
    """Validation samples that the gates are asked about in a round."""
    target: float = Field(0.9, ge=0, lt=1)
    """Share of FFL units that should be gone; 0 prunes nothing."""
    floor: int = Field(4, ge=1)
    warm_up: int = Field(0, ge=0)
    """Rounds before thresholds move."""
    threshold_rate: float = Field(0.1, gt=0)
    every: int = Field(2, ge=1)
    max_drop: float = Field(0.3, gt=0, le=1)
    regulariser: float = Field(1.0, ge=0)
    server_momentum: float = Field(0.5, ge=0, lt=1)
    """Of the coordinator's steps along the mean change (FedAvgM, Hsu et al., arXiv 1909.06335)."""
    lean_after: float = Field(1.0, ge=0, le=1)
    """Share of the run's rounds after which only FFLs and head go on."""
    residual: int = Field(0, ge=0, le=4096)
    """Rank of the personal residual that a hypernetwork generates for attention; 0 generates none."""
    residual_rate: float = Field(5e-3, ge=0)
    """Learning rate of Adam on that hypernetwork and its embeddings."""
    embedding: int = Field(32, ge=1, le=4096)
    hidden: int = Field(64, ge=1, le=4096)
    enough: float = Field(0.0, ge=0)
    """Mean training loss at which a device stops training for this round; 0 never is."""
    converged: float = Field(0.2, ge=0)
    """Mean training loss of an epoch at which a device has converged, and sits out the next round."""
    threshold_s: float | None = Field(None, gt=0)
    """What a round may take. A device that can afford more FFL units within it than `target` leaves keeps
    them, by the allocation of `adaptive_pruning` from what earlier rounds took; without it, none does."""
    uplink_bps: float | None = Field(None, gt=0)
    """With `threshold_s`: what all devices together get through; without it, only each one's link counts."""
    rest: int = Field(1, ge=0, le=1000)
    """Most rounds in a row that it sits out: one, and one more each time it still is; 0 lets nobody rest."""

    def begin(self, model: Parameters, seed: int) -> State:
        """Start from the initial model; thresholds at 0 where there are any."""
        roles = EVERYTHING if self.target else WEIGHTS
        shared = model.only(roles).prefixed("model/")
        if self.residual:
            shape = Shape(model.only(ATTENTION).layout, self.embedding, self.hidden, self.residual)
            shared = shared.updated(residual.begin(shape, model, seed).prefixed("residual/"))
        return State(0, shared)

    def enroll(self, state: State, card: AgentCard, seed: int) -> State:
        """Note when an agent joined; what is personal stays on its device."""
        if card.agent in state.private:
            return state
        joined = Parameters({JOINED: np.array([state.round]), RESTS: np.zeros(2, np.int64)})
        if self.residual:
            row = residual.newcomer(self.embedding, card.agent, state.private, seed)
            joined = joined.updated({"embedding": row})
        return State(state.round, state.shared, {**state.private, card.agent: joined})

    def plan(self, state: State, context: RoundContext) -> Sequence[Assignment]:
        """Send the average to everybody, without the units that nobody keeps any more."""
        # Before the first round the average is the initial model, which devices draw themselves.
        initial = state.round == 0
        work = self._work(context, epochs=self.epochs, rate=self._rate(context), initial=initial)
        first = self._work(context, epochs=self.first_epochs, rate=self.learning_rate, initial=initial)
        targets = self._targets(state, context)
        masks = state.shared.under("offered/")
        assignments = []
        for card in context.present:
            if state.private[card.agent][RESTS][1] > 0:
                assignments.append(context.assign(card.agent, self._resting(context), Parameters()))
                continue
            # Who comes late has its way still to go, whatever the schedule has come down to.
            new = int(state.private[card.agent][JOINED][0]) == state.round
            own = _pruned_to(targets.get(card.agent, self.target), first if new else work)
            assignments.append(context.assign(card.agent, own, self.personal(state, card.agent), masks))
        return assignments

    def absorb(self, state: State, updates: Sequence[Update]) -> State:
        """Descend along the mean change; FFL units along the mean over those who kept them."""
        private = dict(state.private)
        for update in updates:
            private[update.agent] = self._known(private[update.agent], update, state)
        state = State(state.round, state.shared, private)
        kept = _kept_by_any(updates)
        updates = in_order([u for u in updates if u.parameters])
        if not updates:
            return State(state.round + 1, state.shared, state.private)
        shares, model = shares_of(updates), state.shared.under("model/")
        whole = EVERYTHING - FFL if self.target else WEIGHTS
        mean = weighted_mean((u.parameters.only(whole) for u in updates), shares)
        change = mean.only(WEIGHTS)
        if self.residual:
            state = residual.learned(state, updates, change.only(ATTENTION), Adam(self.residual_rate))
        shared = state.shared
        if self.target:
            still = Parameters((name, 0 * array) for name, array in model.only(FFL).items())
            change = change.updated(mean_of_keepers(updates, shares, still))
            shared = shared.updated(mean.only({Role.THRESHOLD}).prefixed("model/"))
            shared = shared.updated(kept.prefixed("offered/"))
        if self.server_momentum:
            change = self._with_momentum(change, shared.under("velocity/"))
            shared = shared.updated(change.prefixed("velocity/"))
        descended = Parameters((name, model[name] - step) for name, step in change.items())
        return State(state.round + 1, shared.updated(descended.prefixed("model/")), state.private)

    def pools(self, name: str) -> bool:
        """Average all that comes; a residual then learns nothing from what a rule made one of."""
        return True

    def _known(self, known: Parameters, update: Update, state: State) -> Parameters:
        """Return what is known of an agent after its update: whether it rests, and what its round took."""
        converged, left = (int(n) for n in known[RESTS])
        if not update.parameters:
            return known.updated({RESTS: np.array([converged, max(0, left - 1)])})
        loss = update.metrics.get("loss_trained", math.inf)
        converged = converged + 1 if loss <= self.converged else 0
        known = known.updated({RESTS: np.array([converged, min(converged, self.rest)])})
        return known if self.threshold_s is None else known.updated(measured(update, state))

    def _targets(self, state: State, context: RoundContext) -> dict[str, float]:
        """Return for each present agent the share of FFL units to lose; nothing without a threshold."""
        if self.threshold_s is None:
            return {}
        cell = AdaptivePruning(
            rates="measured", threshold_s=self.threshold_s, uplink_bps=self.uplink_bps, ratio_max=self.target,
            floor=self.floor, epochs=self.epochs, head_epochs=0, importance_epochs=0, encoding=self.encoding,
        )  # fmt: skip
        allocation = cell.allocation(state, context)
        return {card.agent: cell.ratio(allocation, card.agent) for card in context.present}

    def _with_momentum(self, change: Parameters, velocity: Parameters) -> Parameters:
        """Return beta * velocity + change, for what changed."""
        beta = np.float32(self.server_momentum)
        return Parameters(
            (name, step + beta * velocity[name] if name in velocity else step)
            for name, step in change.items()
        )

    def personal(self, state: State, agent: str) -> Parameters:
        """Return the average; nothing before the first round, when it is what every device begins with."""
        if not state.round:
            return Parameters()
        model = state.shared.under("model/")
        if not self.residual:
            return model
        return model.updated(residual.added(state, agent, model.only(ATTENTION)))

    def _work(self, context: RoundContext, *, epochs: int, rate: float, initial: bool) -> LocalWork:
        lean = context.round > self.lean_after * context.rounds
        moving = LEAN if lean else EVERYTHING
        phase = Phase(train=moving, epochs=epochs, learning_rate=rate, enough=self.enough)
        blend = Blend(gates=self.gates, rate=self.gate_rate, samples=self.gate_samples)
        terms: tuple[Term, ...] = (blend, self._pruning(context)) if self.target else (blend,)
        send = moving if self.target else moving - {Role.THRESHOLD}
        return self.work(
            phases=(phase,), terms=terms, send=send, change=WEIGHTS, keep=EVERYTHING, initial=initial
        )

    def _resting(self, context: RoundContext) -> LocalWork:
        """Ask for nothing but how the model that is there does: nothing comes, nothing goes back."""
        blend = Blend(gates=self.gates, rate=0, samples=1)
        pruning = self._pruning(context).model_copy(update={"active": False})
        terms: tuple[Term, ...] = (blend, pruning) if self.target else (blend,)
        return self.work(phases=(), terms=terms, send=frozenset(), keep=EVERYTHING, train=False)

    def _pruning(self, context: RoundContext) -> ThresholdPruning:
        return ThresholdPruning(
            target=self.target,
            floor=self.floor,
            threshold_rate=self.threshold_rate,
            every=self.every,
            max_drop=self.max_drop,
            regulariser=self.regulariser,
            active=context.round > self.warm_up,
        )

    def _rate(self, context: RoundContext) -> float:
        if self.schedule == "constant":
            return self.learning_rate
        gone = (context.round - 1) / max(1, context.rounds)
        return self.learning_rate * (SLOWEST + (1 - SLOWEST) * (1 + math.cos(math.pi * gone)) / 2)


def _pruned_to(target: float, work: LocalWork) -> LocalWork:
    """Return the work with another target for its thresholds, where it prunes."""
    terms = tuple(
        term.model_copy(update={"target": target}) if isinstance(term, ThresholdPruning) else term
        for term in work.terms
    )
    return work.model_copy(update={"terms": terms})


def _kept_by_any(updates: Sequence[Update]) -> Parameters:
    """Return for each block which units at least one device kept, (hidden,) of bool."""
    kept: dict[str, Array] = {}
    for update in updates:
        for name, mask in update.masks.items():
            kept[name] = kept[name] | mask if name in kept else mask
    return Parameters(kept)


STRATEGY: type[Strategy] = Hedgerow
