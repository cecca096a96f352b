"""Energy sensors on the file trees of real machines: tests/fixtures/power, each with origin and oracle."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_agent.energy import files, ina3221, pi5_pmic
from edge_agent.energy.battery import Battery
from edge_agent.energy.files import NumberFile
from edge_agent.energy.ina3221 import Ina3221
from edge_agent.energy.inline_ina import InlineIna
from edge_agent.energy.nvml import Nvml
from edge_agent.energy.pi5_pmic import Pi5Pmic
from edge_agent.energy.rapl import Rapl
from edge_agent.energy.sensor import EnergySensor, find_sensors
from edge_agent.energy.tegrastats import LOG, Tegrastats, rails_of
from foundation.energy import Kind, Scope
from foundation.profile import DeviceProfile

FOLDER = Path(__file__).parents[1] / "fixtures" / "power"
ALL = sorted(folder.name for folder in FOLDER.iterdir())
FIXTURES = [name for name in ALL if (FOLDER / name / "expect.json").exists()]
"""Those that are file trees; the others are texts, messages and lines."""


class Fixture:
    """One file tree, a copy that a test may change, and what is expected of it."""

    def __init__(self, name: str, scratch: Path) -> None:
        source = FOLDER / name
        self.expected: dict[str, Any] = json.loads((source / "expect.json").read_text())
        self.root = scratch / name
        if (source / "root").exists():
            shutil.copytree(source / "root", self.root)
        self.root.mkdir(exist_ok=True)
        text = source / "pmic.txt"
        self.pmic = text.read_text() if text.exists() else None
        self.profile = DeviceProfile.load(self.expected.get("profile", "unknown-linux"))

    def write(self, values: dict[str, Any]) -> None:
        for place, value in values.items():
            (self.root / place).write_text(f"{value}\n")

    def sensors(self) -> list[EnergySensor]:
        found = list(find_sensors(self.profile, self.root))
        if self.pmic is not None:
            pmic = Pi5Pmic.probe(self.profile, self.root, lambda: self.pmic)
            found = [pmic, *found] if pmic is not None else found
        if "labels" in self.expected:  # a module without a profile of its own
            found = [Ina3221(self.root, self.expected["labels"], Scope.RAIL_SUM, most_w=None), *found]
        return found

    def sensor(self) -> EnergySensor | None:
        return next((sensor for sensor in self.sensors() if sensor.name != "utilisation"), None)


@pytest.fixture
def fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Fixture:
    return Fixture(request.param, tmp_path)


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fixture", names, indirect=True)


@pytest.mark.parametrize("name", ALL)
def test_every_fixture_says_where_it_is_from(name: str) -> None:
    assert (FOLDER / name / "SOURCE").read_text().strip()


@on(*(name for name in FIXTURES if name != "rapl-root-only"))
def test_the_best_source_is_found_and_reads_what_it_should(fixture: Fixture) -> None:
    expected, sensor = fixture.expected, fixture.sensor()
    if expected["sensor"] in (None, "utilisation"):
        assert sensor is None, "nothing may be called measured here"
        return
    assert sensor is not None
    assert (sensor.name, sensor.kind, sensor.scope) == (
        expected["sensor"], Kind(expected["kind"]), Scope(expected["scope"]),
    )  # fmt: skip
    if "watts" in expected:
        assert isinstance(sensor, (Ina3221, InlineIna, Battery, Pi5Pmic))
        assert sensor.watts() == pytest.approx(expected["watts"], rel=1e-9)
    assert sensor.joules(0.0) == 0


@on(*(name for name in FIXTURES if "then" in json.loads((FOLDER / name / "expect.json").read_text())))
def test_what_comes_next_is_added(fixture: Fixture) -> None:
    expected, sensor = fixture.expected, fixture.sensor()
    assert sensor is not None
    sensor.joules(0.0)
    fixture.write(expected["then"])
    after = expected.get("after_s", 2.0)
    wanted = expected.get("then_joules") or (expected["watts"] + expected["then_watts"]) / 2 * after
    assert sensor.joules(after) == pytest.approx(wanted, rel=1e-6)
    assert sensor.breaks == 0


@on("pi4-none", "vm-none")
def test_without_a_source_the_model_is_used_or_nothing(fixture: Fixture) -> None:
    profile = DeviceProfile.detect(fixture.root)
    assert profile.id == fixture.expected["detected"]
    kinds = [sensor.kind for sensor in find_sensors(profile, fixture.root)]
    assert kinds == ([] if fixture.expected["kind"] == "none" else [Kind.MODELLED])


# --- RAPL ----------------------------------------------------------------------------------------


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return paths (their ends) of which reading fails from now on; root may read everything."""
    ends: set[str] = set()
    read = os.pread
    opened = os.open
    paths: dict[int, str] = {}

    def open_(path: Any, *args: Any, **more: Any) -> int:
        descriptor = opened(path, *args, **more)
        paths[descriptor] = str(path)
        return descriptor

    def pread(descriptor: int, *args: Any) -> bytes:
        if any(paths.get(descriptor, "").endswith(end) for end in ends):
            raise OSError(61, "No data available")
        return read(descriptor, *args)

    monkeypatch.setattr(files.os, "open", open_)
    monkeypatch.setattr(files.os, "pread", pread)
    return ends


@on("rapl-root-only")
def test_a_counter_that_may_not_be_read_is_no_sensor(fixture: Fixture, unreadable: set[str]) -> None:
    assert Rapl.probe(fixture.profile, fixture.root) is not None
    unreadable.add(fixture.expected["unreadable"])
    assert Rapl.probe(fixture.profile, fixture.root) is None


@on("rapl-eio")
def test_a_read_error_is_a_gap_that_invents_nothing(fixture: Fixture, unreadable: set[str]) -> None:
    """A naive reader takes the error for 0, the next good value for a wrap, and 262 kJ for used."""
    sensor = Rapl.probe(fixture.profile, fixture.root)
    assert sensor is not None
    sensor.joules(0.0)
    unreadable.add(fixture.expected["breaks"])
    assert sensor.joules(1.0) is None
    unreadable.clear()
    fixture.write({fixture.expected["breaks"]: 3_000_000})
    assert sensor.joules(2.0) == pytest.approx(2.0)
    assert sensor.breaks == 0


@on("rapl-amd")
def test_a_counter_that_starts_again_has_not_wrapped(fixture: Fixture) -> None:
    """65 kJ in a fifth of a second cannot have flowed: the machine slept, or the module was loaded again."""
    sensor = Rapl.probe(fixture.profile, fixture.root)
    assert sensor is not None
    sensor.joules(0.0)
    fixture.write({"sys/class/powercap/intel-rapl:0/energy_uj": 64_000_000_000})
    assert sensor.joules(0.2) == 0
    assert sensor.breaks == 1


@on("rapl-psys")
def test_what_contains_each_other_is_not_added(fixture: Fixture) -> None:
    sensor = Rapl.probe(fixture.profile, fixture.root)
    assert sensor is not None
    assert [folder.name for folder in sensor.folders] == ["intel-rapl:1"]
    shutil.rmtree(fixture.root / "sys/class/powercap/intel-rapl:1")
    sensor = Rapl.probe(fixture.profile, fixture.root)
    assert sensor is not None
    assert [folder.name for folder in sensor.folders] == ["intel-rapl:0", "intel-rapl:0:2"]
    assert sensor.scope is Scope.RAIL_SUM


# --- INA3221 -------------------------------------------------------------------------------------


@on("nano-jp4-permuted", "tx2nx-shunt-x1000")
def test_what_cannot_be_is_not_measured(fixture: Fixture) -> None:
    """A reader that believes the total's label reports 3.2 W for a board that draws 9, or 5 kW."""
    entry = next(e for e in fixture.profile.sensor if e.name == "ina3221")
    full = fixture.profile.model.full_w if fixture.profile.model else 0
    labels = entry.labels
    sensor = Ina3221(fixture.root, labels, Scope.MODULE, most_w=3 * full)
    assert sensor.watts() is None
    assert sensor.flags == (fixture.expected["flag"],)
    naive = ina3221.rails_of(fixture.root)[next(n for n, role in labels.items() if role == "total")]
    assert naive.watts() == pytest.approx(fixture.expected["naive_watts"])


@on(
    *(
        name
        for name in FIXTURES
        if {"parts", "parts_sum"} & json.loads((FOLDER / name / "expect.json").read_text()).keys()
    )
)
def test_parts_are_shown_and_never_added(fixture: Fixture) -> None:
    sensor, expected = fixture.sensor(), fixture.expected
    assert isinstance(sensor, Ina3221)
    parts = sensor.parts()
    if "parts" in expected:
        assert parts == pytest.approx(expected["parts"])
    else:
        assert sum(parts.values()) == pytest.approx(expected["parts_sum"])
    assert sensor.watts() == pytest.approx(expected["watts"])


@on("renumber")
def test_a_renumbered_hwmon_is_found_again_after_one_gap(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = next(e for e in fixture.profile.sensor if e.name == "ina3221")
    now = [0.0]
    sensor = Ina3221(fixture.root, entry.labels, Scope.MODULE, most_w=50, clock=lambda: now[0])
    assert sensor.watts() == pytest.approx(fixture.expected["watts"])
    old, new = (fixture.root / place for place in fixture.expected["moves"])
    shutil.copytree(old, new)
    shutil.rmtree(old)
    assert sensor.watts() is None, "what is gone must not go on answering"
    now[0] = ina3221.LOOK_AGAIN_S
    assert sensor.watts() is None
    assert sensor.watts() == pytest.approx(fixture.expected["watts"])


def test_a_rail_that_is_missing_makes_the_sum_unknown_not_smaller(tmp_path: Path) -> None:
    fixture = Fixture("agx-orin-jp5", tmp_path)
    sensor = fixture.sensor()
    assert isinstance(sensor, Ina3221)
    (fixture.root / "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/curr3_input").unlink()
    assert sensor.watts() is None


# --- in-line, battery, PMIC, NVML ----------------------------------------------------------------


@on("ina226-inline")
def test_two_in_line_meters_cannot_be_told_apart(fixture: Fixture) -> None:
    second = fixture.root / "sys/class/hwmon/hwmon7"
    shutil.copytree(fixture.root / "sys/class/hwmon/hwmon2", second)
    assert InlineIna.probe(fixture.profile, fixture.root) is None


@on("ina226-inline")
def test_an_in_line_meter_is_found_under_another_number(fixture: Fixture) -> None:
    sensor = InlineIna.probe(fixture.profile, fixture.root)
    assert sensor is not None
    hwmon = fixture.root / "sys/class/hwmon"
    shutil.copytree(hwmon / "hwmon2", hwmon / "hwmon5")
    shutil.rmtree(hwmon / "hwmon2")
    assert [sensor.watts(), sensor.watts()] == [None, pytest.approx(fixture.expected["watts"])]


@on("battery-power")
def test_a_battery_on_mains_says_nothing(fixture: Fixture) -> None:
    sensor = Battery.probe(fixture.profile, fixture.root)
    assert sensor is not None
    for status in ("Charging", "Not charging", "Full", "Unknown"):
        fixture.write({"sys/class/power_supply/BAT0/status": status})
        assert sensor.watts() is None
        assert Battery.probe(fixture.profile, fixture.root) is None


@on("battery-power")
def test_one_of_two_batteries_that_does_not_say_makes_the_sum_unknown(fixture: Fixture) -> None:
    second = fixture.root / "sys/class/power_supply/BAT1"
    second.mkdir()
    (second / "status").write_text("Discharging\n")
    assert Battery.probe(fixture.profile, fixture.root) is None


@on("pi5-pmic-a", "pi5-pmic-b")
def test_the_rails_sum_up_and_the_published_line_goes_to_the_board(fixture: Fixture) -> None:
    assert fixture.pmic is not None
    watts, broken = pi5_pmic.rails_of(fixture.pmic)
    assert (len(watts), broken) == (12, ())
    assert sum(watts.values()) == pytest.approx(fixture.expected["rail_sum"], abs=5e-11)


@on("pi5-pmic-a")
def test_a_rail_without_voltage_is_dropped_and_said(fixture: Fixture) -> None:
    assert fixture.pmic is not None
    fixture.pmic = "\n".join(line for line in fixture.pmic.splitlines() if "VDD_CORE_V" not in line)
    sensor = Pi5Pmic.probe(fixture.profile, fixture.root, lambda: fixture.pmic)
    assert sensor is not None
    assert sensor.flags == ("pmic_rail_missing",)
    assert sensor.watts() < fixture.expected["watts"]
    assert Pi5Pmic.probe(fixture.profile, fixture.root, lambda: "error=1 error_msg=...") is None
    assert Pi5Pmic.probe(fixture.profile, fixture.root, lambda: None) is None


def test_the_mailbox_is_asked_in_the_firmwares_format(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/vcio").touch()
    asked: list[bytes] = []

    def firmware(_: int, request: int, letter: bytearray) -> int:
        assert request == 3 << 30 | struct.calcsize("P") << 16 | 0x6400
        asked.append(bytes(letter))
        answer = b"  X_A current(0)=0.5A\n  X_V volt(1)=4.0V\n"
        letter[4:8] = struct.pack("<I", 0x80000000)
        letter[24 : 24 + len(answer) + 1] = answer + b"\0"
        return 0

    monkeypatch.setattr(pi5_pmic.fcntl, "ioctl", firmware)
    sensor = Pi5Pmic.probe(DeviceProfile.load("raspberry-pi-5"), tmp_path)
    assert sensor is not None
    assert sensor.watts() == pytest.approx(1.1451 * 2.0 + 0.5879)
    size, code, tag, length = struct.unpack_from("<IIII", asked[0])
    assert (size, code, tag, length) == (len(asked[0]), 0, 0x30080, 1024)
    assert asked[0][24:].startswith(b"pmic_read_adc\0")
    assert asked[0][-4:] == bytes(4)


@pytest.mark.parametrize("letter", [b"", bytes(24), struct.pack("<6I", 9, 0x80000001, 0, 0, 0, 0)])
def test_a_mailbox_that_refuses_says_nothing(letter: bytes) -> None:
    assert pi5_pmic.answer_of(letter) is None


class Driver(SimpleNamespace):
    """As much of pynvml as is used."""

    class NVMLError(Exception):
        pass

    counters: list[int | None]

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.counters)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        value = self.counters[handle]
        if value is None:
            raise self.NVMLError
        return value


def test_all_cards_are_counted_and_a_lost_one_makes_the_sum_unknown(tmp_path: Path) -> None:
    driver, profile = Driver(counters=[1000, 5000]), DeviceProfile.load("generic-x86-server")
    sensor = Nvml.probe(profile, tmp_path, driver)
    assert sensor is not None
    assert (sensor.scope, sensor.kind) == (Scope.GPU_BOARD, Kind.MEASURED)
    driver.counters = [2000, 8000]
    assert sensor.joules(1.0) == pytest.approx(4.0)
    driver.counters = [3000, None]
    assert sensor.joules(2.0) is None
    driver.counters = [4000, 10]  # the driver was loaded again
    assert sensor.joules(3.0) == pytest.approx(6.0)
    assert sensor.breaks == 1
    assert Nvml.probe(profile, tmp_path, Driver(counters=[None])) is None
    assert Nvml.probe(profile, tmp_path) is None


def open_descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_a_number_file_keeps_one_descriptor_and_gives_it_back(tmp_path: Path) -> None:
    path = tmp_path / "n"
    file = NumberFile(path)
    assert file.read() is None
    path.write_text("12\n")
    before = open_descriptors()
    assert [file.read() for _ in range(50)] == [12] * 50
    assert open_descriptors() == before + 1
    path.write_text("N/A\n")
    assert file.read() is None
    path.write_text("-7\n")
    assert file.read() == -7
    file.close()
    file.close()
    assert open_descriptors() == before


# --- tegrastats ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "watts"), [("r32", 3.056), ("r34", 5.299), ("r39", 5.299)])
def test_every_form_of_the_line_gives_the_power_of_the_moment(
    form: str, watts: float, tmp_path: Path
) -> None:
    line = (FOLDER / "tegrastats" / f"{form}.txt").read_text()
    assert set(rails_of(line)) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    log = tmp_path / LOG
    log.parent.mkdir()
    log.write_text(line)
    sensor = Tegrastats.probe(DeviceProfile.load("jetson-orin-nano"), tmp_path)
    assert sensor is not None
    assert (sensor.watts(), sensor.scope, sensor.u_rel) == (watts, Scope.MODULE, 0.05)
    log.write_text(
        line + line.replace("VDD_IN 5299", "VDD_IN 9999").replace("VDD_IN 3056", "VDD_IN 9999")[:-9]
    )
    assert sensor.watts() == watts  # a line that is still being written is not read
    log.write_text(line + "RAM 1/2MB\n")
    assert sensor.watts() is None


def test_a_log_that_nobody_writes_any_more_says_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text((FOLDER / "tegrastats" / "r34.txt").read_text())
    clock = log.stat().st_mtime + 2.0
    sensor = Tegrastats(log, {"VDD_IN": "total"}, Scope.MODULE, clock=lambda: clock)
    assert sensor.watts() == 5.299
    clock += 2.0
    assert sensor.watts() is None
    assert Tegrastats(tmp_path / "none", {"VDD_IN": "total"}, Scope.MODULE).watts() is None


def test_a_sum_of_rails_needs_all_of_them(tmp_path: Path) -> None:
    log = tmp_path / "log"
    labels = {"VDD_GPU_SOC": "total", "VDD_CPU_CV": "total", "VDD_X": "part"}
    sensor = Tegrastats(log, labels, Scope.RAIL_SUM)
    log.write_text("VDD_GPU_SOC 3205mW/3205mW VDD_CPU_CV 4405mW/4405mW VDD_X 9mW/9mW\n")
    assert sensor.watts() == pytest.approx(7.61)
    log.write_text("VDD_GPU_SOC 3205mW/3205mW\n")
    assert sensor.watts() is None
