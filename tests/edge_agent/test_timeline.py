"""When stages were: no time is lost or told twice, touching ones are one, and there is a bound."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.energy.meter import Meter
from edge_agent.energy.timeline import BRIEF_S, HELD, Stretch, Timeline, thinned
from foundation.energy import Stage
from foundation.profile import DeviceProfile
from foundation.timing import MOST_SPANS
from tests.edge_agent.test_energy_errors import Clock


def passing(*parts: tuple[Stage, float]) -> list[Stretch]:
    found, at = [], 0.0
    for stage, seconds in parts:
        found.append(Stretch(at, at + seconds, {stage: seconds}))
        at += seconds
    return found


def told(stretches: list[Stretch]) -> list[tuple[Stage, float, tuple[Stage, ...]]]:
    return [(s.stage, round(s.seconds, 6), s.also) for s in stretches]


def test_training_that_is_interrupted_for_moments_is_one_stretch() -> None:
    """A naive list has a span for every cut of a unit: hundreds, and none of them a minute long."""
    parts = [(Stage.WAIT, 200.0), (Stage.RECEIVE, 0.4)]
    parts += [(Stage.TRAIN, 8.0), (Stage.PRUNE, 0.1)] * 30
    parts += [(Stage.EVALUATE, 2.0), (Stage.SEND, 3.0)]
    assert told(thinned(passing(*parts))) == [
        (Stage.WAIT, 200.0, ()),
        (Stage.TRAIN, 243.4, (Stage.RECEIVE, Stage.PRUNE)),
        (Stage.EVALUATE, 2.0, ()),
        (Stage.SEND, 3.0, ()),
    ]


stages = st.lists(st.tuples(st.sampled_from(list(Stage)), st.floats(0.001, 50)), min_size=1, max_size=300)


@given(stages)
def test_no_time_is_lost_and_there_are_few(parts: list[tuple[Stage, float]]) -> None:
    found = thinned(passing(*parts))
    assert 1 <= len(found) <= MOST_SPANS
    assert all(a.end_s == b.start_s and a.stage is not b.stage for a, b in pairwise(found))
    assert len(found) == 1 or all(stretch.seconds >= BRIEF_S for stretch in found)
    for stage in Stage:
        before = math.fsum(seconds for one, seconds in parts if one is stage)
        assert math.fsum(s.stages.get(stage, 0.0) for s in found) == pytest.approx(before)


def test_a_timeline_is_bounded_while_it_grows_and_goes_on_after_a_take() -> None:
    clock = Clock()
    line = Timeline(clock)
    line.open()
    start = clock.now_s
    for number in range(5_000):
        clock.now_s += 1.5
        line.mark([Stage.TRAIN, Stage.EVALUATE, Stage.EXPORT][number % 3])
        assert len(line._stretches) <= HELD
    first = line.take()
    assert (first[0].start_s, first[-1].end_s) == (start, clock.now_s)
    clock.now_s += 2.0
    line.mark(Stage.SEND)
    (second,) = line.take()
    assert (second.start_s, second.end_s, second.stage) == (first[-1].end_s, clock.now_s, Stage.SEND)
    assert line.take() == ()


def test_a_meters_window_and_its_stretches_are_of_the_same_time() -> None:
    clock, other = Clock(), Clock()
    meter = Meter(
        DeviceProfile.load("unknown-linux"), [], clock=clock, threaded=False, timeline=Timeline(other)
    )

    def go_on(seconds: float) -> None:
        clock.now_s += seconds
        other.now_s += seconds + 0.25  # a clock that counts sleep: here a little in every stage

    meter.start()
    go_on(5)
    with meter.stage(Stage.TRAIN):
        go_on(10)
        with meter.stage(Stage.PRUNE):
            go_on(0.5)
        go_on(10)
    ledger = meter.take()
    assert told(list(meter.taken)) == [(Stage.IDLE, 5.25, ()), (Stage.TRAIN, 21.25, (Stage.PRUNE,))]
    assert math.fsum(r.seconds for r in ledger.values()) == pytest.approx(25.5)
    go_on(1)
    meter.take()
    assert told(list(meter.taken)) == [(Stage.IDLE, 1.25, ())]
