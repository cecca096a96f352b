"""An update as what it changes: sent - trained, the same for every strategy; and back.

Everything that judges or bounds updates looks at their changes, as a model's own size says nothing. Arrays
that came as changes are changes; for those that came as values it takes what had been sent. An array of which
nothing was sent has no change, and is left as it came. Units that a device cut away changed nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from foundation.messages import Assignment, Update
from foundation.parameters import Array, Parameters, role_of
from foundation.spec import initial_parameters

FOUND = "embedding"
"""What a newcomer looked for: a place, not a direction, and nobody else's."""


def base_of(assignment: Assignment) -> Parameters:
    """Return what the device started from, as far as the coordinator knows."""
    if assignment.work.initial:
        return initial_parameters(assignment.spec, assignment.model_seed)
    return assignment.parameters


def is_change(name: str, assignment: Assignment) -> bool:
    """Whether the array of that name comes as sent - trained."""
    flat = assignment.work.layout == "flat" or name.startswith("teacher/")
    return flat or role_of(name) in assignment.work.change


def changes_of(update: Update, assignment: Assignment, base: Mapping[str, Array]) -> Parameters:
    """Return an update's changes by name, float32; 0 at units that the device does not have."""
    found: dict[str, Array] = {}
    for name, array in update.parameters.items():
        if name == FOUND:
            continue
        if is_change(name, assignment):
            found[name] = array
        elif name in base:
            held = held_at(update, name, array.shape)
            change = np.subtract(base[name], array, dtype=np.float32)
            found[name] = change if held is None else np.where(held, change, np.float32(0))
    return Parameters(found)


def restated(
    update: Update, assignment: Assignment, base: Mapping[str, Array], changes: Mapping[str, Array]
) -> Update:
    """Return the update as it would have come with these changes; other arrays stay as they are."""
    arrays: dict[str, Array] = {}
    for name, change in changes.items():
        if is_change(name, assignment):
            arrays[name] = change
            continue
        value = np.subtract(base[name], change, dtype=np.float32)
        held = held_at(update, name, value.shape)
        arrays[name] = value if held is None else np.where(held, value, update.parameters[name])
    return update.model_copy(update={"parameters": update.parameters.updated(arrays)})


def held_at(update: Update, name: str, shape: tuple[int, ...]) -> Array | None:
    """Return where a device has an array's values, of the array's shape; `None` when everywhere."""
    block, inside, part = name.partition(".ffl.")
    mask = update.masks.get(f"{block}.ffl") if inside else None
    if mask is None or part not in ("up.weight", "up.bias", "down.weight"):
        return None
    return np.broadcast_to(mask[:, None] if part == "up.weight" else mask, shape)


def size_of(update: Update, changes: Mapping[str, Array]) -> float:
    """Return the root mean square of an update's changes over what the device has; 0 where nothing is.

    Per value, so that devices with models or masks of different sizes can be compared.
    """
    square, count = 0.0, 0
    for name, change in changes.items():
        held = held_at(update, name, change.shape)
        square += float(np.sum(np.square(change, dtype=np.float64)))
        count += change.size if held is None else int(held.sum())
    return math.sqrt(square / count) if count else 0.0


def norm_of(changes: Mapping[str, Array]) -> float:
    """Return the Euclidean norm of all changes together."""
    return math.sqrt(sum(float(np.sum(np.square(c, dtype=np.float64))) for c in changes.values()))
