"""The chunked multi-head hypernetwork of MH-pFedHN: flat vectors for models known by their size alone.

    theta_i = concat_c ( A_c f(V_i[c]) + b_c )[: K_i] ,   c = 1 .. ceil(K_i / N)             full heads
                         A_c = U_c R                                                     factored heads

K_i is the number of an agent's weights, N the length of a chunk, V_i its embeddings, one for each chunk, f
the MLP of foundation/nn/hypernet.py, common to all. Agents with the same number of chunks, rounded up to a
multiple of `bucket`, are a group and share its head; heads are found by that number, never by who came first.
The rounding, and R (shared by all heads), are ours. In the official code a head belongs to exactly one number
of chunks, and takes 129 numbers for each one that it generates; factored with rank 16 it is 17.

Arrays, for h hidden values and a group of n chunks:

    trunk.i.weight  trunk.i.bias     mix  (r, h): R
    group/n/weight  (n, N, h): A, or (n, N, r): U            group/n/bias  (n, N): b
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coordinator import hypernet
from coordinator.hypernet import CHUNK_VALUES, array, tensor
from foundation.nn.hypernet import trunk
from foundation.parameters import Array, Parameters

LAYERS = 3
SPREAD = 3e-3
"""Standard deviation, about, of what heads generate at first on top of a device's own initial model."""
PLAIN = 0.05
"""The same without such a model: what a linear layer of torch gives from 128 features."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How vectors are cut, and the sizes of embeddings, trunk and heads; rank 0 makes heads full."""

    chunk: int = 1024
    bucket: int = 16
    embedding: int = 64
    hidden: int = 128
    rank: int = 16

    def chunks(self, size: int) -> int:
        """Return how many chunks a model of `size` weights has."""
        return -(-size // self.chunk)

    def group(self, size: int) -> int:
        """Return the number that names the head of a model of `size` weights."""
        return -(-self.chunks(size) // self.bucket) * self.bucket


def begin(sizes: Sizes, seed: int) -> Parameters:
    """Draw what all groups share."""
    rng = np.random.default_rng([seed, 0x3F4])
    arrays = hypernet.trunk((sizes.embedding, *[sizes.hidden] * LAYERS), rng)
    if sizes.rank:
        arrays["mix"] = rng.standard_normal((sizes.rank, sizes.hidden)).astype(np.float32)
    return Parameters(arrays)


def new_head(sizes: Sizes, group: int, seed: int, *, offset: bool) -> Parameters:
    """Draw the head of a group; it depends on the seed and the group's number.

    With `offset` it generates nearly nothing, as devices add their own initial model.
    """
    rng = np.random.default_rng([seed, 0x3F5, group])
    columns = sizes.rank or sizes.hidden
    std = (SPREAD if offset else PLAIN) / math.sqrt(sizes.rank or 1)  # features have length 1, codes sqrt(r)
    weight = (rng.standard_normal((group, sizes.chunk, columns)) * std).astype(np.float32)
    bias = rng.standard_normal((group, sizes.chunk)) * (0.0 if offset else PLAIN)
    return Parameters({f"group/{group}/weight": weight, f"group/{group}/bias": bias.astype(np.float32)})


def new_embeddings(sizes: Sizes, size: int, seed: Sequence[int]) -> Array:
    """Draw the embeddings of a model of `size` weights, (chunks, embedding), standard normal."""
    shape = (sizes.chunks(size), sizes.embedding)
    return np.random.default_rng(list(seed)).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Member:
    """One vector to generate: its length, and its embeddings (chunks, embedding)."""

    size: int
    embeddings: Array
    teaches: bool = True
    """Whether trunk and heads learn from it; if not, its embeddings alone do."""


def generate(sizes: Sizes, network: Parameters, members: Sequence[Member]) -> list[Array]:
    """Generate the vector of every member, (size,); what it is does not depend on who else is there."""
    tensors = {name: tensor(value) for name, value in network.items()}
    vectors = []
    for member in members:
        with torch.no_grad():
            outputs = _forward(tensors, tensor(member.embeddings[None]), sizes.group(member.size))
        vectors.append(array(outputs[0])[: member.size].copy())
    return vectors


def pull_back(
    sizes: Sizes,
    network: Parameters,
    members: Sequence[Member],
    changes: Sequence[Array],
    shares: Sequence[float],
) -> tuple[Parameters, list[Array]]:
    """One vector-Jacobian product for the whole round: gradients of the network and of all embeddings.

    `changes` are sent - trained, (size,) each; what lies beyond a vector's end has no gradient. Heads of
    groups without a member are not among the gradients: they must not move.
    """
    tensors = {name: tensor(value).requires_grad_() for name, value in network.items()}
    frozen = {name: value.detach() for name, value in tensors.items()}
    rows: dict[int, Array] = {}
    for places in _batches(sizes, members):
        first, own = members[places[0]], _stacked(members, places).requires_grad_()
        outputs = _forward(tensors if first.teaches else frozen, own, sizes.group(first.size))
        cotangents = torch.zeros_like(outputs)
        for cotangent, i in zip(cotangents, places, strict=True):
            cotangent[: members[i].size] = tensor(changes[i]) * shares[i]
        torch.autograd.backward([outputs], [cotangents])
        assert own.grad is not None
        rows |= dict(zip(places, array(own.grad), strict=True))
    gradient = {name: array(t.grad) for name, t in tensors.items() if t.grad is not None}
    return Parameters(gradient), [rows[i] for i in range(len(members))]


def _forward(network: Mapping[str, Tensor], rows: Tensor, group: int) -> Tensor:
    """Map embeddings (members, chunks, embedding) to vectors (members, chunks * N)."""
    members, chunks, _ = rows.shape
    f = trunk(network, rows.flatten(0, 1))
    code = F.linear(f, network["mix"]) if "mix" in network else f
    weight, bias = network[f"group/{group}/weight"], network[f"group/{group}/bias"]
    pieces = torch.einsum("cnk,mck->mcn", weight[:chunks], code.view(members, chunks, -1))
    return (pieces + bias[:chunks]).flatten(1)


def _stacked(members: Sequence[Member], places: Sequence[int]) -> Tensor:
    return tensor(np.stack([members[i].embeddings for i in places]))


def _batches(sizes: Sizes, members: Sequence[Member]) -> Iterator[list[int]]:
    """Yield the places of members with equally many chunks, few enough at a time to bound the memory."""
    alike: dict[tuple[int, bool], list[int]] = {}
    for i, member in enumerate(members):
        alike.setdefault((sizes.chunks(member.size), member.teaches), []).append(i)
    for (chunks, _), places in sorted(alike.items()):
        step = max(1, CHUNK_VALUES // (chunks * sizes.chunk))
        for start in range(0, len(places), step):
            yield places[start : start + step]
