from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from foundation.errors import SettingsError
from foundation.logs import JsonFormatter, TextFormatter, redacted, setup


def record(
    message: str, *args: object, name: str = "coordinator.engine", **extra: object
) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.INFO, "engine.py", 1, message, args, None)
    made.created = 1767608551.25
    made.msecs = 250
    vars(made).update(extra)
    return made


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_one_line_per_event():
    line = TextFormatter().format(record("round closed", round=7, updates="9/10", joules=412.0, share=1 / 3))
    assert (
        line == "2026-01-05T10:22:31Z INFO engine round closed round=7 updates=9/10 joules=412 share=0.333333"
    )


def test_words_with_blanks_are_quoted():
    line = TextFormatter().format(record("refused", reason='no "head" here', empty=""))
    assert line.endswith(r'refused reason="no \"head\" here" empty=""')


def test_a_value_cannot_start_a_line_of_its_own():
    line = TextFormatter().format(record("refused\nERROR forged", reason="a\nb\x1b[31m\u2028c"))
    assert "\n" not in line
    assert "\x1b" not in line
    assert "\u2028" not in line


def test_a_traceback_follows_indented():
    made = record("failed")
    try:
        raise ValueError("no\nway")
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    first, *rest = TextFormatter().format(made).split("\n")
    assert first.endswith("failed")
    assert all(line.startswith("    ") for line in rest)
    assert "no\nway" in json.loads(JsonFormatter().format(made))["traceback"]


def test_json_lines():
    made = record("round %d closed", 7, joules=float("nan"), level="x", seen={"a": (1, float("inf"))})
    event = json.loads(JsonFormatter().format(made))
    assert event == {
        "time": "2026-01-05T10:22:31.250Z",
        "level": "INFO",
        "logger": "coordinator.engine",
        "message": "round 7 closed",
        "joules": "nan",
        "level_": "x",
        "seen": {"a": [1, "inf"]},
    }


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_secrets_are_never_printed(formatter: logging.Formatter):
    line = formatter.format(
        record(
            "connecting to %s",
            "mqtts://bob:hunter2@broker:8883",
            password="hunter2",
            mqtt_password="hunter2",
            key=SecretStr("hunter2"),
            url="mqtt://bob:hunter2/@hunter2@broker",
            page="http://host:80/model@v2",
            nested={"token": "hunter2", "list": [SecretStr("hunter2")]},
        )
    )
    assert "hunter2" not in line
    assert "mqtt://bob:***@broker" in line
    assert "http://host:80/model@v2" in line


def test_what_is_not_secret_stays():
    assert redacted("password_file", "/run/secret") == "/run/secret"
    assert redacted("password", None) is None
    assert redacted("tokens", 7) == 7


@given(st.text(), st.dictionaries(st.text(min_size=1).map("x_".__add__), st.text()))
def test_any_text_is_one_line_of_each_style(message: str, extra: dict[str, str]):
    made = record("%s", message, **extra)
    assert len(TextFormatter().format(made).split("\n")) == 1
    assert json.loads(JsonFormatter().format(made))["message"] is not None


def test_setup_replaces_its_own_handler_only(root_logger: logging.Logger):
    before = len(root_logger.handlers)
    first, second = io.StringIO(), io.StringIO()
    setup("INFO", first, style="text")
    setup("warning", second, style="json")
    assert len(root_logger.handlers) == before + 1
    logging.getLogger("edge_agent.agent").warning("here", extra={"round": 3})
    logging.getLogger("edge_agent.agent").info("not at this level")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["round"] == 3


def test_setup_takes_the_style_from_the_environment(
    root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
):
    stream = io.StringIO()
    monkeypatch.setenv("LOG_FORMAT", "json")
    setup(stream=stream)
    logging.getLogger("x").info("hello")
    assert json.loads(stream.getvalue())["message"] == "hello"
    monkeypatch.setenv("LOG_FORMAT", "xml")
    with pytest.raises(SettingsError, match="LOG_FORMAT='xml'"):
        setup()


def test_a_level_there_is_not():
    with pytest.raises(SettingsError, match="'LOUD'"):
        setup("LOUD")
