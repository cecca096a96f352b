"""What one round of a model costs a device: multiply-adds and bits, from its spec.

Only the matrix products are counted; norms, biases and activations are left out, as is usual. Bits are those
of the payload before lossless compression, which no formula can know.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass

from foundation.parameters import WEIGHTS, Role, role_of
from foundation.spec import ModelSpec
from foundation.work import Encoding

VALUE_BITS: dict[Encoding, int] = {"float32": 32, "float16": 16, "int8": 8}


@dataclass(frozen=True, slots=True)
class ForwardCost:
    """Multiply-adds of one sample on its way through a dense model; a step back costs twice as much."""

    body: int
    """Embedding, attention and its output projection."""
    ffl: int
    """All FFLs; falls in proportion to the units that are left."""
    head: int


def forward_cost(spec: ModelSpec) -> ForwardCost:
    """Return the multiply-adds of one sample; with `pool = "cls"` the last block is for one token only."""
    tokens, d = spec.tokens, spec.width
    embed = 0 if spec.input == "text" else spec.patches * spec.patch_size * d
    whole = tokens * (4 * d * d + 2 * tokens * d)
    last = 2 * tokens * d * d + 2 * d * d + 2 * tokens * d if spec.pool == "cls" else whole
    rows = (spec.depth - 1) * tokens + (1 if spec.pool == "cls" else tokens)
    answers = tokens if spec.input == "text" else 1
    return ForwardCost(
        body=embed + (spec.depth - 1) * whole + last,
        ffl=rows * 2 * d * spec.hidden,
        head=answers * d * spec.classes,
    )


@dataclass(frozen=True, slots=True)
class PayloadBits:
    """Bits of the values of one message."""

    fixed: int
    """Of everything that pruning FFL units leaves."""
    units: int
    """Of the FFL units when all are there; falls in proportion to those that are left."""

    @property
    def total(self) -> int:
        """Bits of the dense model."""
        return self.fixed + self.units


def payload_bits(
    spec: ModelSpec, roles: Set[Role] = WEIGHTS, encoding: Encoding = "float32", *, masks: bool = False
) -> PayloadBits:
    """Return the bits of a model's arrays of these roles on the wire.

    Arrays with one axis travel as float32 whatever the encoding, and `int8` brings one float32 a row. With
    `masks`, every FFL has one bit a unit beside it.
    """
    fixed, units = 0, 0
    for name, shape in spec.layout:
        if role_of(name) not in roles:
            continue
        bits = math.prod(shape) * (32 if len(shape) == 1 else VALUE_BITS[encoding])
        scales = 32 * shape[0] if encoding == "int8" and len(shape) > 1 else 0
        if name.endswith((".ffl.up.weight", ".ffl.up.bias")):
            units += bits + scales
        elif name.endswith(".ffl.down.weight"):
            units, fixed = units + bits, fixed + scales  # its rows are outputs, not units
        else:
            fixed += bits + scales
    return PayloadBits(fixed + (spec.depth * spec.hidden if masks else 0), units)
