"""From an assignment to the model it means, and from what was trained to what goes back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from foundation.errors import WorkRefused
from foundation.messages import Assignment
from foundation.parameters import WEIGHTS, Array, Layout, Masks, Parameters, from_flat, layout_size, role_of
from foundation.spec import ModelSpec, initial_parameters
from foundation.work import LocalWork


def weights_of(spec: ModelSpec) -> Layout:
    """Return names and shapes of a model's weights, in order: all but the thresholds."""
    return tuple((name, shape) for name, shape in spec.layout if role_of(name) in WEIGHTS)


def arrived(assignment: Assignment, spec: ModelSpec, own: Mapping[str, Array]) -> Parameters:
    """Return what an assignment brought, a flat vector under the names of the tensors of `spec`.

    With `LocalWork.initial` that is the initial model, which the device draws itself.

    FFL units that did not come along, as the assignment's masks say, are this device's `own` ones.
    Raises `WorkRefused` when a flat vector is not of this model's size.
    """
    sent = assignment.parameters
    if assignment.work.initial:
        return initial_parameters(spec, assignment.model_seed)
    if assignment.work.layout != "flat":
        return sent.updated(_filled(sent, assignment.masks, own))
    layout = weights_of(spec)
    size = layout_size(layout)
    flat = sent["flat"]
    if flat.shape != (size,):
        raise WorkRefused(f"{flat.size} weights came for this device's model of {size}: it was changed since")
    if assignment.work.offset:
        flat = flat + initial_parameters(spec, assignment.model_seed).only(WEIGHTS).flat()
    others = Parameters((name, array) for name, array in sent.items() if name != "flat")
    return from_flat(flat, layout).updated(others)


def _filled(sent: Parameters, masks: Masks, own: Mapping[str, Array]) -> dict[str, Array]:
    """Return the FFL arrays with the device's own units where `masks` say that none came."""
    filled: dict[str, Array] = {}
    for name in sent:
        block, _, part = name.partition(".ffl.")
        mask = masks.get(f"{block}.ffl")
        if mask is not None and part in ("up.weight", "up.bias", "down.weight"):
            places = mask[:, None] if part == "up.weight" else mask
            filled[name] = np.where(places, sent[name], own[name])
    return filled


def kept(trained: Parameters, extra: Parameters, work: LocalWork) -> Parameters:
    """Return what becomes this device's own for the next round."""
    own = Parameters((name, array) for name, array in trained.items() if work.keeps(name))
    return own.updated(extra.prefixed_only("own/"))


def to_send(trained: Parameters, extra: Parameters, sent: Parameters, work: LocalWork) -> Parameters:
    """Return what the work asks back: values, and changes (sent - trained) for the roles in `change`.

    `trained` is the model, `extra` what is not of it, `sent` what `arrived` returned.
    """
    if work.embedding_fit() is not None:
        return Parameters({"embedding": extra["embedding"]})
    teacher = {name: sent[name] - array for name, array in extra.prefixed_only("teacher/").items()}
    if work.layout == "flat":
        weights = trained.only(WEIGHTS)
        flat = Parameters((name, sent[name]) for name in weights).flat() - weights.flat()
        return Parameters({"flat": largest(flat, work.topk), **teacher})
    arrays: dict[str, Array] = {}
    for name, array in trained.items():
        if not work.sends(name, sent):
            continue
        changed = role_of(name) in work.change
        arrays[name] = largest(sent[name] - array, work.topk) if changed else array
    return Parameters({**arrays, **teacher})


def largest(change: Array, share: float) -> Array:
    """Return the array with all but its `share` of largest magnitudes set to 0."""
    if share >= 1:
        return change
    count = max(1, round(change.size * share))
    kept = np.argpartition(-np.abs(change), count - 1, axis=None)[:count]
    result = np.zeros_like(change)
    result.flat[kept] = change.flat[kept]
    return result
