"""A commented settings file, made from the models that read it: every key, default, bounds and words."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

WIDTH = 100
"""Columns of a comment."""
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def text_of(model: type[BaseModel], given: Mapping[str, Any]) -> str:
    """Return the file: what `given` names by dotted key stands there with that value, the rest in comments.

    Raises `KeyError` for a key that there is not.
    """
    left = set(given)
    text = "\n".join(_table(model, "", given, left)).strip("\n") + "\n"
    if left:
        raise KeyError(f"{model.__name__} has no {', '.join(sorted(left))}")
    return text


def _table(
    model: type[BaseModel], above: str, given: Mapping[str, Any], left: set[str], mark: str = ""
) -> Iterator[str]:
    """Yield a table's keys, and then the tables inside; `mark` is "# " where all of it is left out."""
    words = field_docs(model)
    tables = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        inner = next(_models(field.annotation), None)
        if inner is not None:
            optional = type(None) in _members(field.annotation)
            tables.append((inner, above + key, optional, words.get(name, "")))
            continue
        yield from _comment(words.get(name, ""))
        yield from _line(key, field, above + key, given, left)
        yield ""
    for inner, dotted, optional, said in tables:
        beneath = mark or ("# " if optional and not _any_within(given, dotted) else "")
        yield f"{beneath}[{dotted}]"
        yield from _comment(said or " ".join((inner.__doc__ or "").split("\n\n")[:1]))
        if beneath and not mark:
            yield "# Not there unless this header is."
        yield ""
        yield from _table(inner, f"{dotted}.", given, left, beneath)


def _line(key: str, field: FieldInfo, dotted: str, given: Mapping[str, Any], left: set[str]) -> Iterator[str]:
    takes = _takes(field)
    if dotted in given:
        left.discard(dotted)
        yield f"{key} = {toml(given[dotted])}" + (f"    # {takes}" if takes else "")
        return
    default = field.get_default(call_default_factory=True)
    if default is None or field.is_required():
        yield f"# {key} = {_blank(field)}    # not set" + (f"; {takes}" if takes else "")
        return
    if field.default_factory is not None and not isinstance(default, dict):
        takes = "as this machine has it" + (f"; {takes}" if takes else "")
    yield f"# {key} = {toml(default)}" + (f"    # {takes}" if takes else "")


def _comment(words: str) -> Iterator[str]:
    if words:
        yield from textwrap.wrap(
            " ".join(words.split()),
            WIDTH,
            initial_indent="# ",
            subsequent_indent="# ",
            break_on_hyphens=False,
        )


def _takes(field: FieldInfo) -> str:
    """Return the choices or bounds of a field in words."""
    members = _members(field.annotation)
    choices = [toml(one) for kind in members for one in _choices(kind)]
    if choices:
        return " or ".join(choices) if len(choices) < 3 else ", ".join(choices)
    found = [
        f"{word} {limit:,}".replace(",", "_")
        for name, word in BOUNDS.items()
        for one in field.metadata
        if (limit := getattr(one, name, None)) is not None
    ]
    pattern = next((p for one in field.metadata if (p := getattr(one, "pattern", None))), None)
    return ", ".join([*found, *([f"like {pattern}"] if pattern else [])])


def _blank(field: FieldInfo) -> str:
    """Return where a value goes that has no default: of its kind, and none itself."""
    kinds = [kind for kind in _members(field.annotation) if kind is not type(None)]
    if any(get_origin(kind) in (tuple, list) for kind in kinds):
        return "[...]"
    return '"..."' if any(kind in (str, Path, SecretStr) or _choices(kind) for kind in kinds) else "..."


def _choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()


def _members(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return [one for option in get_args(annotation) for one in _members(option)]
    return [annotation]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    yield from (one for one in _members(annotation) if isinstance(one, type) and issubclass(one, BaseModel))


def _any_within(keys: Collection[str], dotted: str) -> bool:
    return any(key.startswith(f"{dotted}.") for key in keys)


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """Return the words that stand under each field in the model's source."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if not issubclass(kind, BaseModel) or kind is BaseModel:
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(body, ast.ClassDef)
        for before, node in zip(body.body, body.body[1:], strict=False):
            words = node.value if isinstance(node, ast.Expr) else None
            field = before.target if isinstance(before, ast.AnnAssign) else None
            if isinstance(words, ast.Constant) and isinstance(field, ast.Name):
                found[field.id] = str(words.value)
    return found


def toml(value: Any) -> str:
    """Return a value as TOML writes it, in one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(str(key))} = {toml(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple | frozenset):
        return f"[{', '.join(toml(one) for one in value)}]"
    if isinstance(value, Enum):
        value = value.value
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
