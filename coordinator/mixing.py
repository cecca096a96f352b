"""Mixing weights of a layer-wise mixture (pFedLA): rows of the simplex, and the step that teaches them.

Numpy, of any floating type. For one layer of one agent i among N,

    theta_j     agent j's last parameters of the layer, as one vector;  alpha_j its weight
    bar         sum_j alpha_j theta_j, what goes down;  change = bar - trained
    F           |bar - trained|^2 / 2, with `trained` held fixed; for softmax logits l in closed form
                dF/dl_j = alpha_j <theta_j - bar, change>

Ours is where the logits come from. Offsets z begin at 0. Strangers (all but i) have l_j = z_j, shifted so
that together they count as many as they are; self has l_i = log N + z_i, so that an agent starts near itself,
as N strangers. With bar' the mixture of the strangers alone, the closed form becomes

    dF/dz_j = alpha_j <theta_j - bar', change>
    dF/dz_i = alpha_i (1 - alpha_i) <theta_i - bar', change>

and whom to listen to is learned apart from how much. The step is the bracket alone, over |change| and the
root mean square of |theta_j - bar'|: it has no unit and does not grow with the layer. Without the factors
before it, it is a natural gradient (still a descent); with them, strangers of weight 1/2N would hardly move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from foundation.parameters import Array, BoolArray, Parameters

Grouping: TypeAlias = Literal["parts", "blocks", "tensors"]
Layers: TypeAlias = Mapping[str, tuple[str, ...]]
"""Names of the tensors of every layer, in the model's order."""


def layers_of(names: Iterable[str], grouping: Grouping) -> Layers:
    """Group a model's tensors into layers.

    `parts`: what comes before the blocks, attention and FFL of each block with the norm before it, what comes
    after the blocks. `blocks`: whole blocks. `tensors`: every tensor by itself.
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(_layer_of(name, grouping), []).append(name)
    return {layer: tuple(members) for layer, members in layers.items()}


def _layer_of(name: str, grouping: Grouping) -> str:
    if grouping == "tensors":
        return name
    if not name.startswith("blocks."):
        return "end" if name.startswith(("norm.", "head.")) else "start"
    _, block, part, *_ = name.split(".")
    if grouping == "blocks":
        return f"blocks.{block}"
    return f"blocks.{block}.{'ffl' if part in ('norm2', 'ffl') else 'attention'}"


def vector(parameters: Mapping[str, Array], names: Sequence[str]) -> Array:
    """Return the tensors of one layer as one vector of their type."""
    return np.concatenate([parameters[name].ravel() for name in names])


def tensors(values: Array, names: Sequence[str], like: Mapping[str, Array]) -> dict[str, Array]:
    """Cut a layer's vector into its tensors; the inverse of `vector`."""
    arrays, start = {}, 0
    for name in names:
        stop = start + like[name].size
        arrays[name] = values[start:stop].reshape(like[name].shape)
        start = stop
    return arrays


# --- rows of the simplex ---------------------------------------------------------------------------


def widened(offsets: Array, agents: int, own: int) -> Array:
    """Return offsets (layers, n) for `agents` columns: a newcomer counts like the mean stranger so far.

    `own` is the agent's own column, which is no stranger.
    """
    missing = agents - offsets.shape[-1]
    if missing <= 0:
        return offsets
    strangers = np.delete(offsets, own, axis=-1) if own < offsets.shape[-1] else offsets
    mean = np.zeros((*offsets.shape[:-1], 1), offsets.dtype)
    if strangers.shape[-1]:
        mean += strangers.mean(axis=-1, keepdims=True)
    return np.concatenate([offsets, np.repeat(mean, missing, axis=-1)], axis=-1)


def weights(offsets: Array, own: int, known: BoolArray | None = None) -> Array:
    """Return alpha of one agent from its offsets, both (layers, N); `own` is its column.

    Who is not `known` (layers, N) has no weight; where nobody is, all count.
    """
    there = np.ones(offsets.shape, np.bool_) if known is None else known | ~known.any(axis=-1, keepdims=True)
    strangers = there.copy()
    strangers[:, own] = False
    logits = np.where(strangers, offsets, -np.inf)
    top = np.where(strangers.any(axis=-1), logits.max(axis=-1), 0)[:, None]
    # The largest of them gives 1, so the bounds only matter where there are none.
    total = np.maximum(np.exp(logits - top).sum(axis=-1, keepdims=True), 1)
    count = np.maximum(strangers.sum(axis=-1, keepdims=True), 1)
    logits -= top + np.log(total / count)
    logits[:, own] = np.where(there[:, own], math.log(offsets.shape[-1]) + offsets[:, own], -np.inf)
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = exponents / exponents.sum(axis=-1, keepdims=True)
    return result


# --- the step --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One layer of some agents who trained, and of everybody whom they mix."""

    alpha: Array
    """(agents, N)."""
    own: Array
    """Column of each of the agents, (agents,)."""
    models: Array
    """theta, (N, values)."""
    changes: Array
    """bar - trained, (agents, values)."""

    @property
    def strangers(self) -> Array:
        """Weights of bar', (agents, N): alpha without self, of sum 1, or 0 where there are no strangers."""
        others = self.alpha.copy()
        others[np.arange(len(others)), self.own] = 0
        total = others.sum(axis=1, keepdims=True)
        result: Array = np.divide(others, total, out=np.zeros_like(others), where=total > 0)
        return result

    def brackets(self) -> Array:
        """Return <theta_j - bar', change>, (agents, N)."""
        # Differences from one of them: equal models give exactly 0, and near ones lose no digits.
        inner = self.changes @ (self.models - self.models[:1]).T
        result: Array = inner - (self.strangers * inner).sum(axis=1, keepdims=True)
        return result

    def gradient(self) -> Array:
        """Return dF/dz, (agents, N)."""
        result = self.alpha * self.brackets()
        rows = np.arange(len(result))
        result[rows, self.own] *= 1 - self.alpha[rows, self.own]
        return result

    def direction(self, known: BoolArray | None = None, self_rate: float = 1.0) -> Array:
        """Return that in which offsets descend, without unit, (agents, N); 0 where nothing can be learned.

        Only those `known` (N,) count, the others' columns stand still; self moves `self_rate` times as far.
        """
        there = np.ones(len(self.models), np.bool_) if known is None else known
        apart = self.models - self.models[:1]
        bars = self.strangers @ apart
        square = (apart**2).sum(axis=1) - 2 * bars @ apart.T + (bars**2).sum(axis=1, keepdims=True)
        spread = np.sqrt(np.maximum((square * there).sum(axis=1) / max(1, there.sum()), 0))
        size = (np.linalg.norm(self.changes, axis=1) * spread)[:, None]
        found = self.brackets()
        result: Array = np.divide(found, size, out=np.zeros_like(found), where=(size > 0) & there)
        result[np.arange(len(result)), self.own] *= self_rate
        result *= self.strangers.any(axis=1, keepdims=True)  # without strangers, nobody to listen to
        return result


# --- one hypernetwork per agent --------------------------------------------------------------------


def new_hypernetwork(layers: int, embedding: int, hidden: int, seed: Sequence[int]) -> Parameters:
    """Draw one agent's embedding v and MLP, v -> hidden -> hidden (ReLU) -> offsets (layers, N); N is 0 yet.

    Output weights are zero, so that everybody starts at the same offsets whatever was drawn.
    """
    rng = np.random.default_rng(list(seed))
    arrays = {"embedding": rng.standard_normal(embedding).astype(np.float32)}
    for i, (columns, rows) in enumerate(((embedding, hidden), (hidden, hidden))):
        bound = math.sqrt(6 / columns)
        arrays[f"trunk.{i}.weight"] = rng.uniform(-bound, bound, (rows, columns)).astype(np.float32)
        arrays[f"trunk.{i}.bias"] = np.zeros(rows, np.float32)
    arrays["head.weight"] = np.zeros((layers, 0, hidden), np.float32)
    arrays["head.bias"] = np.zeros((layers, 0), np.float32)
    return Parameters(arrays)


def widened_hypernetwork(network: Parameters, agents: int, own: int) -> Parameters:
    """Return the hypernetwork with outputs for `agents` columns, as `widened` does it for offsets."""
    weight, bias = network["head.weight"], network["head.bias"]
    wide = [widened(weight[..., i], agents, own) for i in range(weight.shape[-1])]
    return network.updated({"head.weight": np.stack(wide, axis=-1), "head.bias": widened(bias, agents, own)})


def hypernetwork_offsets(network: Mapping[str, Array]) -> Array:
    """Return offsets (layers, N) of an agent's embedding."""
    result: Array = network["head.weight"] @ _activations(network)[-1] + network["head.bias"]
    return result


def backpropagated(network: Mapping[str, Array], cotangent: Array) -> Parameters:
    """Return the gradient of sum(offsets * cotangent) for embedding and MLP, by hand."""
    activations = _activations(network)
    h = activations[-1]
    found = {"head.weight": cotangent[..., None] * h, "head.bias": cotangent}
    upstream = np.einsum("ln,lnh->h", cotangent, network["head.weight"])
    for i in (1, 0):
        upstream = upstream * (activations[i + 1] > 0)
        found[f"trunk.{i}.weight"] = np.outer(upstream, activations[i])
        found[f"trunk.{i}.bias"] = upstream
        upstream = network[f"trunk.{i}.weight"].T @ upstream
    found["embedding"] = upstream
    return Parameters((name, found[name]) for name in network)


def stepped(network: Parameters, cotangent: Array, rate: float) -> Parameters:
    """Return embedding and MLP after one step of gradient descent along a direction in the offsets.

    The rate is scaled so that, to first order, offsets go as far along it as if they were stepped themselves:
    otherwise the more the MLP has learned, the further the same rate would throw them.
    """
    found = backpropagated(network, cotangent)
    length = sum(float((gradient**2).sum()) for gradient in found.values())
    scale = rate * float((cotangent**2).sum()) / length if length else 0.0
    return Parameters(
        (name, value - value.dtype.type(scale) * found[name]) for name, value in network.items()
    )


def _activations(network: Mapping[str, Array]) -> list[Array]:
    """Return the embedding and what each hidden layer makes of it."""
    result = [network["embedding"]]
    for i in range(2):
        z = network[f"trunk.{i}.weight"] @ result[-1] + network[f"trunk.{i}.bias"]
        result.append(np.maximum(z, 0))
    return result
