"""Settings from four places, each over the one before: defaults, a TOML file, the environment, `--set`.

    [mqtt]                            in a file
    host = "broker.local"
    HEDGEROW__MQTT__HOST=...          in the environment
    --set mqtt.host=...               on the command line

Written on tomllib and pydantic alone: pydantic-settings does not say where a value came from, nor which
key was nearly meant, and these two are what a person with a wrong setting needs.
"""

from __future__ import annotations

import json
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from foundation.errors import SettingsError
from foundation.logs import redacted

Model = TypeVar("Model", bound=BaseModel)
Origins = dict[str, str]
"""Where each setting came from, by dotted key: "default", a file, a variable or an option."""


def load(
    model: type[Model],
    file: Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    *,
    prefix: str = "HEDGEROW",
) -> tuple[Model, Origins]:
    """Return the settings and where each came from.

    `env` is usually `os.environ`; only variables that start with `prefix` and two underscores are read.
    `overrides` are texts like "mqtt.host=broker.local". Text becomes what its field needs; lists and
    tables are written as in TOML, an optional value is unset with "none". A relative path in a file is
    relative to that file; elsewhere to the working directory.
    Raises `SettingsError` that names every wrong key, where it stands and the nearest valid one.
    """
    values: dict[str, Any] = {}
    origins: Origins = {}
    for key, value, origin in _given(model, file, env or {}, overrides, prefix):
        _put(values, key, value, origin)
        for inner in [k for k in origins if _within(k, key)]:
            del origins[inner]
        if value != {} or not _names(_types_at(model, key)):  # the header of a table alone sets nothing
            origins[".".join(key)] = origin
    try:
        settings = model.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_explained(model, values, origins, error)) from None
    return settings, {key: _origin(key, origins) for key, _ in _leaves(settings)}


class Row(NamedTuple):
    """One setting as it may be shown."""

    key: str
    value: str
    """Secrets are hidden, and what is not set is "-"."""
    origin: str
    """"default", a file, a variable or an option."""


def rows(settings: BaseModel, origins: Mapping[str, str]) -> list[Row]:
    """Return all settings, their values and where they came from; secrets are hidden."""
    return [Row(key, _printed(key, value), origins.get(key, "default")) for key, value in _leaves(settings)]


def show(settings: BaseModel, origins: Mapping[str, str]) -> str:
    """Return a table of all settings, their values and where they came from; secrets are hidden."""
    told = rows(settings, origins)
    widths = [max((len(row[column]) for row in told), default=0) for column in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for key, value, origin in told)


def beside(file: Path | None, path: Path) -> Path:
    """Return `path` as seen from the folder of `file`; "~" is the home folder, absolute paths stay."""
    expanded = path.expanduser()
    return expanded if file is None else file.parent / expanded


Key = tuple[str, ...]


def _given(
    model: type[BaseModel], file: Path | None, env: Mapping[str, str], overrides: Sequence[str], prefix: str
) -> Iterator[tuple[Key, Any, str]]:
    """Yield (key, value, where from) of everything that was set, weakest first."""
    if file is not None:
        for key, value in _flat(_read(file)):
            yield key, _rooted(_types_at(model, key), value, file), str(file)
    start = f"{prefix}__"
    for name in sorted(n for n in env if n.upper().startswith(start)):
        key = tuple(name[len(start) :].lower().split("__"))
        yield key, _from_text(_types_at(model, key), env[name]), name
    for override in overrides:
        name, equals, text = override.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        if not equals or not all(key):
            raise SettingsError(
                f"--set {name.strip()}: write it as --set key=value, like --set mqtt.host=localhost"
            )
        yield key, _from_text(_types_at(model, key), text.strip()), f"--set {'.'.join(key)}"


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"the settings file {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {file} is not TOML: {error}") from error


def _flat(table: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, (*above, name))
        else:
            yield (*above, name), value


def _put(values: dict[str, Any], key: Key, value: Any, origin: str) -> None:
    for depth, part in enumerate(key[:-1], 1):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise SettingsError(
                f"{'.'.join(key)} ({origin}): {'.'.join(key[:depth])} is a value, not a table"
            )
    values[key[-1]] = value


def _within(key: str, above: Key) -> bool:
    return key.startswith(".".join(above) + ".")


# -- what type a key has ------------------------------------------------------------------------------


def _members(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation, without `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for option in get_args(annotation) for member in _members(option)]
    return [annotation]


def _types_at(model: type[BaseModel], key: Key) -> list[Any]:
    """Return the types that may stand at a dotted key; none if there is no such key."""
    found: list[Any] = [model]
    for part in key:
        found = [option for kind in found for option in _inside(kind, part)]
    return found


def _inside(kind: Any, part: str) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            if part == (field.alias or name):
                return _members(field.annotation)
        return []
    if get_origin(kind) in (dict, Mapping) and len(get_args(kind)) == 2:
        return _members(get_args(kind)[1])
    if get_origin(kind) in (list, tuple, Sequence):
        return _members(get_args(kind)[0])
    return []


def _names(kinds: Sequence[Any]) -> list[str]:
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return sorted({field.alias or name for kind in models for name, field in kind.model_fields.items()})


# -- text to values -----------------------------------------------------------------------------------


def _from_text(kinds: Sequence[Any], text: str) -> Any:
    """Return what `text` means for a field of these types; what fits none is left to the error message."""
    as_toml = _toml_value(text)
    bracket = text[:1] in ("[", "{")
    for value in (as_toml, text) if bracket else (text, as_toml):
        if value is not None and any(_fits(kind, value) for kind in kinds if kind is not type(None)):
            return value
    if type(None) in kinds and text.lower() in ("none", "null", ""):
        return None
    return as_toml if bracket and as_toml is not None else text


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None


def _fits(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


def _rooted(kinds: Sequence[Any], value: Any, file: Path) -> Any:
    """Return a value of a file with its relative paths made relative to that file."""
    if isinstance(value, str) and Path in kinds:
        return beside(file, Path(value))
    if isinstance(value, list):
        inner = [option for kind in kinds for option in _inside(kind, "")]
        return [_rooted(inner, item, file) for item in value]
    return value


# -- errors and tables --------------------------------------------------------------------------------


def _explained(
    model: type[BaseModel], values: Mapping[str, Any], origins: Origins, error: ValidationError
) -> str:
    # Neither pydantic's own text nor the value is shown: both may hold a secret.
    problems = []
    for item in error.errors(include_input=False, include_url=False):
        key = _data_key(item["loc"], values, missing=item["type"] == "missing")
        dotted = ".".join(key)
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown setting {dotted} ({_origin(dotted, origins)}){_hint(model, key)}")
        elif item["type"] == "missing":
            problems.append(f"{dotted} is missing and has no default")
        else:
            problems.append(f"{dotted or 'settings'} ({_origin(dotted, origins)}): {item['msg']}")
    return "; ".join(dict.fromkeys(problems))


def _data_key(loc: tuple[int | str, ...], values: Any, *, missing: bool) -> Key:
    """Return pydantic's location as a key of the data: the names of union branches are left out."""
    key = []
    for depth, part in enumerate(loc):
        last = missing and depth == len(loc) - 1
        if isinstance(values, Mapping) and part in values:
            values = values[str(part)]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif not last:
            continue
        key.append(str(part))
    return tuple(key)


def _hint(model: type[BaseModel], key: Key) -> str:
    import difflib  # needed by mistakes alone

    valid = _names(_types_at(model, key[:-1]))
    near = difflib.get_close_matches(key[-1], valid, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {'.'.join((*key[:-1], near[0]))}?"
    return f"; there are: {', '.join(valid)}" if valid else ""


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Return where a key came from: set itself, set as part of a table, or table of things that were set."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if (above := ".".join(parts[:length])) in origins:
            return origins[above]
    inner = [origin for name, origin in origins.items() if _within(name, tuple(parts))]
    return ", ".join(dict.fromkeys(inner)) or "default"


def _leaves(settings: BaseModel, above: Key = ()) -> Iterator[tuple[str, Any]]:
    for name, field in type(settings).model_fields.items():
        key, value = (*above, field.alias or name), getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, key)
        else:
            yield ".".join(key), value


def _printed(key: str, value: Any) -> str:
    shown = redacted(key, _plain(value))
    if shown is None:
        return "-"
    return shown if isinstance(shown, str) else json.dumps(shown, default=str, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Return containers with models as tables and enums as their values; secrets stay what they are."""
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(inner) for inner in value), key=str)
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value
