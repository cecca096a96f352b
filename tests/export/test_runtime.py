"""onnxruntime keeps to itself: whoever loads it here has told it so before."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.runtime import SILENCE, ort

ROOT = Path(__file__).parents[2]
PACKAGES = ("coordinator", "edge_agent", "export", "foundation", "hedgerow")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_nobody_else_imports_it() -> None:
    assert len(SOURCES) > 100
    found = [path.relative_to(ROOT).as_posix() for path in SOURCES if "onnxruntime" in imports(path)]
    assert found == ["export/runtime.py"]


@pytest.mark.parametrize(("own", "then"), [(None, "1"), ("0", "0")])
def test_it_is_told_before_it_is_loaded_unless_its_owner_says_otherwise(own: str | None, then: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != SILENCE}
    environment |= {} if own is None else {SILENCE: own, "CI": "1"}  # it keeps to itself there, too
    code = (
        "import os, sys; early = []\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'onnxruntime': early.append(os.environ.get({SILENCE!r}))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import export.proof\n"
        "print(early[0])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == then


def test_the_name_is_the_one_that_this_version_listens_to() -> None:
    library = next((Path(ort.__file__).parent / "capi").glob("onnxruntime_pybind11_state*.so")).read_bytes()
    if b"events.data.microsoft.com" in library:
        assert SILENCE.encode() in library
