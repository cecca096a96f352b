"""`hedgerow agent measure` as a person uses it: on a Jetson's file tree, and where there is nothing."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_agent.__main__ import main

POWER = Path(__file__).parents[1] / "fixtures" / "power"


def test_every_source_is_shown_the_one_that_counts_first(capsys: pytest.CaptureFixture[str]) -> None:
    root = str(POWER / "orin-nano-jp5" / "root")
    profile = ["--profile", "jetson-orin-nano"]
    assert main(["measure", *profile, "--root", root, "--seconds", "0.6", "--every", "0.3", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    for line in lines:
        first, second = line["sources"]
        assert (first["source"], first["kind"], first["scope"]) == ("ina3221", "measured", "module")
        assert (second["source"], second["kind"]) == ("utilisation", "modelled")
        assert first["joules"] == pytest.approx(5.139392 * first["seconds"], rel=1e-6)
        step_j = 2 * 0.04 / math.sqrt(12) * first["seconds"]  # half a step of the converter, 40 mW
        assert first["joules_uncertainty"] == pytest.approx(math.hypot(0.05 * first["joules"], step_j))
    assert lines[1]["sources"][0]["joules"] > lines[0]["sources"][0]["joules"]


def test_people_get_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--profile", "raspberry-pi-4b", "--seconds", "0.3", "--every", "0.3"]) == 0
    shown = capsys.readouterr().out
    assert "Raspberry Pi 4" in shown
    assert "utilisation" in shown
    assert "modelled" in shown


def test_where_nothing_is_known_it_says_so_and_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["measure", "--root", str(tmp_path), "--seconds", "1"]) == 1
    said = capsys.readouterr().err
    assert "no energy source here" in said
    assert "--profile" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--profile", "raspbery-pi-4b"], "raspberry-pi-4b"), (["--every", "0"], "above 0")],
)
def test_what_cannot_be_is_said(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", *arguments]) == 2
    assert named in capsys.readouterr().err


# A shell that starts jobs in the background lets them ignore SIGINT; a person's terminal does not.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from edge_agent.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_is_the_way_to_end_it() -> None:
    command = [sys.executable, "-c", PROGRAM, "measure", "--profile", "raspberry-pi-4b", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["profile"] == "raspberry-pi-4b"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "")
