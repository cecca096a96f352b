"""What the bench of a fleet stands on: two network namespaces, the wire between them, processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from foundation.process import bound_to_parent

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 300.0
SAMPLE_S = 0.2
ETHERNET = 14
"""Bytes of a packet on the wire that are not IP."""


def until(what: str, true: Callable[[], bool], within_s: float = WAIT_S, every_s: float = 0.01) -> None:
    """Wait for something; ends the bench where it does not come."""
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {within_s:g} s")
        time.sleep(every_s)


@dataclass(frozen=True)
class Wire:
    """Where the server side listens, how a command is started on the device side, and the wire's counters."""

    host: str
    inside: tuple[str, ...] = ()
    interface: str | None = None

    def bytes(self) -> int | None:
        """IP bytes so far, both directions; `None` on loopback."""
        if self.interface is None:
            return None
        folder = Path("/sys/class/net") / self.interface / "statistics"
        count = {
            n: int((folder / n).read_text()) for n in ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets")
        }
        return count["rx_bytes"] + count["tx_bytes"] - ETHERNET * (count["rx_packets"] + count["tx_packets"])


@contextlib.contextmanager
def network(name: str = "", subnet: int = 77) -> Iterator[Wire]:
    """Two network namespaces and a wire, removed at the end; loopback where that needs root or `ip`."""
    program, space = shutil.which("ip"), f"hedgerow-bench{name}"
    near, far = f"hgb{subnet}a", f"hgb{subnet}b"
    here, there = f"10.231.{subnet}.1", f"10.231.{subnet}.2"

    def ip(words: str) -> bool:
        return (
            subprocess.run([str(program), *words.split()], capture_output=True, check=False).returncode == 0
        )

    if program is None or os.geteuid() != 0 or not ip(f"netns add {space}"):
        yield Wire("127.0.0.1")
        return
    try:
        made = all(
            ip(words)
            for words in (
                f"link add {near} type veth peer name {far} netns {space}",
                f"addr add {here}/30 dev {near}",
                f"link set {near} up",
                f"-n {space} addr add {there}/30 dev {far}",
                f"-n {space} link set {far} up",
                f"-n {space} link set lo up",
            )
        )
        yield Wire(here, (program, "netns", "exec", space), near) if made else Wire("127.0.0.1")
    finally:
        ip(f"netns del {space}")


def environment() -> dict[str, str]:
    """What children live with: bytecode is kept, as after an installation (compiling takes memory)."""
    result = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return result | {"PYTHONPATH": str(ROOT)}


def compiled() -> None:
    """Have every module compiled once, as an installation does."""
    modules = "edge_agent.__main__, edge_agent.training.trainer, coordinator.__main__, bench.fleet_agent"
    subprocess.run([sys.executable, "-c", f"import {modules}"], env=environment(), cwd=ROOT, check=True)


class Children:
    """Processes with a log each; with their own children they end with this."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder, self.env = folder, dict(env)
        self.running: dict[str, psutil.Popen] = {}

    def start(self, name: str, command: Sequence[str], more: Mapping[str, str] | None = None) -> psutil.Popen:
        with (self.folder / f"{name}.log").open("ab") as log:
            child = psutil.Popen(
                bound_to_parent(list(command)),
                stdout=log,
                stderr=log,
                env=self.env | dict(more or {}),
                cwd=ROOT,
            )
        self.running[name] = child
        return child

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def ended(self) -> bool:
        return any(child.poll() is not None for child in self.running.values())

    def tree(self, name: str) -> list[psutil.Process]:
        """A process and all below it that are alive."""
        child = self.running[name]
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child, *child.children(recursive=True)]
        return []

    def kill(self, name: str) -> None:
        """End a process, and all below it, as a power cut would."""
        for process in self.tree(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.running.pop(name).wait()

    def stop(self) -> None:
        """Ask all to end, then see to it."""
        trees = [process for name in self.running for process in self.tree(name)]
        for child in reversed(self.running.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(trees, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for child in self.running.values():
            child.wait()
        self.running.clear()


def rss(processes: Sequence[psutil.Process]) -> int:
    """Bytes of resident memory of all of them; one that ended meanwhile counts 0."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def pss(processes: Sequence[psutil.Process]) -> int:
    """Bytes of memory of all of them, what they share with others counted in parts."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, OSError):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


class Most(threading.Thread):
    """The most memory that one of several agents had, all its processes together, looked at now and then."""

    def __init__(self, trees: Callable[[], Sequence[Sequence[psutil.Process]]]) -> None:
        super().__init__(daemon=True)
        self.trees, self.rss, self.pss, self.done = trees, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(SAMPLE_S):
            for tree in self.trees()[:2]:
                self.rss, self.pss = max(self.rss, rss(tree)), max(self.pss, pss(tree))

    def __enter__(self) -> Most:
        self.start()
        return self

    def __exit__(self, *what: object) -> None:
        self.done.set()
        self.join()


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """CPU seconds of all of them and of their children that ended."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
