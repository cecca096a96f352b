"""The chain rule of coordinator/hypernet.py against autograd, and its sign."""

from __future__ import annotations

import numpy as np
import torch

from coordinator import hypernet
from coordinator.hypernet import Adam, Shape
from foundation.parameters import Parameters, Role
from foundation.spec import initial_parameters
from tests.toys import SPEC, same

MODEL = initial_parameters(SPEC, 0)
SHAPE = Shape(MODEL.only({Role.ATTENTION}).layout, embedding=6, hidden=10)
NETWORK = hypernet.begin(SHAPE, MODEL, 0)
ROWS = np.stack([hypernet.new_embedding(SHAPE, [0, i]) for i in range(3)])
SHARES = [0.5, 0.2, 0.3]


def _trained() -> list[Parameters]:
    rng = np.random.default_rng(4)
    return [
        Parameters((n, (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32)) for n, a in own.items())
        for own in hypernet.generate(SHAPE, NETWORK, ROWS)
    ]


def _changes(network: Parameters, rows: np.ndarray, trained: list[Parameters]) -> list[Parameters]:
    return [own - t for own, t in zip(hypernet.generate(SHAPE, network, rows), trained, strict=True)]


def _distance(network: Parameters, rows: np.ndarray, trained: list[Parameters]) -> float:
    changes = _changes(network, rows, trained)
    return sum(p * float(np.square(c.flat()).sum()) / 2 for p, c in zip(SHARES, changes, strict=True))


def test_the_start_is_the_initial_model_for_everyone_and_small_differences() -> None:
    for own in hypernet.generate(SHAPE, NETWORK, ROWS):
        for name, array in own.items():
            assert array.shape == MODEL[name].shape
            assert 0 < np.abs(array - MODEL[name]).mean() < 0.3 * np.abs(MODEL[name]).mean()


def test_one_vector_jacobian_product_is_the_gradient_of_the_squared_distance() -> None:
    # The slow clear version: autograd through generate, one agent after the other, in the same precision.
    trained = _trained()
    tensors = {n: torch.tensor(a, requires_grad=True) for n, a in NETWORK.items()}
    rows = torch.tensor(ROWS, requires_grad=True)
    loss = torch.zeros(())
    for i, share in enumerate(SHARES):
        outputs = hypernet._forward(SHAPE, tensors, rows[i : i + 1])
        for name, _ in SHAPE.layout:
            loss = loss + share / 2 * (outputs[name][0] - torch.tensor(trained[i][name])).square().sum()
    loss.backward()
    network, embeddings = hypernet.pull_back(SHAPE, NETWORK, ROWS, _changes(NETWORK, ROWS, trained), SHARES)
    assert same(network, {n: t.grad.numpy() for n, t in tensors.items()}, 1e-5)
    assert np.allclose(embeddings, rows.grad.numpy(), atol=1e-5)
    assert np.abs(embeddings).max() > 1e-4


def test_the_round_is_the_sum_over_agents() -> None:
    changes = _changes(NETWORK, ROWS, _trained())
    whole, rows = hypernet.pull_back(SHAPE, NETWORK, ROWS, changes, SHARES)
    singles = [
        hypernet.pull_back(SHAPE, NETWORK, ROWS[i : i + 1], changes[i : i + 1], SHARES[i : i + 1])
        for i in range(3)
    ]
    total = {name: sum(single[0][name] for single in singles) for name in whole}
    assert same(whole, total, 1e-6)
    assert np.allclose(rows, np.concatenate([single[1] for single in singles]), atol=1e-6)


def test_a_small_step_moves_towards_what_was_trained() -> None:
    trained = _trained()
    changes = _changes(NETWORK, ROWS, trained)
    gradient, row_gradient = hypernet.pull_back(SHAPE, NETWORK, ROWS, changes, SHARES)
    before = _distance(NETWORK, ROWS, trained)
    stepped = Parameters((n, a - 1e-4 * gradient[n]) for n, a in NETWORK.items())
    assert _distance(stepped, ROWS - 1e-4 * row_gradient, trained) < before
    wrong = Parameters((n, a + 1e-4 * gradient[n]) for n, a in NETWORK.items())
    assert _distance(wrong, ROWS + 1e-4 * row_gradient, trained) > before


def test_with_one_plain_step_the_change_is_the_loss_gradient() -> None:
    # If a device takes one step of rate eta, change = eta * dL/dW, so the product is eta * dL/d(network).
    eta, target = 0.01, torch.linspace(-1, 1, 3 * SPEC.width * SPEC.width).view(-1, SPEC.width)
    name = SHAPE.layout[0][0]

    def loss_of(weight: torch.Tensor) -> torch.Tensor:
        return torch.sin(weight - target).sum()

    tensors = {n: torch.tensor(a, requires_grad=True) for n, a in NETWORK.items()}
    outputs = hypernet._forward(SHAPE, tensors, torch.tensor(ROWS[:1]))
    loss_of(outputs[name][0]).backward()
    sent = torch.tensor(hypernet.generate(SHAPE, NETWORK, ROWS[:1])[0][name], requires_grad=True)
    loss_of(sent).backward()
    change = {n: np.zeros(shape, np.float32) for n, shape in SHAPE.layout}
    change[name] = (eta * sent.grad).numpy()
    got, _ = hypernet.pull_back(SHAPE, NETWORK, ROWS[:1], [change], [1.0])
    nothing = {n: np.zeros(t.shape) for n, t in tensors.items()}
    want = nothing | {n: eta * t.grad.numpy() for n, t in tensors.items() if t.grad is not None}
    assert same(got, want, 1e-6)


def test_adam_is_torchs_adam() -> None:
    rng = np.random.default_rng(0)
    value = {"a": rng.standard_normal((3, 4)).astype(np.float32)}
    theirs = torch.nn.Parameter(torch.tensor(value["a"]))
    optimizer = torch.optim.Adam([theirs], lr=5e-3)
    ours, moments = Parameters(value), Parameters()
    for _ in range(5):
        gradient = {"a": rng.standard_normal((3, 4)).astype(np.float32)}
        theirs.grad = torch.tensor(gradient["a"])
        optimizer.step()
        ours, moments = Adam(5e-3).step(ours, gradient, moments)
    assert np.allclose(ours["a"], theirs.detach().numpy(), atol=1e-6)
