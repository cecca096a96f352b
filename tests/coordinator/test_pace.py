"""Soft deadlines from history, who is still at work, and what a late update weighs."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from coordinator.pace import Busy, age_s, answer_s, late_reason
from coordinator.robust.settle import Round, settled
from coordinator.settings import Robust, RunSettings
from coordinator.store.records import RoundRecord, UpdateRecord
from coordinator.strategies.base import available, load_strategy
from tests.toys import ToyFederation, same


def when(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def opened(number: int, at: float) -> RoundRecord:
    return RoundRecord("r", number, "closed", (), 0.0, when(at), when(at + 60))


def stored(number: int, agent: str, at: float) -> UpdateRecord:
    return UpdateRecord("r", number, agent, when(at), {}, None, 0)


def test_the_soft_deadline_is_what_the_middle_device_takes() -> None:
    rounds = [opened(1, 0), opened(2, 100)]
    updates = [
        *(stored(1, "a", 10), stored(2, "a", 112)),  # 11 in the middle
        stored(2, "b", 120),
        stored(2, "c", 1100),  # late, and measured all the same
        stored(9, "d", 1.0),  # of a round nobody looks at
    ]
    assert answer_s(rounds, updates) == 20
    assert answer_s(rounds, []) is None


def test_who_is_at_work_is_not_asked_until_it_would_be_too_late() -> None:
    now = [0.0]
    busy = Busy(lambda: now[0])
    busy.add("a", 1, 10.0)
    busy.add("b", 2, 20.0)
    assert busy.rounds() == {"a": 1, "b": 2}
    busy.done("b", 1)
    assert busy.rounds() == {"a": 1, "b": 2}, "that was another round's"
    busy.done("b", 2)
    now[0] = 10.0
    assert busy.rounds() == {}
    busy.add("a", 1, 30.0)
    assert busy.rounds(first=2) == {}


@pytest.mark.parametrize("name", available())
def test_what_cannot_be_merged_says_so(name: str) -> None:
    merges = {"fedavg", "fedprox", "fedper", "local", "adaptive_pruning", "hedgerow"}
    assert load_strategy(name).mergeable is (name in merges)
    assert late_reason(RunSettings(strategy=name), 1) == ""
    said = late_reason(RunSettings(strategy=name, stale=0.5), 1)
    assert said is None if name in merges else said == f", and {name} cannot merge late updates"
    if name in merges:
        assert late_reason(RunSettings(strategy=name, stale=0.5, stale_rounds=2), 3) == (
            ", and 3 rounds late are more than 2"
        )


@pytest.mark.parametrize("name", ["fedavg", "fedper", "adaptive_pruning", "hedgerow"])
def test_a_late_update_moves_less_in_the_same_direction(name: str) -> None:
    toy = ToyFederation(load_strategy(name, {"learning_rate": 5e-3, "epochs": 1}))
    state, _ = toy.round(toy.begin(), 1)
    late = toy.work(toy.plan(state, 2)[0])
    state, _ = toy.round(state, 2)
    now = toy.plan(state, 3)
    steps = {}
    for staleness in (0.0, 1.0):
        found = Round.of(now, [late], 3, staleness)
        assert found.weights == ((1.0,) if staleness == 0 else (0.5,))
        after = toy.strategy.absorb(state, settled(Robust(), toy.strategy, state, found))
        steps[staleness] = after.shared.under("model/") - state.shared.under("model/")
    momentum = toy.strategy.absorb(state, []).shared.under("model/") - state.shared.under("model/")
    half = {n: 0.5 * (steps[0.0][n] + momentum[n]) for n in steps[1.0]}
    for key in half:
        if name == "hedgerow" and not key.endswith("threshold"):
            # On top of what its momentum does, which no update changes.
            velocity = state.shared.get(f"velocity/{key}", np.zeros(1))
            carried = -0.5 * velocity
            assert np.allclose(steps[1.0][key] - carried, 0.5 * (steps[0.0][key] - carried), atol=1e-5), key
        else:
            assert np.allclose(steps[1.0][key], half[key], atol=1e-5), key


def test_an_update_on_time_is_left_as_it_is() -> None:
    toy = ToyFederation(load_strategy("fedavg"))
    state = toy.begin()
    assignments = toy.plan(state, 1)
    updates = [toy.work(a) for a in assignments]
    ready = settled(Robust(), toy.strategy, state, Round.of(assignments, updates, 1, 0.5))
    assert all(a is b for a, b in zip(ready, updates, strict=True))


def test_values_that_came_late_are_a_step_towards_them() -> None:
    """FedAsync: x + (1 + s)^-a (x_late - x)."""
    toy = ToyFederation(load_strategy("fedavg", {"epochs": 1}))
    state = toy.begin()
    late = toy.work(toy.plan(state, 1)[0])
    state, _ = toy.round(state, 1)
    now = toy.plan(state, 4)
    (ready,) = settled(Robust(), toy.strategy, state, Round.of(now, [late], 4, 0.5))
    base, weight = now[0].parameters, 4**-0.5
    expected = {n: base[n] + weight * (a - base[n]) for n, a in late.parameters.items()}
    assert same(ready.parameters, expected, 1e-6)


@pytest.mark.parametrize(
    ("now", "age"), [(1000.0, 0.0), (1030.0, 30.0), (1060.0, 0.0), (1e6, 0.0), (999.0, 0.0), (-5.0, 0.0)]
)
def test_a_clock_that_was_set_neither_ends_a_round_nor_keeps_it_open_for_ever(now: float, age: float) -> None:
    assert age_s(1000.0, now, 60.0) == age
