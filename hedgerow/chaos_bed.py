"""The testbed of the kill matrix: broker, coordinator, agents, a serving process; killed, started again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from foundation import halt
from foundation.errors import HedgerowError
from hedgerow.broker import EmbeddedBroker
from hedgerow.chaos_plan import OF_COORDINATOR, ROUND, Who
from hedgerow.children import Child, spawn, stop_all
from hedgerow.demo import broker_table, free_port, toml_text

AGENTS = ("device-0", "device-1")
VICTIM = AGENTS[0]
"""The agent that is killed, and that serves."""
ROUNDS = 3
STEP_S = 60.0
"""How long any one thing may take; a loaded machine needs seconds where a quiet one needs tenths."""
RUN_S = 150.0
"""How long a run may take, whatever is killed in it."""
POLL_S = 0.004


class Bed:
    """A federation whose agents live from run to run, as on devices, and whose coordinator lives for one."""

    def __init__(self, folder: Path, broker: str | None, seed: int = 0) -> None:
        """Prepare a bed in `folder`; without a `broker` (a URL) it has its own, to be killed too."""
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.own = EmbeddedBroker(folder / "broker") if broker is None else None
        self._url = broker
        self._federation = f"chaos-{os.getpid()}-{folder.name}"[:60]
        self._children: dict[str, Child] = {}
        self._serving_port = free_port(0)
        self._run = ""

    def start(self) -> None:
        """Start broker and agents; raises `HedgerowError` where that fails."""
        if self.own is not None:
            self.own.start()
            self._url = self.own.url
        for name in AGENTS:
            self._start_agent(name)

    def close(self) -> None:
        """End everything, also what stands still."""
        for child in self._children.values():
            with suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGCONT)
        stop_all([*self._children.values()])
        self._children.clear()
        if self.own is not None:
            self.own.stop()

    # --- processes -----------------------------------------------------------------------------

    def _start_agent(self, name: str) -> None:
        self._spawn(name, "edge_agent", self._agent_table(name))

    def _agent_table(self, name: str) -> dict[str, Any]:
        index = AGENTS.index(name)
        table: dict[str, Any] = {
            "agent": name,
            "federation": self._federation,
            "vault": str(self.vault(name)),
            "profile": "unknown-linux",
            "threads": 1,
            "mqtt": broker_table(str(self._url)),
            "data": {
                "kind": "builtin",
                "name": "digits",
                "index": index,
                "count": len(AGENTS),
                "limit": 240,
                "seed": self.seed,
            },
        }
        if name == VICTIM:
            # Every model is taken: what is compared here is who died when, and not which model is better.
            serve = {"enabled": True, "port": self._serving_port, "canary": 0, "rollback": False}
            table["serve"] = serve
        return table

    def start_run(self, run: str) -> None:
        """Start a coordinator that ends with the run of that name."""
        self._run = run
        self._start_coordinator()

    def _start_coordinator(self) -> None:
        self._spawn("coordinator", "coordinator", self._coordinator_table())

    def _coordinator_table(self) -> dict[str, Any]:
        return {
            "federation": self._federation,
            "folder": str(self.store),
            "exit_when_done": True,
            "http": {"enabled": False},
            "mqtt": broker_table(str(self._url)),
            "run": {
                "name": self._run,
                "strategy": "pfl_tpp",
                "rounds": ROUNDS,
                "seed": self.seed,
                "min_agents": len(AGENTS),
                "quorum": 1.0,
                "wait_s": STEP_S,
                "deadline_s": RUN_S,
                "export_every": 1,
                "settings": {"warm_up": 0, "target": 0.5, "every": 2, "learning_rate": 5e-3, "epochs": 4},
                "model": {"width": 8, "depth": 2, "heads": 2, "ffl_ratio": 2, "patch": 2},
            },
        }

    def _spawn(self, name: str, module: str, table: dict[str, Any]) -> Path:
        """Start a process with these settings; returns their file."""
        halts = self._halts(name)
        halts.mkdir(parents=True, exist_ok=True)
        config = self.folder / f"{name}.toml"
        config.write_text(toml_text(table))
        command = [sys.executable, "-m", module, "--config", str(config)]
        environment = dict(os.environ) | {halt.VARIABLE: str(halts)}
        self._children[name] = spawn(name, command, self.folder / f"{name}.log", environment)
        return config

    def kill(self, who: Who) -> bool:
        """End a process as a power cut would; returns whether it was there."""
        if who == "broker":
            assert self.own is not None
            self.own.kill()
            return True
        if who == "serving":
            process = self.serving()
            if process is None:
                return False
            process.kill()
            return True
        child = self._children[VICTIM if who == "agent" else "coordinator"]
        there = child.process.poll() is None
        child.process.kill()
        child.process.wait()
        return there

    def start_again(self, who: Who) -> None:
        """Start what was killed; the serving process is its agent's to start."""
        if who == "broker":
            assert self.own is not None
            self.own.start()
        elif who == "agent":
            self._start_agent(VICTIM)
        elif who == "coordinator":
            self._start_coordinator()

    def serving(self) -> psutil.Process | None:
        """Return the serving process of the agent that serves, while there is one."""
        try:
            for child in psutil.Process(self._children[VICTIM].process.pid).children():
                if "edge_agent.serving" in child.cmdline():
                    return child
        except psutil.Error:
            return None  # it ended while it was looked at
        return None

    # --- halts ---------------------------------------------------------------------------------

    def _halts(self, name: str) -> Path:
        return self.folder / "halt" / name

    def arm(self, stage: str) -> Path:
        """Ask for a stop as the round enters a stage; returns the file that says that it was reached."""
        asked = self._halts("coordinator" if stage in OF_COORDINATOR else VICTIM) / f"{stage}-{ROUND}"
        asked.parent.mkdir(parents=True, exist_ok=True)
        asked.touch()
        if stage == "swap":
            # The server looks once a second: the next model must not be there before it has looked.
            asked.with_name(f"download-{ROUND + 1}").touch()
        return asked.with_suffix(halt.REACHED)

    def go_on(self) -> None:
        """Take back what was not reached, and let go on what stands still."""
        for file in (self.folder / "halt").glob("*/*"):
            if file.suffix == halt.REACHED:
                with suppress(ProcessLookupError):  # it was the one that was killed
                    os.kill(int(file.read_text()), signal.SIGCONT)
            file.unlink(missing_ok=True)

    def stopped(self, reached: Path) -> None:
        """Wait until a process stands still at its point."""
        self.until(reached.exists, f"{reached.stem} was reached")
        pid = int(reached.read_text())
        self.until(lambda: _stands(pid), f"process {pid} stood still")

    def until(self, condition: Callable[[], bool], what: str, within_s: float = STEP_S) -> None:
        """Wait for something that other processes do; raises `HedgerowError` when it does not come."""
        deadline = time.monotonic() + within_s
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise HedgerowError(f"it did not come within {within_s:.0f} s that {what}")
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raise `HedgerowError` when an agent has ended by itself, or the run's coordinator failed."""
        for name, child in self._children.items():
            code = child.process.poll()
            if code not in (None, 0, -signal.SIGKILL) or (code == 0 and name in AGENTS):
                raise HedgerowError(f"{name} ended with code {code}:\n{child.tail(6)}")

    # --- the run -------------------------------------------------------------------------------

    @property
    def store(self) -> Path:
        """The coordinator's folder; all runs of a bed are in it, as on a coordinator that is used."""
        return self.folder / "coordinator"

    def vault(self, name: str) -> Path:
        """Return an agent's vault."""
        return self.folder / name

    def over(self) -> bool:
        """Whether the run's coordinator has come to its end; whoever still stops at a point goes on."""
        self.go_on()
        return self._children["coordinator"].process.poll() == 0

    def served(self) -> str | None:
        """Return the SHA-256 of the model that answers; `None` while nobody answers."""
        try:
            url = f"http://127.0.0.1:{self._serving_port}/manifest"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return str(json.loads(answer.read())["sha256"])
        except (urllib.error.URLError, OSError):
            return None


def _stands(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False
