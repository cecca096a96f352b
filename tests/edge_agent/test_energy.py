from __future__ import annotations

import csv
import io
import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import pytest

from edge_agent.energy import meter as meter_module
from edge_agent.energy.sensor import CounterSensor, PowerSensor
from edge_agent.energy.utilisation import Utilisation
from foundation.energy import EnergyReading, Kind, Ledger, Scope, Stage, total
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile

Meter = partial(meter_module.Meter, root=Path("/nowhere"))
"""A meter on a board that says nothing of itself."""
PI = DeviceProfile.load("raspberry-pi-4b")
UNKNOWN = DeviceProfile.load("unknown-linux")

RECORDED = """seconds,watts
0.0,2.70
0.2,2.74
0.41,4.90
0.6,6.38
0.8,6.41
1.02,6.35
1.2,5.10
1.4,2.90
1.6,2.72
"""
"""A board that trains for most of a second: seconds and watts as a meter wrote them."""


class Clock:
    """Monotonic time that only moves when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Scripted(PowerSensor):
    """Watts from a function of time; `None` is a read error."""

    name: ClassVar[str] = "scripted"

    def __init__(
        self, clock: Clock, watts: Callable[[float], float | None], idle_w: float | None = 2.0
    ) -> None:
        super().__init__(Scope.BOARD_DC)
        self.idle_w = idle_w
        self.u_rel = 0.05
        self._clock = clock
        self._watts = watts

    @classmethod
    def probe(cls, profile: DeviceProfile, root: object) -> Self | None:
        return None

    def watts(self) -> float | None:
        return self._watts(self._clock.now_s - 100.0)


class Counter(CounterSensor):
    """Raw counts from a list, one per read."""

    name: ClassVar[str] = "counter"

    def __init__(self, counts: Sequence[int | None], range_counts: int | None = 1000) -> None:
        super().__init__(Scope.RAIL, joules_per_count=0.1, range_counts=range_counts, max_w=50.0)
        self._script = iter(counts)

    @classmethod
    def probe(cls, profile: DeviceProfile, root: object) -> Self | None:
        return None

    def count(self) -> int | None:
        return next(self._script)


def model_at(clock: Clock, utilisation: Callable[[float], float]) -> Utilisation:
    """The Pi 4's model under a scripted load; the load's integral is taken as constant 0.5 where simple."""
    assert PI.model is not None
    return Utilisation(PI.model, busy=lambda: 4 * utilisation(clock.now_s - 100.0), cores=4)


def run(meter: meter_module.Meter, clock: Clock, seconds: float, step_s: float = 0.2) -> None:
    """Let time pass and the meter sample at its rate."""
    for _ in range(round(seconds / step_s)):
        clock.now_s += step_s
        meter.sample()


def joules_of(ledger: Ledger, stage: Stage) -> float:
    joules = ledger[stage].joules
    assert joules is not None
    return joules


def test_a_recorded_trace_gives_its_trapezoid():
    rows = [(float(r["seconds"]), float(r["watts"])) for r in csv.DictReader(io.StringIO(RECORDED))]
    clock, trace = Clock(), dict(rows)
    sensor = Scripted(clock, lambda t: trace[round(t, 2)])
    meter = Meter(UNKNOWN, [sensor], clock=clock, threaded=False)
    meter.start()
    for seconds, _ in rows[1:]:
        clock.now_s = 100.0 + seconds
        meter.sample()
    expected = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(rows))
    assert meter.joules_total == pytest.approx(expected, rel=1e-9)
    assert meter.joules_total == pytest.approx(7.4929, abs=1e-4)
    reading = meter.take()[Stage.IDLE]
    assert reading.kind is Kind.MEASURED
    assert reading.scope is Scope.BOARD_DC
    assert reading.coverage == 1
    assert reading.idle_joules == pytest.approx(2.0 * 1.6)
    # the gain's error, and what a board that changes this much may hide between samples
    assert reading.uncertainty_joules is not None
    assert 0.05 * expected < reading.uncertainty_joules < expected


@pytest.mark.parametrize("seed", range(20))
def test_stages_add_up_to_the_total(seed: int):
    rng = random.Random(seed)
    clock = Clock()
    sensor = Scripted(clock, lambda t: 5 + 3 * math.sin(7 * t))
    reference = Scripted(clock, lambda t: 5 + 3 * math.sin(7 * t))
    meter = Meter(UNKNOWN, [sensor], clock=clock, threaded=False)
    meter.start()
    reference.joules(clock.now_s)
    taken = []
    for _ in range(60):
        with meter.stage(rng.choice(list(Stage))):
            clock.now_s += rng.random() * 0.9
            if rng.random() < 0.3:
                taken.append(meter.take())
            with meter.stage(rng.choice(list(Stage))):
                clock.now_s += rng.random() * 0.9
    taken.append(meter.take())
    readings = [reading for ledger in taken for reading in ledger.values()]
    assert sum(r.seconds for r in readings) == pytest.approx(clock.now_s - 100.0, rel=1e-9)
    assert total(readings).joules == pytest.approx(meter.joules_total, rel=1e-9)
    assert total(readings).joules == pytest.approx(sensor.joules(clock.now_s), rel=1e-9)


def test_the_innermost_stage_owns_the_time():
    clock = Clock()
    meter = Meter(UNKNOWN, [Scripted(clock, lambda t: 4.0)], clock=clock, base=Stage.WAIT, threaded=False)
    with meter:
        run(meter, clock, 1)
        with meter.stage(Stage.TRAIN):
            run(meter, clock, 2)
            with meter.stage(Stage.PRUNE):
                assert meter.current is Stage.PRUNE
                run(meter, clock, 3)
            run(meter, clock, 1)
        meter.switch(Stage.IDLE)
        run(meter, clock, 5)
    ledger = meter.take()
    assert {stage: reading.seconds for stage, reading in ledger.items()} == pytest.approx(
        {Stage.WAIT: 1, Stage.TRAIN: 3, Stage.PRUNE: 3, Stage.IDLE: 5}
    )
    assert joules_of(ledger, Stage.TRAIN) == pytest.approx(12.0)


def test_take_closes_the_window_and_the_open_stage_goes_on():
    clock = Clock()
    meter = Meter(UNKNOWN, [Scripted(clock, lambda t: 4.0)], clock=clock, threaded=False)
    meter.start()
    with meter.stage(Stage.SEND):
        clock.now_s += 0.5
        assert joules_of(meter.peek(), Stage.SEND) == pytest.approx(2.0)
        assert joules_of(meter.take(), Stage.SEND) == pytest.approx(2.0)
        assert meter.take() == {}
        clock.now_s += 0.25
    assert joules_of(meter.take(), Stage.SEND) == pytest.approx(1.0)
    assert meter.joules_total == pytest.approx(3.0)


def test_an_edge_between_two_samples_cuts_a_ramp_where_it_is():
    clock = Clock()
    meter = Meter(UNKNOWN, [Scripted(clock, lambda t: 10 * t)], clock=clock, threaded=False)
    meter.start()
    clock.now_s += 0.1
    with meter.stage(Stage.TRAIN):
        clock.now_s += 0.2
    assert joules_of(meter.take(), Stage.TRAIN) == pytest.approx(10 * (0.3**2 - 0.1**2) / 2)


def test_a_stage_whose_edges_fail_is_cut_from_the_reads_around_it():
    clock = Clock()
    failing = {0.2, 0.4}
    sensor = Scripted(clock, lambda t: None if round(t, 1) in failing else 3.0)
    meter = Meter(UNKNOWN, [sensor], clock=clock, threaded=False)
    meter.start()
    clock.now_s += 0.2
    with meter.stage(Stage.EVALUATE):
        clock.now_s += 0.2
    clock.now_s += 0.2
    ledger = meter.take()
    assert joules_of(ledger, Stage.EVALUATE) == pytest.approx(0.6)
    assert ledger[Stage.EVALUATE].kind is Kind.MEASURED


def test_stages_of_several_threads_share_one_stack():
    clock = Clock()
    meter = Meter(UNKNOWN, [], clock=clock, threaded=False)
    meter.start()
    opened, close = threading.Event(), threading.Event()

    def serve() -> None:
        with meter.stage(Stage.INFER):
            opened.set()
            close.wait(10)

    thread = threading.Thread(target=serve)
    with meter.stage(Stage.TRAIN):
        clock.now_s += 1
        thread.start()
        assert opened.wait(10)
        clock.now_s += 2
    clock.now_s += 4  # training is over, the other thread's stage is still open
    close.set()
    thread.join(10)
    clock.now_s += 8
    seconds = {stage: reading.seconds for stage, reading in meter.take().items()}
    assert seconds == {Stage.TRAIN: 1, Stage.INFER: 6, Stage.IDLE: 8}


def test_without_sensor_and_model_the_time_is_still_right():
    clock = Clock()
    meter = Meter(UNKNOWN, clock=clock, threaded=False)
    with meter, meter.stage(Stage.TRAIN):
        clock.now_s += 3
    assert meter.take() == {Stage.TRAIN: EnergyReading(seconds=3.0)}
    assert meter.joules_total is None
    assert (meter.kind, meter.source, meter.scope) == (Kind.NONE, "none", Scope.UNKNOWN)
    assert meter.watts() is None


def test_a_model_is_labelled_a_model_with_its_error_bar():
    clock = Clock()
    meter = Meter(PI, [model_at(clock, lambda t: 0.5 * t)], clock=clock, threaded=False)
    meter.start()
    with meter.stage(Stage.TRAIN):
        run(meter, clock, 10)
    reading = meter.take()[Stage.TRAIN]
    assert reading.joules == pytest.approx(10 * (2.2857 + 4.5344 / 2))
    assert reading.idle_joules == pytest.approx(22.857)
    assert reading.uncertainty_joules == pytest.approx(0.3 * (reading.joules or 0))
    assert (reading.kind, reading.scope, reading.sensor) == (Kind.MODELLED, Scope.BOARD_DC, "utilisation")
    assert meter.watts() == pytest.approx(2.2857 + 4.5344 / 2)


def test_error_bars_of_one_model_add_linearly():
    clock = Clock()
    meter = Meter(PI, [model_at(clock, lambda t: 0.5 * t)], clock=clock, threaded=False)
    meter.start()
    run(meter, clock, 2)
    first = meter.take()[Stage.IDLE]
    run(meter, clock, 2)
    both = first + meter.take()[Stage.IDLE]
    assert both.uncertainty_joules == pytest.approx(2 * (first.uncertainty_joules or 0))


def test_a_sensor_that_vanishes_is_filled_by_a_model_of_the_same_scope():
    clock = Clock()
    sensor = Scripted(clock, lambda t: 5.0 if t < 6.9 else None)
    meter = Meter(PI, [sensor, model_at(clock, lambda t: 0.5 * t)], clock=clock, threaded=False)
    meter.start()
    run(meter, clock, 10)
    reading = meter.take()[Stage.IDLE]
    modelled_w = 2.2857 + 4.5344 / 2
    assert reading.coverage == pytest.approx(0.68)
    assert reading.joules == pytest.approx(6.8 * 5.0 + 3.2 * modelled_w)
    assert reading.uncertainty_joules == pytest.approx(math.hypot(6.8 * 5.0 * 0.05, 3.2 * modelled_w * 0.3))
    assert reading.kind is Kind.MIXED
    assert reading.flags == ("gap_filled",)
    run(meter, clock, 4)
    reading = meter.take()[Stage.IDLE]
    assert (reading.kind, reading.coverage) == (Kind.MODELLED, 0)
    assert reading.joules == pytest.approx(4 * modelled_w)


def test_a_model_of_another_scope_fills_nothing():
    clock = Clock()
    model = DeviceProfile.load("raspberry-pi-5").model  # wall_ac, the sensor is board_dc
    assert model is not None
    sensor = Scripted(clock, lambda t: 5.0 if t < 5 else None)
    meter = Meter(PI, [sensor, Utilisation(model, busy=lambda: 0.0, cores=4)], clock=clock, threaded=False)
    meter.start()
    run(meter, clock, 10)
    reading = meter.take()[Stage.IDLE]
    assert reading.joules is None
    assert reading.idle_joules is None
    assert reading.uncertainty_joules is None
    assert reading.kind is Kind.NONE
    assert reading.flags == ("gap",)
    assert reading.seconds == pytest.approx(10)
    assert meter.joules_total is None


def test_a_clock_that_jumps_is_not_integrated_as_measured():
    clock = Clock()
    meter = Meter(UNKNOWN, [Scripted(clock, lambda t: 5.0)], clock=clock, threaded=False)
    meter.start()
    run(meter, clock, 18)
    clock.now_s += 1.5  # more than five periods of 0.2 s
    meter.sample()
    run(meter, clock, 18)
    reading = meter.take()[Stage.IDLE]
    assert reading.kind is Kind.MIXED
    assert reading.coverage == pytest.approx(36 / 37.5)
    assert reading.joules == pytest.approx(37.5 * 5)
    assert reading.uncertainty_joules == pytest.approx(math.hypot(0.05 * 180, 7.5))
    clock.now_s += 3600
    meter.sample()
    assert meter.take()[Stage.IDLE].joules is None
    clock.now_s -= 60  # a clock that steps back gives neither time nor joules
    meter.sample()
    run(meter, clock, 2)
    assert meter.take()[Stage.IDLE].seconds == pytest.approx(2)


def test_a_slow_sampler_of_a_counter_loses_nothing():
    clock = Clock()
    meter = Meter(UNKNOWN, [Counter([0, 400])], clock=clock, threaded=False)
    meter.start()
    clock.now_s += 30
    reading = meter.take()[Stage.IDLE]
    assert reading.joules == pytest.approx(40)
    assert reading.coverage == 1
    assert reading.idle_joules is None
    assert reading.uncertainty_joules is None


def test_a_counter_wraps():
    sensor = Counter([990, 999, 5, 15])
    assert [sensor.joules(float(t)) for t in range(4)] == pytest.approx([0, 0.9, 1.5, 2.5])
    assert sensor.breaks == 0


def test_a_counter_that_was_reset_invents_nothing():
    sensor = Counter([500, 510, 0, 10])  # a wrap would mean 490 counts: 49 J in half a second at 50 W at most
    assert [sensor.joules(t / 2) for t in range(4)] == pytest.approx([0, 1.0, 1.0, 2.0])
    assert sensor.breaks == 1
    unknown_range = Counter([500, 3], range_counts=None)
    assert [unknown_range.joules(float(t)) for t in range(2)] == [0, 0]
    assert unknown_range.breaks == 1


def test_a_reset_is_a_hole_in_the_coverage():
    clock = Clock()
    counts = [100 + 10 * i for i in range(21)] + [0, 10, 20]
    meter = Meter(UNKNOWN, [Counter(counts)], clock=clock, rate_hz=1, threaded=False)
    meter.start()
    for _ in range(23):
        clock.now_s += 1
        meter.sample()
    reading = meter.take()[Stage.IDLE]
    assert reading.coverage == pytest.approx(22 / 23)
    assert reading.joules == pytest.approx(23.0)
    assert reading.kind is Kind.MIXED


def test_an_unreadable_counter_gives_none_and_catches_up():
    sensor = Counter([100, None, 140])
    assert [sensor.joules(float(t)) for t in range(3)] == [0, None, pytest.approx(4.0)]


@pytest.mark.parametrize("wrong", [None, -1.0, math.nan, math.inf])
def test_a_power_that_cannot_be_is_an_error_not_zero(wrong: float | None):
    clock = Clock()
    sensor = Scripted(clock, lambda t: wrong)
    assert sensor.joules(100.0) is None


def test_a_sensor_that_raises_does_not_stop_the_work(caplog: pytest.LogCaptureFixture):
    clock = Clock()

    def broken(_: float) -> float:
        raise KeyError("rail")

    meter = Meter(UNKNOWN, [Scripted(clock, broken)], clock=clock, threaded=False)
    with meter, meter.stage(Stage.TRAIN):
        run(meter, clock, 1)
    assert meter.take()[Stage.TRAIN].joules is None
    assert [record.message for record in caplog.records] == ["energy sensor raised"]


def test_present_power_is_recent_or_unknown():
    clock = Clock()
    meter = Meter(UNKNOWN, [Scripted(clock, lambda t: 3.0 if t < 5 else 6.0)], clock=clock, threaded=False)
    meter.start()
    assert meter.watts() is None
    run(meter, clock, 4)
    assert meter.watts() == pytest.approx(3.0)
    run(meter, clock, 4)
    assert meter.watts() == pytest.approx(6.0)
    clock.now_s += 2
    assert meter.watts() is None


def test_starting_twice_is_an_error_and_off_time_is_not_counted():
    clock = Clock()
    meter = Meter(UNKNOWN, [Scripted(clock, lambda t: 4.0)], clock=clock, threaded=False)
    meter.start()
    with pytest.raises(RuntimeError, match="runs already"):
        meter.start()
    run(meter, clock, 1)
    meter.stop()
    meter.stop()
    clock.now_s += 50
    meter.start()
    run(meter, clock, 1)
    reading = meter.take()[Stage.IDLE]
    assert reading.seconds == pytest.approx(2)
    assert reading.joules == pytest.approx(8)
    assert reading.coverage == 1


def test_bad_arguments_are_refused():
    with pytest.raises(SettingsError, match="rate_hz"):
        Meter(UNKNOWN, rate_hz=0)
    with pytest.raises(SettingsError, match="agents_on_host"):
        Meter(UNKNOWN, share="process", agents_on_host=0)


def test_the_thread_measures_and_costs_little():
    server = DeviceProfile.load("generic-x86-server")
    assert server.model is not None
    with Meter(server, rate_hz=20) as meter, meter.stage(Stage.TRAIN):
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            sum(range(1000))
    reading = meter.take()[Stage.TRAIN]
    assert reading.joules is not None
    assert (
        server.model.idle_w * reading.seconds < reading.joules <= server.model.full_w * reading.seconds * 1.01
    )
    assert reading.flags == ("placeholder_model",)
    assert meter.cpu_s < 0.5
    assert not [thread for thread in threading.enumerate() if thread.name == "meter"]
