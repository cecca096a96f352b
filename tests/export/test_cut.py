from __future__ import annotations

import numpy as np
import pytest

from export.cut import count, cut, widths
from foundation.errors import ExportError
from foundation.parameters import Array
from tests.export.reference import SPECS, forward, masks_for, normalisation_for, raw_inputs, trained

SPEC = SPECS["image-mean"]


def test_cut_model_is_the_masked_model() -> None:
    parameters, masks = trained(SPEC), masks_for(SPEC, (3, 0, 50))
    dropped = parameters["blocks.0.ffl.up.bias"][~masks["blocks.0.ffl"]]
    assert np.abs(dropped).min() > 0  # a kept bias of a dropped unit would show
    x, statistics = raw_inputs(SPEC, 3), normalisation_for(SPEC)
    masked = forward(SPEC, parameters, masks, statistics, x)
    small = cut(parameters, masks)
    np.testing.assert_allclose(forward(SPEC, small, {}, statistics, x), masked, rtol=0, atol=1e-12)
    assert np.abs(forward(SPEC, parameters, {}, statistics, x) - masked).max() > 0.1


def test_rows_bias_columns_and_thresholds_go_together() -> None:
    parameters, masks = trained(SPEC), masks_for(SPEC, (3, 0, 50))
    small = cut(parameters, masks)
    assert widths(small) == (3, 0, 50)
    assert widths(parameters) == (64, 64, 64)
    keep = masks["blocks.0.ffl"]
    np.testing.assert_array_equal(small["blocks.0.ffl.up.weight"], parameters["blocks.0.ffl.up.weight"][keep])
    np.testing.assert_array_equal(small["blocks.0.ffl.up.bias"], parameters["blocks.0.ffl.up.bias"][keep])
    down = parameters["blocks.0.ffl.down.weight"][:, keep]
    np.testing.assert_array_equal(small["blocks.0.ffl.down.weight"], down)
    np.testing.assert_array_equal(small["blocks.0.ffl.threshold"], parameters["blocks.0.ffl.threshold"][keep])
    assert small["blocks.0.ffl.down.bias"] is parameters["blocks.0.ffl.down.bias"]
    assert small["head.weight"] is parameters["head.weight"]


def test_counts_leave_thresholds_out() -> None:
    parameters = trained(SPEC)
    assert count(parameters) == parameters.size - 3 * 64
    # One unit is a row of up, its bias, and a column of down.
    assert count(parameters) - count(cut(parameters, masks_for(SPEC, (63, 64, 64)))) == 16 + 1 + 16


def test_no_masks_cut_nothing() -> None:
    parameters = trained(SPEC)
    assert cut(parameters, {}) == parameters


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("blocks.7.ffl", np.ones(64, bool), "no FFL of that name"),
        ("blocks.0.ffl", np.ones(63, bool), r"bool\(63,\)"),
        ("blocks.0.ffl", np.ones(64, np.float32), "float32"),
        ("blocks.0.ffl", np.ones((64, 1), bool), "64 units need"),
    ],
)
def test_masks_that_do_not_fit_are_refused(name: str, mask: Array, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        cut(trained(SPEC), {name: mask})
