"""FedTP: attention generated for each device by a hypernetwork, the rest averaged.

Li et al., "FedTP: Federated Learning by Transformer Personalization", TNNLS 2023, arXiv 2211.01572; its
official code, read for the update. Theirs: a projection to query, key and value from an embedding, one
vector-Jacobian product a round, shares by examples. Ours: Adam at the coordinator, head biases that start
as a sane model, factored heads, embeddings that move only for those who took part (see
coordinator/hypernet.py), and that a newcomer finds its embedding on the device, in its first round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from coordinator import hypernet
from coordinator.aggregate import in_order, shares_of, weighted_mean
from coordinator.hypernet import Adam, Shape
from coordinator.strategies.base import RoundContext, State, Strategy
from foundation.messages import AgentCard, Assignment, Update
from foundation.parameters import WEIGHTS, Array, Parameters, Role, role_of
from foundation.work import EmbeddingFit, LocalWork, Phase, Term

ATTENTION = frozenset({Role.ATTENTION})
FRESH = "fresh"
"""Stands in a newcomer's private arrays until its first update."""


class FedTP(Strategy):
    """Attention from the agent's embedding; everything else as in FedAvg."""

    embedding: int = Field(32, ge=1, le=4096)
    hidden: int = Field(64, ge=1, le=4096)
    rank: int = Field(0, ge=0, le=4096)
    """Of the hypernetwork's heads; 0 makes them full, as in the source."""
    hypernet_rate: float = Field(5e-3, ge=0)
    """Learning rate of Adam on hypernetwork and embeddings; 0 leaves them as they are."""
    topk: float = Field(1.0, gt=0, le=1)
    """Share of the change of what is generated that is sent up."""
    personal_head: bool = False
    """Keep the head on the device instead of averaging it."""
    cold_start: bool = True
    """Whether an agent that joins after round 1 first finds its embedding, and moves nothing else."""
    cold_start_epochs: int = Field(5, ge=1, le=1000)
    """Epochs in which a newcomer looks for its embedding."""
    cold_start_rate: float = Field(0.1, gt=0)
    """Learning rate at which it looks."""
    cold_start_local: int | None = Field(None, ge=0, le=1000)
    """Local epochs that follow on the device; without it, `epochs`."""

    def generated(self) -> frozenset[Role]:
        """Roles that the hypernetwork generates."""
        return ATTENTION

    def averaged(self) -> frozenset[Role]:
        """Roles that are averaged."""
        return WEIGHTS - self.generated() - self.own()

    def own(self) -> frozenset[Role]:
        """Roles that never leave the device."""
        return frozenset({Role.HEAD}) if self.personal_head else frozenset()

    def begin(self, model: Parameters, seed: int) -> State:
        """Start hypernetwork and mean from the initial model."""
        layout = model.only(self.generated()).layout
        network = hypernet.begin(Shape(layout, self.embedding, self.hidden, self.rank), model, seed)
        mean = model.only(self.averaged())
        return State(0, network.prefixed("hypernet/").updated(mean.prefixed("model/")))

    def enroll(self, state: State, card: AgentCard, seed: int) -> State:
        """Give a newcomer an embedding, drawn from the seed and its name."""
        if card.agent in state.private:
            return state
        name = int.from_bytes(card.agent.encode()[:32], "big")
        own = {"embedding": hypernet.new_embedding(self.embedding, [seed, name])}
        if state.round and self.cold_start:
            own[FRESH] = np.ones(1, np.float32)
        return State(state.round, state.shared, {**state.private, card.agent: Parameters(own)})

    def plan(self, state: State, context: RoundContext) -> Sequence[Assignment]:
        """Generate for everybody and send it with the mean; newcomers get the hypernetwork as well."""
        usual, first = self.usual_work(context), self.first_work()
        down = self._generated(state, [card.agent for card in context.present])
        network = state.shared.prefixed_only("hypernet/")
        assignments = []
        for card in context.present:
            work, parameters, own = usual, down[card.agent], state.private[card.agent]
            # Who cannot look for an embedding takes part as everybody else does.
            if FRESH in own and first.needs() <= card.terms:
                work, embedding = first, Parameters({"embedding": own["embedding"]})
                parameters = parameters.updated(network).updated(embedding)
            assignments.append(context.assign(card.agent, work, parameters))
        return assignments

    def absorb(self, state: State, updates: Sequence[Update]) -> State:
        """Set the embeddings that newcomers found; one chain-rule step and the mean from the others."""
        state, updates = _settled(state, in_order(updates))
        if updates:
            mean = self.mean(state, updates)
            state = self._pulled_back(state, updates) if self.learns() else state
            state = State(state.round, state.shared.updated(mean.prefixed("model/")), state.private)
        return State(state.round + 1, state.shared, state.private)

    def pools(self, name: str) -> bool:
        """Average what is not generated; that is each device's own."""
        return role_of(name) in self.averaged()

    def pulls(self, state: State, updates: Sequence[Update]) -> Mapping[str, float]:
        """Return how hard each device pulls at the hypernetwork, its embedding left out."""
        network, found = state.shared.under("hypernet/"), {}
        for update in updates:
            change = update.parameters.only(self.generated())
            if change and self.learns():
                row = state.private[update.agent]["embedding"][None]
                gradient, _ = hypernet.pull_back(network, row, [change], [1.0])
                found[update.agent] = hypernet.norm(gradient)
        return found

    def personal(self, state: State, agent: str) -> Parameters:
        """Return the mean with what is generated for this agent on top."""
        return self._generated(state, [agent])[agent]

    def usual_work(self, context: RoundContext) -> LocalWork:
        """Return what an agent is asked to do in this round."""
        roles = self.generated()
        return self.work(send=self.averaged() | roles, change=roles, topk=self.topk, keep=self.own())

    def first_work(self) -> LocalWork:
        """Return what a newcomer is asked to do: find its embedding, then train what it keeps."""
        fit = EmbeddingFit(epochs=self.cold_start_epochs, learning_rate=self.cold_start_rate)
        epochs = self.epochs if self.cold_start_local is None else self.cold_start_local
        phases = (Phase(epochs=epochs, learning_rate=self.learning_rate),)
        return self.work(phases=phases, terms=(fit, *self.first_terms()), send=frozenset(), keep=self.own())

    def first_terms(self) -> tuple[Term, ...]:
        """Return the terms that hold for a newcomer besides."""
        return ()

    def mean(self, state: State, updates: Sequence[Update]) -> Parameters:
        """Return what the updates make of the averaged part."""
        return weighted_mean((u.parameters.only(self.averaged()) for u in updates), shares_of(updates))

    def learns(self) -> bool:
        """Whether updates bring what the hypernetwork can learn from."""
        return True

    def _generated(self, state: State, agents: Sequence[str]) -> dict[str, Parameters]:
        if not agents:
            return {}
        rows = np.stack([state.private[agent]["embedding"] for agent in agents])
        generated = hypernet.generate(state.shared.under("hypernet/"), rows)
        mean = state.shared.under("model/")
        return {agent: mean.updated(own) for agent, own in zip(agents, generated, strict=True)}

    def _pulled_back(self, state: State, updates: Sequence[Update]) -> State:
        rows = np.stack([state.private[u.agent]["embedding"] for u in updates])
        network = state.shared.under("hypernet/")
        changes = [u.parameters.only(self.generated()) for u in updates]
        gradient, row_gradient = hypernet.pull_back(network, rows, changes, shares_of(updates))
        adam = Adam(self.hypernet_rate)
        network, moments = adam.step(network, gradient, state.shared.under("moments/"))
        shared = state.shared.updated(network.prefixed("hypernet/"))
        shared = shared.updated(moments.prefixed("moments/"))
        private = dict(state.private)
        for update, row in zip(updates, row_gradient, strict=True):
            private[update.agent] = _moved(adam, private[update.agent], row)
        return State(state.round, shared, private)


def _settled(state: State, updates: Sequence[Update]) -> tuple[State, list[Update]]:
    """Take newcomers in: set what they found; return the updates of those who took part as usual."""
    private, usual = dict(state.private), []
    for update in updates:
        own = Parameters((n, a) for n, a in private[update.agent].items() if n != FRESH)
        found = update.parameters.get("embedding")
        private[update.agent] = own if found is None else own.updated({"embedding": found})
        usual += [update] if found is None else []
    return State(state.round, state.shared, private), usual


def _moved(adam: Adam, own: Parameters, gradient: Array) -> Parameters:
    """Move one embedding by its own Adam: absent agents' rows never move."""
    embedding = Parameters({"embedding": own["embedding"]})
    embedding, moments = adam.step(embedding, {"embedding": gradient}, own.under("moments/"))
    return own.updated(embedding).updated(moments.prefixed("moments/"))


STRATEGY: type[Strategy] = FedTP
