"""What is shipped: wheel and sdist of a clean checkout, units, default settings."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import typer.testing

from coordinator.settings import CoordinatorSettings
from edge_agent.service import unit
from edge_agent.settings import AgentSettings
from foundation import settings
from hedgerow.cli import app
from hedgerow.wheelhouse import EXTRAS
from tests.test_contracts import PACKAGES, ROOT, kept_files

PACKAGING = ROOT / "packaging"
BUILD = """
import os, sys
import setuptools.build_meta as backend
os.chdir(sys.argv[1])
print("made", getattr(backend, "build_" + sys.argv[2])(sys.argv[3]))
"""


def build(checkout: Path, what: str, out: Path) -> Path:
    """Build as pip does, without asking an index; returns what was made."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, checkout, what, out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out / re.findall(r"^made (.*)$", done.stdout, re.MULTILINE)[0]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean one: what is in the repository and nothing else."""
    folder = tmp_path_factory.mktemp("clone")
    for path in kept_files():
        to = folder / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    with zipfile.ZipFile(build(checkout, "wheel", tmp_path_factory.mktemp("wheel"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_file_of_its_packages(wheel: dict[str, bytes]) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in kept_files()
        if path.relative_to(ROOT).parts[0] in PACKAGES
    }
    inside = {name for name in wheel if name.split("/")[0] in PACKAGES}
    assert inside == wanted
    for package in PACKAGES:
        assert f"{package}/py.typed" in inside, f"{package} ships no type hints"
    assert {"coordinator/web/templates/base.html", "coordinator/web/static/page.css"} <= inside
    assert any(name.startswith("coordinator/store/migrations/versions/v0001") for name in inside)


def test_the_wheel_brings_units_settings_and_the_dashboard(wheel: dict[str, bytes]) -> None:
    shared = {name.partition(".data/data/share/hedgerow/")[2] for name in wheel}
    assert {
        "systemd/hedgerow-agent.service",
        "systemd/hedgerow-coordinator.service",
        "default/hedgerow-agent",
        "default/hedgerow-coordinator",
        "etc/agent.toml",
        "etc/coordinator.toml",
        "monitoring/grafana.json",
        "monitoring/prometheus.yml",
    } <= shared


def test_nothing_else_is_in_the_wheel(wheel: dict[str, bytes]) -> None:
    own = {*PACKAGES}
    rest = {name for name in wheel if name.split("/")[0] not in own}
    assert all(re.match(r"hedgerow-[\d.]+\.(dist-info|data/data/share/hedgerow)/", name) for name in rest), (
        rest
    )


@pytest.mark.skipif(
    not os.environ.get("HEDGEROW_LONG"), reason="two more builds, about six seconds: HEDGEROW_LONG=1 runs it"
)
def test_the_sdist_builds_the_same_wheel(
    checkout: Path, wheel: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(checkout, "sdist", folder)) as archive:
        archive.extractall(folder / "in", filter="data")
    (source,) = (folder / "in").iterdir()
    for name in ("docs", "monitoring", "packaging", "CHANGELOG.md", "constraints.txt", "LICENSE"):
        assert (source / name).exists(), f"the sdist has no {name}"
    assert not (source / "tests").exists()
    with zipfile.ZipFile(build(source, "wheel", folder)) as archive:
        again = {name: archive.read(name) for name in archive.namelist()}
    assert again.keys() == wheel.keys()
    assert [name for name in wheel if wheel[name] != again[name]] == []


def test_the_command_says_its_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = typer.testing.CliRunner().invoke(app, ["--version"])
    assert told.stdout == f"hedgerow {project['version']}\n"


def test_the_wheelhouse_knows_the_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) <= set(project["optional-dependencies"])


# --- units ----------------------------------------------------------------------------------------

UNITS = sorted((PACKAGING / "systemd").glob("*.service"))
RUNS = {"hedgerow-agent.service": "edge_agent", "hedgerow-coordinator.service": "coordinator"}
WHERE = {"ExecStart", "WorkingDirectory", "EnvironmentFile", "ReadWritePaths", "Nice", "MemoryHigh"}
"""What differs between them."""


def service_of(text: str) -> dict[str, str]:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return dict(parser["Service"])


def test_the_agents_unit_is_what_join_writes() -> None:
    text = unit(
        Path("/etc/hedgerow/agent.toml"),
        Path("/var/lib/hedgerow/vault"),
        user="hedgerow",
        python="/opt/hedgerow/bin/python",
    )
    assert (PACKAGING / "systemd/hedgerow-agent.service").read_text() == text


def test_both_units_are_bounded_alike() -> None:
    agent, coordinator = (service_of(path.read_text()) for path in UNITS)
    assert {k: v for k, v in agent.items() if k not in WHERE} == {
        k: v for k, v in coordinator.items() if k not in WHERE
    }


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_fit_the_settings_beside_them(path: Path) -> None:
    service = service_of(path.read_text())
    program = RUNS[path.name]
    name = path.stem.removeprefix("hedgerow-")
    assert (
        service["ExecStart"]
        == f'"/opt/hedgerow/bin/python" -m {program} --config "/etc/hedgerow/{name}.toml"'
    )
    assert service["EnvironmentFile"] == f"-/etc/default/{path.stem}"
    assert (PACKAGING / "default" / path.stem).is_file()
    told = tomllib.loads((PACKAGING / "etc" / f"{name}.toml").read_text())
    folder = told["vault" if name == "agent" else "folder"]
    assert service["WorkingDirectory"] == folder
    assert service["ReadWritePaths"] == f'"{folder}"'


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_takes_the_units(path: Path, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze on this machine")
    # The program has to be there for systemd to agree: this Python takes its place.
    text = path.read_text().replace("/opt/hedgerow/bin/python", sys.executable)
    (tmp_path / path.name).write_text(text)
    done = subprocess.run(
        [program, "verify", tmp_path / path.name], capture_output=True, text=True, check=False
    )
    told = [line for line in done.stderr.splitlines() if path.stem in line]
    assert (done.returncode, told) == (0, []), done.stderr


@pytest.mark.parametrize(
    ("name", "kind", "model"),
    [("agent", "AGENT", AgentSettings), ("coordinator", "COORDINATOR", CoordinatorSettings)],
)
def test_the_default_settings_load_also_with_every_line_of_theirs(
    name: str, kind: str, model: type, tmp_path: Path
) -> None:
    text = (PACKAGING / "etc" / f"{name}.toml").read_text()
    files = re.findall(r'# (?:ca_file|password_file) = "([^"]+)"', text)
    full = re.sub(r"(?m)^# (?=\w+ = )", "", text)
    for file in files:
        (tmp_path / Path(file).name).write_text("x")
        full = full.replace(file, str(tmp_path / Path(file).name))
    for version in (text, full):
        (tmp_path / "it.toml").write_text(version)
        settings.load(model, tmp_path / "it.toml")
    default = (PACKAGING / "default" / f"hedgerow-{name}").read_text()
    lines = re.findall(r"(?m)^#(\w+)=(\S*)$", default)
    assert lines
    given = {key: value for key, value in lines if key.startswith(f"{kind}__")}
    assert given
    settings.load(model, tmp_path / "it.toml", given, prefix=kind)


@pytest.mark.skipif(
    not os.environ.get("HEDGEROW_LONG"),
    reason="some minutes: HEDGEROW_LONG=1 follows the page in a fresh clone",
)
@pytest.mark.timeout(1_800)
def test_the_quickstart_works_word_by_word() -> None:
    venv = Path(sys.executable).parents[1]
    program = [sys.executable, ROOT / "bench" / "quickstart.py", "--venv", venv]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
