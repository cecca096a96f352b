"""Hedgerow's side of the bench: a Mosquitto, a coordinator, and agents on the other side of the wire."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.fleet_net import WAIT_S, Children, Most, Wire, cpu_s, environment, pss, rss, until
from coordinator.strategies.hedgerow import Hedgerow
from edge_agent.agent import RESTING_S
from hedgerow.broker import find_broker

WIDTHS = {1: 104, 10: 324}
"""Model width that makes so many MB of float32."""
OWN_ENCODING = str(Hedgerow.model_fields["encoding"].default)
"""Of the strategy `hedgerow`, both ways; the work is still FedAvg's and dense: only the codec differs."""
SAMPLES = 512
"""Of each agent that trains."""
STRUCK_S = 1.5
"""How long after a round was opened something is killed."""
STILL_S, BUSY_S = 8.0, 0.1
"""An agent rests that has used less than so much CPU in any second, for so long."""
BACK_S = 3.0
"""How long it stays away."""


def flat(table: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Write a table as `--set` options."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield from ("--set", f"{above}{key}={value if isinstance(value, str) else json.dumps(value)}")


def empty_run(mb: int, rounds: int, agents: int, encoding: str = "float32") -> dict[str, Any]:
    """A run whose every round moves so many MB, dense, down and up."""
    return {
        "name": "r",
        "strategy": "fedavg",
        "settings": {"encoding": encoding},
        "encoding": encoding,
        "rounds": rounds,
        "min_agents": agents,
        "export": False,
        "deadline_s": WAIT_S,
        "model": {"width": WIDTHS[mb], "depth": 2, "heads": 4, "ffl_ratio": 4, "patch": 2},
    }


class Fleet(Children):
    """One broker, one coordinator, agents; ended at the end of the `with`."""

    def __init__(self, folder: Path, agents: int, wire: Wire, port: int = 21883) -> None:
        super().__init__(folder, environment())
        self.count, self.wire, self.port = agents, wire, port

    def __enter__(self) -> Fleet:
        self.broker()
        return self

    def __exit__(self, *what: object) -> None:
        self.stop()

    def broker(self) -> None:
        program = find_broker("mosquitto")
        if program is None:
            raise SystemExit("no mosquitto here: apt install mosquitto")
        config = self.folder / "mosquitto.conf"
        text = f"listener {self.port} {self.wire.host}\nallow_anonymous true\nset_tcp_nodelay true\n"
        config.write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
        self.start("broker", [str(program.path), "-c", str(config)])

    def start_agent(self, i: int, work_s: float = 0.0) -> None:
        """Start an agent whose work is empty."""
        command = [sys.executable, "-m", "bench.fleet_agent", f"d{i}", "--folder", str(self.folder)]
        more = ["--at", f"{self.wire.host}:{self.port}", "--work-s", str(work_s)]
        self.start(f"d{i}", [*self.wire.inside, *command, *more])

    def start_agents(self, work_s: float = 0.0) -> None:
        for i in range(self.count):
            self.start_agent(i, work_s)
        files = [self.folder / f"d{i}.up" for i in range(self.count)]
        until("agents are up", lambda: self.ended() or all(file.exists() for file in files))
        if self.ended():
            raise SystemExit(self.log("d0"))

    def start_real_agents(self) -> None:
        """Start agents that train on shares of the digits, as `python -m edge_agent` does."""
        for i in range(self.count):
            data = {"kind": "builtin", "name": "digits", "index": i, "count": self.count}
            table = {
                "agent": f"d{i}",
                "federation": "bench",
                "vault": str(self.folder / f"d{i}"),
                "profile": "unknown-linux",
                "threads": 1,
                "mqtt": {"host": self.wire.host, "port": self.port},
                "data": data | {"limit": SAMPLES * self.count},
            }
            self.start(f"d{i}", [*self.wire.inside, sys.executable, "-m", "edge_agent", *flat(table)])

    def resting(self) -> None:
        """Wait until agents that train have introduced themselves, and their CPU has stood still a while."""
        cards = [self.folder / f"d{i}" / "identity.json" for i in range(self.count)]
        until("agents are up", lambda: self.ended() or all(card.exists() for card in cards))
        before, still_since = self.agents_cpu_s(), time.monotonic()
        while time.monotonic() < still_since + STILL_S and not self.ended():
            time.sleep(1)
            used, before = self.agents_cpu_s() - before, self.agents_cpu_s()
            still_since = still_since if used < BUSY_S else time.monotonic()
        if self.ended():
            raise SystemExit(self.log("d0"))

    def start_coordinator(self, run: Mapping[str, Any]) -> None:
        table: dict[str, Any] = {
            "federation": "bench",
            "folder": str(self.folder / "c"),
            "exit_when_done": True,
            "http.enabled": False,
            "mqtt.host": self.wire.host,
            "mqtt.port": self.port,
            "run": dict(run),
        }
        self.start("coordinator", [sys.executable, "-m", "coordinator", *flat(table)])

    def rows(self, query: str) -> list[Any]:
        """Ask the coordinator's database, which is not there before it has begun."""
        file = self.folder / "c" / "hedgerow.sqlite"
        if not file.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as db:
            try:
                return db.execute(query).fetchall()
            except sqlite3.OperationalError:
                return []  # its tables are not made yet

    def closed(self) -> list[float]:
        """When the rounds were closed, UTC seconds."""
        return [t for (t,) in self.rows("select closed from rounds where closed is not null order by round")]

    def opened(self, number: int) -> bool:
        return bool(self.rows(f"select 1 from rounds where round = {number}"))

    def until_closed(self, number: int) -> list[float]:
        """Wait for the end of a round and return when each so far ended."""
        coordinator = self.running["coordinator"]
        until(f"round {number} ends", lambda: len(self.closed()) >= number or coordinator.poll() is not None)
        found = self.closed()
        if len(found) < number:
            raise SystemExit(self.log("coordinator"))
        return found

    def agents_cpu_s(self) -> float:
        return sum(cpu_s(self.tree(f"d{i}")) for i in range(self.count))

    def payload(self) -> int:
        """Bytes of one update, float32 and dense."""
        return 4 * int((self.folder / "d0.parameters").read_text())

    def counted(self) -> list[int]:
        """Updates stored of each round."""
        return [n for (n,) in self.rows("select count(*) from updates group by round order by round")]

    def state(self, number: int) -> str | None:
        """Digest of the coordinator's state after the last round; it ends by itself."""
        self.running["coordinator"].wait(WAIT_S)
        found = self.rows(f"select sha256 from states where round = {number}")
        return str(found[0][0]) if found else None


@contextlib.contextmanager
def fleet(base: Path, agents: int, wire: Wire, port: int = 21883) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(dir=base) as place, Fleet(Path(place), agents, wire, port) as made:
        yield made


def overhead(
    base: Path, wire: Wire, agents: int, mb: int, rounds: int, encoding: str = "float32"
) -> dict[str, Any]:
    """Run rounds of empty work; the first is counted apart."""
    with fleet(base, agents, wire) as it:
        it.start_agents()
        begun = time.time()
        it.start_coordinator(empty_run(mb, rounds, agents, encoding))
        seen = len(it.until_closed(1))
        cpu, wire_before = it.agents_cpu_s(), wire.bytes()
        closed = it.until_closed(rounds)
        cpu, wire_after = it.agents_cpu_s() - cpu, wire.bytes()
        messages, payload = agents * (rounds - seen), it.payload()
        used = None if wire_before is None or wire_after is None else (wire_after - wire_before) / messages
        return {
            "rounds_s": [b - a for a, b in itertools.pairwise(closed)],
            "first_round_s": closed[0] - begun,
            "payload_mb": payload / 1e6,
            "cpu_s_per_message": cpu / messages,
            "cpu_s_per_mb": cpu / messages / (2 * payload / 1e6),
            "wire_over_payload": None if used is None else used / (2 * payload),
            "state": it.state(rounds),
        }


def training(base: Path, wire: Wire) -> dict[str, Any]:
    """Let two agents idle, then train the default strategy's default model, with its export at the end."""
    with fleet(base, 2, wire) as it:
        it.start_real_agents()
        it.resting()
        trees = [it.tree(f"d{i}") for i in range(2)]
        idle, shared = max(map(rss, trees)), max(map(pss, trees))
        with Most(lambda: [it.tree(f"d{i}") for i in range(2)]) as most:
            it.start_coordinator({"name": "r", "rounds": 2, "min_agents": 2})
            it.until_closed(2)
            it.running["coordinator"].wait(WAIT_S)
            peak = max(_peak(it.running[f"d{i}"].pid) for i in range(2))
        return {
            "idle_rss_mb": idle / 1e6,
            "idle_pss_mb": shared / 1e6,
            "training_rss_mb": max(peak, most.rss) / 1e6,
            "training_pss_mb": most.pss / 1e6,
        }


def _peak(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def idle(base: Path, wire: Wire, seconds: float) -> dict[str, Any]:
    """Count the bytes of two agents that have nothing to do, once they rest: telemetry is rare then."""
    with fleet(base, 2, wire) as it:
        it.start_real_agents()
        it.resting()
        time.sleep(RESTING_S)
        before = wire.bytes()
        time.sleep(seconds)  # what is measured is that nothing happens
        after = wire.bytes()
        known = before is not None and after is not None
        return {"bytes_per_s": (after - before) / seconds / 2 if known else None, "seconds": seconds}  # type: ignore[operator]


def unbroken(base: Path, wire: Wire) -> dict[str, Any]:
    """Run the rounds of the two kills without one, for the state they must come to."""
    with fleet(base, 2, wire) as it:
        it.start_agents()
        it.start_coordinator(empty_run(1, 3, 2))
        it.until_closed(3)
        return {"updates": it.counted(), "state": it.state(3)}


def agent_killed(base: Path, wire: Wire) -> dict[str, Any]:
    """Kill one of two agents in round 2 and start it again 3 s later; work takes 4 s."""
    with fleet(base, 2, wire) as it:
        it.start_agents(work_s=4)
        it.start_coordinator(empty_run(1, 3, 2))
        until("round 2 opens", lambda: it.opened(2))
        time.sleep(STRUCK_S)
        kept = it.folder / "d1" / "personal" / "r" / "000001.safetensors"
        before, killed = kept.read_bytes(), time.time()
        it.kill("d1")
        time.sleep(BACK_S)
        intact = kept.read_bytes() == before
        it.start_agent(1, work_s=4)
        closed = it.until_closed(3)
        told = it.rows("select at from events where kind = 'offline' and agent = 'd1' order by at")
        return {
            "noticed_s": told[0][0] - killed if told else None,
            "longer_s": (closed[1] - closed[0]) - (closed[2] - closed[1]),
            "updates": it.counted(),
            "state_kept": intact,
            "state": it.state(3),
        }


def coordinator_killed(base: Path, wire: Wire) -> dict[str, Any]:
    """Kill the coordinator in round 2; updates wait for it; from its new start to the end of the round."""
    with fleet(base, 2, wire) as it:
        it.start_agents(work_s=1.5)
        it.start_coordinator(empty_run(1, 3, 2))
        until("round 2 opens", lambda: it.opened(2))
        time.sleep(0.7)
        it.kill("coordinator")
        time.sleep(BACK_S)
        again = time.time()
        it.start_coordinator(empty_run(1, 3, 2))
        closed = it.until_closed(3)
        return {"resumed_s": closed[1] - again, "updates": it.counted(), "state": it.state(3)}
