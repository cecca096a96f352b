"""The load steps of a calibration: which, in what order, and the child processes that carry them out.

Children are pinned to cores, in a process group of their own, and end with this process whatever ends it.
"""

from __future__ import annotations

import math
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Self

import psutil

from foundation.calibration import Block
from foundation.errors import HedgerowError
from foundation.process import bound_to_parent

READY_S = 180.0
"""torch takes half a minute to load on the slowest boards."""
MOST_MIB = 64
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
GPU_PROGRAM = (sys.executable, "-m", "edge_agent.training.gpu_load")
LOWER_CLOCKS = (0.0, 0.5)
"""Shares of the clock's range at which the processor is loaded as well, where it can be held there."""


@dataclass(frozen=True, slots=True)
class Load:
    """One kind and amount of load."""

    name: str
    block: Block
    busy: float = 0.0
    """Share of all cores that is meant to be busy; what was busy is measured."""
    hold_out: bool = False
    clock: float = 1.0
    """Share of its range that the processor's clock is held down to; 1 leaves it alone."""
    way: str = ""
    """Of traffic: `up`, or `both` where it comes back."""


IDLE = Load("idle", "idle")
CORES = tuple(
    Load(f"cores-{percent}", "cores", percent / 100, hold_out=percent == 75) for percent in (25, 50, 75, 100)
)
MORE = (Load("duty-50", "duty", 0.5), Load("duty-100", "duty", 1.0), Load("memory-100", "memory", 1.0))
CLOCK = tuple(
    Load(f"clock-{share:.0%}-cores-{busy:.0%}".replace("%", ""), "clock", busy, clock=share)
    for share in LOWER_CLOCKS
    for busy in (0.5, 1.0)
)
GPU = tuple(Load(f"gpu-{percent}", "gpu", percent / 100) for percent in (50, 100))
NETWORK = tuple(
    Load(f"net-{way}-{percent}", "network", percent / 100, way=way)
    for way in ("up", "both")
    for percent in (50, 100)
)
TRAINING = Load("training", "training", 1.0, hold_out=True)


def plan(
    seed: int, *, quick: bool = False, clock: bool = False, gpu: bool = False, net: bool = False
) -> tuple[Load, ...]:
    """Return the loads in an order drawn from a seed, with idle first, in the middle and last.

    `clock` says that the processor's clock can be held down, `gpu` that there is a GPU to load, `net`
    that there is a broker to send to.
    """
    loads = [*CORES, TRAINING] if quick else [*CORES, *MORE, TRAINING]
    loads += CLOCK if clock else ()
    loads += GPU if gpu else ()
    loads += NETWORK if net else ()
    random.Random(seed).shuffle(loads)
    middle = len(loads) // 2
    return (IDLE, *loads[:middle], IDLE, *loads[middle:], IDLE)


def commands(load: Load, cores: Sequence[int], threads: int) -> list[list[str]]:
    """Return the programs that make a load: one for each core, or the trainer on so many threads."""
    kernel = [sys.executable, "-m", "edge_agent.calibration.load"]
    match load.block:
        case "idle":
            return []
        case "training":
            return [[sys.executable, "-m", "edge_agent.training.load", "--threads", str(threads)]]
        case "duty":
            duties = [load.busy] * len(cores)
        case "memory":
            free = psutil.virtual_memory().available >> 20
            mib = max(2, min(MOST_MIB, free // (4 * len(cores))))
            return [[*kernel, "memory", "--core", str(core), "--mib", str(mib)] for core in cores]
        case "gpu":
            return [[*GPU_PROGRAM, "--duty", f"{load.busy:g}"]]
        case "network":
            program = [sys.executable, "-m", "edge_agent.calibration.net_load", load.way]
            return [[*program, "--duty", f"{load.busy:g}"]]
        case "cores" | "clock":
            duties = duties_of(load.busy, len(cores))
    return [
        [*kernel, "matmul", "--core", str(core), "--duty", f"{duty:g}"]
        for core, duty in zip(cores, duties, strict=False)
    ]


def duties_of(busy: float, cores: int) -> list[float]:
    """Return what each used core does: whole cores, and one for the part of a core that is left."""
    whole, part = divmod(busy * cores, 1.0)
    return [1.0] * math.floor(whole) + ([part] if part > 0.01 else [])


def gpu_works() -> str | None:
    """Return why this machine's torch cannot load its GPU; `None` where it can. Asks a process of its own."""
    try:
        done = subprocess.run(
            [*GPU_PROGRAM, "--check"], capture_output=True, text=True, timeout=READY_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "torch did not answer"
    return None if done.returncode == 0 else done.stderr.strip()[-300:] or "torch cannot use it"


def usable_cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count() or 1))


class Running:
    """A load while it runs: `with Running(commands) as load:` returns once every child is at work."""

    def __init__(self, programs: Sequence[Sequence[str]]) -> None:
        self._programs = programs
        self._children: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        """With what each writes to its standard error."""

    def __enter__(self) -> Self:
        try:
            for program in self._programs:
                self._start(program)
            deadline = time.monotonic() + READY_S
            for child, _ in self._children:
                self._wait(child, deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pids(self) -> list[int]:
        """The children."""
        return [child.pid for child, _ in self._children]

    def check(self) -> None:
        """Raise `HedgerowError` with its last words if a child has ended."""
        for child, said in self._children:
            if child.poll() is not None:
                said.seek(0)
                words = said.read()[-2000:].decode(errors="replace").strip()
                raise HedgerowError(f"a load ended by itself with code {child.returncode}: {words}")

    def stop(self) -> None:
        """End all children."""
        for child, _ in self._children:
            child.kill()
        for child, said in self._children:
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
            said.close()
        self._children = []

    def _start(self, program: Sequence[str]) -> None:
        said = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child; stop() closes it
        try:
            child = subprocess.Popen(
                bound_to_parent(program),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                env={**os.environ, **({} if "edge_agent.training.load" in program else ONE_THREAD)},
                process_group=0,  # so that Ctrl-C reaches us, and we end them
            )
        except BaseException:  # Ctrl-C in the middle of it, too; a child that is there ends with us
            said.close()
            raise
        self._children.append((child, said))

    def _wait(self, child: subprocess.Popen[bytes], deadline: float) -> None:
        assert child.stdout is not None
        while not select.select([child.stdout], [], [], 0.1)[0]:
            self.check()
            if time.monotonic() > deadline:
                raise HedgerowError(f"a load did not begin within {READY_S:g} s")
        if child.stdout.readline().strip() != b"ready":
            child.wait()
            self.check()
