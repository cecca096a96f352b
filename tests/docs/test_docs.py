"""The pages say what the code does: blocks run, tables equal the code, links lead somewhere."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
import yaml
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

import coordinator.strategies
import edge_agent.energy
from coordinator.app import create_app
from coordinator.home_discovery import config_topic
from coordinator.live import Live
from coordinator.rollout.steward import Steward
from coordinator.roster import Roster
from coordinator.settings import CoordinatorSettings, HomeAssistantSettings, RolloutSettings
from coordinator.strategies.base import available, load_strategy
from coordinator.web.models import PauseRun, StartRun, StopRun
from edge_agent.datasets import load as load_data
from edge_agent.energy.sensor import find_sensors
from edge_agent.samples import COMMON, KEYS, DataSettings
from edge_agent.settings import AgentSettings
from foundation import settings, topics
from foundation.errors import SettingsError
from foundation.profile import DeviceProfile
from foundation.transport import matches
from hedgerow.cli import app
from tests.docs.pages import (
    CODE,
    FENCE,
    PAGES,
    ROOT,
    Block,
    blocks,
    kind_of,
    leaves,
    messages,
    names_in,
    rows,
    section,
    settings_in,
    text_of,
)
from tests.toys import ToyFederation

MODELS: dict[str, type[BaseModel]] = {"agent": AgentSettings, "coordinator": CoordinatorSettings}
LONGEST = {
    "algorithms": 460,
    "settings": 120,
    "compare": 80,
    "operations": 310,
    "data": 180,
    "ledger": 110,
    "architecture": 490,
    "energy": 200,
    "models": 320,
    "swap": 110,
    "fleet": 180,
    "rollout": 120,
    "brokers": 100,
    "links": 60,
    "scale": 120,
    "monitoring": 130,
    "quickstart": 90,
    "raspberry-pi": 110,
    "jetson": 80,
    "testbed": 95,
    "terminal": 90,
    "serve": 85,
    "troubleshooting": 190,
    **dict.fromkeys(("own-data", "own-model", "own-strategy", "own-sensor", "own-board"), 80),
}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def each(found: list[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", found, ids=map(str, found))


def example(kind: str) -> Block:
    """The complete, commented file of operations.md."""
    return next(b for b in blocks("toml") if b.page == "docs/operations.md" and kind_of(b) == kind)


# --- settings --------------------------------------------------------------------------------------


@each(blocks("toml"))
def test_settings_load(block: Block, tmp_path: Path) -> None:
    kind = kind_of(block)
    assert kind in (*MODELS, "profile"), "say which: ```toml agent, coordinator or profile"
    file = tmp_path / f"{kind}.toml"
    file.write_text(block.text)
    if kind == "profile":
        DeviceProfile.load(file)
        return
    loaded, _ = settings.load(MODELS[kind], file)
    if isinstance(loaded, CoordinatorSettings):
        load_strategy(loaded.run.strategy, loaded.run.settings)


@pytest.mark.parametrize("kind", ["coordinator", "agent"])
def test_the_examples_have_every_setting(kind: str) -> None:
    told, known = settings_in(example(kind).text), leaves(MODELS[kind])
    if kind == "agent":  # the broker's are in the coordinator's example, the data's in data.md
        elsewhere = ("mqtt.", "data.")
        told = {key: value for key, value in told.items() if not key.startswith(elsewhere)}
        known = {key: field for key, field in known.items() if not key.startswith(elsewhere)}
    told = {"run.settings" if key.startswith("run.settings") else key: told[key] for key in told}
    assert told.keys() == known.keys()


@pytest.mark.parametrize("kind", ["coordinator", "agent"])
def test_what_is_commented_out_is_the_default(kind: str) -> None:
    known = leaves(MODELS[kind])
    for key, (value, commented) in settings_in(example(kind).text).items():
        if commented and _plain(known[key]) is not None:
            assert value == _plain(known[key]), key


def _plain(field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=True)
    return str(default) if isinstance(default, Path) else default


@pytest.mark.parametrize("kind", KEYS)
def test_every_key_of_a_data_kind_is_in_its_section(kind: str) -> None:
    text = section("docs/data.md", f'kind = "{kind}"')
    (block,) = [b for b in blocks("toml") if b.page == "docs/data.md" and f'kind = "{kind}"' in b.text]
    told = {key.removeprefix("data.") for key in settings_in(block.text)}
    missing = {key for key in KEYS[kind] - told if f"`{key}`" not in text}
    assert not missing
    assert told <= KEYS[kind] | COMMON


def test_every_key_of_data_is_told() -> None:
    page = text_of("docs/data.md")
    fields = DataSettings.model_fields
    assert {key for key in fields if f"`{key}`" not in page and f"{key} = " not in page} == set()
    for key in ("validation", "test", "split_seed"):
        assert f"`{key}` ({fields[key].default})" in page


def test_the_data_function_of_the_page_is_taken(tmp_path: Path) -> None:
    (code,) = [b for b in blocks("python") if b.page == "docs/data.md"]
    (toml,) = [b for b in blocks("toml") if 'kind = "python"' in b.text]
    (tmp_path / "my_data.py").write_text(code.text)
    (tmp_path / "agent.toml").write_text(toml.text)
    loaded, _ = settings.load(AgentSettings, tmp_path / "agent.toml")
    data = load_data(loaded.data)
    assert (data.input, data.shape, data.labels) == ("series", (64, 3), ("still", "moving"))


@pytest.mark.parametrize("strategy", available())
def test_every_setting_of_a_strategy_is_in_the_table(strategy: str) -> None:
    told: dict[str, Any] = {}
    for name, default, where, _ in rows(text_of("docs/settings.md"), "setting"):
        if where == "all" or strategy in where.split(", "):
            told[name.strip("`")] = None if default == "unset" else json.loads(default.strip("`"))
    assert told == load_strategy(strategy).model_dump(mode="json")


def test_every_strategy_has_a_section() -> None:
    headings = re.findall(r"^## (\w+)$", text_of("docs/algorithms.md"), re.MULTILINE)
    assert set(available()) <= set(headings)


ENVIRONMENT = sorted(
    {
        found
        for page in PAGES
        for found in re.findall(r"\b(?:AGENT|COORDINATOR)__\w+=[\w.]+", page.read_text())
    }
)


@pytest.mark.parametrize("variable", ENVIRONMENT)
def test_variables_of_the_environment_are_read(variable: str, tmp_path: Path) -> None:
    name, _, value = variable.partition("=")
    kind = name.partition("__")[0].lower()
    (tmp_path / "it.toml").write_text(example(kind).text)
    program = {"agent": "edge_agent", "coordinator": "coordinator"}[kind]
    command = [sys.executable, "-m", program, "--config", str(tmp_path / "it.toml"), "--print-settings"]
    said = subprocess.run(
        command, env={**os.environ, name: value}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.search(rf"{re.escape(value)}\s+{name}$", said.stdout, re.MULTILINE)


# --- commands --------------------------------------------------------------------------------------


def commands(program: str) -> list[tuple[Block, list[str]]]:
    """Return the command lines of a program in all shell blocks, cut into words."""
    found = []
    for block in blocks("sh", "bash", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ ").removeprefix("sudo "), comments=True)
            if words and Path(words[0]).name == program:
                found.append((block, words))
    return found


HEDGEROW = commands("hedgerow")


@pytest.mark.parametrize(("block", "words"), HEDGEROW, ids=[" ".join(words) for _, words in HEDGEROW])
def test_commands_exist(block: Block, words: list[str], tmp_path: Path) -> None:
    if words[1].startswith("-"):
        assert CliRunner().invoke(app, words[1:]).exit_code == 0
        return
    verb, arguments = words[1], words[2:]
    assert verb in COMMANDS
    tool = [*itertools.takewhile(lambda word: not word.startswith("-"), arguments[:2])]
    options = options_of(verb, *tool)
    for word in arguments:
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"{block}: {verb} has no {word}"
    if verb in MODELS and not tool:
        given = [after for word, after in itertools.pairwise(arguments) if word == "--set"]
        file = tmp_path / "it.toml"
        file.write_text(example(verb).text)
        settings.load(MODELS[verb], file, None, given)


def options_of(verb: str, *tool: str) -> set[str]:
    command = COMMANDS[verb]
    for word in tool:
        command = getattr(command, "commands", {}).get(word, command)
    assert not hasattr(command, "commands"), f"{verb} {tool}: which of {[*command.commands]}?"
    declared = {option for parameter in command.params for option in parameter.opts}
    if declared:
        return declared | {"--help", "-h"}
    # Verbs that pass their options on say them themselves.
    return set(re.findall(r"--?[a-z][\w-]*", CliRunner().invoke(app, [verb, *tool, "--help"]).output))


@pytest.fixture(scope="module")
def web() -> FastAPI:
    class Nobody:
        async def start(self, request: StartRun) -> None: ...
        async def stop(self, reason: str) -> None: ...
        async def pause(self, run: str, reason: str) -> None: ...
        async def resume(self, run: str) -> None: ...

    async def nobody(agent: str, body: bytes) -> None: ...

    store: Any = None  # no route is called
    steward = Steward(RolloutSettings(), store=store, live=Live(), roster=Roster(), send=nobody)
    return create_app(store, Live(), Nobody(), models=steward)


CURLS = [words for _, words in commands("curl")]


@pytest.mark.parametrize("words", CURLS, ids=map(" ".join, CURLS))
def test_addresses_exist(words: list[str], web: FastAPI) -> None:
    (url,) = [word for word in words if word.startswith(("http://", "https://"))]
    path = re.sub(r"^https?://[^/]+|\?.*$", "", url)
    if not path.startswith("/api/"):
        assert f'"{path}"' in (ROOT / "edge_agent/serving/http.py").read_text()
        if "-d" in words:
            json.loads(words[words.index("-d") + 1])
        return
    method = words[words.index("-X") + 1].lower() if "-X" in words else "get"
    known = [
        re.sub(r"\{\w+\}", r"[^/]+", p) for p, verbs in web.openapi()["paths"].items() if method in verbs
    ]
    assert any(re.fullmatch(pattern, path) for pattern in known)
    if "-d" in words:
        bodies = {"stop": StopRun, "pause": PauseRun, "resume": StopRun}
        model = bodies.get(path.rpartition("/")[2], StartRun)
        model.model_validate_json(words[words.index("-d") + 1])


@each(blocks("python"))
def test_python_runs(block: Block) -> None:
    exec(compile(block.text, str(block), "exec"), {"__name__": "page"})


@each(blocks("json"))
def test_json_is_read(block: Block) -> None:
    json.loads(block.text)


@each(blocks("yaml"))
def test_yaml_is_read(block: Block) -> None:
    assert yaml.safe_load(block.text)


LANGUAGES = {"", "conf", "sh", "toml", "python", "json", "yaml", "ini", "text", "map", "acl"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    told = {match[1].split()[0] if match[1].strip() else "" for match in FENCE.finditer(page.read_text())}
    assert told <= LANGUAGES, "what no test knows is tested by nobody"


def its_block(page: str, word: str) -> str:
    (block,) = [b for b in blocks("python") if b.page == page and b.info.split()[1:] == [word]]
    return block.text


def test_the_strategy_of_the_page_is_found_and_does_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shy.py").write_text(its_block("docs/own-strategy.md", "strategy"))
    monkeypatch.setattr(coordinator.strategies, "__path__", [*coordinator.strategies.__path__, str(tmp_path)])
    assert "shy" in available()
    half, whole = load_strategy("shy", {"step": 0.5}), load_strategy("fedavg")
    federation = ToyFederation(whole, agents=2)
    state = federation.begin()
    updates = [federation.work(one) for one in federation.plan(state, 1)]
    before, went, all_the_way = (
        s.shared for s in (state, half.absorb(state, updates), whole.absorb(state, updates))
    )
    for name in before:
        np.testing.assert_allclose(
            went[name] - before[name], 0.5 * (all_the_way[name] - before[name]), atol=1e-6
        )
    with pytest.raises(SettingsError, match="step"):
        load_strategy("shy", {"step": 2})


def test_the_sensor_of_the_page_is_found_by_its_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "myshunt.py").write_text(its_block("docs/own-sensor.md", "sensor"))
    monkeypatch.setattr(edge_agent.energy, "__path__", [*edge_agent.energy.__path__, str(tmp_path / "code")])
    (entry,) = [b.text for b in blocks("text") if b.page == "docs/own-sensor.md"]
    (board,) = [b.text for b in blocks("toml") if b.page == "docs/own-board.md"]
    top, marker, rest = board.partition("[[sensor]]")
    source = '[[source]]\nid = "my-shunt"\ntext = "its data sheet"\n'
    (tmp_path / "profile.toml").write_text(top + entry + marker + rest + source)
    profile = DeviceProfile.load(tmp_path / "profile.toml")
    root = tmp_path / "root"
    file = root / "sys/class/myshunt/power_mw"
    file.parent.mkdir(parents=True)
    assert [sensor.name for sensor in find_sensors(profile, root)][:1] != ["myshunt"]
    file.write_text("2500\n")
    sensor = find_sensors(profile, root)[0]
    assert (sensor.name, sensor.kind, sensor.scope, sensor.u_rel) == ("myshunt", "measured", "board_dc", 0.02)
    assert (sensor.joules(0.0), sensor.joules(2.0)) == (0.0, 5.0)
    file.write_text("nothing\n")
    assert sensor.joules(3.0) is None


def test_the_site_has_every_page_once() -> None:
    def pages(nav: Any) -> Iterator[str]:
        for one in nav.values() if isinstance(nav, dict) else nav:
            if isinstance(one, str):
                yield one
            else:
                yield from pages(one)

    told = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(told) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


# --- what is quoted --------------------------------------------------------------------------------

QUOTED = [
    (page.name, cells[0].strip("`"))
    for page in PAGES
    for cells in rows(page.read_text(encoding="utf-8"), "message")
]


@pytest.mark.parametrize(("page", "message"), QUOTED)
def test_messages_are_those_of_the_code(page: str, message: str) -> None:
    assert any(message in text for text in messages())


def test_the_messages_are_found() -> None:
    assert len(QUOTED) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_exist(page: Path) -> None:
    for file, name in re.findall(rf"`((?:{'|'.join(CODE)})/[\w/]+\.py)(?::([\w.]+))?`", page.read_text()):
        assert (ROOT / file).is_file(), file
        assert not name or name in names_in(file), f"{file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize(("page", "lines"), LONGEST.items())
def test_pages_are_short(page: str, lines: int) -> None:
    assert len(text_of(f"docs/{page}.md").splitlines()) < lines


# --- the map ---------------------------------------------------------------------------------------


def test_every_module_is_on_the_map() -> None:
    (block,) = blocks("map")
    told, folder = set(), ""
    for line in block.text.splitlines():
        entry = line.split()[0]
        folder = folder if line.startswith(" ") else entry
        if line.startswith(" "):
            told.add(folder + entry)
    files = {p.relative_to(ROOT).as_posix() for name in CODE for p in (ROOT / name).rglob("*.py")}
    assert told == {file for file in files if not file.endswith("__init__.py")}


# --- the broker's access list ----------------------------------------------------------------------


def allowed(user: str, access: str, topic: str) -> bool:
    """Whether the page's ACL lets a user `read` or `write` a topic; as Mosquitto reads it."""
    (block,) = blocks("acl")
    who = ""
    for line in filter(None, block.text.splitlines()):
        word, rest = line.split(" ", 1)
        if word == "user":
            who = rest
            continue
        right, pattern = rest.split(" ", 1)
        applies = word == "pattern" or who == user
        if applies and right in (access, "readwrite") and matches(pattern.replace("%u", user), topic):
            return True
    return False


def test_the_access_list_lets_everyone_do_their_part_and_no_more() -> None:
    home = topics.Topics("home")
    listed = re.findall(r"/agents/\{agent\}/(\w+) +(\w+)", topics.__doc__ or "")
    assert len(listed) == 16
    for what, writer in listed:
        mine, other = home.of("pi-kitchen", what), home.of("pi-garden", what)
        assert allowed("pi-kitchen", "write" if writer == "agent" else "read", mine)
        assert not allowed("pi-kitchen", "write", other)
        assert not allowed("pi-kitchen", "read", other)
        assert allowed("coordinator", "write" if writer == "coordinator" else "read", mine)
    assert allowed("pi-kitchen", "read", home.coordinator_presence)
    assert not allowed("pi-kitchen", "write", home.coordinator_presence)
    assert not allowed("stranger", "read", home.of("pi-kitchen", "update"))


def test_the_access_list_lets_home_assistant_read_what_is_for_it_and_no_more() -> None:
    home = topics.Topics("home")
    announcement = config_topic(HomeAssistantSettings().prefix, "home", "pi-kitchen")
    for topic in (announcement, home.home("pi-kitchen"), home.coordinator_state):
        assert allowed("coordinator", "write", topic)
        assert allowed("homeassistant", "read", topic)
        assert not allowed("pi-kitchen", "write", topic)
        assert not allowed("pi-kitchen", "read", topic)
    assert allowed("homeassistant", "read", home.coordinator_presence)
    assert allowed("homeassistant", "read", home.of("pi-kitchen", "presence"))
    for topic in (home.of("pi-kitchen", "update"), home.of("pi-kitchen", "card"), home.home("pi-kitchen")):
        assert not allowed("homeassistant", "write", topic)
    assert not allowed("homeassistant", "read", home.of("pi-kitchen", "update"))
