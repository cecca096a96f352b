"""Laws of the whole house: who may import whom, what every file has, what a fresh process may hold."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("foundation", "export", "edge_agent", "coordinator", "hedgerow", "firmware_profiles")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Put together, so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(
    r"(?<![\w.~/-])(?:"
    + "|".join(["/wo" + "rk", "/ro" + "ot", "/ho" + r"me/\w+", "/Us" + r"ers/\w+"])
    + r")/\w"
)
HEAVY = {"torch", "onnx", "onnxruntime", "fastapi", "uvicorn", "jinja2", "sqlalchemy"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def kept_files() -> list[Path]:
    """Files that are in the repository, or would be with the next commit."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=relative)
def test_packages_hold_a_docstring_and_nothing_else(path: Path) -> None:
    # So that importing a module never imports its neighbours.
    (only,) = tree(path).body
    assert isinstance(only, ast.Expr)


def test_import_contracts_are_kept() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(program), "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_contracts_cover_every_module_of_the_foundation() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    contracts = {c["name"]: c for c in tools["importlinter"]["contracts"]}
    listed = set(contracts["torch lives in few rooms"]["source_modules"])
    there = {f"foundation.{p.stem}" for p in (ROOT / "foundation").glob("*.py") if p.stem != "__init__"}
    assert there <= listed, f"name them in pyproject.toml: {sorted(there - listed)}"


def test_no_file_names_a_path_of_a_developers_machine() -> None:
    found = []
    for path in kept_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        found += [f"{relative(path)}: {match.group()}" for match in MACHINE_PATHS.finditer(text)]
    assert not found


def test_the_version_is_that_of_the_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version("hedgerow") == project["version"]


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        ("edge_agent.agent, edge_agent.__main__", set()),
        ("edge_agent.datasets, edge_agent.stream, edge_agent.energy.meter", set()),
        ("hedgerow.cli", set()),
        ("edge_agent.serving.http, edge_agent.serving.__main__", {"onnxruntime", "uvicorn"}),
        ("export.package", {"onnx", "onnxruntime"}),
    ],
)
def test_a_fresh_process_holds_no_more_than_it_needs(modules: str, allowed: set[str]) -> None:
    code = f"import sys, {modules}; print(*({HEAVY!r} & {{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert set(done.stdout.split()) <= allowed
