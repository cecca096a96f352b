"""What holds for every profile in firmware_profiles."""

from __future__ import annotations

import re
import tomllib
from importlib import resources

import pytest

from edge_agent.energy.sensor import sensor_class
from foundation.profile import DeviceProfile, available

UNITS = re.compile(
    r"_(w|w_alt\d*|j|c|mhz|mib|gflops|mb_s|gb_s|mbit_s|rel|mb_up|mb_down)$|^(isa|cores|exponent|gain)$"
)
POWER = re.compile(r"_w(_alt\d*)?$")

every_profile = pytest.mark.parametrize("name", available())


@every_profile
def test_loads_and_is_named_like_its_file(name: str):
    assert DeviceProfile.load(name).id == name


@every_profile
def test_every_source_is_used_and_every_number_is_sourced(name: str):
    profile = DeviceProfile.load(name)
    used = {number.src for _, number in profile.numbers()} - {None}
    assert used <= {source.id for source in profile.source}
    assert len({source.id for source in profile.source}) == len(profile.source)
    # rpi-docs and the like may back a single number; a source that backs none is a left-over
    assert used == {source.id for source in profile.source}


@every_profile
def test_units_stand_in_the_names_and_known_watts_have_a_scope(name: str):
    for key, number in DeviceProfile.load(name).numbers():
        if key.startswith("model.u_rel"):
            continue
        last = key.rsplit(".", 1)[-1]
        assert UNITS.search(last), key
        if POWER.search(last) and number.kind != "unknown":
            assert number.scope is not None, key


@every_profile
def test_its_sensors_exist(name: str):
    for entry in DeviceProfile.load(name).sensor:
        assert sensor_class(entry.name).name == entry.name


@every_profile
def test_its_model_never_falls_with_load(name: str):
    model = DeviceProfile.load(name).model
    if model is None:
        pytest.skip("no power model")
    watts = [model.watts(u / 100) for u in range(101)]
    assert watts == sorted(watts)
    assert watts[0] == model.idle_w > 0
    assert watts[-1] == pytest.approx(model.full_w)
    if model.basis == "published":  # one meter, one session
        assert model.p_idle_w.src == model.p_cpu_full_w.src


@every_profile
def test_its_schema_is_described(name: str):
    folder = resources.files("firmware_profiles")
    readme = (folder / "README.md").read_text()
    for table in tomllib.loads((folder / f"{name}.toml").read_text()):
        assert f"`{table}" in readme or f"[{table}" in readme, table
