"""Federations of real processes for tests: `python -m coordinator`, `python -m edge_agent`, a real broker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.settings import RunSettings
from coordinator.store.place import recall
from coordinator.store.schema import FILE
from coordinator.store.sql import Store
from edge_agent.datasets import DataSettings, load
from edge_agent.samples import LocalData
from hedgerow.children import Child, spawn, stop_all
from tests.toys import LABELS, toy_data

AGENTS = ("d0", "d1", "d2")


def write_data(folder: Path, seed: int) -> DataSettings:
    """Write one device's file and return how it is read."""
    path = folder / f"d{seed}.npz"
    if not path.exists():
        data = toy_data(seed, examples=96)
        np.savez(path, x=data.train.x, y=data.train.y)
    return DataSettings(kind="npz", path=path, labels=LABELS)


def loader(folder: Path) -> Callable[[int], LocalData]:
    """Return what reads the same files inside this process."""
    folder.mkdir(parents=True, exist_ok=True)
    return lambda seed: load(write_data(folder, seed))


def until(condition: Callable[[], bool], within_s: float = 60, every_s: float = 0.002) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(every_s)


def sets(table: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Write a table as `--set` options."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from sets(value, f"{above}{key}.")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            yield from ("--set", f"{above}{key}={text}")


@dataclass
class Processes:
    """Agents that outlive runs, and one coordinator per run; everything is ended at the end."""

    folder: Path
    port: int
    profile: str = "unknown-linux"
    children: dict[str, Child] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    """More settings of every agent."""

    def agent_command(self, name: str) -> list[str]:
        data = write_data(self.folder, int(name[1:])).model_dump(mode="json", exclude_unset=True)
        table = {
            "agent": name,
            "federation": "test",
            "vault": str(self.vault(name)),
            "profile": self.profile,
            "threads": 1,
            "mqtt": {"port": self.port},
            "data": data,
        } | self.more
        return [sys.executable, "-m", "edge_agent", *sets(table)]

    def start_agent(self, name: str) -> None:
        log = self.folder / f"{name}.log"
        self.children[name] = spawn(name, self.agent_command(name), log, dict(os.environ))

    def start_coordinator(self, run: RunSettings, **changes: Any) -> None:
        """Start a coordinator that ends with its run; its folder has the run's name."""
        table = {
            "federation": "test",
            "folder": str(self.folder / "runs" / run.name),
            "exit_when_done": True,
            "http": {"enabled": False},
            "mqtt": {"port": self.port},
            "run": run.model_dump(mode="json"),
        }
        table |= changes
        command = [sys.executable, "-m", "coordinator", *sets(table)]
        log = self.folder / f"{run.name}.log"
        self.children["coordinator"] = spawn("coordinator", command, log, dict(os.environ))

    def kill(self, name: str) -> None:
        """End a process as a power cut would."""
        child = self.children.pop(name)
        child.process.send_signal(signal.SIGKILL)
        child.process.wait()

    def pause(self, name: str) -> None:
        """Stop a process where it stands, until `go_on`."""
        self.children[name].process.send_signal(signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        self.children[name].process.send_signal(signal.SIGCONT)

    def pid(self, name: str) -> int:
        return self.children[name].process.pid

    def vault(self, name: str) -> Path:
        return self.folder / name

    def finished(self, run: str, within_s: float = 90) -> bytes:
        """Wait for the coordinator's end and return the run's last state."""
        child = self.children["coordinator"]
        try:
            code = child.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{run} did not end:\n{child.tail(40)}") from None
        assert code == 0, child.tail(40)
        del self.children["coordinator"]
        with self.store(run) as store:
            latest = store.latest_state(run)
            assert latest is not None
            return latest[1]

    @contextlib.contextmanager
    def store(self, run: str) -> Iterator[Store]:
        folder = self.folder / "runs" / run
        with Store.open(folder, place=recall(folder)) as store:
            yield store

    def updates(self, run: str, number: int) -> int:
        """Count the updates of a round that a running coordinator has stored."""
        return len(self.rows(run, "select agent from updates where run = ? and round = ?", run, number))

    def opened(self, run: str, number: int) -> bool:
        return bool(self.rows(run, "select 1 from rounds where run = ? and round = ?", run, number))

    def rows(self, run: str, query: str, *values: Any) -> list[Any]:
        """Ask a running coordinator's database, which is not there before it has begun."""
        file = self.folder / "runs" / run / FILE
        if not file.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as db:
            try:
                return db.execute(query, values).fetchall()
            except sqlite3.OperationalError:
                return []  # its tables are not made yet

    def close(self) -> None:
        for child in self.children.values():
            child.process.send_signal(signal.SIGCONT)
        stop_all([*self.children.values()])
