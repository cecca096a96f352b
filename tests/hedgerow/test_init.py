"""`hedgerow init`: whole, valid files whose comments are the defaults, and which take no other's place."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from coordinator.settings import CoordinatorSettings
from edge_agent.settings import AgentSettings
from foundation import settings
from hedgerow.cli import app
from hedgerow.init import NEEDED, text_for
from hedgerow.settings_file import field_docs, text_of, toml
from tests.docs.pages import leaves

MODELS: dict[str, type[BaseModel]] = {"coordinator": CoordinatorSettings, "agent": AgentSettings}
SETTING = re.compile(r"^(# )?([a-z_][a-z0-9_]*) = (.*?)(?:    # (.*))?$")
HEADER = re.compile(r"^(?:# )?\[([\w.]+)\]$")
each = pytest.mark.parametrize("kind", MODELS)


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["init", *words])
    return done.exit_code, done.stdout, done.stderr


def keys_in(text: str) -> dict[str, tuple[bool, str, str]]:
    """Return every key by dotted name: whether it is commented out, its value and its remark as text."""
    found, table = {}, ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            table = f"{header[1]}."
        elif setting := SETTING.match(line):
            assert table + setting[2] not in found, "told once"
            found[table + setting[2]] = (bool(setting[1]), setting[3], setting[4] or "")
    return found


def known_in(kind: str) -> dict[str, Any]:
    """Return all fields, those of the agent's own model as well, which is a table that need not be there."""
    found = leaves(MODELS[kind])
    model = found.pop("model", None)
    return found if model is None else found | leaves(model.annotation.__args__[0], "model.")


@each
def test_every_setting_is_there_and_the_file_loads_as_the_defaults(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"{kind}.toml"
    code, said, _ = run(kind, "-o", str(file))
    assert (code, f"hedgerow {kind} --config {file}" in said) == (0, True)
    told = keys_in(file.read_text())
    assert told.keys() == known_in(kind).keys()
    assert {key for key, (out, _, _) in told.items() if not out} == NEEDED[kind].keys()
    loaded, origins = settings.load(MODELS[kind], file)
    assert {key for key, origin in origins.items() if origin != "default"} == NEEDED[kind].keys()
    given = {key: getattr_path(loaded, key) for key in NEEDED[kind]}
    bare, _ = settings.load(MODELS[kind], None, None, [f"{key}={value}" for key, value in given.items()])
    assert loaded == bare.model_copy(update=paths_of(loaded)), "and nothing else is changed"


def getattr_path(loaded: BaseModel, key: str) -> Any:
    found: Any = loaded
    for part in key.split("."):
        found = getattr(found, part)
    return found


def paths_of(loaded: BaseModel) -> dict[str, Any]:
    """Return the paths of the top, which a file makes relative to itself."""
    return {
        key: value for key in type(loaded).model_fields if isinstance(value := getattr(loaded, key), Path)
    }


@each
def test_comments_taken_away_are_the_defaults(kind: str, tmp_path: Path) -> None:
    left, taken = tmp_path / "left.toml", tmp_path / "taken.toml"
    left.write_text(text_for(kind, left))  # type: ignore[arg-type]
    lines, table = [], ""
    for line in left.read_text().splitlines():
        setting, header = SETTING.match(line), HEADER.match(line)
        table = header[1] if header else table
        # Keys of other kinds of data are refused by name, and a model of one's own is a choice.
        there = setting and "not set" not in (setting[4] or "") and table not in ("data", "model")
        lines.append(line.removeprefix("# ") if there else line)
    taken.write_text("\n".join(lines))
    loaded, origins = settings.load(MODELS[kind], taken)
    assert sum(origin != "default" for origin in origins.values()) > 25
    assert loaded == settings.load(MODELS[kind], left)[0]


@each
def test_words_bounds_and_choices_are_those_of_the_models(kind: str) -> None:
    text = text_for(kind, Path("x.toml"))  # type: ignore[arg-type]
    told = keys_in(text)
    assert told["mqtt.port"] == (True, "1883", "at least 1, at most 65_535")
    assert told["mqtt.password"] == (True, '"..."', "not set")
    assert told["log_level"][2] == '"DEBUG", "INFO", "WARNING", "ERROR"'
    assert all(len(line) <= 150 for line in text.splitlines())
    flowing = " ".join(text.replace("\n# ", " ").split())
    for words in field_docs(MODELS[kind]).values():
        assert " ".join(words.split()) in flowing


def test_what_is_there_stays(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text("mine")
    code, _, said = run("agent", "-o", str(file))
    assert (code, file.read_text()) == (2, "mine")
    assert "--force" in said
    assert run("agent", "-o", str(file), "--force")[0] == 0
    assert file.read_text() != "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["agent.toml"]
    assert run("agent", "-o", str(tmp_path / "no" / "agent.toml"))[0] == 2
    assert run("nobody")[0] == 2


def test_stdout_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, _ = run("coordinator", "-o", "-")
    assert (code, tomllib.loads(said)["mqtt"], list(tmp_path.iterdir())) == (0, {"host": "127.0.0.1"}, [])
    code, said, _ = run("coordinator", "--json")
    told = json.loads(said)
    assert (told["file"], "hedgerow coordinator --config coordinator.toml" in told["next"]) == (
        "coordinator.toml",
        True,
    )
    assert (tmp_path / "coordinator.toml").is_file()


def test_a_key_that_there_is_not_is_no_key() -> None:
    with pytest.raises(KeyError, match=r"no run\.nmae"):
        text_of(CoordinatorSettings, {"run.nmae": "first"})


def test_values_are_toml() -> None:
    value = {"a b": [1, 2.5, True], "c": {"d": 'é "quoted"\n'}, "e": Path("x"), "f": ()}
    assert tomllib.loads(f"it = {toml(value)}")["it"] == {
        "a b": [1, 2.5, True], "c": {"d": "é \"quoted\"\n"}, "e": "x", "f": [],
    }  # fmt: skip
