"""A federation small enough for a test: toy data, a toy model, rounds without a wire."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.strategies.base import RoundContext, State, Strategy
from edge_agent.answer import arrived, kept, to_send, weights_of
from edge_agent.samples import LocalData, Part
from edge_agent.training.trainer import Checkpoint, Outcome, Progress, Task, carry_out
from foundation.codec import frame_of, update_from
from foundation.energy import Stage
from foundation.messages import AgentCard, Assignment, Update
from foundation.normalisation import Normalisation
from foundation.parameters import Parameters, layout_size
from foundation.spec import ModelSpec, initial_parameters
from foundation.work import ABILITIES

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


def toy_card(agent: str, data: LocalData, spec: ModelSpec = SPEC) -> AgentCard:
    return AgentCard(
        agent=agent,
        version="0",
        profile="unknown-linux",
        examples=data.examples,
        input=data.input,
        shape=data.shape,
        labels=data.labels,
        terms=ABILITIES,
        size=layout_size(weights_of(spec)),
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

    def pause(self) -> float:
        return 0.0

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
    own_specs: Mapping[str, ModelSpec] = field(default_factory=dict)
    """Models of the devices that have one of their own, for strategies with unequal models."""
    personal: dict[str, tuple[Parameters, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [f"d{i}" for i in range(self.agents)]
        self.specs = {name: self.own_specs.get(name, self.spec) for name in names}
        self.data = {name: toy_data(i, spec=self.specs[name]) for i, name in enumerate(names)}
        self.cards = [toy_card(agent, data, self.specs[agent]) for agent, data in self.data.items()]

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
        agent, work = assignment.agent, assignment.work
        spec = self.specs[agent] if work.layout == "flat" else self.spec
        own, steps = self.personal.get(agent, (Parameters(), 0))
        before = initial_parameters(spec, self.seed).updated(own)
        sent = arrived(assignment, spec, before)
        start = before.updated(sent)
        teacher = assignment.spec if work.distillation() else None
        task = Task(
            spec,
            work,
            start,
            sent,
            self.data[agent],
            assignment.seed,
            teacher=teacher,
            pruning_steps=steps,
            own=own,
            offered=assignment.masks,
        )
        outcome = carry_out(task, Quiet())
        self.personal[agent] = kept(outcome.parameters, outcome.extra, work), outcome.pruning_steps
        update = update_of(assignment, self.data[agent], outcome, sent)
        return update_from(frame_of(update))  # what arrives, not what is sent

    def round(self, state: State, number: int) -> tuple[State, list[Update]]:
        updates = [self.work(assignment) for assignment in self.plan(state, number)]
        return self.strategy.absorb(state, updates), updates


def update_of(assignment: Assignment, data: LocalData, outcome: Outcome, sent: Parameters) -> Update:
    return Update(
        run=assignment.run,
        round=assignment.round,
        agent=assignment.agent,
        examples=data.examples,
        metrics=outcome.metrics,
        kept_units=outcome.kept_units,
        parameters=to_send(outcome.parameters, outcome.extra, sent, assignment.work),
        masks=outcome.masks,
    )


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], tolerance: float = 0.0) -> bool:
    """Whether two mappings hold the same arrays, to a tolerance."""
    if a.keys() != b.keys():
        return False
    return all(np.allclose(a[n], b[n], rtol=0, atol=tolerance, equal_nan=False) for n in a)
