"""The changes of a round side by side, a block of coordinates at a time, so that memory stays bounded.

A median needs all values of a coordinate at once, but of few coordinates. Beside the updates themselves,
which the collector holds, this takes a few times `BLOCK_VALUES` numbers, however many updates there are and
however large the model. A coordinate counts only those devices that have it: FFL units are found by index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.robust.changes import held_at
from foundation.messages import Update
from foundation.parameters import Array, Parameters

BLOCK_VALUES = 1 << 20
"""Numbers that stand side by side at once: 4 MiB as float32."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some coordinates of one array over all updates that have that array."""

    name: str
    start: int
    """First coordinate in the flat array."""
    members: tuple[int, ...]
    """Places of those updates."""
    values: Array
    """(members, coordinates), float32."""
    held: Array
    """Which of them the device has, (members, coordinates)."""


def blocks(updates: Sequence[Update], changes: Sequence[Parameters], names: Sequence[str]) -> Iterator[Block]:
    """Yield the blocks of these arrays, over those updates that have them."""
    for name in names:
        members = tuple(i for i, change in enumerate(changes) if name in change)
        if not members:
            continue
        flat = [np.asarray(changes[i][name], np.float32).ravel() for i in members]
        masks = [held_at(updates[i], name, changes[i][name].shape) for i in members]
        step = max(1, BLOCK_VALUES // len(members))
        for start in range(0, flat[0].size, step):
            part = slice(start, min(start + step, flat[0].size))
            held = np.ones((len(members), part.stop - part.start), np.bool_)
            for row, mask in zip(held, masks, strict=True):
                if mask is not None:
                    row[:] = mask.ravel()[part]
            yield Block(name, start, members, np.stack([one[part] for one in flat]), held)


Rule = Callable[[Block], Array]
"""From a block to one value a coordinate, float32."""


def combined(
    updates: Sequence[Update], changes: Sequence[Parameters], names: Sequence[str], rule: Rule
) -> Parameters:
    """Return one array for each name, made of everybody's by a rule."""
    found: dict[str, Array] = {}
    for block in blocks(updates, changes, names):
        if block.name not in found:
            found[block.name] = np.zeros(changes[block.members[0]][block.name].shape, np.float32)
        flat = found[block.name].reshape(-1)
        flat[block.start : block.start + block.values.shape[1]] = rule(block)
    return Parameters(found)
