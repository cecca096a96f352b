"""`hedgerow demo` as a person starts it: what it prints, and that it never leaves a process behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from hedgerow.broker import find_broker
from tests.conftest import LONG, require_service

pytestmark = [pytest.mark.broker, pytest.mark.slow]

# A shell that starts jobs in the background lets them ignore SIGINT; a person's terminal does not.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from hedgerow.cli import main
main()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def demo(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start the demo with its temporary files in `folder`; yields it and the port of its page."""
    require_service(find_broker() is not None, "MQTT broker")
    folder.mkdir(exist_ok=True)
    port = free_port()
    command = [sys.executable, "-c", COMMAND, "demo", "--devices", "2", "--limit", "200"]
    command += ["--port", str(port), *options]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},
        start_new_session=True,
    ) as process:
        try:
            yield process, port
        finally:
            if process.poll() is None:
                process.kill()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def left(processes: list[psutil.Process], within_s: float = 15) -> list[psutil.Process]:
    """Return who is still there; a zombie is not."""
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def all_started(process: subprocess.Popen[str], within_s: float = 60) -> list[psutil.Process]:
    """Return broker, coordinator and two agents once all have been started."""
    deadline = time.monotonic() + within_s
    while len(found := family(process)) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def in_training(process: subprocess.Popen[str], port: int, within_s: float = 60) -> list[psutil.Process]:
    """Wait until a device is training, and return all processes of the demo."""
    deadline = time.monotonic() + within_s
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no device began to train"
        with contextlib.suppress(httpx.HTTPError):
            agents = httpx.get(f"http://127.0.0.1:{port}/api/v1/status", timeout=5).json()["agents"]
            if any(agent["stage"] == "train" for agent in agents):
                return family(process)
        time.sleep(0.05)


def test_two_rounds_on_two_devices_end_with_a_report_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    with demo(folder, "--rounds", "2", "--json", "--set", "epochs=1") as (process, _):
        processes = all_started(process)
        printed, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    report = json.loads(printed)
    assert (report["strategy"], report["rounds"], report["dataset"]) == ("pfl_tpp", 2, "digits")
    assert [d["agent"] for d in report["devices"]] == ["device-0", "device-1"]
    for device in report["devices"]:
        assert device["examples"] > 0
        assert 0 <= device["accuracy_sent"] <= 1
        assert 0 <= device["accuracy"] <= 1
        assert device["down_bytes"] > 0
        assert device["up_bytes"] > 0
        assert device["manifest"]["bytes"] <= device["manifest"]["dense_bytes"]
        assert len(device["kept_units"]) == 2
        assert all(reading["seconds"] >= 0 for reading in device["ledger"].values())
        assert "train" in device["ledger"]
    assert [s["agent"] for s in report["samples"]] == ["device-0", "device-1"]
    for sample in report["samples"]:
        assert len(sample["predicted"]) == len(sample["truth"]) == len(sample["probability"]) > 0
    assert "Traceback" not in said
    assert left(processes) == []
    assert not [*folder.glob("hedgerow-*")]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=LONG)])
def test_a_demo_that_is_interrupted_in_training_ends_everything_and_tidies_up(
    tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "tmp"
    with demo(folder, "--rounds", "50", "--set", "epochs=50") as (process, port):
        processes = in_training(process, port)
        began = time.monotonic()
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
        assert process.returncode == 130, (printed, said)
        assert time.monotonic() - began < 60  # it does not wait for the run
    assert len(processes) >= 4
    assert left(processes) == []
    assert not [*folder.glob("hedgerow-*")]
    assert "stopped" in printed
    assert "Traceback" not in printed + said


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ends the children of a killed parent")
def test_a_demo_that_is_killed_takes_all_its_processes_with_it(tmp_path: Path) -> None:
    with demo(tmp_path / "tmp", "--rounds", "50", "--set", "epochs=50") as (process, port):
        processes = in_training(process, port)
        assert len(processes) >= 4
        process.kill()
        process.communicate(timeout=20)
    assert left(processes) == []


def test_what_a_person_misspelt_is_said_before_anything_starts(tmp_path: Path) -> None:
    with demo(tmp_path / "tmp", "--devices", "1") as (process, _):
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 2, printed + said
    assert "at least 2 devices" in printed + said
    assert not [*(tmp_path / "tmp").glob("hedgerow-*")]


@LONG
def test_a_file_of_ones_own_is_dealt_by_its_groups_and_what_is_thin_is_said_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 120)
    x = rng.normal(size=(120, 8, 2)).astype(np.float32) + y[:, None, None]
    np.savez(tmp_path / "gait.npz", x=x, y=y, person=np.repeat([7, 9], [80, 40]))
    options = ("--dataset", "gait.npz", "--data-dir", str(tmp_path), "--partition", "by:person")
    more = ("--strategy", "hedgerow", "--rounds", "1", "--json")
    with demo(tmp_path / "tmp", *options, *more) as (process, _):
        printed, said = process.communicate(timeout=120)
        assert process.returncode == 0, printed + said
    report = json.loads(printed)
    assert (report["dataset"], report["partition"]) == ("gait.npz", "by:person")
    big, small = (device["examples"] for device in report["devices"])
    assert big == pytest.approx(48, abs=2)  # three fifths of person 7's 80 rows; the rest tests and validates
    assert small == pytest.approx(24, abs=2)
    assert "warning: fewer than 64 training samples, two batches of 32, on devices 0 and 1" in " ".join(
        said.split()
    )
