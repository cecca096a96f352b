"""A device's own sensor, corrected by its calibration: joules, error bars, labels; and when it is not."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.calibration.fit import sensor_of
from edge_agent.energy.corrected import CorrectedSensor, corrected, why_not
from edge_agent.energy.meter import Meter
from edge_agent.energy.sensor import find_sensors, found_by, sensor_class
from foundation.calibration import Calibration, Correction, Figure, FittedSensor
from foundation.energy import Kind, Scope, Stage
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile
from tests.calibrations import MADE, calibration_of, steps_of
from tests.edge_agent.test_energy_errors import Clock, Scripted

GAIN, OFFSET_W = 1.12, 0.55


def fitted(name: str = "scripted", scope: Scope = Scope.BOARD_DC, **more: Any) -> FittedSensor:
    """A fit of a sensor that sees less than the meter, as `calibrate` makes it."""
    steps = [
        step.model_copy(update={"sensor_w": (step.watts - OFFSET_W) / GAIN * (1 + 0.002 * math.sin(i))})
        for i, step in enumerate(steps_of())
    ]
    found = sensor_of(steps, 0.02, name, scope)
    assert found is not None
    return found.model_copy(update=more)


def correction(**more: Any) -> Correction:
    return Correction(fitted=fitted(**more), scope=Scope.WALL_AC, accuracy=0.02, made=MADE)


def measured(sensor: Any, clock: Clock, seconds: float = 60.0) -> Any:
    meter = Meter(DeviceProfile.load("unknown-linux"), [sensor], clock=clock, threaded=False)
    meter.start()
    with meter.stage(Stage.TRAIN):
        for _ in range(round(seconds / 0.2)):
            clock.now_s += 0.2
            meter.sample()
    return meter.take()[Stage.TRAIN]


def test_joules_are_the_meters_and_say_by_what_they_are_corrected() -> None:
    clock = Clock()
    reading = measured(corrected(Scripted(clock, lambda _: 4.0), correction()), clock)
    assert reading.joules == pytest.approx((GAIN * 4.0 + OFFSET_W) * 60, rel=0.005)
    assert (reading.kind, reading.scope, reading.sensor) == (Kind.MEASURED, Scope.WALL_AC, "scripted")
    assert "corrected_2026-05-01" in reading.flags


@given(
    gain=st.floats(0.5, 2),
    offset=st.floats(-1, 1),
    s_gain=st.floats(0.001, 0.05),
    s_offset=st.floats(0.001, 0.2),
    r=st.floats(-0.99, 0.99),
    watts=st.floats(3, 20),
)
def test_the_error_bar_is_that_of_the_line_at_these_watts(
    gain: float, offset: float, s_gain: float, s_offset: float, r: float, watts: float
) -> None:
    """2 sqrt([p, 1] C [p, 1]) and the meter's accuracy; without the covariance it would be another."""
    c = np.array([[s_gain**2, r * s_gain * s_offset], [r * s_gain * s_offset, s_offset**2]])
    fit = FittedSensor(
        name="scripted",
        scope=Scope.BOARD_DC,
        gain=Figure(v=gain, u=0),
        offset_w=Figure(v=offset, u=0),
        covariance=tuple(map(tuple, c.tolist())),
        error=0.01,
    )
    clock = Clock()
    sensor = CorrectedSensor(
        Scripted(clock, lambda _: watts),
        Correction(fitted=fit, scope=Scope.WALL_AC, accuracy=0.02, made=MADE),
    )
    reading = measured(sensor, clock, 2.0)
    p = np.array([watts, 1.0])
    wanted = math.hypot(0.02 * reading.joules, 2 * math.sqrt(float(p @ c @ p)) * reading.seconds)
    assert reading.uncertainty_joules == pytest.approx(wanted, rel=1e-6)


def test_near_the_calibrated_powers_the_line_is_known_better_than_gain_and_offset_alone() -> None:
    clock = Clock()
    told = correction()
    reading = measured(corrected(Scripted(clock, lambda _: 3.5), told), clock)
    f, seconds = told.fitted, reading.seconds
    alone = math.hypot(f.gain.u / f.gain.v * reading.joules, f.offset_w.u * seconds)
    assert reading.uncertainty_joules < alone
    assert reading.uncertainty_joules >= 0.02 * reading.joules


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"scope": Scope.MODULE}, "it sits at board_dc, it was compared at module"),
        ({"gain": Figure(v=0.0, u=0.1)}, "gain is not above 0"),
        ({"covariance": ((1.0,),)}, "no covariance"),
        ({"error": 0.2}, "misses a step of its own by 20%"),
    ],
)
def test_what_does_not_fit_the_sensor_is_not_applied(
    more: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    sensor = Scripted(Clock(), lambda _: 4.0)
    told = correction(**more)
    assert why in str(why_not(sensor, told))
    assert corrected(sensor, told) is sensor
    assert caplog.records[-1].message == "sensor not corrected"
    assert why in caplog.records[-1].__dict__["reason"]


def test_another_sensor_is_left_alone() -> None:
    sensor = Scripted(Clock(), lambda _: 4.0)
    assert corrected(sensor, correction(name="ina3221")) is sensor
    assert corrected(sensor, None) is sensor


def test_a_read_error_stays_one_and_a_power_below_0_is_one() -> None:
    clock = Clock()
    said: list[float | None] = [4.0, None, 4.0, 0.01, 4.0]
    low = correction(offset_w=Figure(v=-2.0, u=0.1))
    sensor = CorrectedSensor(Scripted(clock, lambda _: said.pop(0)), low)
    sums = []
    for now in range(5):
        clock.now_s = float(now)
        sums.append(sensor.joules(clock.now_s))
    assert sums[1] is None
    assert sums[2] == pytest.approx((low.fitted.gain.v * 4.0 - 2.0) * 2)
    assert sums[3] == pytest.approx(sums[2] + low.fitted.gain.v * 2.005 - 2.0)
    assert sums[4] == pytest.approx(sums[3] + low.fitted.gain.v * 2.005 - 2.0)
    down = CorrectedSensor(Scripted(clock, lambda _: 0.1), low)
    assert down.joules(10.0) is not None
    assert down.joules(11.0) is None


def ina(root: Path) -> Path:
    folder = root / "sys/class/hwmon/hwmon3"
    folder.mkdir(parents=True)
    (folder / "name").write_text("ina226\n")
    (folder / "power1_input").write_text("4000000\n")
    return root


def calibrated(**more: Any) -> tuple[DeviceProfile, Calibration]:
    profile = DeviceProfile.load("raspberry-pi-4b")
    made = calibration_of(sensor=fitted("inline_ina", **more))
    return profile.calibrated(made), made


def test_a_calibrated_profile_corrects_the_sensor_that_it_was_made_with(tmp_path: Path) -> None:
    profile, made = calibrated()
    assert made.correction is not None
    (first, *_) = find_sensors(profile, ina(tmp_path))
    assert isinstance(first, CorrectedSensor)
    assert (first.name, first.scope) == ("inline_ina", Scope.WALL_AC)
    published = next(iter(find_sensors(DeviceProfile.load("raspberry-pi-4b"), tmp_path)))
    assert (published.name, published.scope) == ("inline_ina", Scope.BOARD_DC)
    again = found_by(sensor_class("inline_ina"), profile, tmp_path)  # as the meter looks for a lost one
    assert isinstance(again, CorrectedSensor)


def test_calibrations_from_before_are_still_of_their_profile_and_end_with_their_correction() -> None:
    profile, made = calibrated()
    published = DeviceProfile.load("raspberry-pi-4b")
    assert published.correction is None
    assert profile.model_copy(update={"correction": None}).facts != published.facts  # of its own model
    assert made.unfit(published.facts, made.device, MADE) is None
    assert "181 days old" in str(made.unfit(published.facts, made.device, MADE + timedelta(days=181)))


def test_no_profile_may_correct_a_sensor_by_itself(tmp_path: Path) -> None:
    text = """
schema = 1
id = "x"
title = "x"
[correction]
scope = "wall_ac"
accuracy = 0.1
made = 2026-05-01T00:00:00Z
[correction.fitted]
name = "rapl"
scope = "rail_sum"
error = 0.1
gain = { v = 1.0, u = 0.1 }
offset_w = { v = 1.0, u = 0.1 }
covariance = [[1.0, 0.0], [0.0, 1.0]]
"""
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(SettingsError, match="correction: that is one device's"):
        DeviceProfile.load(tmp_path / "x.toml")
