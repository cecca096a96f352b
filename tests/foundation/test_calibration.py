"""A calibration's file: what it keeps, what makes it unfit, and that nothing broken is believed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.calibration import Calibration, read_calibration
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile
from tests.calibrations import FULL_W, IDLE_W, MADE, calibration_of, steps_of

GOOD = calibration_of()
TEXT = GOOD.toml()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = calibration_of(
        agent='pi "ö"\\\x7f\n', forced=("a: b", "c"), made=MADE.astimezone(timezone(timedelta(hours=2)))
    )
    (tmp_path / "it.toml").write_text(made.toml())
    assert read_calibration(tmp_path / "it.toml") == made
    assert made.made.tzinfo is UTC


def test_clocks_gpu_link_and_power_mode_are_read_again(tmp_path: Path) -> None:
    steps = steps_of(clock=True, gpu_w=5.0, link=(0.06, 0.04))
    device = GOOD.device.model_copy(update={"power_mode": "15W", "governor": "schedutil", "most_mhz": 1500.0})
    made = calibration_of(steps, device=device)
    assert None not in (made.model.gpu_w, made.model.link)
    assert len(made.model.clock) == 3
    assert len(made.model.covariance) == 8
    (tmp_path / "it.toml").write_text(made.toml())
    assert read_calibration(tmp_path / "it.toml") == made
    text = made.toml()
    for old, new, says in (
        ("clock = [{ mhz = 600.0", "clock = [{ mhz = 1600.0", "clock must rise"),
        ("clock = [{ mhz", 'link = { interface = "x" }\nclock = [{ mhz', "TOML"),
    ):
        assert old in text
        (tmp_path / "it.toml").write_text(text.replace(old, new, 1))
        with pytest.raises(SettingsError, match=says):
            read_calibration(tmp_path / "it.toml")


@pytest.mark.parametrize(
    ("mine", "now", "reason"),
    [
        ("15W", "15W", None),
        (None, None, None),
        ("15W", "7W", "made in the power mode 15W, now it is in the power mode 7W"),
        ("15W", None, "now it is in no power mode that is known"),
        (None, "7W", "made in no power mode that is known"),
    ],
)
def test_it_holds_in_its_own_power_mode_alone(mine: str | None, now: str | None, reason: str | None) -> None:
    made = calibration_of(device=GOOD.device.model_copy(update={"power_mode": mine}))
    found = made.unfit(made.profile, made.device.model_copy(update={"power_mode": now, "cores": 2}), MADE)
    if reason is None:
        found = made.unfit(made.profile, made.device, MADE)
    assert (found is None) if reason is None else reason in str(found)


def test_it_may_be_used_where_it_was_made() -> None:
    assert GOOD.unfit(GOOD.profile, GOOD.device, MADE + timedelta(days=180)) is None


@pytest.mark.parametrize(
    ("changed", "days", "reason"),
    [
        ({}, 181, "is 181 days old, 180 are the most"),
        ({}, -2, "made in the future"),
        ({"peripherals_sha256": "other"}, 1, "other USB devices"),
        ({"serial_sha256": "other"}, 1, "another device"),
        ({"firmware": "2.0"}, 1, "firmware 1.0, now it is 2.0"),
        ({"cores": 96}, 1, "there are 96"),
        ({"kernel": "99.0"}, 1, None),
        ({"firmware": None}, 1, None),
    ],
)
def test_what_makes_it_unfit(changed: dict[str, object], days: int, reason: str | None) -> None:
    device = GOOD.device.model_copy(update={"serial_sha256": "mine", "firmware": "1.0"})
    made = calibration_of(device=device)
    found = made.unfit(made.profile, device.model_copy(update=changed), MADE + timedelta(days=days))
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_another_profile_or_another_version_of_it_makes_it_unfit() -> None:
    published = DeviceProfile.load("raspberry-pi-4b")
    assert published.model is not None
    edited = published.model_copy(update={"model": published.model.model_copy(update={"exponent": 0.9})})
    assert GOOD.unfit(published.facts, GOOD.device, MADE) is None
    for other in (edited, DeviceProfile.load("raspberry-pi-5")):
        assert "the profile" in (GOOD.unfit(other.facts, GOOD.device, MADE) or "")


def test_what_was_refused_is_never_used() -> None:
    made = calibration_of(refused=("heat: 80 °C",))
    assert "heat: 80 °C" in (made.unfit(made.profile, made.device, MADE) or "")


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.4])
def test_the_calibrated_model_rises_with_load(exponent: float) -> None:
    profile = DeviceProfile.load("raspberry-pi-4b").calibrated(calibration_of(steps_of(exponent=exponent)))
    model = profile.model
    assert model is not None
    watts = [model.watts(u) for u in np.linspace(0, 1, 101)]
    assert watts == sorted(watts)
    assert (watts[0], watts[-1]) == (pytest.approx(IDLE_W, rel=0.03), pytest.approx(FULL_W, rel=0.03))
    assert (model.basis, model.scope) == ("calibrated", "wall_ac")
    assert model.relative_gross == pytest.approx(
        calibration_of(steps_of(exponent=exponent)).model.u_rel_gross
    )
    DeviceProfile.model_validate(profile.model_dump(by_alias=True))  # every number of it has its source


def test_a_profile_without_a_model_gets_one_and_the_sensor_that_uses_it() -> None:
    profile = DeviceProfile.load("unknown-linux").calibrated(GOOD)
    assert profile.model is not None
    assert [entry.name for entry in profile.sensor] == ["utilisation"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("schema = 1", "schema = 2", "schema"),
        ("[model]", "[modell]", "modell"),
        ("exponent = 1.0", "exponent = 2.0", "exponent"),
        ("p_full_w = { v = 6", "p_full_w = { v = 1", "below p_idle_w"),
        ("covariance = [[", "covariance = [[0.0], [", "covariance"),
        ("made = 2026-05-01T12:00:00+00:00", "made = 2026-05-01T12:00:00", "timezone"),
        ("u_rel_gross = ", "u_rel_gross = -", "u_rel_gross"),
        ("agent = ", "agent ", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in TEXT
    file = tmp_path / "pi.toml"
    file.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(SettingsError, match=rf"pi\.toml.*{says}"):
        read_calibration(file)


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read_calibration(tmp_path / "gone.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * (1 << 20) + b"##")
    with pytest.raises(SettingsError, match="no calibration"):
        read_calibration(tmp_path / "big.toml")


@given(
    cut=st.integers(0, len(TEXT)),
    put=st.text(max_size=12)
    | st.sampled_from(["[" * 5000, "9" * 5000, "= 1e999", "= -1", "inf", "nan", "\x00"]),
    taken=st.integers(0, 40),
)
def test_no_damage_is_believed_or_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, cut: int, put: str, taken: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.toml"
    file.write_bytes((TEXT[:cut] + put + TEXT[cut + taken :]).encode(errors="replace"))
    try:
        found = read_calibration(file)
    except SettingsError:
        return
    assert isinstance(found, Calibration)
    assert 0 <= found.model.p_idle_w.v <= found.model.p_full_w.v < float("inf")
    found.unfit(GOOD.profile, GOOD.device, datetime(2026, 6, 1, tzinfo=UTC))
    assert DeviceProfile.load("unknown-linux").calibrated(found).model is not None


@given(data=st.binary(max_size=300))
def test_no_bytes_are_believed(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.toml"
    file.write_bytes(data)
    with pytest.raises(SettingsError):
        read_calibration(file)
