"""Follows docs/quickstart.md literally: a fresh clone, every block in order, ended at the first that fails.

python bench/quickstart.py                  # sets up its own .venv, as a reader would
python bench/quickstart.py --venv .venv     # with one that is set up already
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = "docs/quickstart.md"
BLOCK_S = 1_200.0


def blocks(page: str) -> list[str]:
    """Return the commands of a page, in order."""
    return re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def follow(clone: Path, venv: Path | None) -> None:
    """Run every block in a shell of its own; raises `CalledProcessError` at the first that fails."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    # PYTHONPATH: a virtual environment that is set up already imports the clone all the same.
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    if venv is not None:
        (clone / ".venv").mkdir()
        (clone / ".venv" / "bin").symlink_to((venv / "bin").resolve())
        (clone / ".venv" / ".demo").touch()
    for number, block in enumerate(blocks((clone / PAGE).read_text(encoding="utf-8")), 1):
        print(f"--- block {number}\n{block}", flush=True)
        start = time.monotonic()
        # -m: jobs, so that `kill %1` means what it means at a prompt.
        command = ["bash", "-e", "-m", "-c", block]
        subprocess.run(command, cwd=clone, env=environment, check=True, timeout=BLOCK_S)
        print(f"--- {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Follow docs/quickstart.md in a fresh clone.")
    parser.add_argument("--venv", type=Path, help="a virtual environment that is set up already")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            follow(Path(folder) / "hedgerow", arguments.venv)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            sys.stderr.write(f"the page does not work: {error}\n")
            return 1
    print("the page works")
    return 0


if __name__ == "__main__":
    sys.exit(main())
