"""The transformer's mathematics in numpy and double precision, written apart from the graph.

It loops over samples, heads and units where the graph has one operator, keeps every array in the shape
that training uses, and never folds, fuses or skips anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from foundation.artifact import Probe
from foundation.normalisation import Normalisation
from foundation.parameters import Array, Masks, Parameters
from foundation.spec import ModelSpec, initial_parameters

_erf = np.vectorize(math.erf, otypes=[np.float64])


def forward(
    spec: ModelSpec, parameters: Parameters, masks: Masks, normalisation: Normalisation, x: Array
) -> Array:
    """Return float64 logits of raw samples (n, *shape), with masks on the activations."""
    p = {name: array.astype(np.float64) for name, array in parameters.items()}
    return np.stack([_one(spec, p, masks, normalisation, sample) for sample in x])


def _one(
    spec: ModelSpec, p: Mapping[str, Array], masks: Masks, normalisation: Normalisation, sample: Array
) -> Array:
    tokens = _tokens(spec, p, normalisation, sample)
    if spec.pool == "cls":
        tokens = np.vstack([p["cls"], tokens])
    tokens = tokens + p["position"][: len(tokens)]
    for i in range(spec.depth):
        block = f"blocks.{i}."
        normed = _layer_norm(tokens, p[block + "norm1.weight"], p[block + "norm1.bias"])
        mixed = _attention(spec, normed, p[block + "attention.qkv.weight"])
        tokens = tokens + mixed @ p[block + "output.weight"].T + p[block + "output.bias"]
        normed = _layer_norm(tokens, p[block + "norm2.weight"], p[block + "norm2.bias"])
        hidden = normed @ p[block + "ffl.up.weight"].T + p[block + "ffl.up.bias"]
        active = hidden * 0.5 * (1.0 + _erf(hidden / math.sqrt(2.0))) if hidden.size else hidden
        if block + "ffl" in masks:
            active = active * masks[block + "ffl"]
        tokens = tokens + active @ p[block + "ffl.down.weight"].T + p[block + "ffl.down.bias"]
    tokens = _layer_norm(tokens, p["norm.weight"], p["norm.bias"])
    if spec.input != "text":
        tokens = tokens[0] if spec.pool == "cls" else tokens.mean(0)
    return tokens @ p["head.weight"].T + p["head.bias"]


def _tokens(spec: ModelSpec, p: Mapping[str, Array], normalisation: Normalisation, sample: Array) -> Array:
    if spec.input == "text":
        return p["embed.weight"][sample]
    values = sample.astype(np.float64)
    mean = np.asarray(normalisation.mean or [0.0], np.float32).astype(np.float64)
    std = np.asarray(normalisation.std or [1.0], np.float32).astype(np.float64)
    side = spec.patch
    if spec.input == "series":
        values = (values - mean) / std
        rows = [values[t : t + side].reshape(-1) for t in range(0, len(values), side)]
    else:
        values = (values - mean[:, None, None]) / std[:, None, None]
        _, height, width = values.shape
        corners = [(r, c) for r in range(0, height, side) for c in range(0, width, side)]
        rows = [values[:, r : r + side, c : c + side].reshape(-1) for r, c in corners]
    return np.stack(rows) @ p["embed.weight"].T + p["embed.bias"]


def _attention(spec: ModelSpec, x: Array, qkv: Array) -> Array:
    d, size = spec.width, spec.width // spec.heads
    query, key, value = x @ qkv[:d].T, x @ qkv[d : 2 * d].T, x @ qkv[2 * d :].T
    parts = []
    for h in range(spec.heads):
        own = slice(h * size, (h + 1) * size)
        scores = query[:, own] @ key[:, own].T / math.sqrt(size)
        if spec.input == "text":
            scores[np.triu_indices(len(x), k=1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        parts.append(weights / weights.sum(-1, keepdims=True) @ value[:, own])
    return np.concatenate(parts, axis=1)


def _layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


SPECS = {
    "image-mean": ModelSpec(input="image", shape=(2, 8, 12), classes=5, width=16, depth=3, heads=2),
    "image-cls": ModelSpec(input="image", shape=(3, 8, 8), classes=4, width=16, depth=3, heads=4, pool="cls"),
    "series-mean": ModelSpec(input="series", shape=(24, 3), classes=3, width=12, depth=3, heads=3, patch=6),
    "series-cls": ModelSpec(
        input="series", shape=(10, 2), classes=3, width=8, depth=3, heads=1, patch=5, pool="cls"
    ),
    "text": ModelSpec(input="text", shape=(9,), classes=11, width=16, depth=3, heads=2),
}


def trained(spec: ModelSpec, seed: int = 3) -> Parameters:
    """Return parameters in which nothing is 0 or 1 any more, thresholds, biases and norms included."""
    rng = np.random.default_rng(seed)
    start = initial_parameters(spec, seed)
    return Parameters(
        (name, (array + 0.2 * rng.standard_normal(array.shape)).astype(np.float32))
        for name, array in start.items()
    )


def normalisation_for(spec: ModelSpec) -> Normalisation:
    """Return statistics of raw values far from 0 and 1; none for text."""
    if spec.input == "text":
        return Normalisation()
    channels = spec.shape[0] if spec.input == "image" else spec.shape[1]
    return Normalisation(mean=(120.5, 9.81, -0.8)[:channels], std=(64.0, 3.5, 0.25)[:channels])


def raw_inputs(spec: ModelSpec, count: int, seed: int = 0) -> Array:
    """Draw raw samples: bytes' range for images, sensor-like numbers for series, characters for text."""
    rng = np.random.default_rng(seed)
    if spec.input == "text":
        return rng.integers(0, spec.classes, (count, *spec.shape))
    statistics = normalisation_for(spec)
    shape = (-1, 1, 1) if spec.input == "image" else (-1,)
    mean, std = np.reshape(statistics.mean, shape), np.reshape(statistics.std, shape)
    values: Array = rng.standard_normal((count, *spec.shape)) * std + mean
    return values.astype(np.float32)


def masks_for(spec: ModelSpec, kept: tuple[int, ...], seed: int = 1) -> dict[str, Array]:
    """Return masks that keep so many units of each block, scattered."""
    rng = np.random.default_rng(seed)
    masks = {}
    for i, units in enumerate(kept):
        masks[f"blocks.{i}.ffl"] = rng.permutation(np.arange(spec.hidden) < units)
    return masks


def probe_for(spec: ModelSpec, parameters: Parameters, masks: Masks, count: int = 8) -> Probe:
    """Return a probe with the reference's own answers."""
    x = raw_inputs(spec, count, seed=7)
    logits = forward(spec, parameters, masks, normalisation_for(spec), x)
    return Probe(x, logits.astype(np.float32))
