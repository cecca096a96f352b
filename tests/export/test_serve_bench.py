"""bench/serve.py compares what it says, and tells a missed bar from one that nobody could measure."""

from __future__ import annotations

import numpy as np
import pytest

from bench import serve as bench
from bench import serve_models as models
from bench.serve import Row
from export.proof import open_session


@pytest.fixture(scope="module")
def one() -> models.Drawn:
    return models.Drawn("64/17")


@pytest.mark.parametrize(
    ("value", "bar", "at_least", "met"),
    [
        (0.5, 0.55, None, True),
        (0.56, 0.55, None, False),
        (1.0, 1.05, 0.95, True),
        (0.9, 1.05, 0.95, False),
        (1.1, 1.05, 0.95, False),
        (None, 0.55, None, None),
        (0.5, None, None, None),
    ],
)
def test_a_bar_is_met_missed_or_nobody_knows(
    value: float | None, bar: float | None, at_least: float | None, met: bool | None
) -> None:
    row = Row("a / b", "64/17", value, bar, at_least)
    assert row.met is met
    text = bench.table([row])
    assert ("MISSED" in text) == (met is False)
    assert ("not available" in text) == (value is None)


def test_the_models_are_what_the_table_says(one: models.Drawn) -> None:
    assert one.spec.tokens == 17
    kept = [int(mask.sum()) for mask in one.masks.values()]
    assert kept == [round(0.1 * one.spec.hidden)] * one.spec.depth
    x = one.inputs(8)
    for model, masked in ((one.dense, False), (one.pruned, True)):
        off, flips = models.compared(model, x, one.torch_logits(x, masked=masked))
        assert off < 1e-5
        assert flips == 0
    assert len(one.zeros) == pytest.approx(len(one.dense), rel=0.01), "the control is not smaller"
    assert models.differences(one.zeros, one.dense, x)[0] > 0.01, "and it is another model"


def test_the_usual_torch_model_is_the_same_function(one: models.Drawn) -> None:
    x = models.torch.from_numpy(one.inputs(3))
    with models.torch.inference_mode():
        usual, ours = models.Plain(one.module())(x), one.module()(x)
    np.testing.assert_allclose(usual, ours, atol=1e-5)


def test_every_side_runs_as_often_and_ratios_are_of_medians(one: models.Drawn) -> None:
    times = models.in_turn(models.sides(one, {}), 6)
    assert {len(each) for each in times.values()} == {6}
    value, (low, high) = models.ratio({"a": [1.0, 2, 3, 4, 50], "b": [1.0, 1, 1, 1, 1]}, "a", "b")
    assert (value, low, high) == (3.0, 1.0, 50.0)


def test_parity_is_looked_at_for_every_opset_that_is_offered(one: models.Drawn) -> None:
    assert models.OPSET in models.OPSETS
    assert len(models.OPSETS) >= 6
    x = one.inputs(4)
    expected = one.torch_logits(x, masked=True)
    assert all(one.parity(n, x, expected, masked=True)[0] < 1e-5 for n in models.OPSETS)


def test_eight_bit_weights_make_the_file_smaller(one: models.Drawn) -> None:
    small, how = models.quantised(one.pruned)
    assert how
    assert len(small) < 0.2 * len(one.dense)
    assert open_session(small).get_outputs()[0].name == "logits"
