"""The hypernetwork: from an agent's embedding to its attention, and the one step that trains it.

    e = sqrt(n) v / |v| ,   f = MLP(e) ,   W_l = A_l f + b_l   for every generated tensor l

v is the agent's embedding (n numbers), the MLP has two ReLU layers, each tensor has a linear head. The
heads' biases start as an ordinary initial model and the head weights small, so that every agent starts
from the same sane attention (our choice; the FedTP code's own start and SGD hardly learn in ten rounds).

Training is one vector-Jacobian product a round (pFedHN, Shamsian et al. 2021; FedTP, Li et al. 2023):
with what was generated W_i, what came back trained, change_i = W_i - trained_i and shares p_i,

    g = sum_i p_i J_i^T change_i ,   J_i = d W_i / d(hypernetwork, v)

which is the exact gradient of sum_i p_i/2 |W_i - trained_i|^2 with `trained` held fixed. Then one step of
Adam; rows of embeddings move only for the agents that took part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foundation.nn.bridge import array_of, tensor_of
from foundation.parameters import Array, Layout, Parameters


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a hypernetwork: embedding, hidden width, and what it generates."""

    layout: Layout
    embedding: int = 32
    hidden: int = 64


def begin(shape: Shape, model: Parameters, seed: int) -> Parameters:
    """Draw the hypernetwork's parameters; head biases are the tensors of `model`."""
    rng = np.random.default_rng([seed, 0x4E7])
    sizes = ((shape.hidden, shape.embedding), (shape.hidden, shape.hidden))
    arrays: dict[str, Array] = {}
    for i, (rows, columns) in enumerate(sizes):
        bound = 1 / math.sqrt(columns)
        arrays[f"trunk.{i}.weight"] = rng.uniform(-bound, bound, (rows, columns)).astype(np.float32)
        arrays[f"trunk.{i}.bias"] = rng.uniform(-bound, bound, rows).astype(np.float32)
    for name, dimensions in shape.layout:
        std = 0.1 / math.sqrt(dimensions[-1] * shape.hidden)
        size = (math.prod(dimensions), shape.hidden)
        arrays[f"head/{name}.weight"] = (rng.standard_normal(size) * std).astype(np.float32)
        arrays[f"head/{name}.bias"] = np.asarray(model[name], np.float32).ravel().copy()
    return Parameters(arrays)


def new_embedding(shape: Shape, seed: Sequence[int]) -> Array:
    """Draw one agent's embedding, (embedding,), standard normal."""
    return np.random.default_rng(list(seed)).standard_normal(shape.embedding).astype(np.float32)


def generate(shape: Shape, network: Parameters, embeddings: Array) -> list[Parameters]:
    """Generate for each row of `embeddings` (agents, embedding) the tensors of the layout."""
    with torch.no_grad():
        outputs = _forward(shape, _tensors(network), tensor_of(embeddings))
    return [
        Parameters((name, array_of(outputs[name][i])) for name, _ in shape.layout)
        for i in range(len(embeddings))
    ]


def pull_back(
    shape: Shape,
    network: Parameters,
    embeddings: Array,
    changes: Sequence[Mapping[str, Array]],
    shares: Sequence[float],
) -> tuple[Parameters, Array]:
    """One vector-Jacobian product for the whole round: the gradients of network and embeddings.

    `changes` are sent - trained, one mapping for each row of `embeddings`. Returns arrays of the shapes
    of `network` and of `embeddings`.
    """
    tensors = {name: value.requires_grad_() for name, value in _tensors(network).items()}
    rows = tensor_of(embeddings).requires_grad_()
    outputs = _forward(shape, tensors, rows)
    weights = torch.tensor(list(shares), dtype=torch.float32)
    cotangents = []
    for name, dimensions in shape.layout:
        stacked = torch.stack([tensor_of(change[name]) for change in changes])
        cotangents.append(stacked * weights.view(-1, *([1] * len(dimensions))))
    gradients = torch.autograd.grad(
        [outputs[name] for name, _ in shape.layout], [*tensors.values(), rows], cotangents
    )
    network_gradient = Parameters(
        (name, array_of(gradient)) for name, gradient in zip(tensors, gradients, strict=False)
    )
    return network_gradient, array_of(gradients[-1])


def _forward(shape: Shape, network: Mapping[str, Tensor], embeddings: Tensor) -> dict[str, Tensor]:
    norms = embeddings.norm(dim=1, keepdim=True).clamp_min(1e-12)
    f = embeddings / norms * math.sqrt(shape.embedding)
    for i in range(2):
        f = torch.relu(F.linear(f, network[f"trunk.{i}.weight"], network[f"trunk.{i}.bias"]))
    return {
        name: F.linear(f, network[f"head/{name}.weight"], network[f"head/{name}.bias"]).view(-1, *dims)
        for name, dims in shape.layout
    }


def _tensors(network: Parameters) -> dict[str, Tensor]:
    return {name: tensor_of(array) for name, array in network.items()}


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam (Kingma and Ba 2015) as a function: parameters, gradient and moments in, new ones out."""

    rate: float = 5e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def step(
        self, parameters: Parameters, gradient: Mapping[str, Array], moments: Parameters
    ) -> tuple[Parameters, Parameters]:
        """Return the parameters after one step, and the moments (`first/`, `second/`, `count`)."""
        count = float(moments["count"][0]) + 1 if "count" in moments else 1.0
        new: dict[str, Array] = {}
        kept: dict[str, Array] = {"count": np.array([count], np.float32)}
        for name, value in parameters.items():
            g = np.asarray(gradient[name], np.float32)
            zero = np.zeros_like(g)
            first = self.beta1 * moments.get(f"first/{name}", zero) + (1 - self.beta1) * g
            second = self.beta2 * moments.get(f"second/{name}", zero) + (1 - self.beta2) * g * g
            corrected = first / (1 - self.beta1**count)
            scale = np.sqrt(second / (1 - self.beta2**count)) + self.epsilon
            new[name] = (value - self.rate * corrected / scale).astype(np.float32)
            kept[f"first/{name}"] = first.astype(np.float32)
            kept[f"second/{name}"] = second.astype(np.float32)
        return Parameters(new), Parameters(kept)
