"""Training stands still while answers take too long, and comes to the same bits."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.strategies.base import load_strategy
from edge_agent.energy.meter import Meter
from edge_agent.serving.child import ServingChild
from edge_agent.serving.pressure import WINDOW_S, Gauge, Load, Pressure
from edge_agent.training.trainer import Hooks, Outcome, Task, carry_out
from edge_agent.yielding import LEAST_REQUESTS, LONGEST_PAUSE_S, Yielding
from foundation.energy import Stage
from foundation.profile import DeviceProfile
from foundation.spec import initial_parameters
from tests.artifacts import family, samples
from tests.processes import until
from tests.toys import SPEC, Quiet, ToyFederation, toy_data


class Clock:
    """Moved by whoever waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Patience(threading.Event):
    """An event whose waiting moves a clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.now += timeout
        return self.is_set()


def meter_on(clock: Clock) -> Meter:
    return Meter(DeviceProfile.load("unknown-linux"), [], clock=clock, threaded=False, base=Stage.WAIT)


def test_a_pause_lasts_until_answers_are_fast_again_and_is_counted_as_waiting() -> None:
    clock = Clock()
    slow_until = clock.now + 3.0

    def load() -> Load:
        return Load(requests=50, p95_ms=30.0 if clock.now < slow_until else 5.0)

    with meter_on(clock) as meter:
        yielding = Yielding(10.0, load, meter, clock)
        with meter.stage(Stage.TRAIN):
            clock.now += 1
            seconds = yielding.pause(Patience(clock))
            assert yielding.pause(Patience(clock)) == 0
            clock.now += 1
        ledger = meter.take()
    assert seconds == pytest.approx(2.0, abs=0.2)
    assert yielding.paused_s == seconds
    assert ledger[Stage.TRAIN].seconds == pytest.approx(2.0)
    assert ledger[Stage.WAIT].seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("bound", "load"),
    [
        (None, Load(requests=500, p95_ms=1000)),
        (10.0, None),
        (10.0, Load(requests=0)),
        (10.0, Load(requests=LEAST_REQUESTS - 1, p95_ms=1000)),
        (10.0, Load(requests=500, p95_ms=10)),
    ],
)
def test_without_a_bound_enough_requests_or_reason_it_does_not_wait(
    bound: float | None, load: Load | None
) -> None:
    clock = Clock()
    with meter_on(clock) as meter:
        assert Yielding(bound, lambda: load, meter, clock).pause(Patience(clock)) == 0
    assert clock.now == 100


def test_a_minute_of_pause_shows_that_training_is_not_the_reason() -> None:
    clock = Clock()
    with meter_on(clock) as meter:
        yielding = Yielding(10.0, lambda: Load(requests=50, p95_ms=99), meter, clock)
        assert yielding.pause(Patience(clock)) == pytest.approx(LONGEST_PAUSE_S, abs=0.2)
        clock.now += LONGEST_PAUSE_S - 1
        assert yielding.pause(Patience(clock)) == 0, "it trains for as long"
        clock.now += 2
        assert yielding.pause(Patience(clock)) > 0


def test_work_that_is_called_off_ends_the_pause() -> None:
    clock = Clock()
    off = Patience(clock)
    off.set()
    with meter_on(clock) as meter:
        yielding = Yielding(10.0, lambda: Load(requests=50, p95_ms=99), meter, clock)
        assert yielding.pause(off) == pytest.approx(0.1)


class Pausing(Quiet):
    """Hooks that say that every step waited."""

    paused = 0

    def pause(self) -> float:
        self.paused += 1
        return 1000.0


def outcome(hooks: Hooks) -> Outcome:
    work = ToyFederation(load_strategy("fedavg", {"epochs": 2}), agents=1)
    assignment = work.plan(work.begin(), 1)[0]
    start = initial_parameters(SPEC, 0)
    return carry_out(Task(SPEC, assignment.work, start, start, toy_data(0), 0), hooks)


def test_the_result_of_training_with_pauses_is_the_same_to_the_bit() -> None:
    hooks = Pausing()
    paused, straight = outcome(hooks), outcome(Quiet())
    assert hooks.paused == paused.metrics["steps"] > 0
    for name, array in straight.parameters.items():
        np.testing.assert_array_equal(paused.parameters[name], array)
    assert paused.metrics["step_ms"] < straight.metrics["step_ms"] + 1, "pauses are no time of the steps"


# --- the pipe -----------------------------------------------------------------------------------


def test_the_window_forgets_after_five_seconds() -> None:
    clock = Clock()
    pressure = Pressure(clock)
    assert pressure.load() == Load(requests=0)
    for ms in range(1, 101):
        pressure.answered(ms / 1000)
    load = pressure.load()
    assert (load.requests, load.p95_ms) == (100, pytest.approx(95))
    clock.now += WINDOW_S + 0.1
    pressure.answered(0.007)
    load = pressure.load()
    assert (load.requests, load.p95_ms) == (1, pytest.approx(7))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=600))
def test_whatever_comes_through_the_pipe_is_a_load_or_none(content: bytes) -> None:
    reading, writing = os.pipe()
    gauge = Gauge(reading)
    os.write(writing, content + b'\n{"requests": 3, "p95_ms": 4.0}\n')
    os.close(writing)
    gauge.join(10)
    assert gauge.load() is None, "the writer has ended"


def test_a_server_tells_its_agent_how_long_answers_take(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    family(root)
    child = ServingChild("127.0.0.1", 0, root)
    try:
        url = child.start()
        until(lambda: child.load() is not None)
        assert child.load() == Load(requests=0)
        for _ in range(30):
            answer = httpx.post(
                f"{url}/v2/models/model/infer",
                content=samples(1).tobytes(),
                headers={"Inference-Header-Content-Length": "0"},
            )
            assert answer.status_code == 200
        until(lambda: (load := child.load()) is not None and load.requests >= 20)
        load = child.load()
        assert load is not None
        assert load.p95_ms is not None
        assert 0 < load.p95_ms < 1000
    finally:
        child.stop()
    assert child.load() is None
