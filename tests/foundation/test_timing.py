"""Times that travel with an update: in order, bounded, and nothing that is no time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from foundation.codec import frame_of, update_from
from foundation.messages import Update
from foundation.timing import MOST_S, MOST_SPANS, Timing

CLOCK = {"offset_s": 7.0, "uncertainty_s": 0.01, "pairs": 8}


def span(start: float, end: float, stage: str = "train") -> dict[str, Any]:
    return {"stage": stage, "start_s": start, "end_s": end}


def test_times_travel_with_an_update() -> None:
    timing = Timing.model_validate({"spans": [span(1, 2, "wait"), span(2, 70)], "clock": CLOCK})
    update = Update(run="r", round=1, agent="pi", examples=3, timing=timing)
    assert update_from(frame_of(update, "float32")).timing == timing
    assert update_from(frame_of(update.model_copy(update={"timing": None}), "float32")).timing is None


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"spans": [span(2, 1)]}, "ends before it starts"),
        ({"spans": [span(0, 5), span(4, 6)]}, "overlap"),
        ({"spans": [span(5, 6), span(1, 2)]}, "overlap"),
        ({"spans": []}, "at least 1"),
        ({"spans": [span(i, i + 1) for i in range(MOST_SPANS + 1)]}, "at most 64"),
        ({"spans": [span(0, 2 * MOST_S)]}, "less than or equal"),
        ({"spans": [span(-1, 1)]}, "greater than or equal"),
        ({"spans": [span(0, 1, "sleep")]}, "Input should be"),
        ({"clock": CLOCK | {"pairs": 0}}, "greater than or equal"),
        ({"clock": CLOCK | {"uncertainty_s": -1.0}}, "greater than or equal"),
        ({"clock": None}, "valid"),
        ({"more": 1}, "not permitted"),
    ],
)
def test_what_is_no_time_is_refused(told: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Timing.model_validate({"spans": [span(0, 1)], "clock": CLOCK} | told)


@given(st.recursive(st.none() | st.floats() | st.text(max_size=3), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["spans", "clock", "stage", "start_s", "end_s", "offset_s", "uncertainty_s", "pairs"]), x
), max_leaves=8))  # fmt: skip
def test_no_json_is_believed(told: Any) -> None:
    with pytest.raises(ValidationError):
        Timing.model_validate_json(json.dumps(told))
