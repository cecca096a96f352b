"""FedTP's and PFL-TPP's round against what it must be in its limits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator import hypernet
from coordinator.aggregate import shares_of, weighted_mean
from coordinator.hypernet import Adam
from coordinator.strategies.base import State, load_strategy
from edge_agent.answer import largest
from foundation.messages import Update
from foundation.parameters import EVERYTHING, WEIGHTS, Parameters, Role, role_of
from foundation.spec import initial_parameters
from foundation.work import Phase
from tests.toys import SPEC, ToyFederation, same

ATTENTION = {Role.ATTENTION}
FAST = {"learning_rate": 5e-3, "epochs": 1}
RANKS = pytest.mark.parametrize("rank", [0, 3], ids=["full", "factored"])


def _without(parameters: Parameters, role: Role) -> Parameters:
    return Parameters((n, a) for n, a in parameters.items() if role_of(n.removeprefix("model/")) != role)


def _constant(state: State) -> State:
    """The same state with a hypernetwork that gives everybody its biases."""
    shared = {n: a * 0 if n.startswith("hypernet/head/") and n.endswith(".weight") else a
              for n, a in state.shared.items()}  # fmt: skip
    biases = {n: a for n, a in state.shared.items() if n.endswith(".bias")}
    return dataclasses.replace(state, shared=Parameters(shared | biases))


@RANKS
def test_a_constant_hypernetwork_that_learns_nothing_is_fedavg_with_frozen_attention(rank: int) -> None:
    # Frozen: what attention becomes on a device is thrown away, so that everybody starts from the first one.
    ours = ToyFederation(load_strategy("fedtp", {"hypernet_rate": 0, "rank": rank} | FAST))
    theirs = ToyFederation(load_strategy("fedavg", FAST))
    a, b = _constant(ours.begin()), theirs.begin()
    frozen = b.shared.under("model/").only(ATTENTION).prefixed("model/")
    for number in (1, 2, 3):
        a, _ = ours.round(a, number)
        b, _ = theirs.round(b, number)
        b = dataclasses.replace(b, shared=b.shared.updated(frozen))
        for agent in ours.data:
            assert same(ours.strategy.personal(a, agent), theirs.strategy.personal(b, agent))
    assert not same(b.shared, theirs.begin().shared), "something must have been learned"


@RANKS
def test_a_round_is_one_step_of_adam_along_one_product_and_the_mean_of_the_rest(rank: int) -> None:
    toy = ToyFederation(load_strategy("fedtp", {"rank": rank} | FAST))
    state = toy.begin()
    after, updates = toy.round(state, 1)
    rows = np.stack([state.private[u.agent]["embedding"] for u in updates])
    network, shares = state.shared.under("hypernet/"), shares_of(updates)
    changes = [u.parameters.only(ATTENTION) for u in updates]
    gradient, row_gradient = hypernet.pull_back(network, rows, changes, shares)
    stepped, _ = Adam(5e-3).step(network, gradient, Parameters())
    assert same(after.shared.under("hypernet/"), stepped)
    rest = weighted_mean([_without(u.parameters, Role.ATTENTION) for u in updates], shares)
    assert same(after.shared.under("model/"), rest)
    for update, row, g in zip(updates, rows, row_gradient, strict=True):
        moved, _ = Adam(5e-3).step(Parameters({"v": row}), {"v": g}, Parameters())
        assert np.array_equal(after.private[update.agent]["embedding"], moved["v"])


@RANKS
def test_a_small_step_brings_what_is_sent_nearer_to_what_was_trained(rank: int) -> None:
    settings = {"hypernet_rate": 1e-5, "rank": rank} | FAST
    toy = ToyFederation(load_strategy("fedtp", settings))
    state = toy.begin()
    after, updates = toy.round(state, 1)

    def distance(at: State) -> float:
        total = 0.0
        for share, update in zip(shares_of(updates), updates, strict=True):
            sent = toy.strategy.personal(state, update.agent).only(ATTENTION)
            trained = sent - update.parameters.only(ATTENTION)
            now = toy.strategy.personal(at, update.agent).only(ATTENTION)
            total += share / 2 * float(np.square((now - trained).flat().astype(np.float64)).sum())
        return total

    assert distance(after) < distance(state)


def test_the_embeddings_of_absent_agents_do_not_move() -> None:
    toy = ToyFederation(load_strategy("fedtp", FAST))
    state, updates = toy.round(toy.begin(), 1)  # with moments, which would move them
    updates = [toy.work(a) for a in toy.plan(state, 2)]
    after = toy.strategy.absorb(state, updates[:1])
    assert not same(after.private["d0"], state.private["d0"])
    assert same(after.private["d1"], state.private["d1"])
    assert same(after.private["d2"], state.private["d2"])


def test_the_averaged_attention_is_never_sent() -> None:
    toy = ToyFederation(load_strategy("fedtp", FAST))
    state, _ = toy.round(toy.begin(), 1)
    assert {role_of(n) for n in state.shared.under("model/")} == WEIGHTS - ATTENTION
    (first, second, _) = [a.parameters for a in toy.plan(state, 2)]
    for name in first:
        assert (role_of(name) in ATTENTION) != np.array_equal(first[name], second[name]), name


def test_the_largest_of_all_are_all() -> None:
    rng = np.random.default_rng(0)
    change = rng.standard_normal((24, 8)).astype(np.float32)
    for share in (1.0, 1 - 1e-9):
        assert np.array_equal(largest(change, share), change)
    half = largest(change, 0.5)
    assert np.count_nonzero(half) == change.size / 2
    assert np.abs(half[half != 0]).min() >= np.abs(change[half == 0]).max()


# ---- PFL-TPP without pruning ----

INACTIVE: dict[str, dict[str, object]] = {
    "warming up": {"warm_up": 1000},
    "no force": {"warm_up": 0, "regulariser": 0.0, "task_gradient": False, "every": 1},
}


@RANKS
@pytest.mark.parametrize("how", INACTIVE)
def test_without_pruning_pfl_tpp_is_fedtp_bit_for_bit(how: str, rank: int) -> None:
    common = FAST | {"rank": rank, "personal_head": False}
    plain = ToyFederation(load_strategy("fedtp", common))
    pruning = ToyFederation(load_strategy("pfl_tpp", common | {"ffl": "mean"} | INACTIVE[how]))
    a, b = plain.begin(), pruning.begin()
    if how == "no force":
        # Thresholds as good as minus infinity, which the wire would refuse, and that nothing moves.
        low = {n: np.full_like(x, -50.0) for n, x in b.shared.items() if n.endswith(".threshold")}
        b = dataclasses.replace(b, shared=b.shared.updated(low))
    for number in (1, 2, 3):
        a, ours = plain.round(a, number)
        b, theirs = pruning.round(b, number)
        pairs: list[tuple[Update, Update]] = list(zip(ours, theirs, strict=True))
        for one, other in pairs:
            assert one.parameters == _without(other.parameters, Role.THRESHOLD)
            assert other.kept_units == (SPEC.hidden,) * SPEC.depth
        assert a.shared == _without(b.shared, Role.THRESHOLD)
        assert a.private == b.private


def test_with_pruning_it_is_not() -> None:
    common = FAST | {"personal_head": False}
    plain = ToyFederation(load_strategy("fedtp", common))
    pruning = ToyFederation(
        load_strategy("pfl_tpp", common | {"ffl": "mean", "warm_up": 0, "every": 1, "threshold_rate": 0.5})
    )
    a, b = plain.begin(), pruning.begin()
    for number in (1, 2):
        a, _ = plain.round(a, number)
        b, updates = pruning.round(b, number)
    assert sum(updates[0].kept_units) < SPEC.hidden * SPEC.depth
    assert a.shared != _without(b.shared, Role.THRESHOLD)


def test_attention_that_teaches_nothing_stands_still_on_the_device() -> None:
    # PFL-TPS's uplink with a constant hypernetwork: FedAvg of a model whose attention does not train.
    settings = FAST | {"uplink": "embed", "ffl": "mean", "personal_head": False, "warm_up": 1000}
    ours = ToyFederation(load_strategy("pfl_tpp", settings))
    a = _constant(ours.begin())
    theirs = ToyFederation(load_strategy("fedavg", FAST))
    b = theirs.begin()
    phases = (Phase(train=EVERYTHING - ATTENTION, epochs=1, learning_rate=5e-3),)
    for number in (1, 2):
        a, _ = ours.round(a, number)
        plan = theirs.plan(b, number)
        frozen = [x.model_copy(update={"work": x.work.model_copy(update={"phases": phases})}) for x in plan]
        b = theirs.strategy.absorb(b, [theirs.work(x) for x in frozen])
        assert same(_without(a.shared.under("model/"), Role.THRESHOLD), _without(b.shared.under("model/"), Role.ATTENTION))  # fmt: skip  # noqa: E501
    assert same(b.shared.under("model/").only(ATTENTION), initial_parameters(SPEC, 0).only(ATTENTION))
