"""FedTP: attention generated for each device by a hypernetwork, the rest averaged.

Li et al., "FedTP: Federated Learning by Transformer Personalization", TNNLS 2023, arXiv 2211.01572; its
official code, read for the update. Theirs: a projection to query, key and value from an embedding, one
vector-Jacobian product a round, shares by examples. Ours: Adam at the coordinator, head biases that start
as a sane model, embeddings that move only for those who took part (see coordinator/hypernet.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from coordinator import hypernet
from coordinator.aggregate import in_order, shares_of, weighted_mean
from coordinator.hypernet import Adam, Shape
from coordinator.strategies.base import RoundContext, State, Strategy
from foundation.messages import AgentCard, Assignment, Update
from foundation.parameters import WEIGHTS, Array, Parameters, Role

ATTENTION = frozenset({Role.ATTENTION})


class FedTP(Strategy):
    """Attention from the agent's embedding; everything else as in FedAvg."""

    embedding: int = Field(32, ge=1, le=4096)
    hidden: int = Field(64, ge=1, le=4096)
    hypernet_rate: float = Field(5e-3, ge=0)
    """Learning rate of Adam on hypernetwork and embeddings; 0 leaves them as they are."""
    topk: float = Field(1.0, gt=0, le=1)
    """Share of the attention change that is sent up."""
    personal_head: bool = False
    """Keep the head on the device instead of averaging it."""

    def averaged(self) -> frozenset[Role]:
        """Roles that are averaged."""
        return WEIGHTS - ATTENTION - ({Role.HEAD} if self.personal_head else frozenset())

    def own(self) -> frozenset[Role]:
        """Roles that never leave the device."""
        return frozenset({Role.HEAD}) if self.personal_head else frozenset()

    def begin(self, model: Parameters, seed: int) -> State:
        """Start hypernetwork and mean from the initial model."""
        network = hypernet.begin(self._shape(model), model, seed)
        mean = model.only(self.averaged())
        return State(0, network.prefixed("hypernet/").updated(mean.prefixed("model/")))

    def enroll(self, state: State, card: AgentCard, seed: int) -> State:
        """Give a newcomer an embedding, drawn from the seed and its name."""
        if card.agent in state.private:
            return state
        name = int.from_bytes(card.agent.encode()[:32], "big")
        row = hypernet.new_embedding(self._shape_of(state), [seed, name])
        private = {**state.private, card.agent: Parameters({"embedding": row})}
        return State(state.round, state.shared, private)

    def plan(self, state: State, context: RoundContext) -> Sequence[Assignment]:
        """Generate everybody's attention and send it with the mean."""
        work = self.work(send=self.averaged() | ATTENTION, change=ATTENTION, topk=self.topk, keep=self.own())
        down = self._generated(state, [card.agent for card in context.present])
        return [context.assign(card.agent, work, down[card.agent]) for card in context.present]

    def absorb(self, state: State, updates: Sequence[Update]) -> State:
        """One chain-rule step for attention, the mean for the rest."""
        updates = in_order(updates)
        if not updates:
            return State(state.round + 1, state.shared, state.private)
        mean = weighted_mean([u.parameters.only(self.averaged()) for u in updates], shares_of(updates))
        state = self._pulled_back(state, updates)
        return State(state.round + 1, state.shared.updated(mean.prefixed("model/")), state.private)

    def personal(self, state: State, agent: str) -> Parameters:
        """Return the mean with this agent's own generated attention on top."""
        return self._generated(state, [agent])[agent]

    def _generated(self, state: State, agents: Sequence[str]) -> dict[str, Parameters]:
        if not agents:
            return {}
        rows = np.stack([state.private[agent]["embedding"] for agent in agents])
        shape, network = self._shape_of(state), state.shared.under("hypernet/")
        attention = hypernet.generate(shape, network, rows)
        mean = state.shared.under("model/")
        return {agent: mean.updated(own) for agent, own in zip(agents, attention, strict=True)}

    def _pulled_back(self, state: State, updates: Sequence[Update]) -> State:
        rows = np.stack([state.private[u.agent]["embedding"] for u in updates])
        network = state.shared.under("hypernet/")
        changes = [u.parameters.only(ATTENTION) for u in updates]
        shape = self._shape_of(state)
        gradient, row_gradient = hypernet.pull_back(shape, network, rows, changes, shares_of(updates))
        adam = Adam(self.hypernet_rate)
        network, moments = adam.step(network, gradient, state.shared.under("moments/"))
        shared = state.shared.updated(network.prefixed("hypernet/"))
        shared = shared.updated(moments.prefixed("moments/"))
        private = dict(state.private)
        for update, row in zip(updates, row_gradient, strict=True):
            private[update.agent] = self._moved(adam, private[update.agent], row)
        return State(state.round, shared, private)

    def _moved(self, adam: Adam, own: Parameters, gradient: Array) -> Parameters:
        """Move one embedding by its own Adam: absent agents' rows never move."""
        embedding = Parameters({"embedding": own["embedding"]})
        embedding, moments = adam.step(embedding, {"embedding": gradient}, own.under("moments/"))
        return own.updated(embedding).updated(moments.prefixed("moments/"))

    def _shape(self, model: Parameters) -> Shape:
        return Shape(model.only(ATTENTION).layout, self.embedding, self.hidden)

    def _shape_of(self, state: State) -> Shape:
        """Read the generated layout back from the heads: (3d, d) for every attention tensor."""
        heads = state.shared.under("hypernet/head/")
        layout = []
        for name, bias in heads.items():
            if name.endswith(".bias"):
                width = round((bias.size / 3) ** 0.5)
                layout.append((name.removesuffix(".bias"), (3 * width, width)))
        return Shape(tuple(layout), self.embedding, self.hidden)


STRATEGY: type[Strategy] = FedTP
