"""pFedHN: everything is generated, and one chain-rule step is all that happens to the state."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator import hypernet
from coordinator.aggregate import shares_of
from coordinator.hypernet import Adam
from coordinator.strategies.base import load_strategy
from foundation.parameters import WEIGHTS, Parameters, Role, role_of
from foundation.spec import ModelSpec, initial_parameters
from tests.toys import SPEC, ToyFederation, same

FAST = {"learning_rate": 5e-3, "epochs": 1}


@pytest.mark.parametrize("personal_head", [False, True])
def test_every_weight_is_generated_and_nothing_is_averaged(personal_head: bool) -> None:
    toy = ToyFederation(load_strategy("pfedhn", FAST | {"personal_head": personal_head}))
    state = toy.begin()
    roles = WEIGHTS - {Role.HEAD} if personal_head else WEIGHTS
    wanted = {name for name, _ in SPEC.layout if role_of(name) in roles}
    assert not state.shared.under("model/")
    for assignment in toy.plan(state, 1):
        assert set(assignment.parameters) == wanted
        assert assignment.work.change == assignment.work.send == roles
        assert assignment.work.keep == WEIGHTS - roles
        assert set(toy.work(assignment).parameters) == wanted
    one, other, _ = [a.parameters for a in toy.plan(state, 1)]
    assert not any(np.array_equal(one[name], other[name]) for name in wanted)


@pytest.mark.parametrize("rank", [0, 3], ids=["full", "factored"])
def test_a_round_is_one_step_of_adam_along_one_product(rank: int) -> None:
    toy = ToyFederation(load_strategy("pfedhn", FAST | {"rank": rank, "hypernet_rate": 1e-3}))
    before, _ = toy.round(toy.begin(), 1)
    state, updates = toy.round(before, 2)
    rows = np.stack([before.private[u.agent]["embedding"] for u in updates])
    network = before.shared.under("hypernet/")
    gradient, _ = hypernet.pull_back(network, rows, [u.parameters for u in updates], shares_of(updates))
    stepped, moments = Adam(1e-3).step(network, gradient, before.shared.under("moments/"))
    assert moments["count"] == 2
    assert same(state.shared, stepped.prefixed("hypernet/").updated(moments.prefixed("moments/")))


def test_a_hypernetwork_that_does_not_learn_sends_the_same_for_ever() -> None:
    toy = ToyFederation(load_strategy("pfedhn", FAST | {"hypernet_rate": 0}))
    state = toy.begin()
    after, _ = toy.round(state, 1)
    for agent in toy.data:
        assert same(toy.strategy.personal(state, agent), toy.strategy.personal(after, agent))


def test_factored_heads_make_it_a_few_times_the_model_where_full_ones_make_it_many() -> None:
    spec = ModelSpec(input="image", shape=(1, 8, 8), classes=10, width=64, depth=2, patch=2)
    model = initial_parameters(spec, 0)
    size = model.only(WEIGHTS).size

    def times(settings: dict[str, object]) -> float:
        network: Parameters = load_strategy("pfedhn", settings).begin(model, 0).shared
        return network.size / size

    assert times({"rank": 0}) > 64
    assert times({}) < 10
