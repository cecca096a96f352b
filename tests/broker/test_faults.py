"""Full disks, a forgetful broker, two devices of one name, dead and silent ones: all of it real."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest

from coordinator.settings import RunSettings
from hedgerow.broker import EmbeddedBroker
from hedgerow.children import spawn
from tests.fleet import run_settings
from tests.processes import Processes, until

pytestmark = [
    pytest.mark.broker,
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="needs limits of another process"),
]

KEEPALIVE_S = 10


def run_of(name: str, **changes: object) -> RunSettings:
    settings = {"warm_up": 0, "target": 0.5, "every": 2, "learning_rate": 5e-3, "epochs": 2}
    return run_settings(name=name, settings=settings, **changes)


def disk_of(pid: int, most_bytes: int) -> None:
    """Let a process write no file beyond a size; -1 takes that back. Its writes fail as on a full disk."""
    process = psutil.Process(pid)
    hard = process.rlimit(resource.RLIMIT_FSIZE)[1]
    process.rlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))


def log_of(processes: Processes, name: str) -> str:
    return (processes.folder / f"{name}.log").read_text()


def counts(processes: Processes, run: str) -> list[int]:
    return [processes.updates(run, number) for number in (1, 2, 3)]


def told(processes: Processes, run: str, kind: str) -> list[str]:
    return [row[0] for row in processes.rows(run, "select text from events where kind = ?", kind)]


def test_a_device_whose_disk_is_full_says_so_and_takes_part_again_when_there_is_room(
    processes: Processes,
) -> None:
    run = "devicefull"
    processes.start_coordinator(run_of(run))
    until(lambda: processes.opened(run, 1))
    processes.pause("d2")  # no round closes before it goes on
    disk_of(processes.pid("d1"), 1)
    if processes.updates(run, 1) == 3:  # it was too late for this round
        processes.go_on("d2")
        until(lambda: processes.opened(run, 2))
        processes.pause("d2")
    until(lambda: bool(processes.rows(run, "select 1 from refusals where agent = 'd1'")))
    disk_of(processes.pid("d1"), -1)
    processes.go_on("d2")
    processes.finished(run)
    (reason,) = {row[0] for row in processes.rows(run, "select reason from refusals where agent = 'd1'")}
    assert "the disk of this device is full" in reason
    assert "make room for" in reason
    assert counts(processes, run)[2] == 3


def test_a_coordinator_whose_disk_is_full_loses_no_update(processes: Processes) -> None:
    run = "coordinatorfull"
    before = log_of(processes, "d2").count("update not taken yet")
    processes.start_coordinator(run_of(run))
    until(lambda: processes.opened(run, 1))
    processes.pause("d2")
    until(lambda: sum(counts(processes, run)) >= 2)
    disk_of(processes.pid("coordinator"), 1)
    processes.go_on("d2")
    until(lambda: log_of(processes, "d2").count("update not taken yet") > before)
    disk_of(processes.pid("coordinator"), -1)
    processes.finished(run)
    assert counts(processes, run) == [3, 3, 3]


def test_a_broker_that_has_forgotten_everything_costs_nothing_but_time(
    processes: Processes, running_broker: EmbeddedBroker
) -> None:
    run = "forgetful"
    processes.start_coordinator(run_of(run))
    until(lambda: processes.opened(run, 1))
    running_broker.kill()
    for left in running_broker.log_file.parent.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    running_broker.start()
    processes.finished(run)
    assert counts(processes, run) == [3, 3, 3]


def test_a_dead_device_and_a_silent_one_are_known_to_be_offline(
    processes: Processes, record_property: pytest.RecordProperty
) -> None:
    run = "presence"
    processes.start_coordinator(run_of(run, min_agents=4))
    until(lambda: len(told(processes, run, "online")) == 3)

    def offline() -> int:
        return len(told(processes, run, "offline"))

    began = time.monotonic()
    processes.kill("d0")
    until(lambda: offline() == 1)
    dead_s = time.monotonic() - began
    command = [*processes.agent_command("d0"), "--set", f"mqtt.keepalive_s={KEEPALIVE_S}"]
    log = processes.folder / "d0.log"
    processes.children["d0"] = spawn("d0", command, log, dict(os.environ))
    until(lambda: len(told(processes, run, "online")) == 4)
    began = time.monotonic()
    processes.pause("d0")
    until(lambda: offline() == 2)
    silent_s = time.monotonic() - began
    processes.go_on("d0")
    until(lambda: len(told(processes, run, "online")) == 5)
    processes.kill("coordinator")
    record_property("dead_s", round(dead_s, 3))
    record_property("silent_keepalives", round(silent_s / KEEPALIVE_S, 2))
    told_s = f"dead known after {dead_s:.2f} s, silent after {silent_s / KEEPALIVE_S:.2f} x keepalive"
    sys.stderr.write(told_s + "\n")


def test_two_devices_of_one_name_are_told_on_both_sides(processes: Processes, tmp_path: Path) -> None:
    run = "twins"
    processes.start_coordinator(run_of(run, min_agents=4))
    until(lambda: len(told(processes, run, "online")) >= 3)
    command = [*processes.agent_command("d1"), "--set", f"vault={tmp_path / 'vault'}"]
    log = processes.folder / "twin.log"
    processes.children["twin"] = spawn("twin", command, log, dict(os.environ))
    until(lambda: bool(told(processes, run, "twins")), within_s=90)
    (text,) = told(processes, run, "twins")
    assert "two devices call themselves 'd1'" in text
    assert "a vault of its own" in text
    until(lambda: "is another client called" in log_of(processes, "twin") + log_of(processes, "d1"))
    processes.kill("twin")
    processes.kill("coordinator")
