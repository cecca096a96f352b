"""Shell completion as docs/terminal.md sets it up: a real bash is told, and asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, text_of

ASKED = """
{eval}
COMP_WORDS=(hedgerow model ro); COMP_CWORD=2
_hedgerow_completion hedgerow
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def environment(tmp_path: Path) -> dict[str, str]:
    """Return one in which `hedgerow` is this checkout's."""
    program = tmp_path / "hedgerow"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hedgerow.cli "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def test_bash_completes_verbs(tmp_path: Path) -> None:
    (line,) = (line for line in text_of("docs/terminal.md").splitlines() if line.startswith("eval "))
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-c", ASKED.format(eval=line.partition("#")[0])],
        env=environment(tmp_path), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["rollback", "rollout"]
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(shell: str, tmp_path: Path) -> None:
    assert f"_HEDGEROW_COMPLETE=source_{shell} hedgerow" in text_of("docs/terminal.md")
    said = subprocess.run(
        ["hedgerow"], env=environment(tmp_path) | {"_HEDGEROW_COMPLETE": f"source_{shell}"},
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert f"_HEDGEROW_COMPLETE=complete_{shell}" in said
