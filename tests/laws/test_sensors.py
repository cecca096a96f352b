"""What holds for every energy sensor in edge_agent/energy."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.energy.sensor import find_sensors, sensor_class, sensor_names
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile, available

every_sensor = pytest.mark.parametrize("name", sensor_names())
READS_FILES = tuple(name for name in sensor_names() if name != "utilisation")
"""All but the model, which reads the running system through psutil."""


@every_sensor
def test_is_named_like_its_file(name: str):
    assert sensor_class(name).name == name


@every_sensor
def test_is_not_there_on_an_unknown_machine_without_files(name: str, tmp_path: Path):
    assert sensor_class(name).probe(DeviceProfile.load("unknown-linux"), tmp_path) is None


@every_sensor
@pytest.mark.parametrize("profile", available())
def test_one_that_reads_files_is_not_there_on_an_empty_file_system(name: str, profile: str, tmp_path: Path):
    if name in READS_FILES:
        assert sensor_class(name).probe(DeviceProfile.load(profile), tmp_path) is None


@pytest.mark.parametrize("profile", available())
def test_joules_never_fall(profile: str):
    for sensor in find_sensors(DeviceProfile.load(profile)):
        values = [sensor.joules(now / 50) for now in range(20)]
        known = [value for value in values if value is not None]
        assert known == sorted(known)
        assert all(value >= 0 for value in known)


def test_there_is_at_least_the_model():
    assert "utilisation" in sensor_names()
    assert not {"meter", "sensor"} & set(sensor_names())


def test_a_sensor_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(SettingsError, match=r"'utilsation'; there are: .*utilisation"):
        sensor_class("utilsation")
    with pytest.raises(SettingsError):
        sensor_class("meter")
