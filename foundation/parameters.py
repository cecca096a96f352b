"""Named arrays, and the role that a name gives an array.

A tensor's name says what it does, so no strategy ever lists tensor names:

    embed.weight  embed.bias  position  cls         rest
    blocks.0.norm1.weight  blocks.0.output.weight   rest
    blocks.0.attention.qkv.weight                   attention
    blocks.0.ffl.up.weight  blocks.0.ffl.down.bias  ffl
    blocks.0.ffl.threshold                          threshold, one per hidden unit
    head.weight  head.bias                          head
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
BoolArray: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Layout: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
Masks: TypeAlias = Mapping[str, BoolArray]
"""True where something is kept; one mask of shape (hidden units,) per FFL, under `blocks.i.ffl`."""


class Role(StrEnum):
    """The part a tensor plays in the model."""

    ATTENTION = "attention"
    FFL = "ffl"
    THRESHOLD = "threshold"
    HEAD = "head"
    REST = "rest"


EVERYTHING: frozenset[Role] = frozenset(Role)
WEIGHTS: frozenset[Role] = EVERYTHING - {Role.THRESHOLD}


def role_of(name: str) -> Role:
    """Return the role that a tensor's name gives it."""
    if ".attention." in name:
        return Role.ATTENTION
    if name.endswith(".ffl.threshold"):
        return Role.THRESHOLD
    if ".ffl." in name:
        return Role.FFL
    if name.startswith("head."):
        return Role.HEAD
    return Role.REST


class Parameters(Mapping[str, Array]):
    """An immutable mapping from names to arrays, in a fixed order.

    Arrays are not copied when a `Parameters` is made; whoever gives an array away does not write to it
    any more. Arrays decoded from a frame are read-only.
    """

    __slots__ = ("_arrays",)

    def __init__(self, arrays: Mapping[str, Array] | Iterable[tuple[str, Array]] = ()) -> None:
        self._arrays: Mapping[str, Array] = MappingProxyType(dict(arrays))

    @classmethod
    def over(cls, arrays: Mapping[str, Array]) -> Self:
        """Return parameters that look into a mapping each time, such as one that reads from a disk."""
        found = cls.__new__(cls)
        found._arrays = arrays
        return found

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Parameters({len(self)} arrays, {self.size:,} values)"

    def __reduce__(self) -> tuple[type[Self], tuple[dict[str, Array]]]:
        """Pickle as a dict of arrays, which a mapping proxy is not let be."""
        return type(self), (dict(self._arrays),)

    def __eq__(self, other: object) -> bool:
        """Equal when names, order-free, shapes and values are the same, bit for bit."""
        if not isinstance(other, Mapping) or self.keys() != other.keys():
            return False
        return all(np.array_equal(array, other[name]) for name, array in self.items())

    __hash__ = None  # type: ignore[assignment]  # arrays cannot be hashed

    def only(self, roles: Iterable[Role]) -> Self:
        """Return the arrays whose role is among `roles`."""
        wanted = frozenset(roles)
        return type(self)((n, a) for n, a in self.items() if role_of(n) in wanted)

    def under(self, prefix: str) -> Self:
        """Return the arrays whose name starts with `prefix`, without the prefix."""
        return type(self)((n[len(prefix) :], a) for n, a in self.items() if n.startswith(prefix))

    def prefixed_only(self, prefix: str) -> Self:
        """Return the arrays whose name starts with `prefix`, under their whole names."""
        return type(self)((n, a) for n, a in self.items() if n.startswith(prefix))

    def prefixed(self, prefix: str) -> Self:
        """Return the same arrays with `prefix` before every name."""
        return type(self)((prefix + n, a) for n, a in self.items())

    def updated(self, newer: Mapping[str, Array]) -> Self:
        """Return these arrays with those of `newer` on top: what arrives replaces."""
        return type(self)({**self, **newer})

    def flat(self) -> Array:
        """Return all values as one float32 vector, in layout order."""
        if not self:
            return np.zeros(0, np.float32)
        return np.concatenate([np.asarray(a, np.float32).ravel() for a in self.values()])

    def __sub__(self, other: Mapping[str, Array]) -> Self:
        """Return the change `self - other`, for the names that both have."""
        return type(self)((n, a - other[n]) for n, a in self.items() if n in other)

    @property
    def layout(self) -> Layout:
        """Names and shapes, in order."""
        return tuple((name, tuple(array.shape)) for name, array in self.items())

    @property
    def size(self) -> int:
        """Number of values in all arrays."""
        return sum(array.size for array in self.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays as they lie in memory."""
        return sum(array.nbytes for array in self.values())


def from_flat(vector: Array, layout: Layout) -> Parameters:
    """Cut one vector into named arrays; the inverse of `Parameters.flat`.

    Raises `ValueError` when the vector's length is not that of the layout.
    """
    wanted = layout_size(layout)
    if vector.shape != (wanted,):
        raise ValueError(f"a vector of shape {vector.shape} does not fit a layout of {wanted} values")
    arrays, start = {}, 0
    for name, shape in layout:
        stop = start + int(np.prod(shape))
        arrays[name] = vector[start:stop].reshape(shape)
        start = stop
    return Parameters(arrays)


def layout_size(layout: Layout) -> int:
    """Return how many values a layout holds."""
    return sum(int(np.prod(shape)) for _, shape in layout)
