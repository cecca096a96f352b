"""What a round costs beside the work: seconds, agent CPU and memory, bytes on the wire, idle traffic.

    python bench/fleet.py                     2 and 10 agents with 1 and 10 MB, five rounds each, as root
    python bench/fleet.py --agents 2 --mb 1 --rounds 5 --json

Real processes: a Mosquitto and a coordinator here, agents in a network namespace of their own behind a pair
of virtual interfaces, whose counters say the bytes (IP, both directions, acknowledgements included). The
work is empty: each agent adds a scalar to what arrived. Without root or `ip` all of it is on loopback and
bytes are unknown.

Seconds are from the end of one round to the end of the next, medians. CPU is that of an agent's whole process
over those rounds, for each message (one model down, one up). Beside them stand the bars, and what Flower 1.41
took on another day (2 cores, busier): not of this run. Ends with 1 where a round is over its bar.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from edge_agent.agent import RESTING_S
from foundation.process import bound_to_parent
from hedgerow.broker import find_broker

SPACE, HERE, THERE = "hedgerow-bench", "10.231.77.1", "10.231.77.2"
WIDTHS = {1: 104, 10: 324}
"""Model width that makes so many MB of float32."""
FLOWER = {(2, 1): 6.67, (2, 10): 10.3, (10, 1): 26.9, (10, 10): 28.6}
BARS = {(2, 1): 0.3, (2, 10): 1.5, (10, 1): 1.0, (10, 10): 6.0}
IDLE_S = 300.0
WAIT_S = 300.0


def until(what: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {WAIT_S:g} s")
        time.sleep(0.01)


@contextlib.contextmanager
def network() -> Iterator[list[str] | None]:
    """Two network namespaces and a wire; gives what starts a command in the other, `None` without root."""

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0

    there = shutil.which("ip") is not None and os.geteuid() == 0 and ip("netns", "add", SPACE)
    if not there:
        yield None
        return
    try:
        made = (
            ip("link", "add", "hgb0", "type", "veth", "peer", "name", "hgb1", "netns", SPACE)
            and ip("addr", "add", f"{HERE}/30", "dev", "hgb0")
            and ip("link", "set", "hgb0", "up")
            and ip("-n", SPACE, "addr", "add", f"{THERE}/30", "dev", "hgb1")
            and ip("-n", SPACE, "link", "set", "hgb1", "up")
            and ip("-n", SPACE, "link", "set", "lo", "up")
        )
        yield [str(shutil.which("ip")), "netns", "exec", SPACE] if made else None
    finally:
        ip("netns", "del", SPACE)


def flat(table: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Write a table as `--set` options."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield from ("--set", f"{above}{key}={value if isinstance(value, str) else json.dumps(value)}")


def wire_bytes() -> int | None:
    """IP bytes over the wire so far, both directions."""
    folder = Path("/sys/class/net/hgb0/statistics")
    if not folder.exists():
        return None
    names = ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets")
    count = {name: int((folder / name).read_text()) for name in names}
    return count["rx_bytes"] + count["tx_bytes"] - 14 * (count["rx_packets"] + count["tx_packets"])


class Fleet:
    """One broker, one coordinator, agents; all are ended at the end."""

    def __init__(self, folder: Path, agents: int, inside: list[str] | None) -> None:
        self.folder, self.count, self.inside = folder, agents, inside
        self.host = HERE if inside else "127.0.0.1"
        self.port = 21883
        self.children: list[subprocess.Popen[bytes]] = []
        self.agents: list[psutil.Process] = []

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(bound_to_parent(list(command)), stdout=log, stderr=log)
        self.children.append(child)
        return child

    def broker(self) -> None:
        program = find_broker("mosquitto")
        if program is None:
            raise SystemExit("no mosquitto here: apt install mosquitto")
        config = self.folder / "mosquitto.conf"
        text = f"listener {self.port} {self.host}\nallow_anonymous true\nset_tcp_nodelay true\n"
        config.write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
        self.start("broker", [str(program.path), "-c", str(config)])

    def start_agents(self) -> None:
        for i in range(self.count):
            here = [sys.executable, __file__, "--as-agent", f"d{i}", "--folder", str(self.folder)]
            child = self.start(f"d{i}", [*(self.inside or []), *here, "--at", f"{self.host}:{self.port}"])
            self.agents.append(psutil.Process(child.pid))
        names = [f"d{i}" for i in range(self.count)]
        until("agents are up", lambda: self.ended() or all((self.folder / f"{n}.up").exists() for n in names))
        if self.ended():
            raise SystemExit((self.folder / "d0.log").read_text()[-3000:])

    def ended(self) -> bool:
        return any(child.poll() is not None for child in self.children)

    def start_coordinator(self, mb: int, rounds: int) -> None:
        table: dict[str, Any] = {
            "federation": "bench",
            "folder": str(self.folder / "c"),
            "exit_when_done": True,
            "http.enabled": False,
            "mqtt.host": self.host,
            "mqtt.port": self.port,
            "run": {
                "name": "r",
                "strategy": "fedavg",
                "settings": {"encoding": "float32"},
                "encoding": "float32",
                "rounds": rounds,
                "min_agents": self.count,
                "export": False,
                "deadline_s": WAIT_S,
                "model": {"width": WIDTHS[mb], "depth": 2, "heads": 4, "ffl_ratio": 4, "patch": 2},
            },
        }
        sets = list(flat(table))
        self.coordinator = self.start("coordinator", [sys.executable, "-m", "coordinator", *sets])

    def closed(self) -> list[float]:
        """When the rounds were closed, UTC seconds."""
        file = self.folder / "c" / "hedgerow.sqlite"
        if not file.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as db:
            try:
                return [
                    t
                    for (t,) in db.execute(
                        "select closed from rounds where closed is not null order by round"
                    )
                ]
            except sqlite3.OperationalError:
                return []  # its tables are not made yet

    def payload(self) -> int:
        """Bytes of one update's frame, float32 and dense."""
        return 4 * int((self.folder / "d0.parameters").read_text())

    def cpu_s(self) -> float:
        return sum(sum(agent.cpu_times()[:2]) for agent in self.agents)

    def stop(self) -> None:
        for child in reversed(self.children):
            child.send_signal(signal.SIGTERM)
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()
            child.wait()


def measured(agents: int, mb: int, rounds: int, inside: list[str] | None, idle_s: float) -> dict[str, Any]:
    """Run one federation and return its figures."""
    with tempfile.TemporaryDirectory() as place:
        fleet = Fleet(Path(place), agents, inside)
        try:
            fleet.broker()
            fleet.start_agents()
            idle: float | None = None
            rss = max(agent.memory_info().rss for agent in fleet.agents)
            if idle_s:
                time.sleep(RESTING_S + 5)  # until it rests: introductions are over, telemetry is rare
                before = wire_bytes()
                time.sleep(idle_s)  # what is measured is that nothing happens
                after = wire_bytes()
                idle = None if before is None or after is None else (after - before) / idle_s / agents
            begun = time.time()
            fleet.start_coordinator(mb, rounds)
            until("round 1 ends", lambda: len(fleet.closed()) >= 1 or fleet.coordinator.poll() is not None)
            cpu, wire = fleet.cpu_s(), wire_bytes()
            seen = len(fleet.closed())
            until(
                "the run ends", lambda: len(fleet.closed()) >= rounds or fleet.coordinator.poll() is not None
            )
            cpu_used, wire_after, closed = fleet.cpu_s() - cpu, wire_bytes(), fleet.closed()
            if len(closed) < rounds:
                raise SystemExit((fleet.folder / "coordinator.log").read_text()[-3000:])
            messages, payload = agents * (rounds - seen), fleet.payload()
            used = None if wire is None or wire_after is None else (wire_after - wire) / messages
            return {
                "agents": agents,
                "mb": payload / 1e6,
                "round_s": statistics.median(b - a for a, b in itertools.pairwise(closed)),
                "bar_s": BARS.get((agents, mb)),
                "flower_s_other_day": FLOWER.get((agents, mb)),
                "first_round_s": closed[0] - begun,
                "cpu_s_per_message": cpu_used / messages,
                "cpu_s_per_mb": cpu_used / messages / (2 * payload / 1e6),
                "wire_over_payload": None if used is None else used / (2 * payload),
                "idle_bytes_per_s": idle,
                "idle_rss_mb": rss / 1e6,
                "load": os.getloadavg()[0],
            }
        finally:
            fleet.stop()


def as_agent(name: str, folder: Path, at: str) -> None:
    """Be an agent whose work is empty."""
    from edge_agent.agent import OFFLINE, Agent
    from edge_agent.datasets import DataSettings, load
    from edge_agent.energy.meter import Meter
    from edge_agent.settings import AgentSettings
    from foundation.mqtt import MqttSettings, MqttTransport
    from foundation.profile import DeviceProfile
    from foundation.topics import Topics, client_id

    def nothing(task: Any, hooks: Any) -> Any:
        import numpy as np

        from edge_agent.training.trainer import Outcome, Probe

        arrays = [(key, np.asarray(value) + np.float32(1e-3)) for key, value in task.start.items()]
        (folder / f"{name}.parameters").write_text(str(sum(array.size for _, array in arrays)))
        start = type(task.start)(arrays)
        widths = (task.spec.hidden,) * task.spec.depth
        empty = np.zeros((0,), np.float32)
        return Outcome(start, {}, widths, {"accuracy": 0.0, "accuracy_sent": 0.0}, 0, Probe(empty, empty))

    host, port = at.split(":")
    settings = AgentSettings(
        agent=name,
        federation="bench",
        vault=folder / name,
        data=DataSettings(kind="builtin", name="digits"),
        mqtt=MqttSettings(host=host, port=int(port), connect_timeout_s=None),
    )
    will = (Topics("bench").of(name, "presence"), OFFLINE.model_dump_json().encode())
    transport = MqttTransport(settings.mqtt, client_id("bench", name), will=will)

    async def live(meter: Meter) -> None:
        agent = Agent(
            settings,
            transport=transport,
            meter=meter,
            profile="unknown-linux",
            threads=1,
            load_data=lambda: load(settings.data, None, folder / name),
            carry_out=nothing,
        )
        task = asyncio.ensure_future(agent.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        while not transport.connected and not task.done():
            await asyncio.sleep(0.01)
        (folder / f"{name}.up").touch()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    with Meter(DeviceProfile.load("unknown-linux")) as meter:
        asyncio.run(live(meter))


def show(found: list[dict[str, Any]]) -> None:
    columns = list(found[0])
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in found:
        cells = ["unknown" if v is None else f"{v:.3g}" for v in row.values()]
        print(f"| {' | '.join(cells)} |")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, action="append", help="how many; may be given again")
    parser.add_argument("--mb", type=int, action="append", choices=WIDTHS, help="may be given again")
    parser.add_argument("--rounds", type=int, default=6, help="the first is counted apart")
    parser.add_argument("--idle", type=float, default=IDLE_S, help="seconds of idling, once; 0 leaves it out")
    parser.add_argument("--json", action="store_true")
    for hidden in ("--as-agent", "--at"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.as_agent:
        as_agent(a.as_agent, a.folder, a.at)
        return 0
    found: list[dict[str, Any]] = []
    with network() as inside:
        for agents in a.agents or (2, 10):
            for mb in a.mb or (1, 10):
                print(f"{agents} agents, {mb} MB ...", file=sys.stderr)
                found.append(measured(agents, mb, a.rounds, inside, 0 if found else a.idle))
    if a.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    missed = [f for f in found if f["bar_s"] is not None and f["round_s"] > f["bar_s"]]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
