"""FedProx: the pull mu (w - w_sent), against autograd and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coordinator.strategies.fedavg import FedAvg
from coordinator.strategies.fedprox import FedProx
from edge_agent.training.terms import ProximalPull
from foundation.nn.bridge import to_module
from foundation.nn.transformer import loss_of
from foundation.parameters import WEIGHTS, Parameters
from foundation.spec import initial_parameters
from foundation.work import Proximal
from tests.toys import SPEC, ToyFederation, same, toy_data

SENT = initial_parameters(SPEC, 0).only(WEIGHTS)
NOW = initial_parameters(SPEC, 1).only(WEIGHTS)


def test_the_gradient_is_that_of_the_squared_distance() -> None:
    mu = 0.37
    data = toy_data(0)
    x, y = torch.tensor(data.train.x[:8], dtype=torch.float64), torch.tensor(data.train.y[:8])
    by_autograd, by_term = to_module(SPEC, NOW).double(), to_module(SPEC, NOW).double()
    pull = sum(
        ((w - torch.tensor(SENT[name], dtype=torch.float64)) ** 2).sum()
        for name, w in by_autograd.named_parameters()
    )
    (loss_of(by_autograd(x), y) + mu / 2 * pull).backward()
    loss_of(by_term(x), y).backward()
    ProximalPull(Proximal(mu=mu), SENT, {}).add_gradient(by_term)
    for (name, a), (_, b) in zip(by_autograd.named_parameters(), by_term.named_parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_the_pull_by_hand_and_only_on_what_arrived() -> None:
    model = to_module(SPEC, NOW.updated({"head.bias": np.array([3, -1, 0], np.float32)}))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sent = Parameters({"head.bias": np.array([1, 1, 0], np.float32)})
    ProximalPull(Proximal(mu=0.5), sent, {}).add_gradient(model)
    gradients = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    assert gradients.pop("head.bias").tolist() == [1, -1, 0]  # 0.5 * (3 - 1), 0.5 * (-1 - 1), 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_every_device_is_asked_to_hold_on_to_what_was_sent() -> None:
    toy = ToyFederation(FedProx(mu=0.2))
    for assignment in toy.plan(toy.begin(), 1):
        assert assignment.work.terms == (Proximal(mu=0.2),)
        assert {name for name, _ in assignment.parameters.layout} == set(SENT)
    assert FedProx().mu == 0.01


def test_without_mu_it_is_fedavg() -> None:
    ends = []
    for strategy in (FedAvg(), FedProx(mu=0.0)):
        toy = ToyFederation(strategy)
        state = toy.begin()
        for number in (1, 2):
            state, _ = toy.round(state, number)
        ends.append(state)
    assert same(ends[0].shared, ends[1].shared)


@pytest.mark.parametrize(("weaker", "stronger"), [(0.0, 1.0), (1.0, 100.0)])
def test_a_stronger_pull_ends_nearer(weaker: float, stronger: float) -> None:
    def distance(mu: float) -> float:
        # Plain gradient steps: Adam would scale the pull away.
        toy = ToyFederation(FedProx(mu=mu, optimizer="sgd", momentum=0.0, learning_rate=5e-3, clip=1e3))
        (first, *_) = toy.plan(toy.begin(), 1)
        trained = toy.work(first).parameters
        return float(np.linalg.norm((trained - first.parameters).flat()))

    assert 0 < distance(stronger) < distance(weaker)
