"""FedAvg on numbers small enough to do by hand."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.strategies.fedavg import FedAvg
from foundation.messages import Update
from foundation.parameters import WEIGHTS, Parameters
from tests.toys import ToyFederation, same

MODEL = Parameters(
    {
        "embed.bias": np.array([1, 1], np.float32),
        "blocks.0.ffl.threshold": np.array([9], np.float32),
        "head.bias": np.array([0, 0], np.float32),
    }
)


def _update(agent: str, examples: int, embed: list[float], head: list[float]) -> Update:
    arrays = {"embed.bias": np.array(embed, np.float32), "head.bias": np.array(head, np.float32)}
    return Update(run="r", round=1, agent=agent, examples=examples, parameters=Parameters(arrays))


def test_the_mean_is_weighted_by_examples() -> None:
    strategy = FedAvg()
    updates = [_update("a", 10, [1, 4], [0, 2]), _update("b", 30, [5, 0], [4, -2])]
    state = strategy.absorb(strategy.begin(MODEL, 0), updates)
    # p = (1/4, 3/4):  1/4 * 1 + 3/4 * 5 = 4;  1/4 * 4 = 1;  3/4 * 4 = 3;  1/4 * 2 - 3/4 * 2 = -1
    mean = strategy.personal(state, "whoever")
    assert {name: array.tolist() for name, array in mean.items()} == {
        "embed.bias": [4, 1],
        "head.bias": [3, -1],
    }


def test_shares_are_over_those_who_answered() -> None:
    strategy = FedAvg()
    begun = strategy.begin(MODEL, 0)
    alone = strategy.absorb(begun, [_update("b", 30, [5, 0], [4, -2])])
    assert strategy.personal(alone, "a")["embed.bias"].tolist() == [5, 0]
    nobody = strategy.absorb(begun, [])
    assert same(nobody.shared, begun.shared)
    assert nobody.round == 1


def test_equal_devices_average_to_what_each_of_them_trained() -> None:
    toy = ToyFederation(FedAvg())
    toy.data = dict.fromkeys(toy.data, toy.data["d0"])
    state = toy.begin()
    plans = toy.plan(state, 1)
    # The same batches for everybody, too: then all train the same model, and its mean is that model.
    updates = [toy.work(plan.model_copy(update={"seed": plans[0].seed})) for plan in plans]
    mean = toy.strategy.personal(toy.strategy.absorb(state, updates), "d0")
    assert same(mean, updates[0].parameters.only(WEIGHTS), 1e-7)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_order_does_not_matter(order: tuple[int, int]) -> None:
    strategy = FedAvg()
    updates = [_update("a", 7, [0.1, 0.7], [0.3, 1e-7]), _update("b", 11, [0.2, 1e6], [0.6, 1.1])]
    state = strategy.absorb(strategy.begin(MODEL, 0), [updates[i] for i in order])
    by_hand = (7 * 0.7 + 11 * 1e6) / 18
    assert strategy.personal(state, "a")["embed.bias"][1] == pytest.approx(by_hand, rel=1e-7)
