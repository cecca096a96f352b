"""A federation small enough for a test: toy data, a toy model, rounds without a wire."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.strategies.base import RoundContext, State, Strategy
from edge_agent.agent import to_send
from edge_agent.samples import LocalData, Part
from edge_agent.training.trainer import Checkpoint, Outcome, Progress, Task, carry_out
from foundation.codec import frame_of, update_from
from foundation.energy import Stage
from foundation.messages import AgentCard, Assignment, Update
from foundation.normalisation import Normalisation
from foundation.parameters import Parameters
from foundation.spec import ModelSpec, initial_parameters
from foundation.work import TERMS

SPEC = ModelSpec(input="image", shape=(1, 4, 4), classes=3, width=8, depth=2, heads=2, ffl_ratio=2, patch=2)
LABELS = ("a", "b", "c")


def toy_data(seed: int, *, examples: int = 48, spec: ModelSpec = SPEC) -> LocalData:
    """Classes that differ in their mean image, in shares that differ from device to device."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(7).normal(size=(spec.classes, *spec.shape)) * 2
    shares = rng.dirichlet([0.7] * spec.classes)

    def part(count: int) -> Part:
        if spec.input == "text":
            x = rng.integers(0, spec.classes, (count, *spec.shape))
            return Part(x, (x + 1) % spec.classes)
        y = rng.choice(spec.classes, size=count, p=shares)
        x = means[y] + rng.normal(size=(count, *spec.shape))
        return Part(x.astype(np.float32), y.astype(np.int64))

    train = part(examples)
    labels = tuple("abcdefghij"[: spec.classes])
    learned = Normalisation.learn(train.x, spec.input)
    return LocalData(spec.input, spec.shape, labels, train, part(8), part(24), learned)


def toy_card(agent: str, data: LocalData) -> AgentCard:
    return AgentCard(
        agent=agent,
        version="0",
        profile="unknown-linux",
        examples=data.examples,
        input=data.input,
        shape=data.shape,
        labels=data.labels,
        terms=TERMS,
    )


@dataclass
class Quiet:
    """Trainer hooks that keep checkpoints in memory and can call the work off after some steps."""

    checkpoints: list[Checkpoint] = field(default_factory=list)
    resume: Checkpoint | None = None
    stages: list[Stage] = field(default_factory=list)
    progresses: list[Progress] = field(default_factory=list)
    stop_after: int | None = None

    def stage(self, stage: Stage) -> contextlib.AbstractContextManager[None]:
        self.stages.append(stage)
        return contextlib.nullcontext()

    def progress(self, progress: Progress) -> None:
        self.progresses.append(progress)

    def cancelled(self) -> bool:
        return self.stop_after is not None and len(self.progresses) >= self.stop_after

    def save(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(checkpoint)

    def load(self) -> Checkpoint | None:
        return self.resume


@dataclass
class ToyFederation:
    """Strategy and devices in one place, with nothing between them."""

    strategy: Strategy
    agents: int = 3
    seed: int = 0
    spec: ModelSpec = SPEC
    personal: dict[str, tuple[Parameters, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = {f"d{i}": toy_data(i, spec=self.spec) for i in range(self.agents)}
        self.cards = [toy_card(agent, data) for agent, data in self.data.items()]

    def begin(self) -> State:
        state = self.strategy.begin(initial_parameters(self.spec, self.seed), self.seed)
        for card in self.cards:
            state = self.strategy.enroll(state, card, self.seed)
        return state

    def context(self, number: int) -> RoundContext:
        return RoundContext(
            run="toy",
            round=number,
            rounds=3,
            present=self.cards,
            spec=self.spec,
            seed=self.seed,
            deadline_s=60,
            strategy="toy",
        )

    def plan(self, state: State, number: int) -> Sequence[Assignment]:
        return self.strategy.plan(state, self.context(number))

    def work(self, assignment: Assignment) -> Update:
        own, steps = self.personal.get(assignment.agent, (Parameters(), 0))
        start = initial_parameters(self.spec, self.seed).updated(own).updated(assignment.parameters)
        data = self.data[assignment.agent]
        task = Task(self.spec, assignment.work, start, assignment.parameters, data, assignment.seed, steps)
        outcome = carry_out(task, Quiet())
        self.personal[assignment.agent] = (
            outcome.parameters.only(assignment.work.keep),
            outcome.pruning_steps,
        )
        return update_from(frame_of(update_of(assignment, data, outcome)))  # what arrives, not what is sent

    def round(self, state: State, number: int) -> tuple[State, list[Update]]:
        updates = [self.work(assignment) for assignment in self.plan(state, number)]
        return self.strategy.absorb(state, updates), updates


def update_of(assignment: Assignment, data: LocalData, outcome: Outcome) -> Update:
    return Update(
        run=assignment.run,
        round=assignment.round,
        agent=assignment.agent,
        examples=data.examples,
        metrics=outcome.metrics,
        kept_units=outcome.kept_units,
        parameters=to_send(outcome.parameters, assignment.parameters, assignment.work),
        masks=outcome.masks,
    )


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], tolerance: float = 0.0) -> bool:
    """Whether two mappings hold the same arrays, to a tolerance."""
    if a.keys() != b.keys():
        return False
    return all(np.allclose(a[n], b[n], rtol=0, atol=tolerance, equal_nan=False) for n in a)
