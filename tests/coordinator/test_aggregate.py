"""Means over updates, on numbers small enough to do by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from coordinator.aggregate import in_order, mean_of_keepers, shares_of, weighted_mean
from foundation.messages import Update
from foundation.parameters import Parameters


def update(
    agent: str, examples: int = 1, arrays: Mapping[str, Any] | None = None, mask: list[int] | None = None
) -> Update:
    return Update(
        run="r",
        round=1,
        agent=agent,
        examples=examples,
        parameters=Parameters({n: np.array(a, np.float32) for n, a in (arrays or {}).items()}),
        masks={} if mask is None else {"blocks.0.ffl": np.array(mask, np.bool_)},
    )


def test_shares_are_by_examples_and_equal_when_nobody_has_any() -> None:
    assert shares_of([update("a", 1), update("b", 3)]) == [0.25, 0.75]
    assert shares_of([update("a", 0), update("b", 0)]) == [0.5, 0.5]


def test_the_order_is_by_agent_whoever_was_first() -> None:
    assert [u.agent for u in in_order([update("c"), update("a"), update("b")])] == ["a", "b", "c"]


def test_a_weighted_mean_by_hand() -> None:
    # (1 * 1 + 3 * 5) / 4 = 4;  (1 * 2 + 3 * 2) / 4 = 2
    mean = weighted_mean([{"w": np.array([1, 2])}, {"w": np.array([5, 2])}], [1, 3])
    assert mean["w"].tolist() == [4.0, 2.0]
    assert mean["w"].dtype == np.float32


def test_a_mean_is_summed_in_double_precision() -> None:
    # In float32, 2^24 + 1 is 2^24: the ones would be lost.
    arrays = [{"w": np.array([v], np.float32)} for v in (2.0**24, 1, 1, -(2.0**24))]
    assert weighted_mean(arrays, [1, 1, 1, 1])["w"].tolist() == [0.5]


OLD = {
    "blocks.0.ffl.up.weight": [[9, 9], [9, 9], [9, 9]],
    "blocks.0.ffl.up.bias": [9, 9, 9],
    "blocks.0.ffl.down.weight": [[9, 9, 9], [9, 9, 9]],
    "blocks.0.ffl.down.bias": [9, 9],
    "blocks.0.ffl.threshold": [9, 9, 9],
}


def filled(value: float) -> dict[str, Any]:
    return {name: np.full(np.shape(array), value) for name, array in OLD.items()}


def mean(updates: list[Update], weights: list[float]) -> Parameters:
    return mean_of_keepers(updates, weights, Parameters({n: np.array(a, np.float32) for n, a in OLD.items()}))


def test_a_unit_is_averaged_over_its_keepers_and_stays_where_nobody_kept_it() -> None:
    # unit 0: both keep it, (1 * 1 + 3 * 5) / 4 = 4; unit 1: only b, 5; unit 2: nobody, 9 as it was
    updates = [update("a", 1, filled(1), [1, 0, 0]), update("b", 3, filled(5), [1, 1, 0])]
    result = mean(updates, [1, 3])
    assert result["blocks.0.ffl.up.weight"].tolist() == [[4, 4], [5, 5], [9, 9]]
    assert result["blocks.0.ffl.up.bias"].tolist() == [4, 5, 9]
    assert result["blocks.0.ffl.down.weight"].tolist() == [[4, 5, 9], [4, 5, 9]]
    assert result["blocks.0.ffl.threshold"].tolist() == [4, 5, 9]
    assert result["blocks.0.ffl.down.bias"].tolist() == [4, 4], "it belongs to no unit"


def test_an_update_without_a_mask_kept_everything() -> None:
    updates = [update("a", 1, filled(1)), update("b", 1, filled(3), [0, 1, 1])]
    assert mean(updates, [1, 1])["blocks.0.ffl.up.bias"].tolist() == [1, 2, 2]


def test_what_a_device_sends_for_units_it_dropped_does_not_matter() -> None:
    wild = filled(5)
    wild["blocks.0.ffl.up.bias"] = np.array([5, 1e30, 5])
    kept = mean([update("a", 1, wild, [1, 0, 1]), update("b", 1, filled(5))], [1, 1])
    assert kept["blocks.0.ffl.up.bias"].tolist() == [5, 5, 5]


def test_a_weight_of_nought_keeps_nothing() -> None:
    # the only keeper of unit 1 has no examples: its share is 0, and the unit stays as it was
    updates = [update("a", 4, filled(1), [1, 0, 1]), update("b", 0, filled(3), [1, 1, 1])]
    result = mean(updates, shares_of(updates))
    assert result["blocks.0.ffl.up.bias"].tolist() == [1, 9, 1]
    assert pytest.approx(result["blocks.0.ffl.down.bias"].tolist()) == [1, 1]
