"""Our own strategy: its special cases are other strategies, and its steps are what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.strategies.base import State, load_strategy
from foundation.codec import array_bytes, frame_of
from foundation.energy import EnergyReading, Stage
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
    "rest": 0,
    "encoding": "float32",
    "encoding_down": "float32",
    "learning_rate": 5e-3,
    "epochs": 2,
    "first_epochs": 2,
}
SAME = {"learning_rate": 5e-3, "epochs": 2}
ALL = {str(role): 1.0 for role in WEIGHTS}
NONE = {str(role): 0.0 for role in WEIGHTS}


def _three_rounds(toy: ToyFederation) -> tuple[State, list[Update]]:
    state = toy.begin()
    updates: list[Update] = []
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
    state = ToyFederation(strategy).begin()
    first, second = np.arange(SPEC.hidden) < 4, np.arange(SPEC.hidden) < 8
    masks = [{f"blocks.{i}.ffl": mask for i in range(SPEC.depth)} for mask in (first, second)]
    updates = [_update("d0", _changes(1.0), 1, masks[0]), _update("d1", _changes(3.0), 3, masks[1])]
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
    state = ToyFederation(strategy).begin()
    one = strategy.absorb(state, [_update("d0", _changes(1.0))])
    two = strategy.absorb(one, [_update("d0", _changes(1.0))])
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


# --- rest ----------------------------------------------------------------------------------------


def test_a_converged_device_sits_out_the_next_round_and_serves_what_it_has() -> None:
    toy = ToyFederation(load_strategy("hedgerow", {"converged": 1e9}))
    state, trained = toy.round(toy.begin(), 1)
    plans = toy.plan(state, 2)
    assert [(p.work.train, len(p.parameters)) for p in plans] == [(False, 0)] * 3
    rested, updates = toy.round(state, 2)
    assert same(rested.shared, state.shared)
    for before, now in zip(trained, updates, strict=True):
        assert not now.parameters
        assert now.kept_units == before.kept_units
        for figure in ("accuracy", "loss", "validation"):
            assert now.metrics[figure] == now.metrics[f"{figure}_sent"] == before.metrics[figure]
    assert all(p.work.train for p in toy.plan(rested, 3))


def test_rests_grow_by_one_up_to_the_setting_and_end_when_there_is_something_to_learn() -> None:
    strategy = load_strategy("hedgerow", {"converged": 0.5, "rest": 2})
    toy = ToyFederation(strategy, agents=1)
    state = toy.begin()
    rounds: list[bool] = []
    for number, loss in enumerate([0.6, 0.5, None, 0.1, None, None, 0.9, 0.2, None], 1):
        (plan,) = toy.plan(state, number)
        rounds.append(plan.work.train)
        update = _update("d0", _changes(0.0)).model_copy(update={"metrics": {"loss_trained": loss}})
        rested = update.model_copy(update={"metrics": {}, "parameters": Parameters()})
        state = strategy.absorb(state, [update if plan.work.train else rested])
    assert rounds == [True, True, False, True, False, False, True, True, False]


def test_a_devices_first_round_is_short() -> None:
    toy = ToyFederation(load_strategy("hedgerow", {"epochs": 3, "first_epochs": 1}))
    state = toy.begin()
    later = toy.strategy.absorb(state, [])
    assert [toy.plan(s, n)[0].work.phases[0].epochs for s, n in ((state, 1), (later, 2))] == [1, 3]
    late = toy.cards[0].model_copy(update={"agent": "late"})
    later = toy.strategy.enroll(later, late, 0)
    toy.cards = [*toy.cards, late]
    assert [plan.work.phases[0].epochs for plan in toy.plan(later, 2)] == [3, 3, 3, 1]


def test_nobody_rests_at_rest_0() -> None:
    toy = ToyFederation(load_strategy("hedgerow", {"converged": 1e9, "rest": 0}))
    state, _ = toy.round(toy.begin(), 1)
    assert all(p.work.train for p in toy.plan(state, 2))


# --- the residual --------------------------------------------------------------------------------

RESIDUAL = {"residual": 2, "target": 0, "server_momentum": 0, "embedding": 4, "hidden": 8}


def _attention(value: float) -> Parameters:
    changes = _changes(0.0)
    return changes.updated({n: a + value for n, a in changes.only({Role.ATTENTION}).items()})


def _begun(agents: int = 2) -> tuple[ToyFederation, State]:
    toy = ToyFederation(load_strategy("hedgerow", RESIDUAL), agents=agents)
    state = toy.begin()
    return toy, State(1, state.shared, state.private)  # round 1 sends nothing, here or elsewhere


def _sent(toy: ToyFederation, state: State) -> list[Parameters]:
    return [toy.strategy.personal(state, card.agent) for card in toy.cards]


def test_at_first_nobody_has_a_residual() -> None:
    toy, state = _begun()
    average = state.shared.under("model/")
    for sent in _sent(toy, state):
        assert same(sent, average)


def test_what_all_have_in_common_moves_the_average_alone() -> None:
    toy, state = _begun()
    after = toy.strategy.absorb(state, [_update(c.agent, _attention(1e-2)) for c in toy.cards])
    assert same(after.shared.under("residual/"), state.shared.under("residual/"))
    first, second = _sent(toy, after)
    assert same(first, second)
    assert np.allclose(first["blocks.0.attention.qkv.weight"],
                       state.shared["model/blocks.0.attention.qkv.weight"] - 1e-2)  # fmt: skip


def test_what_they_do_not_have_in_common_moves_the_residuals_apart() -> None:
    toy, state = _begun()
    before = state
    for _ in range(3):
        updates = [_update(c.agent, _attention(s)) for c, s in zip(toy.cards, (1e-2, -1e-2), strict=True)]
        state = toy.strategy.absorb(state, updates)
    assert same(state.shared.under("model/"), before.shared.under("model/"), 1e-7)
    first, second = _sent(toy, state)
    name = "blocks.1.attention.qkv.weight"
    start = before.shared[f"model/{name}"]
    assert (first[name] - second[name]).mean() < -1e-3
    rows = [state.private[c.agent]["embedding"] for c in toy.cards]
    assert not np.array_equal(rows[0], before.private["d0"]["embedding"])
    # A factored head: the residual has the rank that was asked for, whoever it is for.
    residuals = np.stack([(sent[name] - start).ravel() for sent in (first, second)])
    assert np.linalg.matrix_rank(residuals, tol=1e-6) <= RESIDUAL["residual"]


def test_the_residuals_step_is_the_gradient_of_the_deviations() -> None:
    toy, state = _begun()
    rng = np.random.default_rng(0)
    changes = [
        Parameters((n, rng.normal(size=a.shape).astype(np.float32)) for n, a in _changes(0.0).items())
        for _ in toy.cards
    ]
    updates = [_update(c.agent, change) for c, change in zip(toy.cards, changes, strict=True)]
    after = toy.strategy.absorb(state, updates)
    name = "blocks.0.attention.qkv.weight"
    network = state.shared.under("residual/")
    codes = []
    for card in toy.cards:
        v = state.private[card.agent]["embedding"]
        f = np.sqrt(len(v)) * v / np.linalg.norm(v)
        for i in range(2):
            f = np.maximum(network[f"trunk.{i}.weight"] @ f + network[f"trunk.{i}.bias"], 0)
        codes.append(network[f"head/{name}.mix"] @ f)
    mean = (changes[0][name] + changes[1][name]) / 2
    deviations = [(change[name] - mean).ravel() for change in changes]
    gradient = sum(np.outer(d, code) / 2 for d, code in zip(deviations, codes, strict=True))
    first = after.shared[f"residual_moments/first/head/{name}.weight"]
    assert np.allclose(first, 0.1 * gradient, atol=1e-6)  # Adam's first moment: (1 - 0.9) g


def test_a_newcomer_begins_at_the_mean_of_the_embeddings() -> None:
    toy, state = _begun()
    updates = [_update(c.agent, _attention(s)) for c, s in zip(toy.cards, (1e-2, -1e-2), strict=True)]
    state = toy.strategy.absorb(state, updates)
    late = toy.cards[0].model_copy(update={"agent": "late"})
    state = toy.strategy.enroll(state, late, 0)
    rows = [state.private[name]["embedding"] for name in ("d0", "d1")]
    assert np.allclose(state.private["late"]["embedding"], np.mean(rows, axis=0), atol=1e-7)


# --- density by what a device can afford ---------------------------------------------------------


def test_who_can_afford_more_units_within_the_threshold_keeps_them() -> None:
    toy = ToyFederation(load_strategy("hedgerow", {"threshold_s": 1.0}))
    state = toy.begin()
    for agent, seconds, rate in (("d0", 1e-3, 1e9), ("d1", 0.97, 1e5)):
        known = {"train": np.array([seconds, 1.0]), "rate_bps": np.array([rate])}
        own = {agent: state.private[agent].updated(known)}
        state = State(state.round, state.shared, {**state.private, **own})
    terms = [plan.work.pruning() for plan in toy.plan(state, 1)]
    fast, slow, unknown = (term.target for term in terms if term is not None)
    assert fast == 0
    assert 0 < slow < 0.9
    assert unknown == 0, "nobody has measured it yet"
    everybody = ToyFederation(load_strategy("hedgerow", {}))
    (term, *_) = [plan.work.pruning() for plan in everybody.plan(everybody.begin(), 1)]
    assert term is not None
    assert term.target == 0.9


def test_what_a_round_took_is_noted_for_the_allocation() -> None:
    reading = EnergyReading(seconds=2.0)
    update = _update("d0", _changes(0.0)).model_copy(
        update={
            "ledger": {Stage.TRAIN: reading, Stage.SEND: reading},
            "sent_bytes": 1000,
            "kept_units": (8, 8),
        }
    )
    for settings, expected in (({"threshold_s": 1.0}, True), ({}, False)):
        toy = ToyFederation(load_strategy("hedgerow", settings))
        known = toy.strategy.absorb(toy.begin(), [update]).private["d0"]
        assert ("train" in known) is expected
        if expected:
            assert known["train"].tolist() == [2.0, 0.5]  # 16 of 32 units
            assert known["rate_bps"].tolist() == [4000.0]
