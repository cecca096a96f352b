"""The threshold equations of edge_agent/training/pruning.py, on numbers small enough to check."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_agent.training.pruning import (
    Pruner,
    compacted,
    floor_of,
    importance,
    masks_of,
    scattered,
    surrogate,
)
from foundation.nn.bridge import to_module, to_parameters
from foundation.nn.transformer import loss_of
from foundation.parameters import Parameters
from foundation.spec import initial_parameters
from foundation.work import ThresholdPruning
from tests.toys import SPEC


def _lively(seed: int = 1) -> Parameters:
    """An initial model whose biases are not 0, so that a dropped unit would be missed if it still spoke."""
    rng = np.random.default_rng(seed)
    model = initial_parameters(SPEC, 0)
    return Parameters(
        (n, (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32) if _weighs(n) else a)
        for n, a in model.items()
    )


def _weighs(name: str) -> bool:
    return "ffl" in name and "threshold" not in name


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, *SPEC.shape, generator=generator), torch.arange(6) % SPEC.classes


def test_the_mask_gradient_is_the_scalar_product_with_the_down_gradient() -> None:
    # eq. 2: dL/dm_j = <down_j, dL/d down_j> at m = 1, to 1e-10 in double precision.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 4, dtype=torch.float64, generator=generator)
    up = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    down = torch.randn(4, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.ones(9, dtype=torch.float64, requires_grad=True)
    loss = torch.tanh(F.linear(mask * F.gelu(F.linear(x, up)), down)).square().mean()
    loss.backward()
    assert down.grad is not None
    assert mask.grad is not None
    assert torch.allclose((down * down.grad).sum(0), mask.grad, rtol=0, atol=1e-10)
    assert mask.grad.abs().max() > 1e-6


def test_the_surrogate_is_the_long_tailed_one() -> None:
    q = torch.tensor([0.0, 0.1, -0.1, 0.4, 0.7, -1.0, 1.2])
    assert torch.allclose(surrogate(q), torch.tensor([2.0, 1.6, 1.6, 0.4, 0.4, 0.4, 0.0]))


def _pruner(term: ThresholdPruning, start: Parameters | None = None) -> Pruner:
    start = start or _lively()
    masks = masks_of(start, SPEC, term)
    return Pruner(to_module(SPEC, compacted(start, masks)), start, masks, term)


def _backward(pruner: Pruner) -> None:
    x, y = _batch()
    pruner.model.zero_grad()
    loss_of(pruner.model(x), y).backward()


def test_the_task_loss_alone_moves_thresholds() -> None:
    # In some public code the task gradient on thresholds is exactly zero; here it must not be.
    pruner = _pruner(ThresholdPruning(every=1, regulariser=0, max_drop=0.01))
    _backward(pruner)
    pruner.after_backward()
    assert all(t.abs().max() > 1e-4 for t in pruner.thresholds)
    assert all(t.min() < 0 < t.max() for t in pruner.thresholds)


def test_a_unit_whose_loss_the_task_would_lower_by_dropping_it_gets_a_higher_threshold() -> None:
    pruner = _pruner(ThresholdPruning(every=1, regulariser=0, max_drop=0.01))
    _backward(pruner)
    block = pruner.model.blocks[0]
    pull = (block.ffl.down.weight * block.ffl.down.weight.grad).sum(0)
    size = torch.tensor(importance(_lively(), SPEC, 0))
    pruner.after_backward()
    moved = pruner.thresholds[0]
    near = size.abs() <= 1  # beyond, the surrogate is 0 and nothing moves
    assert torch.equal(torch.sign(moved[near]), torch.sign(pull[near]))
    assert torch.all(moved[~near] == 0)


def test_the_regulariser_alone_moves_by_its_closed_form() -> None:
    term = ThresholdPruning(every=2, threshold_rate=0.05, task_gradient=False, target=0.9, floor=1)
    pruner = _pruner(term)
    _backward(pruner)
    pruner.after_backward()
    assert all(torch.all(t == 0) for t in pruner.thresholds)  # the first of two steps: nothing yet
    pruner.after_backward()
    # eq. 3 from t = 0: rate * every * 1 * exp(0) = 0.1, far from the target so r = 1
    assert all(torch.allclose(t, torch.full_like(t, 0.1)) for t in pruner.thresholds)


def test_counting_goes_on_across_rounds() -> None:
    # A device with fewer steps a round than `every` must move its thresholds all the same.
    term = ThresholdPruning(every=4, task_gradient=False)
    start = _lively()
    masks = masks_of(start, SPEC, term)
    pruner = Pruner(to_module(SPEC, compacted(start, masks)), start, masks, term, steps=3)
    _backward(pruner)
    pruner.after_backward()
    assert pruner.steps == 4
    assert pruner.thresholds[0].min() > 0


def test_warm_up_moves_nothing() -> None:
    pruner = _pruner(ThresholdPruning(every=1, active=False))
    _backward(pruner)
    assert pruner.after_backward() == [None, None]
    assert all(torch.all(t == 0) for t in pruner.thresholds)


@pytest.mark.parametrize("threshold", [0.9, 50.0])
def test_floor_and_largest_drop_hold(threshold: float) -> None:
    start = _lively()
    term = ThresholdPruning(every=1, target=0.75, floor=2, max_drop=0.3)
    pruner = _pruner(term, start)
    for t in pruner.thresholds:
        t.fill_(threshold)
    optimizer = torch.optim.AdamW(pruner.model.parameters(), fused=True)
    _backward(pruner)
    optimizer.step()
    pruner.cut(pruner.after_backward(), optimizer)
    assert all(width >= round(0.7 * SPEC.hidden) for width in pruner.widths)
    for _ in range(20):
        _backward(pruner)
        pruner.cut(pruner.after_backward(), optimizer)
    floor = floor_of(SPEC, term)
    assert floor == 4
    assert all(width >= floor for width in pruner.widths)
    if threshold == 50.0:
        assert pruner.widths == (floor, floor)


def test_the_floor_holds_when_masks_are_built_too() -> None:
    start = _lively().updated({"blocks.0.ffl.threshold": np.full(SPEC.hidden, 99, np.float32)})
    masks = masks_of(start, SPEC, ThresholdPruning(target=0.5, floor=1))
    assert masks["blocks.0.ffl"].sum() == SPEC.hidden // 2
    strongest = np.sort(importance(start, SPEC, 0))[-SPEC.hidden // 2 :]
    assert np.allclose(np.sort(importance(start, SPEC, 0)[masks["blocks.0.ffl"]]), strongest)


def test_masked_equals_compacted() -> None:
    start = _lively()
    rng = np.random.default_rng(5)
    masks = {f"blocks.{i}.ffl": rng.random(SPEC.hidden) < 0.4 for i in range(SPEC.depth)}
    x, _ = _batch()
    small = to_module(SPEC, compacted(start, masks))
    dense = to_module(SPEC, start)

    def mask_activation(mask: np.ndarray):  # type: ignore[no-untyped-def]
        return lambda _module, inputs: (inputs[0] * torch.from_numpy(mask).float(),)

    for i, block in enumerate(dense.blocks):
        block.ffl.down.register_forward_pre_hook(mask_activation(masks[f"blocks.{i}.ffl"]))
    with torch.no_grad():
        assert torch.allclose(small(x), dense(x), rtol=0, atol=1e-5)
        assert not torch.allclose(small(x), to_module(SPEC, start)(x), rtol=0, atol=1e-3)


def test_cutting_takes_the_optimizer_along() -> None:
    pruner = _pruner(ThresholdPruning(every=1, target=0.5, max_drop=1.0))
    optimizer = torch.optim.AdamW(pruner.model.parameters(), fused=True)
    for _ in range(3):
        _backward(pruner)
        optimizer.step()
    keep = torch.tensor([0, 3, 5, 6, 9, 10, 12, 15])
    ffl = pruner.model.blocks[1].ffl
    before = {
        name: (p.detach().clone(), optimizer.state[p]["exp_avg"].clone(), optimizer.state[p]["step"].clone())
        for name, p in ffl.named_parameters()
    }
    assert pruner.cut([None, keep], optimizer)
    assert pruner.widths == (SPEC.hidden, 8)
    for name, axis in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
        new = dict(ffl.named_parameters())[name]
        weight, moment, step = before[name]
        assert torch.equal(new, weight.index_select(axis, keep))
        assert torch.equal(optimizer.state[new]["exp_avg"], moment.index_select(axis, keep))
        assert torch.equal(optimizer.state[new]["step"], step)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in pruner.model.parameters()
    }
    _backward(pruner)
    optimizer.step()  # and it goes on


def test_parked_units_keep_their_values_and_places() -> None:
    start = _lively()
    masks = {f"blocks.{i}.ffl": np.arange(SPEC.hidden) % 3 == 0 for i in range(SPEC.depth)}
    model = to_module(SPEC, compacted(start, masks))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    back = scattered(to_parameters(model), start, masks)
    kept = masks["blocks.0.ffl"]
    for name in start:
        if name.endswith("threshold"):
            assert np.array_equal(back[name], start[name])
        elif name.endswith(("up.weight", "up.bias")):
            assert np.allclose(back[name][kept], start[name][kept] + 1)
            assert np.array_equal(back[name][~kept], start[name][~kept])
        elif name.endswith("down.weight"):
            assert np.allclose(back[name][:, kept], start[name][:, kept] + 1)
            assert np.array_equal(back[name][:, ~kept], start[name][:, ~kept])
        else:
            assert np.allclose(back[name], start[name] + 1)


def test_importance_is_about_one_at_the_start() -> None:
    spec = SPEC.model_copy(update={"width": 64, "heads": 4, "ffl_ratio": 4.0})
    model = initial_parameters(spec, 0)
    for block in range(spec.depth):
        assert importance(model, spec, block).mean() == pytest.approx(1.0, abs=0.03)
