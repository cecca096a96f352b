"""A thousand connected agents on one machine: seconds a round, CPU an update, memory, bytes, idle traffic.

    python bench/thousand.py                         100, 300 and 1,000 agents, two rounds each
    python bench/thousand.py --quick                 50 agents, one round: does it work here?
    python bench/thousand.py --agents 1000 --rounds 5 --idle 60 --json FILE
    python bench/thousand.py --rule median           a rule that needs everybody's values at once

Real processes: a broker with the configuration that we ship, a coordinator, and two processes of virtual
agents (bench/thousand_agents.py), each agent with an MQTT connection of its own. Work is empty: an update is
there as soon as its assignment is, so all of them come at once. All of it shares this machine, so a round's
seconds have the agents' own coding in them, which devices would do at their own expense; their CPU is told
apart.

One round goes before those that are measured. Seconds are from the end of one round to the end of the next,
medians; CPU is user and system time of a process between the same two instants; memory is the largest
resident set of a process so far (VmHWM), of the coordinator also as it was after each round. Everything is
measured but `update_mb`, which is agents times the size of a frame. The bars are those of issue 6: round
<= 60 s, coordinator <= 500 MB, and a coordinator that does not grow with the number of updates: from the
fewest agents to the most by at most a quarter of what the updates weigh. One page is open all the time. Ends
with 1 where a bar is missed. Each agent takes a file here and one in the broker: `ulimit -n` of 4,096 is
enough for 1,000.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.fleet_ours import flat
from bench.thousand_agents import more_files
from foundation.parameters import layout_size
from foundation.process import bound_to_parent
from foundation.spec import ModelSettings
from hedgerow.broker import EmbeddedBroker

CROWDS = 2
"""Processes that the agents share."""
WIDTHS = {"float32": 4, "float16": 2, "int8": 1}
"""Bytes of a value."""
FILES_EACH, FILES_BESIDE = 1, 200
"""Files that a process has open for each of its agents, and beside them."""
QUICK = 50
ROUND_S, MOST_MB, GROWTH = 60.0, 500.0, 0.25
WAIT_S = 900.0


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {words}", file=sys.stderr, flush=True)


def model_of(payload_kb: float, encoding: str) -> dict[str, int]:
    """Return the model whose update is the nearest to so many KB."""
    shape = {"depth": 2, "heads": 4, "ffl_ratio": 4, "patch": 2}

    def kb(width: int) -> float:
        spec = ModelSettings(width=width, **shape).spec("image", (1, 8, 8), 10)
        return layout_size(spec.layout) * WIDTHS[encoding] / 1e3

    return {"width": min(range(4, 1025, 4), key=lambda width: abs(kb(width) - payload_kb)), **shape}


def check_files(agents: int) -> None:
    """End with what to do where the system allows too few files for so many agents."""
    needed, allowed = FILES_EACH * agents + FILES_BESIDE, more_files()
    if allowed < needed:  # the broker has all of them
        raise SystemExit(
            f"{agents} agents need {needed} open files, {allowed} are allowed: ulimit -n {needed}"
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def peak_mb(pid: int) -> float:
    """Largest resident set so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e6


class Stage:
    """One broker, one coordinator, and the processes of the agents; all are ended at the end."""

    def __init__(self, folder: Path, agents: int, options: argparse.Namespace) -> None:
        self.folder, self.agents, self.options = folder, agents, options
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.broker = EmbeddedBroker(folder / "broker", prefer=options.broker)
        self.page = free_port()
        self.after_rounds: list[float] = []
        """MB of the coordinator after each round."""

    def start(self, name: str, command: Sequence[str]) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        with (self.folder / f"{name}.log").open("wb") as log:
            self.children[name] = subprocess.Popen(
                bound_to_parent(list(command)), stdout=log, stderr=log, env=environment
            )

    def start_agents(self) -> None:
        share = -(-self.agents // CROWDS)
        for i, first in enumerate(range(0, self.agents, share)):
            count = min(share, self.agents - first)
            words = {
                "--port": self.broker.port,
                "--first": first,
                "--count": count,
                "--status": self.status(i),
            }
            command = [sys.executable, "-m", "bench.thousand_agents"]
            self.start(f"agents-{i}", [*command, *(str(word) for pair in words.items() for word in pair)])

    def start_coordinator(self) -> None:
        o = self.options
        table: dict[str, Any] = {
            "federation": "bench",
            "folder": str(self.folder / "c"),
            "log_level": "WARNING",
            "http.port": self.page,
            "mqtt.port": self.broker.port,
            "run": {
                "name": "r",
                "strategy": o.strategy,
                "settings": {"encoding": o.encoding},
                "encoding": o.encoding,
                "rounds": o.rounds + 1,
                "min_agents": self.agents,
                "quorum": 1.0,
                "export": False,
                "deadline_s": WAIT_S,
                "model": model_of(o.payload_kb, o.encoding),
                "robust": {"rule": o.rule},
            },
        }
        words = list(flat(table))
        self.start("coordinator", [sys.executable, "-m", "coordinator", *words])

    def status(self, i: int) -> Path:
        return self.folder / f"agents-{i}.json"

    def told(self) -> dict[str, Any]:
        """What the agents say of themselves, added up."""
        found: list[dict[str, Any]] = []
        for i in range(CROWDS):
            with contextlib.suppress(FileNotFoundError):
                found.append(json.loads(self.status(i).read_text()))
        names = [n for n, value in (found[0] if found else {}).items() if isinstance(value, int | float)]
        result: dict[str, Any] = {name: sum(one[name] for one in found) for name in names}
        result["update_bytes"] = max((one["update_bytes"] for one in found), default=0)
        result["reasons"] = [reason for one in found for reason in one["reasons"]]
        return result

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        file = self.folder / "c" / "hedgerow.sqlite"
        if not file.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30)) as db:
            try:
                return db.execute(query).fetchall()
            except sqlite3.OperationalError:
                return []  # its tables are not made yet

    def closed(self) -> list[float]:
        return [t for (t,) in self.rows("select closed from rounds where closed is not null order by round")]

    def until(self, what: str, true: Callable[[], bool], shown: Callable[[], str]) -> None:
        deadline, said = time.monotonic() + WAIT_S, time.monotonic()
        while not true():
            for name, child in self.children.items():
                if child.poll() is not None:
                    tail = (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]
                    raise SystemExit(f"{name} ended with {child.returncode}:\n{tail}")
            if time.monotonic() > deadline:
                raise SystemExit(f"{what}: not within {WAIT_S:g} s ({shown()})")
            if time.monotonic() - said > 5:
                said = time.monotonic()
                say(f"  {what}: {shown()}")
            time.sleep(0.2)

    def process(self, name: str) -> psutil.Process:
        if name != "broker":
            return psutil.Process(self.children[name].pid)
        assert self.broker.pid is not None, "the broker has ended"
        return psutil.Process(self.broker.pid)

    def look(self) -> list[float]:
        """Return when rounds closed, and note the coordinator's memory after each."""
        closed = self.closed()
        while len(self.after_rounds) < len(closed):
            self.after_rounds.append(self.process("coordinator").memory_info().rss / 1e6)
        return closed

    def cpu_s(self, name: str) -> float:
        times = self.process(name).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        for child in reversed(self.children.values()):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for child in reversed(self.children.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30)
            child.kill()
            child.wait()
        self.broker.stop()


class Page(threading.Thread):
    """Somebody who has the page open: reads the event stream until the coordinator ends."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.bytes = port, 0
        self.problem: str | None = None

    def run(self) -> None:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}/api/v1/events", timeout=WAIT_S
            ) as stream:
                while data := stream.read1(65_536):
                    self.bytes += len(data)
        except (OSError, http.client.HTTPException) as error:  # the end of the coordinator is one, too
            self.problem = str(error)


def fetched_ms(port: int, path: str) -> float:
    """Milliseconds until an address has answered in full, the median of five."""
    found = []
    for _ in range(5):
        begun = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            answer.read()
        found.append(1000 * (time.monotonic() - begun))
    return statistics.median(found)


def measured(stage: Stage) -> dict[str, Any]:
    """Run one federation and return its figures."""
    o, agents = stage.options, stage.agents
    stage.broker.start()
    stage.start_agents()
    stage.until(
        "connecting",
        lambda: stage.told().get("connected") == agents,
        lambda: f"{stage.told().get('connected')} of {agents}",
    )
    begun = time.time()
    stage.start_coordinator()
    stage.until(
        "introducing",
        lambda: bool(stage.rows("select 1 from rounds")),
        lambda: f"{len(stage.rows('select agent from agents'))} of {agents} cards in the store",
    )
    introduced = stage.rows("select opened from rounds where round = 1")[0][0] - begun
    page = Page(stage.page)
    page.start()
    before_rounds = stage.process("coordinator").memory_info().rss / 1e6

    def shown() -> str:
        here = stage.process("coordinator").memory_info().rss / 1e6
        return f"{len(stage.closed())} rounds, {stage.told()['stored']:,} updates stored, {here:.0f} MB"

    stage.until("round 1", lambda: len(stage.look()) >= 1, shown)
    cpu, crowd, wire = stage.cpu_s("coordinator"), stage.told(), stage.told()
    broker_cpu, seen = stage.cpu_s("broker"), len(stage.look())
    stage.until("rounds", lambda: len(stage.look()) > o.rounds, shown)
    cpu_used, broker_used = stage.cpu_s("coordinator") - cpu, stage.cpu_s("broker") - broker_cpu
    stage.until("the last receipts", lambda: stage.told()["stored"] >= agents * (o.rounds + 1), shown)
    after, closed = stage.told(), stage.closed()
    updates = agents * (o.rounds + 1 - seen)
    idle = idle_of(stage) if o.idle else {}
    found = {
        "agents": agents,
        "update_kb": after["update_bytes"] / 1e3,
        "update_mb": agents * after["update_bytes"] / 1e6,
        "round_s": statistics.median(b - a for a, b in itertools.pairwise(closed)),
        "slowest_round_s": max(b - a for a, b in itertools.pairwise(closed)),
        "first_round_s": closed[0] - begun - introduced,
        "introduced_s": introduced,
        "coordinator_cpu_ms_per_update": 1e3 * cpu_used / updates,
        "broker_cpu_ms_per_update": 1e3 * broker_used / updates,
        "agent_cpu_ms_per_update": 1e3 * (after["cpu_s"] - crowd["cpu_s"]) / updates,
        "coordinator_mb": peak_mb(stage.children["coordinator"].pid),
        "coordinator_mb_before_rounds": before_rounds,
        **{f"coordinator_mb_after_round_{i}": mb for i, mb in enumerate(stage.after_rounds, start=1)},
        "broker_mb": peak_mb(stage.process("broker").pid),
        "kb_up_per_update": (after["sent_bytes"] - wire["sent_bytes"]) / updates / 1e3,
        "kb_down_per_update": (after["received_bytes"] - wire["received_bytes"]) / updates / 1e3,
        "lost_connections": after["lost"],
        "refused": after["refused"],
        **idle,
        "page_ms": fetched_ms(stage.page, "/"),
        "status_ms": fetched_ms(stage.page, "/api/v1/status"),
        "load": os.getloadavg()[0],
    }
    if after["reasons"]:
        say(f"  refused: {after['reasons']}")
    if page.problem:
        say(f"  the page's stream broke: {page.problem}")
    return found


def idle_of(stage: Stage) -> dict[str, float]:
    """Bytes and CPU while nothing happens."""
    seconds = stage.options.idle
    say(f"  idling for {seconds:g} s")
    time.sleep(2)
    before, cpu = stage.told(), stage.cpu_s("coordinator")
    time.sleep(seconds)  # what is measured is that nothing happens
    after = stage.told()
    moved = sum(after[name] - before[name] for name in ("sent_bytes", "received_bytes"))
    past = (after["at"] - before["at"]) / CROWDS
    return {
        "idle_bytes_per_s_per_agent": moved / past / stage.agents,
        "idle_coordinator_cpu": (stage.cpu_s("coordinator") - cpu) / seconds,
    }


def verdicts(found: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """The bars, each in words, and whether it is met."""
    most, least = found[-1], found[0]
    result = [
        (f"round {most['round_s']:.1f} s, bar {ROUND_S:g} s", most["round_s"] <= ROUND_S),
        (
            f"coordinator {most['coordinator_mb']:.0f} MB, bar {MOST_MB:g} MB",
            most["coordinator_mb"] <= MOST_MB,
        ),
    ]
    if most["agents"] > least["agents"]:
        grown = most["coordinator_mb"] - least["coordinator_mb"]
        weigh = (most["agents"] - least["agents"]) * most["update_kb"] / 1e3
        words = (
            f"coordinator grew by {grown:.0f} MB from {least['agents']} to {most['agents']} agents, whose"
            f" updates weigh {weigh:.0f} MB more, bar {GROWTH * weigh:.0f} MB"
        )
        result.append((words, grown <= GROWTH * weigh))
    return result


def show(found: list[dict[str, Any]]) -> None:
    for name in found[-1]:
        cells = " | ".join(f"{row[name]:,.4g}" if name in row else "-" for row in found)
        print(f"| {name} | {cells} |")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, action="append", help="how many; may be given again")
    parser.add_argument("--payload-kb", type=float, default=100.0, help="size of an update's arrays, about")
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds; one more comes before them")
    parser.add_argument("--broker", choices=("mosquitto", "nats"), default="mosquitto")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} agents and one measured round")
    parser.add_argument("--idle", type=float, default=0.0, help="seconds of idling with the most agents")
    parser.add_argument("--strategy", default="fedavg")
    parser.add_argument("--encoding", choices=WIDTHS, default="float32")
    parser.add_argument("--rule", default="mean", help="run.robust.rule")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    o = parser.parse_args(argv)
    if o.quick:
        o.agents, o.rounds = o.agents or [QUICK], 1
    counts, idle, found = sorted(o.agents or [100, 300, 1000]), o.idle, []
    check_files(counts[-1])
    for agents in counts:
        say(f"{agents} agents, updates of about {o.payload_kb:g} KB as {o.encoding}, rule {o.rule}")
        o.idle = idle if agents == counts[-1] else 0
        with tempfile.TemporaryDirectory() as folder:
            stage = Stage(Path(folder), agents, o)
            try:
                found.append(measured(stage))
            finally:
                stage.stop()
        row = found[-1]
        say(f"  a round in {row['round_s']:.1f} s, coordinator at most {row['coordinator_mb']:.0f} MB")
    judged = verdicts(found)
    show(found)
    for words, met in judged:
        print(f"{'met   ' if met else 'MISSED'}  {words}")
    if o.json is not None:
        told = {"figures": found, "bars": [{"bar": words, "met": met} for words, met in judged]}
        o.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0 if all(met for _, met in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
