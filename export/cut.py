"""Removes dropped hidden units for good.

A mask sits on the activation of a hidden unit, so a dropped unit contributes exactly nothing: its row of
`up.weight`, its entry of `up.bias`, its column of `down.weight` and its threshold go together, and the
smaller model computes the same function. That is what makes an artifact smaller and faster; zeros at the
old shape do neither.
"""

from __future__ import annotations

import numpy as np

from foundation.errors import ExportError
from foundation.parameters import WEIGHTS, Array, BoolArray, Masks, Parameters

# Which axis of a tensor counts hidden units.
_UNIT_AXIS = {"up.weight": 0, "up.bias": 0, "down.weight": 1, "threshold": 0}


def cut(parameters: Parameters, masks: Masks) -> Parameters:
    """Return the parameters without the units whose mask is false.

    `masks` has one array of shape (hidden units,) per FFL, under `blocks.i.ffl`; a block without a mask
    stays whole. Raises `ExportError` for a mask of no FFL, of another type or of another length.
    """
    for name, mask in masks.items():
        _check(name, mask, parameters)
    return Parameters((name, _kept(name, array, masks)) for name, array in parameters.items())


def widths(parameters: Parameters) -> tuple[int, ...]:
    """Return the number of hidden units of every block, from the first block to the last."""
    found: list[int] = []
    while (name := f"blocks.{len(found)}.ffl.up.weight") in parameters:
        found.append(int(parameters[name].shape[0]))
    return tuple(found)


def count(parameters: Parameters) -> int:
    """Return how many numbers a served model has: thresholds are for training and do not count."""
    return parameters.only(WEIGHTS).size


def _kept(name: str, array: Array, masks: Masks) -> Array:
    block, found, part = name.partition(".ffl.")
    mask = masks.get(f"{block}.ffl") if found else None
    axis = _UNIT_AXIS.get(part)
    if mask is None or axis is None:
        return array
    return np.compress(mask, array, axis=axis)


def _check(name: str, mask: BoolArray, parameters: Parameters) -> None:
    up = parameters.get(f"{name}.up.weight")
    if up is None:
        raise ExportError(f"there is a mask for {name!r}, and the model has no FFL of that name")
    if mask.dtype != np.bool_ or mask.shape != (up.shape[0],):
        raise ExportError(
            f"the mask of {name} is {mask.dtype}{mask.shape}; {up.shape[0]} units need bool({up.shape[0]},)"
        )
