from __future__ import annotations

import logging
import ssl
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from foundation.errors import FrameTooLarge, SettingsError
from foundation.mqtt import MqttSettings, MqttTransport


def test_a_url_is_read_into_settings() -> None:
    settings = MqttSettings.from_url("mqtt://agent-1:p%40ss%3A%2Fword@broker.local:1884")
    assert (settings.host, settings.port, settings.username) == ("broker.local", 1884, "agent-1")
    assert settings.secret() == "p@ss:/word"
    assert not settings.tls
    assert settings.address == "mqtt://broker.local:1884"


@pytest.mark.parametrize(
    ("url", "port", "tls", "address"),
    [
        ("mqtt://h", 1883, False, "mqtt://h:1883"),
        ("mqtts://h", 8883, True, "mqtts://h:8883"),
        ("mqtts://h:1883/", 1883, True, "mqtts://h:1883"),
        ("mqtt://[::1]:9", 9, False, "mqtt://[::1]:9"),
    ],
)
def test_ports_and_tls_follow_the_scheme(url: str, port: int, tls: bool, address: str) -> None:
    settings = MqttSettings.from_url(url)
    assert (settings.port, settings.tls, settings.address) == (port, tls, address)


def test_tls_alone_moves_the_default_port() -> None:
    assert MqttSettings(tls=True).port == 8883
    assert MqttSettings(tls=True, port=1883).port == 1883
    assert MqttSettings().port == 1883


@pytest.mark.parametrize(
    "url",
    [
        "",
        "broker:1883",
        "http://broker",
        "mqtt://",
        "mqtt://:1883",
        "mqtt://h:99999",
        "mqtt://h:0",
        "mqtt://h:abc",
        "mqtt://h/topic",
        "mqtt://h?x=1",
        "mqtt://[::1",
        "mqtt://:hunter2@h",
    ],
)
def test_a_bad_url_says_how_to_write_it_and_keeps_the_password(url: str) -> None:
    with pytest.raises(SettingsError, match="mqtt://") as caught:
        MqttSettings.from_url(url)
    assert "hunter2" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_settings_or_a_settings_error(text: str) -> None:
    for url in (text, f"mqtt://{text}", f"mqtts://u:p@{text}:1"):
        try:
            settings = MqttSettings.from_url(url)
        except SettingsError:
            continue
        assert settings.host
        assert 1 <= settings.port <= 65535


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_user_and_password_survive_percent_encoding(user: str, password: str) -> None:
    try:
        url = f"mqtt://{quote(user, safe='')}:{quote(password, safe='')}@host"
    except UnicodeEncodeError:  # lone surrogates have no encoding
        return
    settings = MqttSettings.from_url(url)
    assert settings.username == user
    assert settings.secret() == password


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"username": "u", "password": "hunter2", "password_file": "x"}, "not both"),
        ({"password": "hunter2"}, "mqtt.username"),
        ({"tls": True, "key_file": "k"}, "mqtt.cert_file"),
        ({"ca_file": "ca.pem"}, "mqtt.tls"),
        ({"insecure": True}, "mqtt.tls"),
        ({"hots": "broker"}, "hots"),
        ({"port": 0}, "port"),
        ({"keepalive_s": 1}, "keepalive_s"),
        ({"connect_timeout_s": 0}, "connect_timeout_s"),
    ],
)
def test_contradictions_are_refused_without_showing_secrets(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason) as caught:
        MqttSettings.model_validate(fields)
    assert "hunter2" not in str(caught.value)


def test_secrets_are_not_printed() -> None:
    settings = MqttSettings(username="u", password=SecretStr("hunter2"))
    assert "hunter2" not in repr(settings) + str(settings) + settings.model_dump_json() + settings.address


def test_a_password_file_is_read_without_its_last_newline(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(" p w \r\n")
    assert MqttSettings(username="u", password_file=file).secret() == " p w "
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="password_file"):
        MqttSettings(username="u", password_file=file).secret()


@pytest.mark.parametrize("name", ["ca_file", "cert_file", "password_file"])
def test_a_missing_file_is_named_before_anything_is_opened(tmp_path: Path, name: str) -> None:
    settings = MqttSettings.model_validate({"tls": True, "username": "u", name: tmp_path / "nowhere.pem"})
    with pytest.raises(SettingsError, match=rf"mqtt\.{name} = .*nowhere\.pem"):
        MqttTransport(settings, "agent")


def test_files_that_are_no_certificates_are_a_settings_error(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("hello")
    with pytest.raises(SettingsError, match=r"mqtt\.ca_file"):
        MqttSettings(tls=True, ca_file=file).tls_context()
    with pytest.raises(SettingsError, match=r"mqtt\.ca_file, cert_file"):
        MqttSettings(tls=True, cert_file=file).tls_context()


def test_certificates_are_verified_unless_insecure_which_warns(caplog: pytest.LogCaptureFixture) -> None:
    strict = MqttSettings(tls=True).tls_context()
    assert strict is not None
    assert strict.check_hostname
    assert strict.verify_mode == ssl.CERT_REQUIRED
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        loose = MqttSettings(tls=True, insecure=True).tls_context()
    assert loose is not None
    assert loose.verify_mode == ssl.CERT_NONE
    assert "mqtt.insecure" in caplog.text
    assert MqttSettings().tls_context() is None


def test_a_transport_checks_its_id_and_its_will() -> None:
    settings = MqttSettings()
    with pytest.raises(ValueError, match="id"):
        MqttTransport(settings, "")
    with pytest.raises(ValueError, match="wildcards"):
        MqttTransport(settings, "agent", will=("a/#", b""))
    with pytest.raises(FrameTooLarge):
        MqttTransport(settings, "agent", will=("a", bytes(120_001)))
