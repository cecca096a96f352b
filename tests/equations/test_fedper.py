"""FedPer: the head never leaves its device; the rest is FedAvg's mean."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from coordinator.aggregate import shares_of
from coordinator.strategies.fedper import FedPer
from foundation.parameters import WEIGHTS, Parameters, Role, role_of
from foundation.spec import initial_parameters
from foundation.work import Phase
from tests.toys import SPEC, ToyFederation, same

HEAD = frozenset({Role.HEAD})


def _heads(toy: ToyFederation) -> dict[str, Parameters]:
    return {agent: own for agent, (own, _) in toy.personal.items()}


def test_no_head_goes_down_or_up() -> None:
    toy = ToyFederation(FedPer())
    state = toy.begin()
    for number in (1, 2):
        plan = toy.plan(state, number)
        assert all(role_of(name) is not Role.HEAD for a in plan for name in a.parameters)
        assert all(a.work.keep == HEAD for a in plan)
        updates = [toy.work(a) for a in plan]
        body = {name for name, _ in SPEC.layout if role_of(name) in WEIGHTS - HEAD}
        assert all(set(update.parameters) == body for update in updates)
        state = toy.strategy.absorb(state, updates)
        assert all(role_of(name.removeprefix("model/")) is not Role.HEAD for name in state.shared)


def test_every_device_goes_on_from_its_own_head() -> None:
    toy = ToyFederation(FedPer())
    state, _ = toy.round(toy.begin(), 1)
    heads = _heads(toy)
    initial = initial_parameters(SPEC, 0).only(HEAD)
    assert all(own.keys() == initial.keys() and not same(own, initial, 1e-4) for own in heads.values())
    assert not any(same(a, b, 1e-4) for a, b in pairwise(heads.values()))
    # A round that trains nothing leaves the heads as they were, whatever arrives.
    still = (Phase(epochs=0),)
    for plan in toy.plan(state, 2):
        toy.work(plan.model_copy(update={"work": plan.work.model_copy(update={"phases": still})}))
    assert all(same(own, heads[agent]) for agent, own in _heads(toy).items())


def test_the_rest_is_the_weighted_mean() -> None:
    toy = ToyFederation(FedPer())
    state, updates = toy.round(toy.begin(), 1)
    shares = shares_of(updates)
    for name, mean in toy.strategy.personal(state, "d0").items():
        by_hand = sum(p * u.parameters[name].astype(float) for p, u in zip(shares, updates, strict=True))
        np.testing.assert_allclose(mean, by_hand, rtol=0, atol=1e-6)
