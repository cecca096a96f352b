"""The hypernetwork at the coordinator: its start, what it generates, and the one step that trains it.

The forward pass is foundation/nn/hypernet.py's. The heads' biases start as an ordinary initial model and the
head weights small, so that every agent starts from the same sane model (our choice; the FedTP code's own
start and SGD hardly learn in ten rounds).

Training is one vector-Jacobian product a round (pFedHN, Shamsian et al. 2021; FedTP, Li et al. 2023):
with what was generated W_i, what came back trained, change_i = W_i - trained_i and shares p_i,

    g = sum_i p_i J_i^T change_i ,   J_i = d W_i / d(hypernetwork, v_i)

which is the exact gradient of sum_i p_i/2 |W_i - trained_i|^2 with `trained` held fixed. Then one step of
Adam; embeddings move only for the agents that took part. Agents are taken a few at a time, so that what a
round needs beside the hypernetwork does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from foundation.nn.hypernet import forward, layout_of
from foundation.parameters import Array, Layout, Parameters, layout_size

CHUNK_VALUES = 1 << 22
"""Values generated at once: 16 MiB, and a few times that while pulling back."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a hypernetwork: embedding, hidden width, rank of its heads, and what it generates."""

    layout: Layout
    embedding: int = 32
    hidden: int = 64
    rank: int = 0
    """0 makes the heads full."""


def begin(shape: Shape, model: Parameters, seed: int) -> Parameters:
    """Draw the hypernetwork's parameters; head biases are the tensors of `model`.

    What is generated differs at first from agent to agent by about a tenth of a tensor's initial scale.
    """
    rng = np.random.default_rng([seed, 0x4E7])
    arrays = trunk((shape.embedding, shape.hidden, shape.hidden), rng)
    for name, dimensions in shape.layout:
        head = f"head/{name}"
        std = 0.1 / math.sqrt(dimensions[-1] * shape.hidden)
        columns = shape.hidden
        if shape.rank:
            # R draws codes of about 1, as large as a feature or larger, and U is smaller for it: a step of
            # Adam then moves W about as far as with a full head.
            columns, std = shape.rank, std / 2
            arrays[f"{head}.mix"] = rng.standard_normal((shape.rank, shape.hidden)).astype(np.float32)
        size = (math.prod(dimensions), columns)
        arrays[f"{head}.weight"] = (rng.standard_normal(size) * std).astype(np.float32)
        arrays[f"{head}.bias"] = np.array(model[name], np.float32)
    return Parameters(arrays)


def trunk(sizes: Sequence[int], rng: np.random.Generator) -> dict[str, Array]:
    """Draw the layers of an MLP with these sizes, from its input on, uniform with fan-in scaling."""
    arrays: dict[str, Array] = {}
    for i, (columns, rows) in enumerate(pairwise(sizes)):
        bound = 1 / math.sqrt(columns)
        arrays[f"trunk.{i}.weight"] = rng.uniform(-bound, bound, (rows, columns)).astype(np.float32)
        arrays[f"trunk.{i}.bias"] = rng.uniform(-bound, bound, rows).astype(np.float32)
    return arrays


def new_embedding(size: int, seed: Sequence[int]) -> Array:
    """Draw one agent's embedding, (size,), standard normal."""
    return np.random.default_rng(list(seed)).standard_normal(size).astype(np.float32)


def generate(network: Parameters, embeddings: Array) -> list[Parameters]:
    """Generate for each row of `embeddings` (agents, n) the tensors of the hypernetwork's layout.

    One agent after the other: products of matrices round by how many rows there are, and what an agent is
    sent does not depend on who else is there.
    """
    tensors = {name: tensor(values) for name, values in network.items()}
    result: list[Parameters] = []
    for row in embeddings:
        with torch.no_grad():
            outputs = forward(tensors, tensor(row[None]))
        result.append(Parameters((name, array(value[0])) for name, value in outputs.items()))
    return result


def pull_back(
    network: Parameters,
    embeddings: Array,
    changes: Sequence[Mapping[str, Array]],
    shares: Sequence[float],
) -> tuple[Parameters, Array]:
    """One vector-Jacobian product for the whole round: the gradients of network and embeddings.

    `changes` are sent - trained, one mapping for each row of `embeddings`; each is looked at once. Returns
    arrays of the shapes and types of `network` and of `embeddings`.
    """
    tensors = {name: tensor(value).requires_grad_() for name, value in network.items()}
    names = [name for name, _ in layout_of(network)]
    row_gradient = np.zeros_like(embeddings)
    for chunk in _chunks(network, len(embeddings)):
        rows = tensor(embeddings[chunk]).requires_grad_()
        outputs = forward(tensors, rows)
        own = [changes[i] for i in range(chunk.start, chunk.stop)]
        weights = shares[chunk]
        cotangents = [_stacked([change[name] for change in own], weights, outputs[name]) for name in names]
        torch.autograd.backward([outputs[name] for name in names], cotangents)
        row_gradient[chunk] = _gradient(rows)
    return Parameters((name, _gradient(value)) for name, value in tensors.items()), row_gradient


def norm(gradient: Mapping[str, Array]) -> float:
    """Return the Euclidean norm of a gradient."""
    return math.hypot(*(float(np.linalg.norm(g)) for g in gradient.values()))


def tensor(values: Array) -> Tensor:
    """Return a copy as a tensor of the same type, in torch's own memory (see foundation/nn/bridge.py)."""
    return torch.tensor(np.asarray(values, order="C"))


def array(values: Tensor) -> Array:
    """Return a tensor's values as an array of the same type."""
    result: Array = values.detach().numpy()
    return result


def _stacked(changes: Sequence[Array], weights: Sequence[float], like: Tensor) -> Tensor:
    stacked = torch.empty_like(like)
    for row, change, weight in zip(stacked, changes, weights, strict=True):
        row.copy_(tensor(change)).mul_(weight)
    return stacked


def _gradient(leaf: Tensor) -> Array:
    return array(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)


def _chunks(network: Parameters, agents: int) -> Iterator[slice]:
    size = max(1, CHUNK_VALUES // max(1, layout_size(layout_of(network))))
    for start in range(0, agents, size):
        yield slice(start, min(start + size, agents))


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
            g = np.asarray(gradient[name], value.dtype)
            zero = np.zeros_like(g)
            first = self.beta1 * moments.get(f"first/{name}", zero) + (1 - self.beta1) * g
            second = self.beta2 * moments.get(f"second/{name}", zero) + (1 - self.beta2) * g * g
            corrected = first / (1 - self.beta1**count)
            scale = np.sqrt(second / (1 - self.beta2**count)) + self.epsilon
            new[name] = value - self.rate * corrected / scale
            kept[f"first/{name}"] = first
            kept[f"second/{name}"] = second
        return Parameters(new), Parameters(kept)
