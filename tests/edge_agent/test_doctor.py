"""`hedgerow agent doctor`: what it finds on real machines' file trees, and whether what it advises fits."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from edge_agent import doctor
from edge_agent.__main__ import main
from edge_agent.doctor import Finding, energy, findings
from foundation.mqtt import MqttSettings
from foundation.profile import DeviceProfile
from hedgerow.broker import EmbeddedBroker, find_broker
from tests.conftest import require_service
from tests.devices import ORIN, written

POWER = Path(__file__).parents[1] / "fixtures" / "power"


def found_on(fixture: str, profile: str, root: Path | None = None) -> dict[str, Finding]:
    root = root or POWER / fixture / "root"
    return {f.what.removeprefix("energy: "): f for f in energy(DeviceProfile.load(profile), root)}


def test_the_source_that_counts_is_said_with_kind_scope_and_error() -> None:
    found = found_on("orin-nano-jp5", "jetson-orin-nano")
    assert found["ina3221"].verdict == "good"
    assert found["ina3221"].says == "measured at module, ± 5% (k = 2), the one that counts"
    assert "counts" not in found["utilisation"].says


def test_counters_for_root_alone_come_with_the_rule_that_opens_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.energy.files.os.pread", lambda *_: b"")  # as if not allowed
    found = found_on("rapl-root-only", "generic-x86-server")
    assert found["rapl"].verdict == "note"
    assert "root alone" in found["rapl"].says
    assert "70-hedgerow-rapl.rules" in found["rapl"].mend
    assert "udevadm trigger" in found["rapl"].mend


@pytest.mark.parametrize(
    ("fixture", "profile", "sensor", "says"),
    [
        ("nano-jp4-permuted", "jetson-nano", "ina3221", "POM_5V_GPU 8.95 W"),
        ("battery-idle", "generic-x86-laptop", "battery", "on mains"),
        ("vm-none", "generic-x86-server", "rapl", "no zones"),
        ("vm-none", "raspberry-pi-5", "pi5_pmic", "no firmware mailbox"),
        ("vm-none", "raspberry-pi-4b", "inline_ina", "none in the supply line"),
        ("vm-none", "jetson-nano", "ina3221", "no such chip"),
    ],
)
def test_why_a_sensor_is_not_there(fixture: str, profile: str, sensor: str, says: str) -> None:
    finding = found_on(fixture, profile)[sensor]
    assert finding.verdict == "note"
    assert says in finding.says


def test_two_meters_and_a_closed_mailbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(POWER / "ina226-inline" / "root", tmp_path, dirs_exist_ok=True)
    hwmon = tmp_path / "sys/class/hwmon"
    shutil.copytree(hwmon / "hwmon2", hwmon / "hwmon8")
    assert "2 of them" in found_on("", "raspberry-pi-4b", tmp_path)["inline_ina"].says
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/vcio").touch()
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert "usermod -aG video" in found_on("", "raspberry-pi-5", tmp_path)["pi5_pmic"].mend


@pytest.mark.parametrize(("bits", "verdict"), [("0x0", "good"), ("0x50000", "good"), ("0x50005", "bad")])
def test_throttling_now_is_told_from_throttling_once(tmp_path: Path, bits: str, verdict: str) -> None:
    place = tmp_path / "sys/devices/platform/soc/soc:firmware"
    place.mkdir(parents=True)
    (place / "get_throttled").write_text(f"{bits.removeprefix('0x')}\n")
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("61300\n")
    found = {f.what: f for f in findings(DeviceProfile.load("raspberry-pi-4b"), tmp_path, None)}
    assert found["throttling"].verdict == verdict
    assert (found["heat"].verdict, found["heat"].says) == ("good", "61 °C of 80")
    (zone / "temp").write_text("78000\n")
    found = {f.what: f for f in findings(DeviceProfile.load("raspberry-pi-4b"), tmp_path, None)}
    assert found["heat"].verdict == "note"


def test_a_clock_that_was_never_set_is_bad() -> None:
    assert doctor.clock(3600.0).verdict == "bad"
    assert doctor.clock(1.8e9).verdict == "good"


def config(folder: Path, port: int) -> list[str]:
    file = folder / "agent.toml"
    file.write_text(
        f'agent = "pi"\nvault = "{folder}/vault"\nprofile = "raspberry-pi-4b"\n'
        f'[mqtt]\nhost = "127.0.0.1"\nport = {port}\n[data]\nname = "digits"\n'
    )
    return ["doctor", "--config", str(file), "--json"]


def test_a_broker_that_is_not_there_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    assert main(config(tmp_path, port)) == 1
    (finding,) = [f for f in json.loads(capsys.readouterr().out) if f["what"] == "broker"]
    assert finding["verdict"] == "bad"
    assert str(port) in finding["says"]
    assert "[mqtt]" in finding["mend"]


@pytest.mark.broker
def test_a_broker_that_lets_it_in_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_service(find_broker() is not None, "MQTT broker")
    with EmbeddedBroker(tmp_path) as broker:
        assert main(config(tmp_path, MqttSettings.from_url(broker.url).port)) == 0
    found = json.loads(capsys.readouterr().out)
    assert {f["what"] for f in found} >= {"device", "memory", "disk", "software", "clock", "broker"}
    assert not [f for f in found if f["verdict"] == "bad"]


def test_people_get_a_table_and_errors_name_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["doctor", "--root", str(tmp_path)]) == 0
    assert "not recognised" in capsys.readouterr().out
    assert main(["doctor", "--profile", "raspberry-pi-6"]) == 2
    assert "raspberry-pi-5" in capsys.readouterr().err


def test_the_speed_is_said_where_anybody_says_it(tmp_path: Path) -> None:
    profile = DeviceProfile.load("jetson-orin-nano")

    def speed(root: Path) -> tuple[str, str]:
        found = {finding.what: finding for finding in findings(profile, root, None)}
        return found["speed"].verdict, found["speed"].says

    assert speed(written(tmp_path / "orin", ORIN)) == (
        "good",
        "power mode 15W, governor schedutil, 115 to 1510 MHz",
    )
    assert speed(tmp_path / "nothing")[0] == "note"
