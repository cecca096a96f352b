"""Adaptive pruning and personalisation: a personal head, and a shared part pruned so that rounds end in time.

"Adaptive Model Pruning and Personalization for Federated Learning over Wireless Networks" (arXiv
2309.01816, IEEE TSP 2024). Only its abstracts could be read. Theirs: a pruned shared part, a personal part;
pruning ratio and bandwidth optimised together under a latency threshold. LocalAlt (personal part first, then
the shared one) is FedAlt of Pillutla et al., "Federated Learning with Partial Model Personalization", ICML
2022. Ours: whole FFL units are pruned and nothing else, the allocation of coordinator/wireless.py, and rates
measured on a real fleet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from coordinator.aggregate import in_order, mean_of_keepers, shares_of, weighted_mean
from coordinator.channel import NOISE_DBM_HZ, Link, Radio, Wire, rate_bps
from coordinator.cost import forward_cost, payload_bits
from coordinator.strategies.base import RoundContext, State, Strategy
from coordinator.wireless import Allocation, Device, allocate, reachable_s
from foundation.energy import Stage
from foundation.messages import AgentCard, Assignment, Update
from foundation.parameters import EVERYTHING, WEIGHTS, Array, Parameters, Role, role_of
from foundation.spec import ModelSpec
from foundation.work import ImportancePruning, LocalWork, Phase

HEAD = frozenset({Role.HEAD})
FFL = frozenset({Role.FFL})
SHARED = WEIGHTS - HEAD
ASKED_AGAIN = 5
"""Rounds after which an excluded device is measured again, at the greatest pruning: it may have recovered."""


class AdaptivePruning(Strategy):
    """Head personal, FFL units averaged over those who kept them, the rest averaged over all."""

    mergeable: ClassVar[bool] = True

    head_epochs: int = Field(1, ge=0, le=1000)
    """Epochs of the personal phase, before the shared one."""
    importance_epochs: int = Field(1, ge=0, le=1000)
    """Epochs of the shared phase before the importance is measured and units are cut."""
    score: Literal["change", "change_gradient", "magnitude"] = "change"
    ratio_max: float = Field(0.9, ge=0, lt=1)
    """Largest share of the FFL units that a device prunes."""
    floor: int = Field(1, ge=1)
    """Units that every block keeps at least."""
    threshold_s: float | None = Field(None, gt=0)
    """What a round may take on every device; when not set, `tightness` chooses it."""
    tightness: float = Field(0.5, ge=0, le=1)
    """Where the threshold lies between the shortest round without pruning (0) and with `ratio_max` (1)."""
    weights: Literal["examples", "equal"] = "examples"
    """What a device's pruning weighs in the allocation."""
    rates: Literal["simulated", "measured"] = "simulated"
    """A cell drawn from the seed, or the rates and times of earlier rounds."""
    uplink_bps: float | None = Field(None, gt=0)
    """With `measured`: what all devices together get through; when not set, only each one's link counts."""
    bandwidth_hz: float = Field(1.8e5, gt=0)
    """With `simulated`, as all below: of the shared uplink, and of the broadcast down; one NB-IoT carrier."""
    power_dbm: float = Field(20, ge=-30, le=60)
    base_power_dbm: float = Field(40, ge=-30, le=80)
    noise_dbm_hz: float = Field(NOISE_DBM_HZ, ge=-250, le=0)
    nearest_km: float = Field(0.05, gt=0, le=1000)
    farthest_km: float = Field(0.5, gt=0, le=1000)
    """Devices lie evenly over the area between."""
    slowest_hz: float = Field(5e8, gt=0)
    fastest_hz: float = Field(3e9, gt=0)
    """Clocks are drawn evenly between."""
    cycles_per_madd: float = Field(1.0, gt=0)
    """Clock cycles of one multiply-add."""

    @model_validator(mode="after")
    def _possible(self) -> AdaptivePruning:
        if self.importance_epochs > self.epochs:
            raise ValueError(
                f"importance_epochs {self.importance_epochs} is more than epochs {self.epochs}: nothing would"
                " ever be cut; raise epochs or lower importance_epochs"
            )
        if self.nearest_km > self.farthest_km or self.slowest_hz > self.fastest_hz:
            raise ValueError(
                f"nearest_km {self.nearest_km} and slowest_hz {self.slowest_hz} must not be above farthest_km"
                f" {self.farthest_km} and fastest_hz {self.fastest_hz}"
            )
        return self

    def begin(self, model: Parameters, seed: int) -> State:
        """Start the shared part from the initial model."""
        return State(0, model.only(SHARED).prefixed("model/"))

    def enroll(self, state: State, card: AgentCard, seed: int) -> State:
        """In a simulated cell, give a newcomer a place and a clock, drawn from the seed and its name."""
        if self.rates == "measured" or card.agent in state.private:
            return state
        rng = np.random.default_rng([seed, int.from_bytes(card.agent.encode()[:32], "big"), 0xCE11])
        distance = math.sqrt(rng.uniform(self.nearest_km**2, self.farthest_km**2))
        clock = rng.uniform(self.slowest_hz, self.fastest_hz)
        drawn = {"distance_km": _number(distance), "cpu_hz": _number(clock)}
        return State(state.round, state.shared, {**state.private, card.agent: Parameters(drawn)})

    def plan(self, state: State, context: RoundContext) -> Sequence[Assignment]:
        """Send the shared part, and to everybody its pruning ratio; the excluded are left out."""
        allocation, out = self._decided(state, context)
        down = state.shared.under("model/")
        return [
            context.assign(card.agent, self._local_alt(self.ratio(allocation, card.agent)), down)
            for card in context.present
            if card.agent not in out
        ]

    def excluded(self, state: State, context: RoundContext) -> Mapping[str, str]:
        """Return who cannot meet the threshold this round, and why."""
        return self._decided(state, context)[1]

    def absorb(self, state: State, updates: Sequence[Update]) -> State:
        """Average FFL units over their keepers and the rest over all; note what was measured."""
        updates = in_order(updates)
        if not updates:
            return State(state.round + 1, state.shared, state.private)
        shares = shares_of(updates)
        mean = weighted_mean((u.parameters.only(SHARED - FFL) for u in updates), shares)
        mean = mean.updated(mean_of_keepers(updates, shares, state.shared.under("model/").only(FFL)))
        private = dict(state.private)
        if self.rates == "measured":
            for update in updates:
                known = private.get(update.agent, Parameters())
                private[update.agent] = known.updated(measured(update, state))
        return State(state.round + 1, state.shared.updated(mean.prefixed("model/")), private)

    def pools(self, name: str) -> bool:
        """Average the shared part."""
        return role_of(name) in SHARED

    def personal(self, state: State, agent: str) -> Parameters:
        """Return the shared part: the same for everybody."""
        return state.shared.under("model/")

    def allocation(self, state: State, context: RoundContext) -> Allocation:
        """Return this round's allocation, ratios in whole units, over the devices of which enough is known.

        Its latencies are those of the model (simulated cell) or of a forecast from earlier rounds (measured).
        """
        devices = self.devices(state, context)
        hidden = context.spec.hidden
        ratio_max = 1 - self._fewest(hidden) / hidden
        bandwidth = self._bandwidth(devices)
        threshold_s = self.threshold_s
        if threshold_s is None:
            long, short = reachable_s(devices, bandwidth), reachable_s(devices, bandwidth, ratio_max)
            threshold_s = max(long - self.tightness * (long - short), 1e-9)
        return allocate(devices, threshold_s, bandwidth, ratio_max=ratio_max).in_units(hidden)

    def devices(self, state: State, context: RoundContext) -> list[Device]:
        """Return what a round without pruning costs every present device of which enough is known."""
        mean = sum(card.examples for card in context.present) / max(1, len(context.present))
        found = []
        for card in context.present:
            known = state.private.get(card.agent, Parameters())
            costs = self._simulated(known, card, context.spec) or self._forecast(known, context.spec)
            if costs is None:
                continue
            fixed_s, compute_s, link = costs
            bits = payload_bits(context.spec, SHARED, self.encoding, masks=True)
            weight = max(card.examples, 1) / max(mean, 1) if self.weights == "examples" else 1.0
            device = Device(card.agent, fixed_s, bits.fixed, compute_s, bits.units, link, weight)
            found.append(device)
        return found

    def ratio(self, allocation: Allocation, agent: str) -> float:
        """Return what this agent prunes: nothing while nobody has measured it."""
        if agent in allocation.excluded:
            return allocation.ratio_max
        return allocation.shares[agent].ratio if agent in allocation.shares else 0.0

    # --- inside ------------------------------------------------------------------------------

    def _decided(self, state: State, context: RoundContext) -> tuple[Allocation, dict[str, str]]:
        """Return the allocation, and those it leaves out but for who is to be measured again."""
        allocation = self.allocation(state, context)
        out = {}
        for agent, reason in allocation.excluded.items():
            heard = state.private[agent].get("heard")
            if heard is None or context.round - float(heard[0]) <= ASKED_AGAIN:
                out[agent] = reason
        return allocation, out

    def _local_alt(self, ratio: float) -> LocalWork:
        rate = self.learning_rate
        term = ImportancePruning(
            ratio=ratio, score=self.score, epochs=self.importance_epochs, floor=self.floor
        )
        return self.work(
            phases=(
                Phase(train=HEAD, epochs=self.head_epochs, learning_rate=rate),
                Phase(train=EVERYTHING - HEAD, epochs=self.epochs, learning_rate=rate),
            ),
            terms=(term,) if ratio > 0 else (),
            send=SHARED,
            keep=HEAD,
        )

    def _fewest(self, hidden: int) -> int:
        """Return how many units of a block are left at the greatest pruning."""
        return min(hidden, max(self.floor, math.ceil(hidden * (1 - self.ratio_max) - 1e-6)))

    def _bandwidth(self, devices: Sequence[Device]) -> float:
        if self.rates == "simulated":
            return self.bandwidth_hz
        links = math.fsum(d.link.link_bps for d in devices if isinstance(d.link, Wire))
        return self.uplink_bps or max(links, 1.0)

    def _madds(self, spec: ModelSpec) -> tuple[float, float]:
        """Return multiply-adds per example: of what pruning leaves, and of what it shrinks.

        The personal phase computes what lies below the head once; a step back costs two steps forward.
        """
        cost = forward_cost(spec)
        pruned = self.epochs - self.importance_epochs
        head = self.head_epochs * 3 * cost.head + (cost.body + cost.ffl if self.head_epochs else 0)
        shared = self.epochs * (3 * cost.body + 2 * cost.head) + self.importance_epochs * 3 * cost.ffl
        return float(head + shared), float(pruned * 3 * cost.ffl)

    def _simulated(
        self, known: Parameters, card: AgentCard, spec: ModelSpec
    ) -> tuple[float, float, Link] | None:
        if "cpu_hz" not in known:
            return None
        fixed, shrinking = self._madds(spec)
        second = card.examples * self.cycles_per_madd / float(known["cpu_hz"][0])
        distance = float(known["distance_km"][0])
        base = Radio(self.base_power_dbm, distance, self.noise_dbm_hz)
        down_s = payload_bits(spec, SHARED, self.encoding_down).total / rate_bps(base, self.bandwidth_hz)
        link = Radio(self.power_dbm, distance, self.noise_dbm_hz)
        return down_s + fixed * second, shrinking * second, link

    def _forecast(self, known: Parameters, spec: ModelSpec) -> tuple[float, float, Link] | None:
        """Scale the measured seconds, of which a part was pruned, back to the dense model."""
        if "train" not in known or "rate_bps" not in known:
            return None
        seconds, kept = map(float, known["train"])
        fixed, shrinking = self._madds(spec)
        second = seconds / max(fixed + kept * shrinking, 1.0)
        return fixed * second, shrinking * second, Wire(float(known["rate_bps"][0]))


def measured(update: Update, state: State) -> Parameters:
    """Return what an update tells of its device: seconds of training with the share kept, and the rate up.

    The bytes are those of its update before, whose seconds are in this one's ledger.
    """
    found = {"heard": _number(state.round + 1)}
    train_s = sum(update.ledger[s].seconds for s in (Stage.TRAIN, Stage.PRUNE) if s in update.ledger)
    units = sum(a.size for name, a in state.shared.under("model/").items() if name.endswith(".ffl.up.bias"))
    if train_s > 0 and update.kept_units:
        found["train"] = np.array([train_s, sum(update.kept_units) / units])
    sending = update.ledger.get(Stage.SEND)
    if sending is not None and sending.seconds > 0 and update.sent_bytes > 0:
        found["rate_bps"] = _number(8 * update.sent_bytes / sending.seconds)
    return Parameters(found)


def _number(value: float) -> Array:
    return np.array([value], np.float64)


STRATEGY: type[Strategy] = AdaptivePruning
