"""Where a round starts: between what arrived and what this device kept, role by role, by its validation part.

    s = (1 - g_r) a + g_r p          for every tensor of role r                                   (1)
    dL/dg_r = sum over role r of < dL/ds , p - a >                                                (2)
    g_r <- clip(g_r - rate * (dL/dg_r) / max_r |dL/dg_r|, 0, 1)                                   (3)

a is what arrived, p what the device kept, L the loss on (at most `samples` of) the validation part, on which
nothing else is trained. g = 0 everywhere is FedAvg, g = 1 for the head FedPer, g = 1 everywhere `local`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from foundation.nn.bridge import to_module
from foundation.nn.transformer import loss_of
from foundation.parameters import Array, BoolArray, Parameters, Role, role_of
from foundation.spec import ModelSpec
from foundation.work import Blend

GATES = "own/gates"
"""Name under which the gates stay on the device: (roles,), in the order of `Role`."""
ROLES = tuple(Role)


def gates_of(term: Blend, own: Mapping[str, Array]) -> Array:
    """Return the gates as they stand, (roles,): those kept, or the term's first ones."""
    if GATES in own:
        return np.asarray(own[GATES], np.float32)
    return np.array([term.gates.get(role, 0.0) for role in ROLES], np.float32)


def mixed(sent: Parameters, own: Parameters, gates: Array, names: tuple[str, ...]) -> Parameters:
    """Return (1), for the names that both have; what only one of them has is taken as it is."""
    gate = dict(zip(ROLES, gates.tolist(), strict=True))
    arrays: dict[str, Array] = {}
    for name in names:
        if name not in sent or name not in own:
            continue
        g = gate[role_of(name)]
        # Exact at both ends: a special case is the special case, to the bit.
        arrays[name] = sent[name] if g == 0 else own[name] if g == 1 else _between(sent[name], own[name], g)
    return Parameters(arrays)


def _between(sent: Array, own: Array, gate: float) -> Array:
    result: Array = (np.float32(1 - gate) * sent + np.float32(gate) * own).astype(np.float32)
    return result


def moved(
    gates: Array,
    term: Blend,
    spec: ModelSpec,
    start: Parameters,
    masks: dict[str, BoolArray],
    difference: Parameters,
    x: Tensor,
    y: Tensor,
) -> Array:
    """Return the gates after (2) and (3).

    `start` is the (compacted) mixture, `difference` own - sent, dense; `masks` say which FFL units are left.
    """
    model = to_module(spec, start)
    loss_of(model(x), y).backward()  # type: ignore[no-untyped-call]
    slope = np.zeros(len(ROLES))
    for name, parameter in model.named_parameters():
        if name in difference and parameter.grad is not None:
            far = _cut(name, difference[name], masks)
            slope[ROLES.index(role_of(name))] += float(np.vdot(parameter.grad.numpy(), far))
    largest = np.abs(slope).max()
    if not np.isfinite(largest) or largest == 0:
        return gates
    result: Array = np.clip(gates - term.rate * slope / largest, 0, 1).astype(np.float32)
    return result


def _cut(name: str, array: Array, masks: dict[str, BoolArray]) -> Array:
    block, _, part = name.partition(".ffl.")
    mask = masks.get(f"{block}.ffl")
    if mask is None or part in ("", "down.bias"):
        return array
    return array[:, mask] if part == "down.weight" else array[mask]


def some(examples: int, term: Blend, seed: int) -> Array:
    """Return the rows of the validation part that are asked in this round."""
    rows: Array = np.random.default_rng([seed, 0xB1E]).permutation(examples)[: term.samples]
    return np.sort(rows)
