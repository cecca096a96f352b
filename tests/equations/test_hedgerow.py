"""Our own strategy: its special cases are other strategies, and its steps are what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.strategies.base import State, load_strategy
from foundation.codec import array_bytes, frame_of
from foundation.messages import Update
from foundation.parameters import WEIGHTS, Parameters, Role
from foundation.spec import initial_parameters
from tests.toys import SPEC, ToyFederation, same

PLAIN: dict[str, Any] = {
    "target": 0,
    "gate_rate": 0,
    "schedule": "constant",
    "server_momentum": 0,
    "lean_after": 1,
    "encoding": "float32",
    "encoding_down": "float32",
    "learning_rate": 5e-3,
    "epochs": 2,
}
SAME = {"learning_rate": 5e-3, "epochs": 2}
ALL = {str(role): 1.0 for role in WEIGHTS}
NONE = {str(role): 0.0 for role in WEIGHTS}


def _three_rounds(toy: ToyFederation) -> tuple[State, list[Update]]:
    state, updates = toy.begin(), []
    for number in (1, 2, 3):
        state, updates = toy.round(state, number)
    return state, updates


@pytest.mark.parametrize(
    ("name", "gates"), [("fedavg", NONE), ("fedper", NONE | {"head": 1.0}), ("local", ALL)]
)
def test_gates_at_their_ends_are_other_strategies(name: str, gates: dict[str, float]) -> None:
    ours = ToyFederation(load_strategy("hedgerow", PLAIN | {"gates": gates}))
    theirs = ToyFederation(load_strategy(name, SAME))
    state, updates = _three_rounds(ours)
    reference, expected = _three_rounds(theirs)
    for mine, other in zip(updates, expected, strict=True):
        for figure in ("accuracy_sent", "accuracy", "loss_sent", "loss"):
            assert mine.metrics[figure] == pytest.approx(other.metrics[figure], abs=1e-5)
    for name_, array in reference.shared.items():
        assert np.allclose(state.shared[name_], array, atol=1e-5)


def _update(agent: str, change: Parameters, examples: int = 1, masks: Any = None) -> Update:
    thresholds = initial_parameters(SPEC, 0).only({Role.THRESHOLD})
    return Update(
        run="toy", round=1, agent=agent, examples=examples, parameters=change.updated(thresholds),
        masks=masks or {},
    )  # fmt: skip


def _changes(value: float) -> Parameters:
    model = initial_parameters(SPEC, 0).only(WEIGHTS)
    return Parameters((n, np.full_like(a, value)) for n, a in model.items())


def test_the_average_descends_along_the_mean_change_and_units_along_their_keepers() -> None:
    strategy = load_strategy("hedgerow", {"server_momentum": 0})
    state = strategy.begin(initial_parameters(SPEC, 0), 0)
    first, second = np.arange(SPEC.hidden) < 4, np.arange(SPEC.hidden) < 8
    masks = [{f"blocks.{i}.ffl": mask for i in range(SPEC.depth)} for mask in (first, second)]
    updates = [_update("a", _changes(1.0), 1, masks[0]), _update("b", _changes(3.0), 3, masks[1])]
    after = strategy.absorb(state, updates).shared.under("model/")
    moved = {n: a - after[n] for n, a in state.shared.under("model/").only(WEIGHTS).items()}
    assert np.allclose(moved["head.weight"], 2.5, atol=1e-6)  # (1 * 1 + 3 * 3) / 4
    up = moved["blocks.0.ffl.up.bias"]
    assert np.allclose(up[:4], 2.5)  # kept by both
    assert np.allclose(up[4:8], 3.0)  # by the second alone
    assert np.array_equal(up[8:], np.zeros(SPEC.hidden - 8))  # by nobody


def test_units_that_nobody_keeps_are_not_sent_again() -> None:
    settings = {"target": 0.75, "every": 1, "max_drop": 1.0, "floor": 1}
    toy = ToyFederation(load_strategy("hedgerow", settings), agents=1)
    state, updates = toy.round(toy.begin(), 1)
    kept = np.any([u.masks["blocks.0.ffl"] for u in updates], axis=0)
    assert 0 < kept.sum() < SPEC.hidden
    second = toy.plan(state, 2)[0]
    assert np.array_equal(second.masks["blocks.0.ffl"], kept)
    whole = second.model_copy(update={"masks": {}})
    assert sum(array_bytes(frame_of(second)).values()) < sum(array_bytes(frame_of(whole)).values())
    _, updates = toy.round(state, 2)
    for update in updates:
        assert not (update.masks["blocks.0.ffl"] & ~kept).any(), "what did not come cannot be kept"


def test_server_momentum_adds_a_share_of_the_step_before() -> None:
    strategy = load_strategy("hedgerow", {"server_momentum": 0.5, "target": 0})
    state = strategy.begin(initial_parameters(SPEC, 0), 0)
    one = strategy.absorb(state, [_update("a", _changes(1.0))])
    two = strategy.absorb(one, [_update("a", _changes(1.0))])
    name = "model/head.weight"
    assert np.allclose(state.shared[name] - one.shared[name], 1.0, atol=1e-6)
    assert np.allclose(one.shared[name] - two.shared[name], 1.5, atol=1e-6)


def test_lean_rounds_train_and_send_ffls_and_head_alone() -> None:
    toy = ToyFederation(load_strategy("hedgerow", {"lean_after": 0.5}))
    state = toy.begin()
    whole, lean = toy.plan(state, 1)[0], toy.plan(state, 2)[0]
    assert whole.work.phases[0].train >= WEIGHTS
    assert lean.work.phases[0].train == {Role.FFL, Role.HEAD, Role.THRESHOLD}
    state, updates = toy.round(state, 2)
    assert not updates[0].parameters.only({Role.ATTENTION, Role.REST})
    start = initial_parameters(SPEC, 0)
    assert same(state.shared.under("model/").only({Role.ATTENTION}), start.only({Role.ATTENTION}))
    assert not same(state.shared.under("model/").only({Role.HEAD}), start.only({Role.HEAD}))


def test_the_learning_rate_falls_along_a_cosine_to_a_twentieth() -> None:
    toy = ToyFederation(load_strategy("hedgerow", {"learning_rate": 1e-2}))
    state = toy.strategy.absorb(toy.begin(), [])  # nobody is new any more
    rates = [toy.plan(state, number)[0].work.phases[0].learning_rate for number in (1, 2, 3)]
    expected = [1e-2 * (0.05 + 0.95 * (1 + np.cos(np.pi * r / 3)) / 2) for r in (0, 1, 2)]
    assert rates == pytest.approx(expected)


def test_a_newcomer_starts_from_the_average_and_keeps_its_own_from_then_on() -> None:
    toy = ToyFederation(load_strategy("hedgerow", PLAIN))
    state, _ = _three_rounds(toy)
    late = toy.cards[0].model_copy(update={"agent": "d9"})
    toy.data["d9"], toy.specs["d9"] = toy.data["d0"], SPEC
    state = toy.strategy.enroll(state, late, 0)
    toy.cards = [late]
    (assignment,) = toy.plan(state, 4)
    assert same(assignment.parameters, state.shared.under("model/"))
    assert assignment.work.phases[0].learning_rate == PLAIN["learning_rate"]
    toy.work(assignment)
    assert {Role.HEAD, Role.FFL} <= {role for role in Role if toy.personal["d9"][0].only({role})}
