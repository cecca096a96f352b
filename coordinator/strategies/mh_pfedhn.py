"""MH-pFedHN: one federation of devices with different models, generated as flat vectors.

"MH-pFedHN" (arXiv 2507.22330, later IJCAI-26); its official code, read for the update. The coordinator knows
of a device the number of its weights, and generates that many from the device's own embeddings, chunk by
chunk, through a common trunk and the head of its group (coordinator/multihead.py). `teacher` is MH-pFedHNGD:
a model of the coordinator's own is one more client of the hypernetwork; everybody whose data suit it learns
from it by distillation, and trains it.

Ours: one step a round over all devices together, where theirs takes one after the other and depends on who
answers first; groups of near sizes; factored heads; devices start from their own initial model (`offset`);
heads of absent groups and embeddings of absent devices do not move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from coordinator import hypernet, multihead
from coordinator.aggregate import in_order, shares_of, weighted_mean
from coordinator.hypernet import Adam
from coordinator.multihead import Member, Sizes
from coordinator.strategies.base import RoundContext, State, Strategy
from foundation.messages import AgentCard, Assignment, Update
from foundation.parameters import WEIGHTS, Array, Parameters, from_flat
from foundation.spec import ModelSpec
from foundation.work import Distillation, LocalWork

TEACHER = "teacher/"
HEADS = "hypernet/group/"


class MhPFedHN(Strategy):
    """Every device's weights from a hypernetwork that knows their number alone."""

    unequal: ClassVar[bool] = True

    chunk: int = Field(1024, ge=1, le=1 << 20)
    """Weights that are generated from one embedding; the source's is 3072, of larger models."""
    bucket: int = Field(16, ge=1, le=4096)
    """Devices share a head when their numbers of chunks, rounded up to a multiple of this, are the same;
    1 is the source's."""
    embedding: int = Field(64, ge=1, le=4096)
    hidden: int = Field(128, ge=1, le=4096)
    heads: Literal["factored", "full"] = "factored"
    """`full` is the source's: hidden + 1 numbers of head for each one generated; `factored`: rank + 1."""
    rank: int = Field(16, ge=1, le=4096)
    """Of factored heads."""
    offset: bool = True
    """Devices add what is generated to the initial model that they draw themselves; false is the source's."""
    hypernet_rate: float = Field(1e-3, ge=0)
    """Learning rate of Adam on hypernetwork and embeddings."""
    hypernet_clip: float = Field(50.0, gt=0)
    """Largest norm of the hypernetwork's gradient, embeddings included."""
    topk: float = Field(1.0, gt=0, le=1)
    """Share of the change that is sent up."""
    newcomer_rounds: int = Field(0, ge=0)
    """Rounds in which an agent that joins after round 1 moves its own embeddings alone."""
    teacher: bool = False
    """Whether there is a global model that teaches and is taught (MH-pFedHNGD)."""
    alpha: float = Field(0.2, ge=0, le=1)
    """Weight of the teacher in a device's loss."""
    temperature: float = Field(15.0, gt=0)
    teacher_epochs: int = Field(1, ge=0, le=1000)
    """Epochs in which every device trains the teacher."""

    def begin(self, model: Parameters, seed: int) -> State:
        """Start what all groups share; `model` becomes the teacher's start, and counts for nothing else."""
        shared = multihead.begin(self._sizes, seed).prefixed("hypernet/")
        if self.teacher:
            start = model.only(WEIGHTS)
            rows = multihead.new_embeddings(self._sizes, start.size, [seed, 0x7EAC])
            shared = shared.updated(start.prefixed("start/")).updated({TEACHER + "embedding": rows})
            shared = self._with_head(shared, start.size, seed)
        return State(0, shared)

    def enroll(self, state: State, card: AgentCard, seed: int) -> State:
        """Draw embeddings for a newcomer, or where a model's size has changed; and the head of its group."""
        own = state.private.get(card.agent)
        if not card.size or (own is not None and own["size_joined"][0] == card.size):
            return state
        name = int.from_bytes(card.agent.encode()[:32], "big")
        rows = multihead.new_embeddings(self._sizes, card.size, [seed, name])
        numbers = np.array([card.size, state.round], np.int64)
        private = {**state.private, card.agent: Parameters({"size_joined": numbers, "embedding": rows})}
        return State(state.round, self._with_head(state.shared, card.size, seed), private)

    def excluded(self, state: State, context: RoundContext) -> Mapping[str, str]:
        """Leave out whose card does not tell the size of its model."""
        reason = "its card tells no model size: it has no data yet, or needs a newer version"
        return {card.agent: reason for card in context.present if card.agent not in state.private}

    def plan(self, state: State, context: RoundContext) -> Sequence[Assignment]:
        """Generate everybody's weights; the teacher goes to those whose data suit it."""
        cards = [card for card in context.present if card.agent in state.private]
        vectors = self._vectors(state, [card.agent for card in cards])
        alone, taught = self._work(), self._work(taught=True)
        teacher = self._teacher(state).prefixed(TEACHER) if self.teacher else Parameters()
        assignments = []
        for card, vector in zip(cards, vectors, strict=True):
            work, parameters = alone, Parameters({"flat": vector})
            if self.teacher and _suits(card, context.spec):
                work, parameters = taught, parameters.updated(teacher)
            assignments.append(context.assign(card.agent, work, parameters))
        return assignments

    def absorb(self, state: State, updates: Sequence[Update]) -> State:
        """One chain-rule step on trunk, heads and embeddings, of those who answered and of the teacher."""
        updates = in_order(updates)
        if updates:
            members = [self._member(state, u.agent) for u in updates]
            changes: list[Array] = [u.parameters["flat"] for u in updates]
            shares = shares_of(updates)
            lesson = _lesson(state, updates)
            if lesson is not None:
                members, changes, shares = [*members, _pupil(state)], [*changes, lesson], [*shares, 1.0]
            state = self._pulled_back(state, [u.agent for u in updates], members, changes, shares)
        return State(state.round + 1, state.shared, state.private)

    def pools(self, name: str) -> bool:
        """Average the teacher's change; vectors are each device's own."""
        return name.startswith(TEACHER)

    def pulls(self, state: State, updates: Sequence[Update]) -> Mapping[str, float]:
        """Return how hard each device pulls at trunk and head, its embeddings left out."""
        network, found = state.shared.under("hypernet/"), {}
        for update in updates:
            member, change = self._member(state, update.agent), update.parameters["flat"]
            gradient, _ = multihead.pull_back(self._sizes, network, [member], [change], [1.0])
            found[update.agent] = hypernet.norm(gradient)
        return found

    def personal(self, state: State, agent: str) -> Parameters:
        """Return the vector of this agent; what comes with it of the teacher is not its own."""
        return Parameters({"flat": self._vectors(state, [agent])[0]})

    @property
    def _sizes(self) -> Sizes:
        rank = self.rank if self.heads == "factored" else 0
        return Sizes(self.chunk, self.bucket, self.embedding, self.hidden, rank)

    def _work(self, *, taught: bool = False) -> LocalWork:
        lesson = Distillation(alpha=self.alpha, temperature=self.temperature, epochs=self.teacher_epochs)
        return self.work(
            layout="flat",
            offset=self.offset,
            send=WEIGHTS,
            change=WEIGHTS,
            topk=self.topk,
            terms=(lesson,) if taught else (),
        )

    def _with_head(self, shared: Parameters, size: int, seed: int) -> Parameters:
        """Add the head of that size, if it is not there; heads stand in the order of their numbers."""
        group = self._sizes.group(size)
        if f"hypernet/group/{group}/bias" in shared:
            return shared
        head = multihead.new_head(self._sizes, group, seed, offset=self.offset).prefixed("hypernet/")
        shared = shared.updated(head)
        heads = shared.prefixed_only(HEADS)
        by_number = sorted(heads.items(), key=lambda item: int(item[0].split("/")[2]))
        others = ((name, value) for name, value in shared.items() if name not in heads)
        return Parameters([*others, *by_number])

    def _member(self, state: State, agent: str) -> Member:
        own = state.private[agent]
        size, joined = (int(number) for number in own["size_joined"])
        new = joined > 0 and state.round < joined + self.newcomer_rounds
        return Member(size, own["embedding"], teaches=not new)

    def _vectors(self, state: State, agents: Sequence[str]) -> list[Array]:
        members = [self._member(state, agent) for agent in agents]
        return multihead.generate(self._sizes, state.shared.under("hypernet/"), members)

    def _teacher(self, state: State) -> Parameters:
        start = state.shared.under("start/")
        (vector,) = multihead.generate(self._sizes, state.shared.under("hypernet/"), [_pupil(state)])
        return from_flat(vector + start.flat() if self.offset else vector, start.layout)

    def _pulled_back(
        self,
        state: State,
        agents: Sequence[str],
        members: Sequence[Member],
        changes: Sequence[Array],
        shares: Sequence[float],
    ) -> State:
        """Move the network and the embeddings of all members: those of `agents`, and last the teacher's."""
        network = state.shared.under("hypernet/")
        gradient, rows = multihead.pull_back(self._sizes, network, members, changes, shares)
        norm = math.hypot(*(float(np.linalg.norm(g)) for g in (*gradient.values(), *rows)))
        scale = min(1.0, self.hypernet_clip / norm) if norm else 1.0
        adam = Adam(self.hypernet_rate)
        shared, private = state.shared, dict(state.private)
        for name, one in gradient.items():
            shared = _moved(adam, shared, "hypernet/" + name, one * scale)
        for agent, row in zip(agents, rows, strict=False):
            private[agent] = _moved(adam, private[agent], "embedding", row * scale)
        for row in rows[len(agents) :]:
            shared = _moved(adam, shared, TEACHER + "embedding", row * scale)
        return State(state.round, shared, private)


def _moved(adam: Adam, arrays: Parameters, name: str, gradient: Array) -> Parameters:
    """Move one array by its own Adam: what has no gradient in a round stays, with its moments."""
    prefix = f"moments/{name}/"
    moved, moments = adam.step(Parameters({"value": arrays[name]}), {"value": gradient}, arrays.under(prefix))
    return arrays.updated({name: moved["value"]}).updated(moments.prefixed(prefix))


def _lesson(state: State, updates: Sequence[Update]) -> Array | None:
    """Return the mean change of the teacher, flat, over those who trained it; None when nobody did."""
    taught = [u for u in updates if any(name.startswith(TEACHER) for name in u.parameters)]
    if not taught:
        return None
    mean = weighted_mean((u.parameters.under(TEACHER) for u in taught), shares_of(taught))
    return Parameters((name, mean[name]) for name in state.shared.under("start/")).flat()


def _pupil(state: State) -> Member:
    """Return the teacher as a member: a client of the hypernetwork like the others."""
    return Member(state.shared.under("start/").size, state.shared[TEACHER + "embedding"])


def _suits(card: AgentCard, spec: ModelSpec) -> bool:
    return (card.input, card.shape, len(card.labels)) == (spec.input, spec.shape, spec.classes)


STRATEGY: type[Strategy] = MhPFedHN
