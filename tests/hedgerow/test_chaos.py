"""What the kill matrix plans, how it compares, and how it tells; the kills themselves are in tests/broker."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from foundation import halt
from foundation.parameters import Parameters
from hedgerow import chaos, doctor
from hedgerow.chaos_check import Ending, distance
from hedgerow.chaos_plan import STAGES, WHO, plan
from hedgerow.chaos_report import Report, Result, Verdict, show
from hedgerow.cli import app
from tests.processes import until


def test_every_process_and_every_pair_is_killed_at_every_stage() -> None:
    cases = plan(kills=5, seed=1, quick=False, broker=True)
    singles = {(case.who[0], case.stage) for case in cases if case.kind == "single"}
    assert singles == {(who, stage) for who in WHO for stage in STAGES}
    assert sum(case.kind == "pair" for case in cases) == 6 * len(STAGES)
    assert len(set(cases)) == len(cases)
    instants = [case.instant for case in cases if case.instant is not None]
    assert len(instants) == 5
    assert all(0 <= instant < 1 for instant in instants)


def test_instants_are_those_of_the_seed_and_a_broker_of_others_is_left_alone() -> None:
    assert plan(kills=9, seed=1, quick=True, broker=True) == plan(kills=9, seed=1, quick=True, broker=True)
    assert plan(kills=9, seed=1, quick=True, broker=True) != plan(kills=9, seed=2, quick=True, broker=True)
    for quick in (True, False):
        found = plan(kills=50, seed=1, quick=quick, broker=False)
        assert found
        assert not any("broker" in case.who for case in found)


def ended(value: float, state: bytes = b"s", **more: np.ndarray) -> Ending:
    return Ending(state, Parameters({"a": np.array([1.0, value]), **more}.items()))


def test_two_endings_are_the_same_close_or_apart_and_it_is_said_where() -> None:
    assert distance(ended(2.0), ended(2.0)).bits
    close = distance(ended(2.0 + 1e-9), ended(2.0))
    assert (close.bits, close.where) == (False, "a")
    assert 0 < close.largest <= 1e-6
    assert distance(ended(3.0), ended(2.0)).largest == 1
    assert distance(ended(float("nan")), ended(2.0)).largest != 0
    assert not distance(ended(2.0), ended(2.0, b"t")).bits
    other = distance(ended(2.0, b=np.zeros(1)), ended(2.0))
    assert (other.largest, other.where) == (float("inf"), "b")
    assert distance(Ending(b"s", Parameters([("a", np.zeros(3))])), ended(2.0)).largest == float("inf")


def result(verdict: Verdict, said: str = "") -> Result:
    return Result(
        case="agent at train",
        kind="single",
        who=("agent",),
        stage="train",
        verdict=verdict,
        seconds=1.0,
        largest=None if verdict == "lost" else 0.5,
        where="a",
        said=said,
    )


def test_the_report_is_good_only_when_everything_came_to_the_same_end() -> None:
    def report(*results: Result) -> Report:
        return Report(broker="mosquitto", seed=0, reference_s=3.0, results=results, logs="place")

    assert report(result("same"), result("close")).good
    assert not report(result("same"), result("lost")).good
    assert not report(result("differs")).good
    console = Console(record=True, width=100, file=io.StringIO())
    show(report(result("same"), result("lost", "it never ended")), console)
    told = console.export_text()
    assert "agent at train: lost: it never ended" in told
    assert "2 runs on mosquitto: 1 same, 1 lost" in told
    assert "logs: place" in told


STOPS = "import sys; from foundation import halt; halt.at('train', 2); print('on'); sys.exit(7)"


def test_a_process_stops_at_the_point_that_was_asked_for_and_at_no_other(tmp_path: Path) -> None:
    environment = dict(os.environ) | {halt.VARIABLE: str(tmp_path)}
    (tmp_path / "train-3").touch()
    assert subprocess.run([sys.executable, "-c", STOPS], env=environment, check=False).returncode == 7
    (tmp_path / "train-2").touch()
    process = subprocess.Popen([sys.executable, "-c", STOPS], env=environment)
    reached = tmp_path / f"train-2{halt.REACHED}"
    until(reached.exists)
    assert int(reached.read_text()) == process.pid
    assert os.waitpid(process.pid, os.WUNTRACED)[1] & 0xFF == 0x7F, "it stands still"
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 7
    assert (tmp_path / "train-3").exists()


def test_halting_is_off_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(halt.VARIABLE, raising=False)
    halt.at("train", 2)


def test_the_doctor_says_what_this_machine_has() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    found = {finding["what"]: finding for finding in json.loads(done.output)}
    assert {"software", "clock", "disk", "memory", "open files", "port 1883"} <= found.keys()
    assert done.exit_code == int(any(one["verdict"] == "bad" for one in found.values()))


def test_the_doctor_names_a_port_that_is_taken_and_a_broker_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert doctor.port_finding(port, "page").verdict == "note"
    found = {finding.what: finding for finding in doctor.findings(f"mqtt://127.0.0.1:{port}")}
    assert found["broker"].verdict == "bad"


def test_the_doctor_says_what_is_wrong_with_its_options() -> None:
    assert CliRunner().invoke(app, ["doctor", "--quick"]).exit_code == 2
    assert chaos.run_command(chaos.ChaosOptions(kills=-1)) == 2
    assert chaos.run_command(chaos.ChaosOptions(broker="gopher://x")) == 2
    assert doctor.run_command("gopher://x", as_json=True) == 2
