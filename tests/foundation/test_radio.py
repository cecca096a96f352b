"""_radio.toml: sourced numbers that the channel model agrees with, and no device's profile."""

from __future__ import annotations

import tomllib
from importlib import resources

import pytest

from coordinator.channel import NOISE_DBM_HZ, Radio
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile, available
from foundation.radio import FILE, RadioConstants

TEXT = (resources.files("firmware_profiles") / FILE).read_text(encoding="utf-8")


def test_every_number_is_there_and_every_source_is_used() -> None:
    constants = RadioConstants.load()
    told = tomllib.loads(TEXT)
    assert set(constants.tables) == set(told) - {"schema", "id", "title", "source"}
    assert len(list(constants.numbers())) == sum(len(table) for table in constants.tables.values()) > 20
    assert {number.src for _, number in constants.numbers()} == {source.id for source in constants.source}
    recalled = {key for key, number in constants.numbers() if not number.verified}
    assert {key for key, number in constants.numbers() if number.src in ("huang", "yang")} <= recalled


def test_it_is_no_profile() -> None:
    assert "_radio" not in available()
    with pytest.raises(SettingsError, match="there is no device profile"):
        DeviceProfile.load("_radio")


def test_the_channel_has_the_same_constants() -> None:
    value = RadioConstants.load().value
    assert value("fl_model", "noise_dbm_per_hz") == NOISE_DBM_HZ
    loss, decade = value("fl_model", "pathloss_db"), value("fl_model", "pathloss_db_per_decade")
    for distance, db in ((1.0, loss), (0.1, loss - decade)):
        assert Radio(10, distance).snr_hz == pytest.approx(10 ** ((10 - db - NOISE_DBM_HZ) / 10))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("schema = ", "is not TOML"),
        (TEXT.replace('id = "yang"', 'id = "young"'), "there is no \\[\\[source\\]\\] with id 'yang'"),
        (TEXT.replace("idle_w = { v = 0.942,", "idle_w = { w = 0.942,"), "wifi_kaup.idle_w"),
        (TEXT.replace("schema = 1", "schema = 2"), "schema"),
        (TEXT.replace("[ethernet]", "ethernet = 3\n[cable]"), "_radio.toml is wrong"),
    ],
)
def test_what_is_wrong_is_named(text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        RadioConstants.parse(text.encode())


def test_a_number_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingsError, match=r"no known number fl_model\.colour"):
        RadioConstants.load().value("fl_model", "colour")
