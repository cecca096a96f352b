"""Joining a plug's series to a round's time: known powers, error bars that hold, what a plug cannot say."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.store.records import PlugReading
from coordinator.wall.join import LAG_S, PHASE_S, Series, WallRecord, joined, not_joined
from foundation.energy import Kind, Scope, Stage
from foundation.timing import ClockOffset, Span, Timing

T0 = 1.8e9


def series(readings: list[PlugReading], **more: Any) -> Series:
    usual: dict[str, Any] = {"silent_s": 30.0, "accuracy": 0.02, "step_j": 0.36, "step_w": 0.1}
    return Series(readings, **{**usual, **more})


def steady(
    watts: float, seconds: float, *, every_s: float = 1.0, joules: bool = True, skip: Any = None
) -> list[PlugReading]:
    """What a plug says of a constant load, from a minute before `T0`; `skip` says when it is silent."""
    found, at = [], -60.0
    while at <= seconds + 60:
        if skip is None or not skip(at):
            found.append(PlugReading(T0 + at, watts, 1e6 + watts * at if joules else None))
        at += every_s
    return found


def timing(*spans: tuple[Stage, float, float], offset: float = 0.0, error: float = 0.01) -> Timing:
    return Timing(
        spans=tuple(
            Span(stage=stage, start_s=T0 + start - offset, end_s=T0 + end - offset)
            for stage, start, end in spans
        ),
        clock=ClockOffset(offset_s=offset, uncertainty_s=error, pairs=8),
    )


def record(times: Timing, told: Series) -> WallRecord:
    return joined("pi", 3, "shelly:x", times, told)


@pytest.mark.parametrize(("joules", "how"), [(True, "counter"), (False, "watts")])
@pytest.mark.parametrize("offset", [0.0, 7.0, -1.7e9])
def test_a_known_power_is_found_by_both_ways_whatever_the_devices_clock_says(
    joules: bool, how: str, offset: float
) -> None:
    found = record(
        timing((Stage.WAIT, 0, 20), (Stage.TRAIN, 20, 120), offset=offset),
        series(steady(5.0, 120, joules=joules), step_w=1.0 if joules else 0.1),
    )
    reading = found.reading
    assert reading.joules == pytest.approx(600.0, rel=1e-6)
    assert (found.how, reading.kind, reading.scope, reading.coverage) == (
        how,
        Kind.MEASURED,
        Scope.WALL_AC,
        1,
    )
    assert reading.uncertainty_joules is not None
    assert 0.02 * 600 <= reading.uncertainty_joules < 0.035 * 600
    assert found.start_s == pytest.approx(T0)


def test_a_phase_has_a_figure_from_a_minute_on_and_a_shorter_one_is_in_the_total_alone() -> None:
    times = timing((Stage.WAIT, 0, 59), (Stage.TRAIN, 59, 59 + PHASE_S), (Stage.SEND, 119, 121))
    found = record(times, series(steady(5.0, 121)))
    assert [(phase.stage, phase.reading.seconds) for phase in found.phases] == [(Stage.TRAIN, 60.0)]
    assert found.phases[0].reading.joules == pytest.approx(300.0)
    assert found.reading.joules == pytest.approx(605.0)


def test_a_coarse_total_gives_way_to_watts_and_whole_watts_cost_half_a_watt() -> None:
    """Tasmota without EnergyRes writes three decimals of a kWh: a step is twelve minutes of 5 W."""
    coarse = [PlugReading(r.at, 5.0, 3600.0 * int((r.joules or 0) / 3600)) for r in steady(5.0, 300)]
    found = record(timing((Stage.TRAIN, 0, 300)), series(coarse, step_j=3600.0, step_w=1.0))
    assert (found.how, found.reading.joules) == ("watts", pytest.approx(1500.0))
    assert found.reading.uncertainty_joules == pytest.approx(
        math.hypot(0.02 * 1500, 2 / math.sqrt(12) * 300), rel=0.01
    )


def test_messages_that_repeat_an_old_total_are_no_knots_of_it() -> None:
    """A Shelly tells its energy once a minute, and its power in between: beside the old total."""
    said = [
        PlugReading(T0 + at, 5.0, 1e6 + 5.0 * 60 * (at // 60)) for at in range(-120, 400, 10)
    ]  # fmt: skip
    found = record(timing((Stage.TRAIN, 35, 215)), series(said, silent_s=90.0, step_w=1.0))
    assert found.how == "counter"
    assert found.reading.joules == pytest.approx(900.0)


def test_a_plug_that_speaks_when_its_power_changes_holds_it_until_then() -> None:
    """A trapezoid over the quiet minute would find half of a step that was none yet."""
    said = [PlugReading(T0 + at, watts, None) for at, watts in ((-30, 3.0), (0, 3.0), (60, 9.0), (120, 9.0))]
    found = record(timing((Stage.TRAIN, 0, 60)), series(said, silent_s=90.0))
    assert found.reading.joules == pytest.approx(180.0)


def test_what_the_clocks_error_and_the_plugs_delay_may_cost_is_in_the_error_bar() -> None:
    """Ten watts before, a hundred after: a second of delay loses ten joules and gains a hundred."""
    said = [PlugReading(T0 + at, 10.0 if at < 50 else 100.0, None) for at in range(-60, 200)]
    bars = []
    for error in (0.01, 3.0):
        reading = record(timing((Stage.TRAIN, 0, 100), error=error), series(said, accuracy=1e-6)).reading
        assert reading.uncertainty_joules is not None
        bars.append(reading.uncertainty_joules)
    assert bars[0] >= 90 * LAG_S
    assert bars[1] >= 90 * (LAG_S + 3.0)
    assert bars[0] < bars[1] / 2


def test_silence_is_a_hole_that_is_filled_up_to_a_tenth_and_said() -> None:
    short = series(steady(5.0, 600, joules=False, skip=lambda at: 100 <= at < 150))
    found = record(timing((Stage.TRAIN, 0, 600)), short).reading
    assert (found.kind, found.flags) == (Kind.MIXED, ("gap_filled",))
    assert found.joules == pytest.approx(3000.0)
    assert found.uncertainty_joules is not None
    assert found.uncertainty_joules > 5.0 * 50  # what was filled in may be all wrong
    long = record(
        timing((Stage.TRAIN, 0, 600)),
        series(steady(5.0, 600, joules=False, skip=lambda at: 100 <= at < 200)),
    )
    assert (long.reading.joules, long.reading.kind, long.how) == (None, Kind.NONE, None)
    assert "silent" in str(long.why)


def test_a_total_counts_through_silence() -> None:
    told = series(steady(5.0, 600, skip=lambda at: 100 <= at < 500))
    found = record(timing((Stage.TRAIN, 0, 600)), told)
    assert (found.how, found.reading.kind) == ("counter", Kind.MEASURED)
    assert found.reading.joules == pytest.approx(3000.0)


def test_an_edge_in_silence_costs_all_that_flowed_in_it() -> None:
    told = series(steady(5.0, 600, skip=lambda at: 500 <= at < 640))
    found = record(timing((Stage.TRAIN, 0, 600)), told).reading
    assert found.uncertainty_joules is not None
    assert found.uncertainty_joules > 5.0 * 140


def test_a_total_that_goes_backwards_is_no_energy_and_is_said() -> None:
    """A naive difference is negative, or a million joules too few."""
    said = [
        PlugReading(r.at, r.watts, r.joules if r.at < T0 + 50 else (r.joules or 0) - 1e6)
        for r in steady(5.0, 120)
    ]
    found = record(timing((Stage.TRAIN, 0, 120)), series(said))
    assert (found.how, found.reading.flags) == ("watts", ("total_fell",))
    assert found.reading.joules == pytest.approx(600.0, rel=1e-3)
    before = record(timing((Stage.TRAIN, 0, 40)), series(said, step_w=3.0))
    assert (before.how, before.reading.flags) == ("counter", ())


def test_nothing_heard_is_unknown_and_not_0() -> None:
    for readings in ([], [PlugReading(T0, 5.0, 1.0)], [PlugReading(T0, None, None)]):
        found = record(timing((Stage.TRAIN, 0, 60)), series(readings))
        assert (found.reading.joules, found.reading.kind) == (None, Kind.NONE)
    assert not_joined("pi", 1, "shelly:x", "why").reading.joules is None


def wild(rng: random.Random) -> Callable[[float, float], float]:
    """The true energy of a load that jumps at random times."""
    edges = [(-200.0, 3.0)]
    while edges[-1][0] < 800:
        edges.append((edges[-1][0] + rng.expovariate(1 / 8), rng.choice([2.7, 3.1, 6.4, 5.0])))

    def joules(start: float, end: float) -> float:
        pieces = pairwise([*edges, (1e9, 0.0)])
        return sum(max(0.0, min(b, end) - max(a, start)) * w for (a, w), (b, _) in pieces)

    return joules


@pytest.mark.parametrize("by", ["counter", "watts"])
def test_the_error_bar_holds_on_loads_that_jump(by: str) -> None:
    """Nineteen of twenty: a plug that is late by up to a second, a clock that is off within its error."""
    inside, relative = 0, []
    for seed in range(120):
        rng = random.Random(seed)
        joules = wild(rng)
        lag, gain = rng.uniform(0, LAG_S), rng.gauss(1, 0.01)
        error = rng.uniform(0.01, 0.5)
        wrong = rng.uniform(-error, error)
        said = []
        for at in range(-40, 240):
            seen = at - lag + rng.uniform(-0.02, 0.02)
            mean = joules(seen - 1, seen)  # a plug's power is the mean of its last second
            total = gain * joules(-100, seen) if by == "counter" else None
            said.append(PlugReading(T0 + at, round(gain * mean, 1), total))
        start, end = rng.uniform(0, 20), rng.uniform(40, 200)
        times = timing((Stage.TRAIN, start + wrong, end + wrong), error=error)
        reading = record(times, series(said)).reading
        truth = joules(start, end)
        assert reading.joules is not None
        assert reading.uncertainty_joules is not None
        inside += abs(reading.joules - truth) <= reading.uncertainty_joules
        relative.append(reading.uncertainty_joules / truth)
    assert inside >= 0.95 * 120
    assert max(relative) < 0.25  # and it says something


@settings(max_examples=60, deadline=None)
@given(
    readings=st.lists(
        st.tuples(st.floats(0, 4e9), st.none() | st.floats(0, 1e5), st.none() | st.floats(0, 1e15)),
        max_size=12,
    ),
    edges=st.lists(st.floats(0, 4e9), min_size=2, max_size=6),
)
def test_nothing_that_a_plug_or_a_device_says_gives_a_number_that_is_none(
    readings: list[tuple[float, float | None, float | None]], edges: list[float]
) -> None:
    ordered = sorted(edges)
    spans = tuple(Span(stage=Stage.TRAIN, start_s=a, end_s=b) for a, b in pairwise(ordered))
    times = Timing(spans=spans, clock=ClockOffset(offset_s=0.0, uncertainty_s=1.0, pairs=1))
    rows = {at: PlugReading(at, watts, joules) for at, watts, joules in readings}
    found = record(times, series([rows[at] for at in sorted(rows)]))
    for reading in (found.reading, *(phase.reading for phase in found.phases)):
        for value in (reading.joules, reading.uncertainty_joules):
            assert value is None or 0 <= value < math.inf
    assert WallRecord.model_validate_json(found.model_dump_json()) == found
