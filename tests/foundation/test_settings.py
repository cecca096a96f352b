from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, SecretStr

from foundation.errors import SettingsError
from foundation.frozen import Frozen
from foundation.settings import beside, load, show


class Mqtt(Frozen):
    host: str = "127.0.0.1"
    port: int = Field(1883, ge=1, le=65535)
    password: SecretStr | None = None
    password_file: Path | None = None
    tls: bool = False


class Csv(Frozen):
    kind: Literal["csv"] = "csv"
    path: Path
    shape: tuple[int, ...] = ()


class Builtin(Frozen):
    kind: Literal["builtin"] = "builtin"
    name: str = "digits"


class Settings(Frozen):
    agent: str
    mqtt: Mqtt = Mqtt()
    data: Annotated[Csv | Builtin, Field(discriminator="kind")] = Builtin()
    labels: tuple[str, ...] | None = None
    folders: tuple[Path, ...] = ()
    weights: dict[str, float] = Field(default_factory=dict)
    deadline_s: float | None = 60.0
    broker_url: str = ""


def write(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def test_each_place_wins_over_the_one_before(tmp_path: Path):
    file = write(tmp_path, 'agent = "a"\n[mqtt]\nhost = "file"\nport = 1\ntls = true\n')
    env = {"HEDGEROW__MQTT__HOST": "env", "HEDGEROW__MQTT__PORT": "2", "HEDGEROW_DATA": "x", "PATH": "y"}
    settings, origins = load(Settings, file, env, ["mqtt.host=cli"])
    assert settings.mqtt == Mqtt(host="cli", port=2, tls=True)
    assert origins["mqtt.host"] == "--set mqtt.host"
    assert origins["mqtt.port"] == "HEDGEROW__MQTT__PORT"
    assert origins["mqtt.tls"] == origins["agent"] == str(file)
    assert origins["mqtt.password"] == origins["deadline_s"] == "default"


def test_text_becomes_what_the_field_needs():
    settings, _ = load(
        Settings,
        overrides=[
            "agent=007",
            "mqtt.tls=true",
            "mqtt.password=123",
            'labels=["a", "b"]',
            "weights={a = 1.5}",
            "deadline_s=none",
            "data.kind=csv",
            "data.path=x.csv",
            "data.shape=[1, 8, 8]",
            "broker_url=[not toml",
        ],
    )
    assert settings.agent == "007"
    assert settings.mqtt.tls is True
    assert settings.mqtt.password == SecretStr("123")
    assert settings.labels == ("a", "b")
    assert settings.weights == {"a": 1.5}
    assert settings.deadline_s is None
    assert settings.data == Csv(path=Path("x.csv"), shape=(1, 8, 8))
    assert settings.broker_url == "[not toml"


def test_a_value_with_equals_signs_stays_whole():
    assert load(Settings, overrides=["agent=a=b=c"])[0].agent == "a=b=c"


def test_a_table_given_whole_replaces_what_was_there(tmp_path: Path):
    file = write(tmp_path, 'agent = "a"\n[mqtt]\nhost = "file"\nport = 1\n')
    settings, origins = load(Settings, file, {}, ['mqtt={host="cli"}'])
    assert settings.mqtt == Mqtt(host="cli")
    assert origins["mqtt.host"] == "--set mqtt"
    assert origins["agent"] == str(file)


@pytest.mark.parametrize(
    ("text", "env", "overrides", "message"),
    [
        (
            '[mqtt]\nhots = "x"',
            {},
            [],
            r"unknown setting mqtt\.hots \(.*agent\.toml\); did you mean mqtt\.host\?",
        ),
        (
            "",
            {"HEDGEROW__MQTT__PROT": "1"},
            [],
            r"mqtt\.prot \(HEDGEROW__MQTT__PROT\); did you mean mqtt\.port",
        ),
        ("", {}, ["mqt.host=x"], r"unknown setting mqt \(--set mqt\.host\); did you mean mqtt\?"),
        ("", {}, ["zzzzzz=x"], r"unknown setting zzzzzz .*there are: agent, broker_url, data"),
        (
            '[data]\nkind="builtin"\nnmae="x"',
            {},
            [],
            r"unknown setting data\.nmae .*did you mean data\.name\?",
        ),
        ("[data]\nkind='csv'", {}, [], r"data\.path is missing"),
        ("[mqtt]\nport = 70000", {}, [], r"mqtt\.port \(.*agent\.toml\): .*65535"),
        ("", {}, ["mqtt.port=many"], r"mqtt\.port \(--set mqtt\.port\): .*integer"),
        ("", {}, ["mqtt.host"], r"--set mqtt\.host: write it as"),
        ("", {}, ["mqtt..host=1"], "write it as"),
        ("mqtt = 5", {"HEDGEROW__MQTT__HOST": "x"}, [], r"mqtt is a value, not a table"),
        ("a = = 3", {}, [], r"agent\.toml is not TOML"),
    ],
)
def test_errors_name_the_key_the_place_and_the_nearest(
    tmp_path: Path, text: str, env: dict[str, str], overrides: list[str], message: str
):
    with pytest.raises(SettingsError, match=message):
        load(Settings, write(tmp_path, text), env, ["agent=a", *overrides])


def test_a_missing_file_and_a_missing_setting_are_named(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"gone\.toml cannot be read: No such file"):
        load(Settings, tmp_path / "gone.toml")
    with pytest.raises(SettingsError, match="agent is missing and has no default"):
        load(Settings)


def test_relative_paths_of_a_file_are_relative_to_it(tmp_path: Path):
    file = write(
        tmp_path,
        'agent = "a"\nfolders = ["x", "/abs"]\nmqtt.password_file = "secret"\n'
        'data = { kind = "csv", path = "d.csv" }\n',
    )
    settings, _ = load(Settings, file, {"HEDGEROW__MQTT__PASSWORD_FILE": "here"})
    assert settings.folders == (tmp_path / "x", Path("/abs"))
    assert settings.mqtt.password_file == Path("here")
    assert isinstance(settings.data, Csv)
    assert settings.data.path == tmp_path / "d.csv"
    assert beside(None, Path("x")) == Path("x")
    assert beside(file, Path("x")) == tmp_path / "x"


def test_secrets_are_neither_shown_nor_quoted_in_errors():
    overrides = ["agent=a", "mqtt.password=hunter2", "broker_url=mqtt://bob:hunter2@h"]
    settings, origins = load(Settings, overrides=overrides)
    table = show(settings, origins)
    assert "hunter2" not in table
    assert "mqtt.password  " in table
    assert "mqtt://bob:***@h" in table
    with pytest.raises(SettingsError) as caught:
        load(
            Settings,
            env={"HEDGEROW__MQTT__PASSWORD": "hunter2"},
            overrides=["mqtt.password=[1]", "agent=a", "x=hunter2"],
        )
    assert "hunter2" not in str(caught.value)


def test_show_is_a_table_of_everything():
    settings, origins = load(Settings, overrides=["agent=pi-1", 'labels=["a"]'])
    rows = [line.split(None, 1) for line in show(settings, origins).splitlines()]
    shown = {key: " ".join(rest.split()) for key, rest in rows}
    assert shown["agent"] == "pi-1 --set agent"
    assert shown["labels"] == '["a"] --set labels'
    assert shown["mqtt.port"] == "1883 default"
    assert shown["mqtt.password"] == "- default"
    assert shown["data.name"] == "digits default"


@given(st.lists(st.text(max_size=20), max_size=4), st.dictionaries(st.text(max_size=8), st.text(max_size=8)))
def test_any_text_gives_settings_or_a_settings_error(overrides: list[str], env: dict[str, str]):
    named = {f"HEDGEROW__{key}": value for key, value in env.items()}
    with contextlib.suppress(SettingsError):
        load(Settings, None, named, ["agent=a", *overrides, *[f"mqtt.{text}" for text in overrides]])
