"""Updates whose arrays stay in the store: the same numbers, in memory that does not grow with the round."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.collector import expected_layout
from coordinator.robust.settle import Round, judged, settled
from coordinator.settings import Robust
from coordinator.shelf import Shelf
from coordinator.strategies.base import State, load_strategy
from foundation.codec import frame_of
from foundation.errors import StoreError
from foundation.messages import Assignment, Update
from foundation.parameters import Parameters
from tests.toys import ToyFederation

STRATEGIES = ("fedavg", "fedper", "fedtp", "pfl_tpp", "adaptive_pruning", "hedgerow")


class Frames:
    """What a store has."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int, str], bytes] = {}

    def __call__(self, run: str, round: int, agent: str) -> bytes:
        if (run, round, agent) not in self.kept:
            raise StoreError("there is none")
        return self.kept[run, round, agent]

    def keep(self, update: Update) -> Update:
        self.kept[update.run, update.round, update.agent] = frame_of(update)
        return update


def answer(assignment: Assignment) -> Update:
    rng = np.random.default_rng(assignment.seed)
    layout = expected_layout(assignment)
    return Update(
        run=assignment.run,
        round=assignment.round,
        agent=assignment.agent,
        examples=int(rng.integers(1, 9)),
        parameters=Parameters((name, rng.normal(size=shape).astype(np.float32)) for name, shape in layout),
    )


def absorbed(name: str, agents: int, most_bytes: int) -> tuple[State, State, Shelf]:
    """Return the state of a round whose updates are in memory, of one whose are not, and their shelf."""
    toy, frames, robust = ToyFederation(load_strategy(name), agents=agents), Frames(), Robust()
    state = toy.begin()
    assignments = list(toy.plan(state, 1))
    whole = [answer(assignment) for assignment in assignments]
    shelf = Shelf(frames, most_bytes)
    states = []
    for updates in (whole, [shelf.put(frames.keep(update)) for update in whole]):
        round = Round.of(assignments, updates, 1)
        assert not judged(robust, toy.strategy, round).quarantined
        states.append(toy.strategy.absorb(state, settled(robust, toy.strategy, state, round)))
    return states[0], states[1], shelf


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_read_again_is_absorbed_to_the_same_bits(name: str) -> None:
    whole, shelved, shelf = absorbed(name, agents=5, most_bytes=1)
    assert shelf.readings > 0
    assert whole.to_bytes() == shelved.to_bytes()


def test_what_is_in_memory_at_once_does_not_depend_on_how_many_there_are() -> None:
    bound = 100_000
    few, many = (absorbed("fedavg", agents, bound)[2] for agents in (8, 40))
    assert few.peak_bytes <= bound
    assert many.peak_bytes <= bound
    # Once for whom to quarantine and once for the mean, whatever the number of names.
    assert many.readings <= 2 * 40


def test_a_small_round_is_not_read_again() -> None:
    assert absorbed("fedavg", 5, 2**30)[2].readings == 0


def test_names_are_known_without_reading_and_a_lost_frame_is_an_error() -> None:
    frames = Frames()
    shelf = Shelf(frames)
    update = Update(
        run="r", round=1, agent="a", examples=1, parameters=Parameters({"head.bias": np.ones(2, np.float32)})
    )
    shelved = shelf.put(update)
    shelf.clear()
    assert list(shelved.parameters) == ["head.bias"]
    assert len(shelved.parameters) == 1
    assert "head.bias" in shelved.parameters
    assert "other" not in shelved.parameters
    assert shelf.readings == 0
    with pytest.raises(StoreError, match="there is none"):
        shelved.parameters["head.bias"]
    frames.keep(update)
    assert shelf.take("r", 1, "a") == update
