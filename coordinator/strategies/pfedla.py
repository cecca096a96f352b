"""pFedLA: every agent gets its own layer-wise mixture of everybody's last parameters.

Ma et al., "Layer-wised Model Aggregation for Personalized Federated Learning", CVPR 2022, arXiv 2205.03993;
only its abstract and figures could be read, and there is no official code. Theirs: a row of weights per agent
and layer, from one hypernetwork per agent; HeurpFedLA, which keeps the K most self-weighted layers on the
device (`heuristic`). Ours: softmax rows that start near self, a step without unit in which the weight on self
learns slowly (coordinator/mixing.py), no hypernetwork as the default, and that nobody is mixed before it has
sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from coordinator import mixing
from coordinator.aggregate import in_order
from coordinator.mixing import Layers
from coordinator.strategies.base import RoundContext, State, Strategy
from foundation.errors import SettingsError
from foundation.messages import AgentCard, Assignment, Update
from foundation.parameters import WEIGHTS, Array, BoolArray, Parameters

HELD = "held"
"""Of an agent: which layers its device kept from the coordinator in its last round, (layers,)."""


class PFedLA(Strategy):
    """A mixture per agent and layer; its weights follow what training changes."""

    layers: Literal["parts", "blocks", "tensors"] = "parts"
    """What is mixed with one weight: attention and FFL of a block apart, whole blocks, or every tensor."""
    mixing: Literal["direct", "hypernetwork"] = "direct"
    """What is stepped: the weights' logits themselves, or an embedding and a small MLP of each agent."""
    mixing_rate: float = Field(1.0, ge=0)
    """Step of the logits, which has no unit; 0 leaves the weights where they start."""
    self_rate: float = Field(0.1, ge=0)
    """How far the weight on self moves, relative to that: 1 follows the source, 0 leaves it where it starts.
    What a device trained last always lies in the direction of what it trains next."""
    embedding: int = Field(16, ge=1, le=4096)
    """Numbers in an agent's embedding, with `hypernetwork`."""
    hidden: int = Field(32, ge=1, le=4096)
    """Width of its MLP."""
    heuristic: int = Field(0, ge=0)
    """HeurpFedLA: so many layers, those with the largest weight on self, are neither sent nor received."""

    def begin(self, model: Parameters, seed: int) -> State:
        """Start from the initial model; raises `SettingsError` when more layers should stay than it has."""
        weights = model.only(WEIGHTS)
        count = len(mixing.layers_of(weights, self.layers))
        if self.heuristic > count:
            raise SettingsError(
                f"pfedla: heuristic = {self.heuristic}, but the model has {count} layers as {self.layers!r}:"
                f" give {count} or less"
            )
        return State(0, weights.prefixed("model/"))

    def enroll(self, state: State, card: AgentCard, seed: int) -> State:
        """Give a newcomer the next column and weights that start near self."""
        if card.agent in state.private:
            return state
        count = len(self._layers(state))
        arrays: dict[str, Array] = {"column": np.array([len(state.private)], np.int64)}
        arrays[HELD] = np.zeros(count, np.bool_)
        if self.mixing == "direct":
            arrays["mixing/offsets"] = np.zeros((count, 0), np.float64)
        else:
            name = int.from_bytes(card.agent.encode()[:32], "big")
            drawn = mixing.new_hypernetwork(count, self.embedding, self.hidden, [seed, name, 0x1A])
            arrays |= drawn.prefixed("mixing/")
        return State(state.round, state.shared, {**state.private, card.agent: Parameters(arrays)})

    def plan(self, state: State, context: RoundContext) -> Sequence[Assignment]:
        """Send everybody its mixture, without the layers that stay on the device."""
        agents = [card.agent for card in context.present]
        mixtures = self._mixtures(state, agents)
        layers = self._layers(state)
        assignments = []
        for agent in agents:
            own = tuple(name for layer in self.retained(state, agent) for name in layers[layer])
            # With HeurpFedLA the device keeps all it trained: another layer may stay there next time.
            keep = WEIGHTS if self.heuristic else frozenset()
            work = self.work(send=WEIGHTS, keep=keep, own=own)
            assignments.append(context.assign(agent, work, mixtures[agent]))
        return assignments

    def absorb(self, state: State, updates: Sequence[Update]) -> State:
        """Step the weights of those who took part, then keep what they trained as their last parameters."""
        updates = in_order(updates)
        directions = self._directions(state, updates) if updates and self.mixing_rate else {}
        private, layers = dict(state.private), self._layers(state)
        for update in updates:
            own = private[update.agent]
            if update.agent in directions:
                own = own.updated(self._stepped(state, own, directions[update.agent]))
            held = [names[0] not in update.parameters for names in layers.values()]
            last = update.parameters.only(WEIGHTS).prefixed("last/")
            private[update.agent] = own.updated(last).updated({HELD: np.array(held, np.bool_)})
        return State(state.round + 1, state.shared, private)

    def personal(self, state: State, agent: str) -> Parameters:
        """Return this agent's mixture, without the layers that are on its device."""
        return self._mixtures(state, [agent])[agent]

    def weights(self, state: State, agent: str) -> dict[str, dict[str, float]]:
        """Return an agent's mixing weights by layer and agent; a layer's sum to 1."""
        found = {}
        for layer in self._each_layer(state, [agent]):
            row = zip(_columns(state), layer.alpha[0], strict=True)
            found[layer.name] = {other: float(weight) for other, weight in row}
        return found

    def retained(self, state: State, agent: str) -> list[str]:
        """Return the layers that stay on this agent's device: those most weighted on self.

        Among equals, as at the start, those nearest to the answer: ours, after what FedPer keeps.
        """
        if not self.heuristic:
            return []
        layers = list(self._layers(state))
        own = self._offsets(state, agent)[:, _column(state, agent)]
        ranked = sorted(range(len(layers)), key=lambda index: (own[index], index), reverse=True)
        return [layers[index] for index in sorted(ranked[: self.heuristic])]

    # --- inside --------------------------------------------------------------------------------

    def _layers(self, state: State) -> Layers:
        return mixing.layers_of(state.shared.under("model/"), self.layers)

    def _offsets(self, state: State, agent: str) -> Array:
        """Return an agent's offsets (layers, N), from which its weights come."""
        source = self._widened(state, state.private[agent])
        if self.mixing == "hypernetwork":
            return mixing.hypernetwork_offsets(source).astype(np.float64)
        return source["offsets"]

    def _widened(self, state: State, own: Parameters) -> Parameters:
        """Return what an agent's offsets come from, with a column for everybody who joined since."""
        source, column = own.under("mixing/"), int(own["column"][0])
        if self.mixing == "hypernetwork":
            return mixing.widened_hypernetwork(source, len(state.private), column)
        return Parameters({"offsets": mixing.widened(source["offsets"], len(state.private), column)})

    def _stepped(self, state: State, own: Parameters, direction: Array) -> Parameters:
        source = self._widened(state, own)
        if self.mixing == "hypernetwork":
            source = mixing.stepped(source, direction.astype(np.float32), self.mixing_rate)
        else:
            source = Parameters({"offsets": source["offsets"] - self.mixing_rate * direction})
        return source.prefixed("mixing/")

    def _away(self, state: State, agent: str) -> frozenset[str]:
        """Return the layers that do not go down: retained ones, and those the device only now lets go of.

        Of the latter the coordinator has an old version; the device's own comes up first.
        """
        held = zip(self._layers(state), state.private[agent][HELD], strict=True)
        return frozenset(self.retained(state, agent)) | {layer for layer, there in held if there}

    def _mixtures(self, state: State, agents: Sequence[str]) -> dict[str, Parameters]:
        """Return what goes down to each agent: the layers that are not away, mixed."""
        model = state.shared.under("model/")
        away = {agent: self._away(state, agent) for agent in agents}
        found: dict[str, dict[str, Array]] = {agent: {} for agent in agents}
        for layer in self._each_layer(state, agents):
            # Before anybody has sent it, all have the initial one, and a mean of equals may round.
            mixed = layer.mixtures if layer.known.any() else [layer.models[0]] * len(agents)
            for agent, mixture in zip(agents, mixed, strict=True):
                if layer.name not in away[agent]:
                    found[agent] |= mixing.tensors(mixture, layer.tensors, model)
        return {agent: Parameters(arrays) for agent, arrays in found.items()}

    def _directions(self, state: State, updates: Sequence[Update]) -> dict[str, Array]:
        """Return the direction of every updater's offsets, (layers, N); 0 for layers that did not go down."""
        agents = [update.agent for update in updates]
        away = {agent: self._away(state, agent) for agent in agents}
        found = np.zeros((len(agents), len(self._layers(state)), len(state.private)))
        for index, layer in enumerate(self._each_layer(state, agents)):
            got = [i for i, agent in enumerate(agents) if layer.name not in away[agent]]
            if got:
                trained = np.stack([mixing.vector(updates[i].parameters, layer.tensors) for i in got])
                changes = layer.mixtures[got] - trained
                own = np.array([_column(state, agents[i]) for i in got])
                alpha = layer.alpha[got].astype(changes.dtype)
                step = mixing.Step(alpha, own, layer.models, changes)
                found[got, index] = step.direction(layer.known, self.self_rate)
        return dict(zip(agents, found, strict=True))

    def _each_layer(self, state: State, agents: Sequence[str]) -> Iterator[_Layer]:
        """Give one layer after another, so that only one layer of everybody is stacked at a time."""
        model, everybody = state.shared.under("model/"), _columns(state)
        lasts = [state.private[agent].under("last/") for agent in everybody]
        layers = self._layers(state)
        known = np.array([[names[0] in last for last in lasts] for names in layers.values()], np.bool_)
        rows = [mixing.weights(self._offsets(state, a), _column(state, a), known) for a in agents]
        for index, (name, tensors) in enumerate(layers.items()):
            sources = (last if there else model for last, there in zip(lasts, known[index], strict=True))
            models = np.stack([mixing.vector(source, tensors) for source in sources])
            yield _Layer(name, tensors, known[index], np.stack([row[index] for row in rows]), models)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of everybody, and the weights of some agents."""

    name: str
    tensors: tuple[str, ...]
    known: BoolArray
    """Who has sent it, (N,); the others' is the initial model's, and has no weight."""
    alpha: Array
    """(agents, N), float64."""
    models: Array
    """(N, values of the layer)."""

    @property
    def mixtures(self) -> Array:
        """The agents' mixtures, (agents, values of the layer)."""
        mixed: Array = self.alpha.astype(self.models.dtype) @ self.models
        return mixed


def _column(state: State, agent: str) -> int:
    return int(state.private[agent]["column"][0])


def _columns(state: State) -> list[str]:
    """Return all agents in the order of their columns, which is that of joining."""
    return sorted(state.private, key=lambda agent: _column(state, agent))


STRATEGY: type[Strategy] = PFedLA
