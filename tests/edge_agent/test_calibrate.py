"""What an agent does with a calibration, and what `hedgerow agent calibrate` says before and after."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from edge_agent.__main__ import main
from edge_agent.calibration.host import throttled_between, usb_ids
from edge_agent.calibration.use import calibrated, logged, place_beside
from edge_agent.doctor import findings
from edge_agent.energy.meter import Meter
from edge_agent.energy.sensor import find_sensors
from edge_agent.settings import AgentSettings
from foundation.calibration import Calibration, read_calibration
from foundation.energy import Kind, Scope, Stage
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile
from tests.calibrations import MADE, calibration_of

PI4 = DeviceProfile.load("raspberry-pi-4b")
SOON: datetime = MADE + timedelta(days=1)


def written(path: Path, made: Calibration | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((made or calibration_of()).toml())
    return path


def test_one_beside_the_vault_is_found_by_the_agents_name(tmp_path: Path) -> None:
    place = place_beside(tmp_path / "vault", "pi")
    assert place == tmp_path / "calibration" / "pi.toml"
    assert calibrated(PI4, None, place, now=SOON).profile is PI4
    use = calibrated(PI4, None, written(place), now=SOON)
    assert use.profile.model is not None
    assert (use.profile.model.basis, use.reason) == ("calibrated", None)


def test_readings_stay_modelled_and_say_that_the_model_is_calibrated(tmp_path: Path) -> None:
    use = calibrated(PI4, written(tmp_path / "pi.toml"), now=SOON)
    assert use.calibration is not None
    with Meter(use.profile, find_sensors(use.profile, tmp_path)) as meter:
        meter.sample()
    reading = meter.peek()[Stage.IDLE]
    assert (reading.kind, reading.scope, reading.flags) == (Kind.MODELLED, Scope.WALL_AC, ("calibrated",))
    assert reading.joules is not None
    assert reading.uncertainty_joules == pytest.approx(use.calibration.model.u_rel_gross * reading.joules)


def test_one_that_has_expired_is_not_used_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        use = calibrated(PI4, written(tmp_path / "pi.toml"), now=MADE + timedelta(days=200))
        assert logged(use) is PI4
    assert "200 days old" in (use.reason or "")
    (record,) = caplog.records
    assert "200 days old" in record.reason  # type: ignore[attr-defined]


def test_other_usb_devices_end_it(tmp_path: Path) -> None:
    path = written(tmp_path / "pi.toml")
    assert calibrated(PI4, path, now=SOON).reason is None
    root = tmp_path / "root"
    device = root / "sys/bus/usb/devices/1-1"
    device.mkdir(parents=True)
    (device / "idVendor").write_text("0bda\n")
    (device / "idProduct").write_text("8153\n")
    assert usb_ids(root) == ["0bda:8153"]
    assert "other USB devices" in (calibrated(PI4, path, root=root, now=SOON).reason or "")


def test_a_damaged_one_stops_who_asked_for_it_and_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "pi.toml"
    path.write_text("schema = 1\n")
    with pytest.raises(SettingsError, match=r"pi\.toml is wrong: agent"):
        calibrated(PI4, path, now=SOON)
    use = calibrated(PI4, None, path, now=SOON)
    assert use.profile is PI4
    assert "is wrong" in (use.reason or "")
    with pytest.raises(SettingsError, match="cannot be read"):
        calibrated(PI4, tmp_path / "gone.toml", now=SOON)


@pytest.mark.parametrize(
    ("before", "after", "slowed"),
    [
        (None, None, None),
        (0x0, 0x0, False),
        (0x50000, 0x50000, False),
        (0x0, 0x50000, True),
        (0x50005, 0x50005, True),
    ],
)
def test_only_what_happened_meanwhile_counts_as_throttled(
    before: int | None, after: int | None, slowed: bool | None
) -> None:
    assert throttled_between(before, after) is slowed


def test_an_agent_does_not_start_with_one_that_is_not_there(tmp_path: Path) -> None:
    keys = {
        "agent": "pi",
        "vault": tmp_path / "vault",
        "data.name": "digits",
        "energy.calibration": "gone.toml",
    }
    sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "edge_agent", *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "the calibration gone.toml cannot be read" in done.stderr


# --- doctor ----------------------------------------------------------------------------------------


def doctor(folder: Path, **energy: object) -> tuple[str, str]:
    settings = AgentSettings.model_validate(
        {
            "agent": "pi",
            "vault": folder / "vault",
            "energy": energy,
            "data": {"name": "digits"},
            "mqtt": {"connect_timeout_s": 0.1, "port": 1},
        }
    )
    found = {finding.what: finding for finding in findings(PI4, Path("/"), settings)}
    return found["calibration"].verdict, found["calibration"].says


def test_doctor_says_whether_it_is_used_and_why_not(tmp_path: Path) -> None:
    assert doctor(tmp_path) == ("note", "none: the power model of the profile is used, ± 30% (k = 2)")
    now = datetime.now().astimezone()
    place = place_beside(tmp_path / "vault", "pi")
    written(place, calibration_of(made=now))
    verdict, says = doctor(tmp_path)
    assert verdict == "good"
    assert "against shelly:plug" in says
    written(place, calibration_of(made=now, forced=("short hold: x",)))
    assert doctor(tmp_path)[0] == "note"
    written(place, calibration_of(made=now - timedelta(days=181)))
    verdict, says = doctor(tmp_path)
    assert verdict == "bad"
    assert "181 days old" in says
    assert doctor(tmp_path, calibration=tmp_path / "gone.toml")[0] == "bad"


# --- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--meter", "plug3"], "mqtt:tasmota/PLUG"),
        (["--meter", "manual", "--hold", "10"], "--hold 10 is too short for manual, which needs 60 s"),
        (["--meter", "sysfs:x", "--settle", "1"], "--settle 1 is too short"),
        (["--meter", "sysfs:x", "--hold", "0.5", "--force"], "a second at least"),
        (["--meter", "manual", "--accuracy", "2"], "--accuracy"),
        (["--meter", "manual", "--profile", "raspbery-pi"], "raspberry-pi-4b"),
        (["--meter", "shelly:x", "--mqtt-password-file", "x"], "needs mqtt.username"),
    ],
)
def test_what_cannot_be_is_said_before_anything_begins(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_meter_that_does_not_answer_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--meter", f"sysfs:{tmp_path}"]) == 1
    assert "power1_input" in capsys.readouterr().err


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    said = capsys.readouterr().out
    for word in ("csv:FILE", "WattRes 2", "AGENT@MODE.toml", "--net", "wall_ac", "--quick", "50 pulses"):
        assert word in said


@pytest.mark.slow
def test_what_is_refused_is_kept_to_be_looked_at_and_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person who types watts that fall at full load."""
    watts = {"idle": "2.4", "cores-25": "3.3", "cores-50": "6.2", "cores-75": "5.2", "cores-100": "4.0"}
    answers = iter(watts.get(name, "5.0") for name in ORDER)
    monkeypatch.setattr("edge_agent.calibration.meters._from_terminal", lambda _: next(answers))
    out = tmp_path / "pi.toml"
    arguments = ["--meter", "manual", "--quick", "--settle", "0", "--hold", "1", "--force", "--json"]
    assert main(["calibrate", *arguments, "--profile", "raspberry-pi-4b", "--out", str(out)]) == 3
    said = json.loads(capsys.readouterr().out)
    assert not said["accepted"]
    assert {breach["rule"] for breach in said["breaches"]} >= {"hold-out", "short hold"}
    assert all(breach["says"] and breach["mend"] for breach in said["breaches"])
    assert not out.exists()
    kept = read_calibration(tmp_path / "pi.refused.toml")
    assert len(kept.step) == 8
    use = calibrated(PI4, tmp_path / "pi.refused.toml")
    assert use.profile is PI4
    assert "was refused" in (use.reason or "")


ORDER = ("idle", "cores-75", "cores-50", "idle", "cores-25", "training", "cores-100", "idle")
"""What the seed 0 draws with --quick."""
