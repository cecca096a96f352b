"""The hypernetwork's forward pass: from agents' embeddings to tensors of their models.

    e = sqrt(n) v / |v| ,   f = MLP(e) ,   W = A f + b       a full head
                                           W = U R f + b     a factored head of rank r

Coordinator and devices run the same code: the one to generate and to learn, the others to find the embedding
of a newcomer. Its parameters, for h hidden values and a generated tensor T:

    trunk.0.weight  (h, n)          trunk.i.weight  (h, h)      trunk.i.bias  (h,)
    head/T.bias     T's own shape
    head/T.weight   full: A, (T's values, h)                    factored: U, (T's values, r)
    head/T.mix                                                  factored: R, (r, h)

Biases have the shapes of what they are added to, so names and shapes of all that is generated can be read
from the arrays. Factored heads are ours, with an R for every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from foundation.nn import kernels
from foundation.parameters import Array, Layout

kernels.choose()

HEAD = "head/"
BIAS = ".bias"


def layout_of(network: Mapping[str, Tensor] | Mapping[str, Array]) -> Layout:
    """Return names and shapes of the tensors that a hypernetwork generates."""
    return tuple(
        (name.removeprefix(HEAD).removesuffix(BIAS), tuple(value.shape))
        for name, value in network.items()
        if name.startswith(HEAD) and name.endswith(BIAS)
    )


def trunk(network: Mapping[str, Tensor], embeddings: Tensor) -> Tensor:
    """Map embeddings (rows, n), whose lengths do not count, to features (rows, h)."""
    f = F.normalize(embeddings, dim=1) * math.sqrt(embeddings.shape[1])
    for i in count():
        weight = network.get(f"trunk.{i}.weight")
        if weight is None:
            return f
        f = torch.relu(F.linear(f, weight, network[f"trunk.{i}.bias"]))
    raise AssertionError  # `count` does not end


def forward(network: Mapping[str, Tensor], embeddings: Tensor) -> dict[str, Tensor]:
    """Return for embeddings (agents, n) every generated tensor, (agents, *its shape)."""
    f = trunk(network, embeddings)
    return {name: _head(network, HEAD + name, f) for name, _ in layout_of(network)}


def _head(network: Mapping[str, Tensor], name: str, f: Tensor) -> Tensor:
    mix, bias = network.get(f"{name}.mix"), network[name + BIAS]
    code = f if mix is None else F.linear(f, mix)
    return F.linear(code, network[f"{name}.weight"], bias.flatten()).view(-1, *bias.shape)
