"""One event, one line: time, level, module, message, and the values given as `extra`.

    2026-01-05T10:22:31Z INFO engine round closed round=7 updates=9/10 joules=412 kind=measured

`LOG_FORMAT=json` in the environment gives one JSON object per line instead. Modules only ever write
`logger = logging.getLogger(__name__)`; `setup` is called by programs, once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from typing import Any, Literal, TextIO

from pydantic import SecretStr

from foundation.errors import SettingsError

HIDDEN = "***"
"""What is printed in place of a secret."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_SECRET_NAME = re.compile(r"(^|[_.-])(password|passwd|passphrase|secret|token|psk|api_key)$", re.IGNORECASE)
# Up to the last @ of the word, as people put @ and / into passwords; but a port is no password.
_URL_SECRET = re.compile(r"(?<=://)([^/@:\s]*):(?!\d+/)\S*@")
_BARE = re.compile(r"[^\s\"'=\x00-\x1f\x7f-\x9f]+")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def redacted(name: str, value: object) -> object:
    """Return `value` as it may be printed: secrets by type, by name or inside a URL are hidden."""
    if value is None:
        return None
    if isinstance(value, SecretStr) or _SECRET_NAME.search(name):
        return HIDDEN
    if isinstance(value, dict):
        return {key: redacted(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(name, inner) for inner in value]
    return without_url_secrets(value) if isinstance(value, str) else value


def without_url_secrets(text: str) -> str:
    """Return `text` with the password of every URL in it hidden."""
    return _URL_SECRET.sub(rf"\1:{HIDDEN}@", text)


class TextFormatter(logging.Formatter):
    """One line per event, with `key=value` at its end; only a traceback follows on indented lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; control characters are escaped, so no value can start a line of its own."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        words = [stamp, record.levelname, record.name.rsplit(".", 1)[-1], _escaped(_message(record))]
        words += [f"{_escaped(key)}={_as_word(value)}" for key, value in _extras(record).items()]
        trace = _traceback(self, record)
        return " ".join(words) + "".join(f"\n    {_escaped(line)}" for line in trace.splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object per event: time, level, logger, message, the extras, and the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as one line; an extra named like a fixed field gets an underscore behind it."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        event: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        if trace := _traceback(self, record):
            event["traceback"] = trace
        for key, value in _extras(record).items():
            event[f"{key}_" if key in event else key] = _as_json(value)
        return json.dumps(event, default=str, allow_nan=False)


class _Handler(logging.StreamHandler[TextIO]):
    """The handler that `setup` installed, so that a second call replaces it and nothing else."""


def setup(
    level: str = "INFO", stream: TextIO | None = None, *, style: Literal["text", "json"] | None = None
) -> None:
    """Send the log of the whole process to `stream` (default: stderr); only programs call this.

    `style` is taken from `LOG_FORMAT` if it is not given. Raises `SettingsError` for a level or style
    there is not.
    """
    wanted = level.upper()
    if wanted not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise SettingsError(f"log level {level!r}: use DEBUG, INFO, WARNING, ERROR or CRITICAL")
    chosen = style or os.environ.get("LOG_FORMAT") or "text"
    if chosen not in ("text", "json"):
        raise SettingsError(f"LOG_FORMAT={chosen!r}: use text or json")
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if chosen == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(wanted)


def _message(record: logging.LogRecord) -> str:
    return without_url_secrets(record.getMessage())


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: redacted(key, value) for key, value in vars(record).items() if key not in _STANDARD}


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return without_url_secrets("\n".join(parts))


def _escaped(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: repr(found.group())[1:-1], text)


def _as_word(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _BARE.fullmatch(text) else json.dumps(_escaped(text), ensure_ascii=False)


def _as_json(value: object) -> object:
    """Return a value `json` can write: what is not finite becomes text, as JSON has no word for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    return value
