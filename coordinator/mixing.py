"""Mixing weights of a layer-wise mixture (pFedLA): rows of the simplex, and the step that teaches them.

Numpy, of any floating type. For one layer of one agent,

    theta_j     agent j's last parameters of the layer, as one vector
    z_j         its logit;  alpha = softmax(z), over those who have sent the layer
    bar         sum_j alpha_j theta_j, what goes down;  change = bar - trained
    dF/dz_j     alpha_j <theta_j - bar, change>,  with F = |bar - trained|^2 / 2 and `trained` held fixed

Logits are offsets from a start near self, where an agent counts as much as N strangers: they begin at zero.
Ours: the step z_j -= rate <theta_j - bar, change> / (|change| s), with s^2 the mean of |theta_j - bar|^2. The
quotient has no unit and does not grow with the layer. It lacks the factor alpha_j of the gradient, which
makes it the natural gradient on the simplex (still a descent): with it, strangers of weight 1/2N hardly move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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


def widened(logits: Array, agents: int, own: int) -> Array:
    """Return logits (layers, n) for `agents` columns: a newcomer counts like the mean stranger so far.

    `own` is the agent's own column, which is no stranger.
    """
    missing = agents - logits.shape[-1]
    if missing <= 0:
        return logits
    strangers = np.delete(logits, own, axis=-1) if own < logits.shape[-1] else logits
    mean = np.zeros((*logits.shape[:-1], 1), logits.dtype)
    if strangers.shape[-1]:
        mean += strangers.mean(axis=-1, keepdims=True)
    return np.concatenate([logits, np.repeat(mean, missing, axis=-1)], axis=-1)


def near_self(logits: Array, own: int) -> Array:
    """Return logits (layers, agents) from the offsets: log N on the agent's own column."""
    result = logits.copy()
    result[..., own] += math.log(logits.shape[-1])
    return result


def weights(logits: Array, known: BoolArray | None = None) -> Array:
    """Return softmax(logits) over the last axis, 0 where not `known`; where nobody is known, all count."""
    if known is not None:
        logits = np.where(known | ~known.any(axis=-1, keepdims=True), logits, -np.inf)
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = exponents / exponents.sum(axis=-1, keepdims=True)
    return result


# --- the step --------------------------------------------------------------------------------------


def scores(alpha: Array, models: Array, changes: Array) -> Array:
    """Return <theta_j - bar_i, change_i>, (agents who trained, N).

    `alpha` is (agents who trained, N), `models` (N, n) a layer's vectors, `changes` (agents who trained, n).
    """
    # Differences from one of them: equal models give exactly 0, and near ones lose no digits.
    inner = changes @ (models - models[:1]).T
    result: Array = inner - (alpha * inner).sum(axis=-1, keepdims=True)
    return result


def gradient(alpha: Array, models: Array, changes: Array) -> Array:
    """Return dF_i/dz_ij = alpha_ij <theta_j - bar_i, change_i> of shape (agents who trained, N)."""
    result: Array = alpha * scores(alpha, models, changes)
    return result


def direction(alpha: Array, models: Array, changes: Array, known: BoolArray | None = None) -> Array:
    """Return the step's direction without unit, in which logits descend; 0 where there is nothing to learn.

    Shapes as in `scores`; `known` (N,) says whose models count, the others' columns stand still.
    """
    there = np.ones(len(models), np.bool_) if known is None else known
    apart = models - models[:1]
    bars = alpha @ apart
    square = (apart**2).sum(axis=1) - 2 * bars @ apart.T + (bars**2).sum(axis=1, keepdims=True)
    spread = np.sqrt(np.maximum((square * there).sum(axis=1) / max(1, there.sum()), 0))
    size = np.linalg.norm(changes, axis=1) * spread
    found = scores(alpha, models, changes)
    result: Array = np.divide(found, size[:, None], out=np.zeros_like(found), where=size[:, None] > 0)
    return result * there


# --- one hypernetwork per agent --------------------------------------------------------------------


def new_hypernetwork(layers: int, embedding: int, hidden: int, seed: Sequence[int]) -> Parameters:
    """Draw one agent's embedding v and MLP, v -> hidden -> hidden (ReLU) -> logits (layers, N); N is 0 yet.

    Output weights are zero, so that everybody starts at the same logits whatever was drawn.
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
    """Return the hypernetwork with outputs for `agents` columns, as `widened` does it for logits."""
    weight, bias = network["head.weight"], network["head.bias"]
    wide = [widened(weight[..., i], agents, own) for i in range(weight.shape[-1])]
    return network.updated({"head.weight": np.stack(wide, axis=-1), "head.bias": widened(bias, agents, own)})


def hypernetwork_logits(network: Mapping[str, Array]) -> Array:
    """Return logits (layers, N) of an agent's embedding."""
    result: Array = network["head.weight"] @ _activations(network)[-1] + network["head.bias"]
    return result


def backpropagated(network: Mapping[str, Array], cotangent: Array) -> Parameters:
    """Return the gradient of sum(logits * cotangent) for embedding and MLP, by hand."""
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
    """Return embedding and MLP after one step of gradient descent along a direction in the logits.

    The rate is scaled so that, to first order, logits go as far along it as if they were stepped themselves:
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
