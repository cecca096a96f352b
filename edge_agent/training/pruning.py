"""Learned thresholds on FFL units, and cutting the units for good while training goes on.

A hidden unit j of an FFL has the importance and is kept while

    I_j = |up_j| * |down_j| / c ,        kept  <=>  I_j > t_j                                  (1)

with up_j the row of `up.weight`, down_j the column of `down.weight` and c the expected value of the
product at initialisation (`ModelSpec.importance_scale`). With a mask m_j on the unit's activation, the
task loss pulls a threshold through the step function of (1):

    dL/dt_j = -H(I_j - t_j) * dL/dm_j ,   dL/dm_j = <down_j, dL/d(down_j)>                     (2)

The second half is an identity at m_j = 1, so a compacted layer needs no mask in its graph. H is the
long-tailed surrogate of DST (Liu et al. 2020): 2 - 4|q| up to 0.4, 0.4 up to 1, 0 beyond. Every few
optimizer steps

    t_j <- t_j + rate * every * ( H * s_j / mean|s| + r * exp(-t_j) ) ,   s_j = dL/dm_j         (3)
    r   =  regulariser * clip((target - share gone) / 0.1, 0, 1)

and units at or below their threshold are cut: rows of `up`, its bias, columns of `down`, and the same
rows and columns of the optimizer's moments. Formulation, normalisation by the block's mean |s|,
controller and floor are our choice; the papers leave them open.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from foundation.nn.bridge import tensor_of
from foundation.nn.transformer import FFL, Block, Transformer
from foundation.parameters import Array, BoolArray, Masks, Parameters
from foundation.spec import ModelSpec
from foundation.work import ImportancePruning, ThresholdPruning


def surrogate(q: Tensor) -> Tensor:
    """Return H(q), the stand-in for the derivative of the step function; same shape as `q`."""
    size = q.abs()
    return torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0))


def importance(parameters: Parameters, spec: ModelSpec, block: int) -> Array:
    """Return I_j of every unit of one block, shape (units,); eq. 1."""
    up = np.linalg.norm(parameters[f"blocks.{block}.ffl.up.weight"], axis=1)
    down = np.linalg.norm(parameters[f"blocks.{block}.ffl.down.weight"], axis=0)
    result: Array = (up * down / spec.importance_scale).astype(np.float32)
    return result


def chance(spec: ModelSpec, block: int) -> Array:
    """Return importances drawn for the units of a block, (hidden,): the control that knows nothing."""
    return np.random.default_rng([0xC4A, block]).uniform(0.5, 1.5, spec.hidden).astype(np.float32)


def floor_of(spec: ModelSpec, term: ThresholdPruning) -> int:
    """Return how many units a block keeps at least: the target's share, and never under `term.floor`."""
    return min(spec.hidden, max(term.floor, round(spec.hidden * (1 - term.target))))


def masks_of(
    parameters: Parameters, spec: ModelSpec, term: ThresholdPruning, offered: Masks | None = None
) -> dict[str, BoolArray]:
    """Return which units of a dense model its thresholds keep, `blocks.i.ffl` -> (hidden,).

    The floor holds here too: otherwise averaged thresholds overshoot the target at the round's start. Where
    `offered` says which units came along, no others are kept.
    """
    masks = {}
    for i in range(spec.depth):
        size = chance(spec, i) if term.importance == "random" else importance(parameters, spec, i)
        margin = size - parameters[f"blocks.{i}.ffl.threshold"]
        floor = floor_of(spec, term)
        came = (offered or {}).get(f"blocks.{i}.ffl")
        if came is not None and came.any():
            margin = np.where(came, margin, -np.inf)
            floor = min(floor, int(came.sum()))
        kept = margin > 0
        if kept.sum() < floor:
            kept[np.argsort(-margin, kind="stable")[:floor]] = True
        masks[f"blocks.{i}.ffl"] = kept
    return masks


def compacted(parameters: Parameters, masks: dict[str, BoolArray]) -> Parameters:
    """Return the parameters with the dropped units' rows and columns removed; thresholds too."""
    arrays = dict(parameters)
    for block, mask in masks.items():
        arrays[f"{block}.up.weight"] = arrays[f"{block}.up.weight"][mask]
        arrays[f"{block}.up.bias"] = arrays[f"{block}.up.bias"][mask]
        arrays[f"{block}.down.weight"] = arrays[f"{block}.down.weight"][:, mask]
        if f"{block}.threshold" in arrays:
            arrays[f"{block}.threshold"] = arrays[f"{block}.threshold"][mask]
    return Parameters(arrays)


def scattered(trained: Parameters, dense: Parameters, masks: dict[str, BoolArray]) -> Parameters:
    """Put a compacted model's values back to their original coordinates, over the parked dense copy."""
    arrays = dict(dense.updated({n: a for n, a in trained.items() if ".ffl." not in n}))
    for block, mask in masks.items():
        for part, index in (("up.weight", mask), ("up.bias", mask), ("down.weight", (slice(None), mask))):
            name = f"{block}.{part}"
            full = dense[name].copy()
            full[index] = trained[name]
            arrays[name] = full
        arrays[f"{block}.down.bias"] = trained[f"{block}.down.bias"]
    return Parameters(arrays)


class Cutter:
    """Cuts a model's FFLs in place, and knows which of their original units are left.

    `kept` holds, for every block, the original coordinates of the units that are still there.
    """

    steps = 0
    """Optimizer steps that count towards the next move of a threshold; none without thresholds."""

    def __init__(self, model: Transformer, masks: Mapping[str, BoolArray]) -> None:
        self.model, self.spec = model, model.spec
        self.kept = [
            torch.from_numpy(np.flatnonzero(masks[name])) if name in masks else torch.arange(self.spec.hidden)
            for name in (f"blocks.{i}.ffl" for i in range(model.spec.depth))
        ]

    @property
    def masks(self) -> dict[str, BoolArray]:
        """Which original units are kept, `blocks.i.ffl` -> (hidden,)."""
        result = {}
        for i, kept in enumerate(self.kept):
            mask = np.zeros(self.spec.hidden, np.bool_)
            mask[kept.numpy()] = True
            result[f"blocks.{i}.ffl"] = mask
        return result

    @property
    def widths(self) -> tuple[int, ...]:
        """Kept units of every block."""
        return tuple(len(kept) for kept in self.kept)

    def threshold_parameters(self) -> Parameters:
        """Return the dense thresholds of all blocks; none here."""
        return Parameters()

    def after_backward(self) -> list[Tensor | None]:
        """Count a step; return for each block the positions (in the compacted layer) to keep, or `None`.

        Call it between `backward` and clipping, while gradients are the loss's own.
        """
        return [None] * len(self.kept)

    def after_epochs(self, done: int, start: Parameters) -> list[Tensor | None]:
        """Return the same after `done` epochs in which FFLs moved, away from their values in `start`."""
        return [None] * len(self.kept)

    def cut(self, keeps: list[Tensor | None], optimizer: torch.optim.Optimizer) -> bool:
        """Remove units from the matrices and from the optimizer's moments; true if anything fell."""
        for i, keep in enumerate(keeps):
            if keep is None:
                continue
            ffl = self._ffl(i)
            _shrink(ffl.up, "weight", keep, 0, optimizer)
            _shrink(ffl.up, "bias", keep, 0, optimizer)
            _shrink(ffl.down, "weight", keep, 1, optimizer)
            ffl.up.out_features = ffl.down.in_features = len(keep)
            self.kept[i] = self.kept[i][keep]
        return any(keep is not None for keep in keeps)

    def _importance(self, ffl: FFL) -> Tensor:
        size: Tensor = ffl.up.weight.norm(dim=1) * ffl.down.weight.norm(dim=0)
        return size / self.spec.importance_scale

    def _ffl(self, i: int) -> FFL:
        block = self.model.blocks[i]
        assert isinstance(block, Block)
        return block.ffl


class ImportanceCutter(Cutter):
    """Cuts a given share of every block's units once, after some epochs: the least important ones."""

    def __init__(self, model: Transformer, masks: Mapping[str, BoolArray], term: ImportancePruning) -> None:
        super().__init__(model, masks)
        self.term = term
        self.left = min(self.spec.hidden, max(term.floor, round(self.spec.hidden * (1 - term.ratio))))
        """Units that every block keeps."""

    @torch.no_grad()
    def after_epochs(self, done: int, start: Parameters) -> list[Tensor | None]:
        """Return what to keep when `done` are the term's epochs, and nothing to do otherwise."""
        if done != self.term.epochs:
            return [None] * len(self.kept)
        return [self._choice(i, start) for i in range(len(self.kept))]

    def _choice(self, i: int, start: Parameters) -> Tensor | None:
        if len(self.kept[i]) <= self.left:
            return None
        order = torch.argsort(self._score(i, start), stable=True)
        return torch.sort(order[len(self.kept[i]) - self.left :]).values

    def _score(self, i: int, start: Parameters) -> Tensor:
        ffl = self._ffl(i)
        if self.term.score == "magnitude":
            return self._importance(ffl)
        parts = (
            (ffl.up.weight, "up.weight"),
            (ffl.up.bias[:, None], "up.bias"),
            (ffl.down.weight.T, "down.weight"),
        )
        if self.term.score == "change_gradient":
            gradients = (ffl.up.weight.grad, ffl.up.bias.grad, ffl.down.weight.grad)
            if any(g is None for g in gradients):
                return self._importance(ffl)  # no step was taken: nothing is known but the size
            up, bias, down = (g for g in gradients if g is not None)
            taylor = (ffl.up.weight * up).sum(1) + ffl.up.bias * bias + (ffl.down.weight * down).sum(0)
            return taylor.abs()
        total = torch.zeros(len(self.kept[i]))
        for now, part in parts:
            before = tensor_of(start[f"blocks.{i}.ffl.{part}"])
            before = before.T if part == "down.weight" else before.reshape(len(before), -1)
            total += (now - before[self.kept[i]]).square().sum(dim=1)
        return total.sqrt()


class Pruner(Cutter):
    """Owns the thresholds of one training run and cuts the model's FFLs in place.

    `thresholds` are dense, so that those of dropped units go on travelling.
    """

    def __init__(
        self,
        model: Transformer,
        thresholds: Parameters,
        masks: dict[str, BoolArray],
        term: ThresholdPruning,
        *,
        steps: int = 0,
    ) -> None:
        super().__init__(model, masks)
        self.term, self.steps = term, steps
        self.floor = floor_of(model.spec, term)
        blocks = range(model.spec.depth)
        self.thresholds = [torch.tensor(thresholds[f"blocks.{i}.ffl.threshold"]) for i in blocks]

    def threshold_parameters(self) -> Parameters:
        """Return the dense thresholds of all blocks."""
        return Parameters(
            (f"blocks.{i}.ffl.threshold", t.numpy().copy()) for i, t in enumerate(self.thresholds)
        )

    def after_backward(self) -> list[Tensor | None]:
        """Count a step; when it is time, move the thresholds by eq. 3 and say what falls."""
        self.steps += 1
        if not self.term.active or self.steps % self.term.every:
            return [None] * len(self.kept)
        return [self._move(i) for i in range(len(self.kept))]

    @torch.no_grad()
    def _move(self, i: int) -> Tensor | None:
        kept, term = self.kept[i], self.term
        if len(kept) <= self.floor:
            return None  # at the target: no bookkeeping any more
        ffl = self._ffl(i)
        t = self.thresholds[i][kept]
        size = self._importance(ffl)
        if term.importance == "random":
            size = torch.from_numpy(chance(self.spec, i))[kept]
        gone = 1 - len(kept) / self.spec.hidden
        pull = term.regulariser * min(1.0, max(0.0, (term.target - gone) / 0.1))
        step = pull * torch.exp(-t)
        if term.task_gradient and term.importance != "random":
            step += surrogate(size - t) * self._saliency(ffl)
        t = t + term.threshold_rate * term.every * step
        self.thresholds[i][kept] = t
        margin = size - t
        fallen = int((margin <= 0).sum())
        drop = min(fallen, max(1, int(len(kept) * term.max_drop)), len(kept) - self.floor)
        if drop < 1:
            return None
        order = torch.argsort(margin, stable=True)
        return torch.sort(order[drop:]).values

    def _saliency(self, ffl: FFL) -> Tensor:
        gradient = ffl.down.weight.grad
        if gradient is None:  # the FFLs stand still in this phase: no task gradient to speak of
            return torch.zeros(ffl.down.weight.shape[1])
        s = (ffl.down.weight * gradient).sum(dim=0)  # eq. 2
        return s / s.abs().mean().clamp_min(1e-12)


def _shrink(layer: nn.Linear, name: str, keep: Tensor, axis: int, optimizer: torch.optim.Optimizer) -> None:
    old: nn.Parameter = getattr(layer, name)
    new = nn.Parameter(old.detach().index_select(axis, keep).contiguous(), old.requires_grad)
    if old.grad is not None:
        new.grad = old.grad.index_select(axis, keep).contiguous()
    setattr(layer, name, new)
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state:
        optimizer.state[new] = {
            key: value.index_select(axis, keep).contiguous()
            if isinstance(value, Tensor) and value.shape == old.shape
            else value
            for key, value in state.items()
        }
