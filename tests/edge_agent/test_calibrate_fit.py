"""The fit recovers what is known, and every rule refuses what it should."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_agent.calibration.fit import fit, model_of, nnls, sensor_of
from edge_agent.calibration.judge import Breach, breaches
from edge_agent.calibration.loads import CLOCK, CORES, IDLE, Load
from foundation.calibration import Step
from foundation.energy import Scope
from foundation.errors import SensorError
from foundation.profile import DeviceProfile
from tests.calibrations import (
    FAST_MHZ,
    FULL_W,
    IDLE_W,
    METER,
    SLOW_MHZ,
    calibration_of,
    step_of,
    steps_of,
)

PI4 = DeviceProfile.load("raspberry-pi-4b")


def judged(steps: list[Step], profile: DeviceProfile = PI4) -> list[Breach]:
    return breaches(steps, model_of(fit(steps, METER.accuracy), steps, METER.accuracy), METER, profile)


def with_steps(which: str, **changed: object) -> list[Step]:
    return [step.model_copy(update=changed if step.name == which else {}) for step in steps_of()]


@pytest.mark.parametrize("quick", [False, True])
@given(seed=st.integers(0, 500))
def test_a_known_model_is_recovered(quick: bool, seed: int) -> None:
    steps = steps_of(seed=seed, quick=quick)
    model = model_of(fit(steps, METER.accuracy), steps, METER.accuracy)
    assert model.p_idle_w.v == pytest.approx(IDLE_W, rel=0.03)
    assert model.p_full_w.v == pytest.approx(FULL_W, rel=0.03)
    assert model.hold_out_error <= 0.02
    assert model.exponent == 1
    assert abs(model.p_idle_w.v - IDLE_W) <= model.p_idle_w.u
    assert abs(model.p_full_w.v - FULL_W) <= model.p_full_w.u
    assert not judged(steps)


def test_error_bars_hold_the_meters_error_and_the_scatter() -> None:
    model = calibration_of(steps_of(noise=0.0)).model
    assert model.u_rel_gross == METER.accuracy
    assert model.p_full_w.u == pytest.approx(METER.accuracy * FULL_W, rel=0.1)
    noisy = calibration_of(steps_of(noise=0.3)).model
    assert noisy.u_rel_gross == pytest.approx(
        2 * noisy.rmse_w / np.mean([step.watts for step in steps_of(noise=0.3)])
    )
    assert noisy.u_rel_net == pytest.approx(2 * noisy.rmse_w / (noisy.p_full_w.v - noisy.p_idle_w.v))
    assert noisy.p_idle_w.u > model.p_idle_w.u
    assert noisy.covariance[0][0] > model.covariance[0][0]


@pytest.mark.parametrize("exponent", [0.5, 0.7, 1.3])
def test_a_bent_device_gets_its_exponent(exponent: float) -> None:
    model = calibration_of(steps_of(exponent=exponent)).model
    assert model.exponent == pytest.approx(exponent, abs=0.1)
    assert model.p_full_w.v == pytest.approx(FULL_W, rel=0.03)


@pytest.mark.parametrize("quick", [False, True])
@given(seed=st.integers(0, 200))
@hypothesis_settings(max_examples=15, deadline=None)
def test_what_each_clock_and_the_gpu_draw_is_recovered(quick: bool, seed: int) -> None:
    steps = steps_of(seed=seed, quick=quick, clock=True, gpu_w=5.0)
    model = model_of(fit(steps, METER.accuracy), steps, METER.accuracy)
    assert [at.mhz for at in model.clock] == [SLOW_MHZ, 1050.0, FAST_MHZ]
    for at in model.clock:
        true = IDLE_W + (FULL_W - IDLE_W) * (at.mhz / FAST_MHZ) ** 2
        assert at.full_w.v == pytest.approx(true, rel=0.03)
        assert abs(at.full_w.v - true) <= at.full_w.u
    assert model.p_full_w == model.clock[-1].full_w
    assert model.p_idle_w.v == pytest.approx(IDLE_W, rel=0.03)
    assert model.gpu_w is not None
    assert model.gpu_w.v == pytest.approx(5.0, rel=0.03)
    assert model.exponent == 1
    assert not judged(steps)


@given(seed=st.integers(0, 200))
@hypothesis_settings(max_examples=15, deadline=None)
def test_what_traffic_draws_each_way_is_recovered(seed: int) -> None:
    steps = steps_of(seed=seed, link=(0.06, 0.04))
    model = model_of(fit(steps, METER.accuracy), steps, METER.accuracy, "wlan0")
    assert model.link is not None
    assert model.link.down is not None
    assert model.link.interface == "wlan0"
    assert model.link.up.v == pytest.approx(0.06, rel=0.03)
    assert model.link.down.v == pytest.approx(0.04, rel=0.04)
    assert abs(model.link.down.v - 0.04) <= model.link.down.u
    assert not judged(steps)


def test_over_loopback_both_ways_are_one() -> None:
    steps = [s.model_copy(update={"down_mbit_s": s.up_mbit_s}) for s in steps_of(link=(0.1, 0.0), noise=0.0)]
    link = model_of(fit(steps, 0.02), steps, 0.02, "lo").link
    assert link is not None
    assert link.up.v == pytest.approx(0.1, rel=0.01)
    assert link.down is None


def test_a_clock_that_did_not_follow_is_no_clock_of_its_own() -> None:
    steps = [s.model_copy(update={"mhz": FAST_MHZ}) for s in steps_of()] + [
        step_of(load, IDLE_W + (FULL_W - IDLE_W) * load.busy, load.busy, mhz=FAST_MHZ, most_mhz=SLOW_MHZ)
        for load in CLOCK[:2]
    ]
    assert not model_of(fit(steps, 0.02), steps, 0.02).clock


def test_a_clock_that_nobody_could_read_is_said() -> None:
    steps = [s.model_copy(update={"mhz": None}) for s in steps_of(clock=True)]
    with pytest.raises(SensorError, match="clock could not be read"):
        fit(steps, 0.02)
    steps = [s.model_copy(update={"gpu": None}) for s in steps_of(gpu_w=4.0)]
    with pytest.raises(SensorError, match="GPU"):
        fit(steps, 0.02)
    steps = [s.model_copy(update={"up_mbit_s": None}) for s in steps_of(link=(0.1, 0.1))]
    with pytest.raises(SensorError, match="bytes could not be read"):
        fit(steps, 0.02)


def test_more_power_at_a_lower_clock_is_refused() -> None:
    steps = [
        s.model_copy(update={"watts": 9.0} if s.block == "clock" and s.utilisation > 0.9 else {})
        for s in steps_of(clock=True)
    ]
    found = [breach for breach in judged(steps) if breach.rule == "clock"]
    assert found
    assert not any(breach.may_force for breach in found)


def test_memory_bound_load_does_not_bend_the_line_but_widens_the_bars() -> None:
    plain, heavy = calibration_of(steps_of()).model, calibration_of(steps_of(memory_w=1.5)).model
    assert heavy.p_full_w.v == pytest.approx(FULL_W, rel=0.03)
    assert heavy.memory_w is not None
    assert heavy.memory_w.v == pytest.approx(1.5, rel=0.1)
    assert heavy.u_rel_gross > 3 * plain.u_rel_gross


@given(
    a=st.lists(st.tuples(*[st.integers(-5, 5)] * 3), min_size=3, max_size=6),
    y=st.lists(st.integers(-5, 5), min_size=6, max_size=6),
)
def test_no_other_point_of_the_quadrant_is_nearer(a: list[tuple[int, ...]], y: list[int]) -> None:
    system, wanted, weights = np.array(a, float), np.array(y[: len(a)], float), np.arange(1.0, len(a) + 1)

    def far(x: np.ndarray) -> float:
        return float(np.sum(weights * (system @ x - wanted) ** 2))

    best, free = nnls(system, wanted, weights)
    assert np.all(best >= 0)
    assert all(best[i] == 0 for i in range(3) if i not in free)
    for steps in itertools.product((-1e-3, 0.0, 1e-3), repeat=3):
        assert far(best) <= far(np.maximum(0, best + np.array(steps))) + 1e-9


def test_the_own_sensor_is_fitted_to_the_meter() -> None:
    steps = [step.model_copy(update={"sensor_w": (step.watts - 0.6) / 1.15}) for step in steps_of()]
    found = sensor_of(steps, METER.accuracy, "pi5_pmic", Scope.RAIL_SUM)
    assert found is not None
    assert (found.gain.v, found.offset_w.v) == (pytest.approx(1.15), pytest.approx(0.6))
    assert found.error < 1e-9
    assert sensor_of(steps_of(), METER.accuracy, "pi5_pmic", Scope.RAIL_SUM) is None


# --- refusals --------------------------------------------------------------------------------------


def test_power_that_falls_at_full_load_is_refused() -> None:
    """As an EPYC 8024P: 50.9 W at 80 %, 46.2 W at 100 %."""
    found = judged(with_steps("cores-100", watts=5.0))
    (breach,) = [breach for breach in found if breach.rule == "monotonic"]
    assert "cores-100" in breach.says
    assert "cores-75" in breach.says
    assert not breach.may_force
    assert breach.mend


@pytest.mark.parametrize(
    ("steps", "rule", "says", "may_force"),
    [
        (with_steps("cores-50", throttled=True), "throttled", "in cores-50", False),
        (with_steps("cores-50", temperature_c=75.0), "heat", "75 °C", False),
        (with_steps("training", watts=7.0), "hold-out", "5% is the most", False),
        (with_steps("memory-100", hold_s=20.0), "short hold", "20 s of 60 s", True),
        ([s for s in steps_of() if s.block != "duty"][:7], "steps", "7 steps, 8", False),
    ],
)
def test_what_is_refused_is_said_with_how_much(
    steps: list[Step], rule: str, says: str, may_force: bool
) -> None:
    (breach,) = [breach for breach in judged(steps) if breach.rule == rule]
    assert says in breach.says
    assert breach.may_force is may_force


def test_drifting_and_busy_idles_are_refused() -> None:
    steps = steps_of()
    idles = [number for number, step in enumerate(steps) if step.block == "idle"]
    steps[idles[-1]] = steps[idles[-1]].model_copy(update={"watts": 1.05 * steps[idles[-1]].watts})
    assert "idle repeats" in [breach.rule for breach in judged(steps)]
    # More load in one idle hold is no drift of the idle power, but it is no idle either.
    steps = steps_of()
    busy = step_of(IDLE, IDLE_W + (FULL_W - IDLE_W) * 0.2, 0.2)
    steps[idles[-1]] = busy
    assert [breach.rule for breach in judged(steps)] == ["busy at idle"]


def test_an_idle_far_from_the_profiles_may_be_forced() -> None:
    (breach,) = judged(steps_of(idle_w=4.0))
    assert (breach.rule, breach.may_force) == ("idle of the profile", True)
    assert "+75%" in breach.says
    assert not judged(steps_of(idle_w=4.0), DeviceProfile.load("unknown-linux"))


def test_loads_that_are_all_alike_are_refused() -> None:
    steps = [
        step.model_copy(update={"utilisation": 0.9 + 0.1 * step.utilisation}) for step in steps_of(noise=0)
    ]
    assert "spread" in [breach.rule for breach in judged(steps) if not breach.may_force]


def test_a_meter_that_does_not_see_the_device_gives_no_model() -> None:
    steps = [step.model_copy(update={"watts": 3.0 - 0.5 * step.utilisation}) for step in steps_of()]
    with pytest.raises(SensorError, match="does not rise with load"):
        model_of(fit(steps, 0.02), steps, 0.02)


@pytest.mark.parametrize("loads", [[], [IDLE], [IDLE, IDLE, IDLE, IDLE, *CORES[2:3]], [IDLE, *CORES[:1]] * 3])
def test_too_little_to_fit_is_said(loads: list[Load]) -> None:
    steps = [step_of(load, 2.0 + load.busy, load.busy) for load in loads]
    with pytest.raises(SensorError, match="too few different steps"):
        fit(steps, 0.02)
