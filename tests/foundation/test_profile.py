from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from foundation.energy import Scope
from foundation.errors import SettingsError
from foundation.profile import AgentDefaults, DeviceProfile, Number, PowerModel, available

BARE_X86 = "processor : 0\nvendor_id : AuthenticAMD\nflags\t\t: fpu sse lm avx2\n"
VIRTUAL_X86 = BARE_X86.replace("avx2", "avx2 hypervisor")


def fake(root: Path, **files: str) -> Path:
    """Write files into a fake root; '__' in a name stands for '/'."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def board(root: Path, model: str) -> Path:
    path = root / "proc/device-tree/model"
    path.parent.mkdir(parents=True)
    path.write_text(model + "\0")
    return root


def test_profiles_ship_and_load():
    pis = {f"raspberry-pi-{board}" for board in ("zero-2w", "3b-plus", "4b", "5")}
    jetsons = {f"jetson-{module}" for module in ("nano", "tx2", "xavier-nx", "orin-nano", "agx-orin")}
    others = {"radxa-rock-5b", "generic-x86-laptop", "generic-x86-server", "unknown-linux"}
    assert pis | jetsons | others == set(available())
    pi = DeviceProfile.load("raspberry-pi-4b")
    assert pi.model is not None
    assert pi.model.scope is Scope.BOARD_DC
    assert pi.model.watts(0) == 2.2857
    assert pi.model.watts(0.5) == pytest.approx(2.2857 + 4.5344 / 2)
    assert pi.model.watts(1) == pi.model.watts(7) == pytest.approx(6.8201)
    assert pi.agent.threads == 3


def test_unknown_machine_has_no_invented_watts():
    unknown = DeviceProfile.load("unknown-linux")
    assert unknown.model is None
    assert unknown.sensor == ()
    assert all(number.v is None for _, number in unknown.numbers())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Raspberry Pi 4 Model B Rev 1.4", "raspberry-pi-4b"),
        ("Raspberry Pi Compute Module 4 Rev 1.0", "raspberry-pi-4b"),
        ("Raspberry Pi 400 Rev 1.0", "raspberry-pi-4b"),
        ("Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"),
        ("Raspberry Pi 500 Rev 1.0", "raspberry-pi-5"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "raspberry-pi-3b-plus"),
        ("Raspberry Pi Zero 2 W Rev 1.0", "raspberry-pi-zero-2w"),
        ("NVIDIA Jetson Nano Developer Kit", "jetson-nano"),
        ("NVIDIA Jetson Xavier NX Developer Kit", "jetson-xavier-nx"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "jetson-orin-nano"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "jetson-agx-orin"),
        ("Radxa ROCK 5B", "radxa-rock-5b"),
        ("Raspberry Pi Model B Rev 2", "unknown-linux"),
        ("Some Board Nobody Knows", "unknown-linux"),
    ],
)
def test_detects_boards_by_device_tree(tmp_path: Path, model: str, expected: str):
    assert DeviceProfile.detect(board(tmp_path, model)).id == expected


def test_detects_a_bare_x86_server(tmp_path: Path):
    root = fake(tmp_path, proc__cpuinfo=BARE_X86, sys__class__dmi__id__sys_vendor="Supermicro\n")
    assert DeviceProfile.detect(root).id == "generic-x86-server"


def test_a_laptop_is_not_a_server(tmp_path: Path):
    root = fake(tmp_path, proc__cpuinfo=BARE_X86, sys__class__power_supply__BAT0__type="Battery\n")
    assert DeviceProfile.detect(root).id == "generic-x86-laptop"


def test_a_virtual_machine_is_unknown_by_flag_or_by_dmi(tmp_path: Path):
    by_flag = fake(tmp_path / "a", proc__cpuinfo=VIRTUAL_X86)
    by_name = fake(tmp_path / "b", proc__cpuinfo=BARE_X86, sys__class__dmi__id__sys_vendor="QEMU\n")
    assert DeviceProfile.detect(by_flag).id == "unknown-linux"
    assert DeviceProfile.detect(by_name).id == "unknown-linux"


def test_an_empty_file_system_is_unknown(tmp_path: Path):
    assert DeviceProfile.detect(tmp_path).id == "unknown-linux"


def test_a_wrong_id_names_those_there_are():
    with pytest.raises(
        SettingsError, match=r"raspberry-pi-9.*generic-x86-server, jetson-agx-orin.*raspberry-pi-4b"
    ):
        DeviceProfile.load("raspberry-pi-9")


def test_loads_from_a_users_path(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('schema = 1\nid = "mine"\ntitle = "My board"\n')
    assert DeviceProfile.load(str(path)).id == DeviceProfile.load(path).id == "mine"
    with pytest.raises(SettingsError, match=r"gone\.toml cannot be read: No such file"):
        DeviceProfile.load(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("titel = 1", "titel"),
        ("[agent]\nthread = 2", "agent.thread"),
        ('[power]\nidle_w = { v = 2.0, kind = "measured" }', "power.idle_w.*needs v and src"),
        ('[power]\nidle_w = { v = 2.0, kind = "measured", src = "who" }', "power.idle_w.*no .*who"),
        ('[power]\nidle_w = { v = 0, kind = "unknown" }', "power.idle_w.*neither v nor range"),
        ('[[sensor]]\nname = "../evil"', "sensor.0.name"),
        ('match.dt_model = ["("]', "match.dt_model.*regular expression"),
        ("= 3", "is not TOML"),
    ],
)
def test_a_wrong_file_names_file_and_key(tmp_path: Path, line: str, named: str):
    path = tmp_path / "mine.toml"
    path.write_text(f'schema = 1\nid = "mine"\ntitle = "My board"\n{line}\n')
    with pytest.raises(SettingsError, match=rf"(?s)mine\.toml.*{named}"):
        DeviceProfile.load(path)


def test_a_number_lies_in_its_range():
    with pytest.raises(ValidationError, match="range"):
        Number(v=3.0, range=(1.0, 2.0), kind="measured", src="x")


def test_a_model_must_rise_and_stay_at_its_scope():
    def number(v: float, scope: Scope | None = None) -> Number:
        return Number(v=v, kind="measured", scope=scope, src="x")

    rest = {
        "scope": Scope.WALL_AC,
        "basis": "published",
        "u_rel_gross": number(0.3),
        "u_rel_net": number(0.4),
    }
    with pytest.raises(ValidationError, match="below p_idle_w"):
        PowerModel.model_validate({**rest, "p_idle_w": number(5.0), "p_cpu_full_w": number(4.0)})
    with pytest.raises(ValidationError, match="a number of it at module"):
        PowerModel.model_validate(
            {**rest, "p_idle_w": number(1.0, Scope.MODULE), "p_cpu_full_w": number(4.0)}
        )


def test_threads_leave_a_core_and_never_exceed_the_machine():
    assert AgentDefaults().threads_of(4) == 3
    assert AgentDefaults().threads_of(1) == 1
    assert AgentDefaults(threads=3).threads_of(2) == 1
