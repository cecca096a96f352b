"""The chain rule of coordinator/hypernet.py in float64 against autograd, its sign, and the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from coordinator import hypernet
from coordinator.hypernet import Adam, Shape
from foundation.nn.hypernet import forward, layout_of
from foundation.parameters import Parameters, Role
from foundation.spec import initial_parameters
from tests.toys import SPEC, same

MODEL = initial_parameters(SPEC, 0)
LAYOUT = MODEL.only({Role.ATTENTION, Role.HEAD}).layout
SHARES = [0.5, 0.2, 0.3]
AGENTS = len(SHARES)
EXACT = 1e-12

Net: TypeAlias = tuple[Parameters, np.ndarray]
"""A hypernetwork and the embeddings of the agents, in float64."""


def _double(parameters: Mapping[str, np.ndarray]) -> Parameters:
    return Parameters((name, np.asarray(array, np.float64)) for name, array in parameters.items())


@pytest.fixture(params=[0, 3], ids=["full", "factored"])
def net(request: pytest.FixtureRequest) -> Net:
    network = hypernet.begin(Shape(LAYOUT, embedding=6, hidden=10, rank=request.param), MODEL, 0)
    rows = np.stack([hypernet.new_embedding(6, [0, i]) for i in range(AGENTS)])
    return _double(network), rows.astype(np.float64)


def _trained(net: Net) -> list[Parameters]:
    rng = np.random.default_rng(4)
    return [
        Parameters((name, array + 0.1 * rng.standard_normal(array.shape)) for name, array in own.items())
        for own in hypernet.generate(*net)
    ]


def _changes(net: Net, trained: Sequence[Parameters]) -> list[Parameters]:
    return [own - other for own, other in zip(hypernet.generate(*net), trained, strict=True)]


def _distance(net: Net, trained: Sequence[Parameters]) -> float:
    """sum_i p_i/2 |W_i - trained_i|^2."""
    squares = [sum(float(np.square(a).sum()) for a in c.values()) for c in _changes(net, trained)]
    return sum(share / 2 * square for share, square in zip(SHARES, squares, strict=True))


def _autograd(net: Net, loss_of: Callable[[int, dict[str, Tensor]], Tensor]) -> Net:
    """The slow clear version: gradients of sum_i loss_of(i, what is generated for i), one after the other."""
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in net[0].items()}
    rows = torch.tensor(net[1], requires_grad=True)
    for i in range(AGENTS):
        outputs = {name: value[0] for name, value in forward(tensors, rows[i : i + 1]).items()}
        loss_of(i, outputs).backward()
    gradients = {name: t.grad for name, t in tensors.items()}
    assert rows.grad is not None
    return Parameters((n, g.numpy()) for n, g in gradients.items() if g is not None), rows.grad.numpy()


def _agree(a: Net, b: Net, tolerance: float = EXACT) -> bool:
    return same(a[0], b[0], tolerance) and np.allclose(a[1], b[1], rtol=0, atol=tolerance)


# ---- the three identities of the update ----


def test_the_product_is_the_gradient_of_the_squared_distance(net: Net) -> None:
    trained = _trained(net)

    def distance(i: int, outputs: dict[str, Tensor]) -> Tensor:
        terms = [(outputs[name] - torch.tensor(array)).square().sum() for name, array in trained[i].items()]
        return SHARES[i] / 2 * torch.stack(terms).sum()

    got = hypernet.pull_back(*net, _changes(net, trained), SHARES)
    assert _agree(got, _autograd(net, distance))
    assert np.abs(got[1]).max() > 1e-4, "embeddings must learn"
    assert min(np.abs(g).max() for g in got[0].values()) > 1e-6, "and so must every array of the network"


def test_after_one_plain_step_on_the_device_it_is_the_gradient_of_the_loss(net: Net) -> None:
    # change = eta dL/dW, so the product is eta dL/d(network, v).
    eta = 0.01

    def loss(i: int, outputs: dict[str, Tensor]) -> Tensor:
        parts = [torch.sin((i + 1) * value).sum() * SHARES[i] for value in outputs.values()]
        return torch.stack(parts).sum()

    changes = [
        Parameters((name, eta * (i + 1) * np.cos((i + 1) * array)) for name, array in own.items())
        for i, own in enumerate(hypernet.generate(*net))
    ]
    network, rows = _autograd(net, loss)
    wanted = Parameters((name, eta * array) for name, array in network.items()), eta * rows
    assert _agree(hypernet.pull_back(*net, changes, SHARES), wanted)


@pytest.mark.parametrize("chunk_values", [1, 700, 1 << 22])
def test_the_round_is_the_sum_over_agents_however_many_are_taken_at_once(
    net: Net, chunk_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, rows = net
    changes = _changes(net, _trained(net))
    singles = [
        hypernet.pull_back(network, rows[i : i + 1], changes[i : i + 1], SHARES[i : i + 1])
        for i in range(AGENTS)
    ]
    total = {name: np.sum([single[0][name] for single in singles], axis=0) for name in network}
    monkeypatch.setattr(hypernet, "CHUNK_VALUES", chunk_values)
    whole = hypernet.pull_back(network, rows, changes, SHARES)
    assert _agree(whole, (Parameters(total), np.concatenate([single[1] for single in singles])))


def test_a_small_step_moves_towards_what_was_trained_and_the_other_way_from_it(net: Net) -> None:
    trained = _trained(net)
    gradient, row_gradient = hypernet.pull_back(*net, _changes(net, trained), SHARES)

    def stepped(rate: float) -> float:
        network = Parameters((name, array - rate * gradient[name]) for name, array in net[0].items())
        return _distance((network, net[1] - rate * row_gradient), trained)

    before = _distance(net, trained)
    assert stepped(1e-4) < before < stepped(-1e-4)
    square = sum(float(np.square(g).sum()) for g in (*gradient.values(), row_gradient))
    assert (before - stepped(1e-6)) / 1e-6 == pytest.approx(square, rel=1e-3), "by the gradient's square"


# ---- what is generated ----


def test_the_start_is_the_initial_model_for_everyone_and_small_differences(net: Net) -> None:
    for own in hypernet.generate(*net):
        assert own.layout == LAYOUT
        for name, array in own.items():
            if MODEL[name].any():
                assert 0 < np.abs(array - MODEL[name]).mean() < 0.3 * np.abs(MODEL[name]).mean()


def test_names_and_shapes_are_read_from_the_arrays(net: Net) -> None:
    # head.bias and head.weight differ in their last word alone, which the arrays of a head have as well.
    assert layout_of(net[0]) == LAYOUT
    assert {"head.weight", "head.bias"} <= {name for name, _ in LAYOUT}


def test_a_factored_head_is_the_full_head_of_the_product() -> None:
    network = _double(hypernet.begin(Shape(LAYOUT, embedding=6, hidden=10, rank=3), MODEL, 0))
    heads = [name.removesuffix(".mix") for name in network if name.endswith(".mix")]
    assert len(heads) == len(LAYOUT)
    full = dict(network)
    for head in heads:
        full[f"{head}.weight"] = full[f"{head}.weight"] @ full.pop(f"{head}.mix")
    rows = np.random.default_rng(0).standard_normal((2, 6))
    pairs = zip(hypernet.generate(network, rows), hypernet.generate(Parameters(full), rows), strict=True)
    assert all(same(a, b, 1e-12) for a, b in pairs)


def test_what_an_agent_gets_does_not_depend_on_who_else_is_there(net: Net) -> None:
    network = Parameters((name, array.astype(np.float32)) for name, array in net[0].items())
    rows = net[1].astype(np.float32)
    together = hypernet.generate(network, rows)
    assert together == [hypernet.generate(network, rows[i : i + 1])[0] for i in range(AGENTS)]


def test_the_length_of_an_embedding_does_not_count(net: Net) -> None:
    network, rows = net
    pairs = zip(hypernet.generate(network, rows), hypernet.generate(network, 7 * rows), strict=True)
    assert all(same(a, b, 1e-12) for a, b in pairs)


def test_adam_is_torchs_adam() -> None:
    rng = np.random.default_rng(0)
    value = {"a": rng.standard_normal((3, 4))}
    theirs = torch.nn.Parameter(torch.tensor(value["a"]))
    optimizer = torch.optim.Adam([theirs], lr=5e-3)
    ours, moments = Parameters(value), Parameters()
    for _ in range(5):
        gradient = {"a": rng.standard_normal((3, 4))}
        theirs.grad = torch.tensor(gradient["a"])
        optimizer.step()
        ours, moments = Adam(5e-3).step(ours, gradient, moments)
    assert np.allclose(ours["a"], theirs.detach().numpy(), rtol=0, atol=1e-12)
