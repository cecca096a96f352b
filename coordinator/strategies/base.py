"""What a strategy is: five verbs and no memory. State goes in and comes out."""

from __future__ import annotations

import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

import coordinator.strategies
from foundation.errors import SettingsError, StoreError
from foundation.frozen import Frozen
from foundation.messages import AgentCard, Assignment, Update
from foundation.parameters import Masks, Parameters
from foundation.spec import ModelSpec
from foundation.words import unknown
from foundation.work import Encoding, LocalWork, Phase


@dataclass(frozen=True, slots=True)
class State:
    """All a strategy knows between rounds."""

    round: int
    """Rounds absorbed so far."""
    shared: Parameters
    """`model/...`, `hypernet/...`, `moments/...`."""
    private: Mapping[str, Parameters] = field(default_factory=dict)
    """By agent: what belongs to it alone, such as its embedding."""

    def to_bytes(self) -> bytes:
        """Return a safetensors file of everything; the same state gives the same bytes."""
        arrays = {f"shared/{name}": np.ascontiguousarray(a) for name, a in self.shared.items()}
        for agent in sorted(self.private):
            for name, array in self.private[agent].items():
                arrays[f"private/{agent}/{name}"] = np.ascontiguousarray(array)
        # One key only: the library writes several in no fixed order. It also sorts arrays by size, so
        # their order is kept beside them.
        meta = {"round": self.round, "order": [*arrays], "agents": sorted(self.private)}
        return save_arrays(arrays, {"state": json.dumps(meta)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote; raises `StoreError` when it is not that."""
        try:
            length = int.from_bytes(data[:8], "little")
            meta = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["state"])
            arrays = load_arrays(data)
            named = [(name, arrays[name]) for name in meta["order"]]
            agents: list[str] = meta["agents"]
            rounds = int(meta["round"])
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StoreError(f"a snapshot cannot be read: {error}") from error
        everything = Parameters(named)
        private = {agent: everything.under(f"private/{agent}/") for agent in agents}
        return cls(rounds, everything.under("shared/"), private)


@dataclass(frozen=True, slots=True)
class RoundContext:
    """What a strategy may know when it plans a round."""

    run: str
    round: int
    rounds: int
    present: Sequence[AgentCard]
    spec: ModelSpec
    seed: int
    deadline_s: float
    strategy: str
    export: bool = False

    def assign(
        self, agent: str, work: LocalWork, parameters: Parameters, masks: Masks | None = None
    ) -> Assignment:
        """Return the assignment of one agent; the seed depends on run, round and agent alone."""
        digits = int.from_bytes(agent.encode()[:32], "big")
        seed = np.random.SeedSequence([self.seed, self.round, digits]).generate_state(1)[0]
        return Assignment(
            run=self.run,
            round=self.round,
            agent=agent,
            strategy=self.strategy,
            spec=self.spec,
            model_seed=self.seed,
            seed=int(seed),
            work=work,
            deadline_s=self.deadline_s,
            export=self.export,
            last=self.round == self.rounds,
            parameters=parameters,
            masks=masks or {},
        )


class Strategy(Frozen, ABC):
    """An algorithm. Its fields are its hyperparameters; a misspelt one is an error that names it.

    All verbs are pure: same arguments, same result; randomness comes from seeds. `absorb` does not care
    in which order updates are given and survives missing ones, even all of them.
    """

    unequal: ClassVar[bool] = False
    """Whether agents may differ in model and data; then only the size of theirs is known here."""

    mergeable: ClassVar[bool] = False
    """Whether an update of an earlier round can be merged with less weight. What an average absorbs can be;
    what a hypernetwork generated from other parameters cannot, as its gradient is of another place."""

    epochs: int = Field(2, ge=0, le=1000)
    """Local epochs a round."""
    learning_rate: float = Field(1.5e-3, gt=0)
    batch_size: int = Field(32, ge=1)
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = Field(0.9, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    encoding: Encoding = "float32"
    """How values travel up; `float16` halves the bytes, `int8` quarters them."""
    encoding_down: Encoding = "float32"
    """How values travel down, unless the run says so itself."""

    @abstractmethod
    def begin(self, model: Parameters, seed: int) -> State:
        """Return the state before the first round; `model` is the dense initial model."""

    @abstractmethod
    def enroll(self, state: State, card: AgentCard, seed: int) -> State:
        """Return the state with this agent known; no change for one that already is."""

    @abstractmethod
    def plan(self, state: State, context: RoundContext) -> Sequence[Assignment]:
        """Return what each present agent is asked to do."""

    def excluded(self, state: State, context: RoundContext) -> Mapping[str, str]:
        """Return whom `plan` leaves out among those present, each with the reason in words."""
        return {}

    @abstractmethod
    def absorb(self, state: State, updates: Sequence[Update]) -> State:
        """Return the state after a round."""

    def pools(self, name: str) -> bool:
        """Whether the array of that name is averaged over devices; others are for one device alone."""
        return False

    def pulls(self, state: State, updates: Sequence[Update]) -> Mapping[str, float]:
        """Return by agent how hard its update pulls at what a hypernetwork shares: a gradient's norm."""
        return {}

    @abstractmethod
    def personal(self, state: State, agent: str) -> Parameters:
        """Return what goes down to this agent at this state."""

    def work(self, **changes: Any) -> LocalWork:
        """Return local work with this strategy's common settings and `changes` on top."""
        settings: dict[str, Any] = {
            "phases": (Phase(epochs=self.epochs, learning_rate=self.learning_rate),),
            "batch_size": self.batch_size,
            "optimizer": self.optimizer,
            "momentum": self.momentum,
            "clip": self.clip,
            "encoding": self.encoding,
        }
        return LocalWork(**(settings | changes))


def available() -> list[str]:
    """Return the names of all strategies: the files of this folder."""
    names = (module.name for module in pkgutil.iter_modules(coordinator.strategies.__path__))
    return sorted(name for name in names if name != "base")


def load_strategy(name: str, settings: Mapping[str, Any] | None = None) -> Strategy:
    """Return the strategy of that name with these settings.

    Raises `SettingsError` that names the unknown strategy or key, the nearest one and all there are.
    """
    if name not in available():
        raise SettingsError(unknown("strategy", name, available()))
    kind: type[Strategy] = importlib.import_module(f"coordinator.strategies.{name}").STRATEGY
    try:
        return kind(**(settings or {}))
    except ValidationError as error:
        problems = [
            unknown("setting", ".".join(map(str, problem["loc"])), kind.model_fields)
            if problem["type"] == "extra_forbidden"
            else f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}"
            for problem in error.errors()
        ]
        raise SettingsError(f"strategy {name}: {'; '.join(problems)}") from error
