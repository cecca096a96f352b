"""The text form of metrics."""

from __future__ import annotations

import math

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.prometheus import Family, Sample, counter, gauge, process_families, render
from tests.exposition import follows_the_conventions, read


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from(["device", "kind", "stage"]), st.text(max_size=20)),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(min_size=1, max_size=30),
)
def test_what_is_written_is_read_as_it_was(labels: dict[str, str], value: float, told: str) -> None:
    text = render([gauge("hedgerow_x", f"h{told}", [(labels, value)])])
    (((_, own), found),) = read(text)["hedgerow_x"].samples.items()
    assert dict(own) == labels
    assert found == value


def test_the_unknown_is_not_there() -> None:
    families = read(render([gauge("hedgerow_a", "A.", [({"d": "x"}, None), ({"d": "y"}, 0)])]))
    assert families["hedgerow_a"].samples == {("hedgerow_a", frozenset({("d", "y")})): 0}


def test_infinities_have_their_words() -> None:
    text = render([gauge("a", "A.", [({}, math.inf), ({"x": 1}, -math.inf), ({"x": 2}, math.nan)])])
    assert [line.rpartition(" ")[2] for line in text.splitlines()[2:]] == ["+Inf", "-Inf", "NaN"]


def test_a_counter_is_called_one() -> None:
    with pytest.raises(ValueError, match="_total"):
        counter("hedgerow_joules", "J.", [])


def test_a_label_that_is_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="label"):
        render([Family("a", "gauge", "A.", (Sample({'x="': 1}, 1.0),))])


def test_a_process_has_the_usual_names() -> None:
    families = read(render(process_families(psutil.Process())))
    follows_the_conventions(families)
    assert families["process_resident_memory_bytes"].value() > 1 << 20
