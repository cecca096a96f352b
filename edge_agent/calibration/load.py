"""`python -m edge_agent.calibration.load KIND`: keeps one core busy until it is killed."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

PERIOD_S = 0.1
"""A duty of a half is busy for half of each such period."""
SIDE = 160
"""Rows of the matrices: three of them fit a small core's cache."""


def matmul() -> Callable[[], object]:
    """Return one matrix product: the arithmetic of training."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(SIDE, SIDE)).astype(np.float32) for _ in range(2))
    out = np.empty_like(a)
    return lambda: np.matmul(a, b, out=out)


def memory(mib: int) -> Callable[[], object]:
    """Return one copy of more than any cache holds, in pieces of a few milliseconds."""
    a = np.ones(mib << 17, dtype=np.float64).reshape(-1, 1 << 17)
    b = np.empty_like(a)
    rows = itertools.cycle(range(len(a)))

    def copy() -> None:
        row = next(rows)
        np.copyto(b[row], a[row])

    return copy


def run(work: Callable[[], object], duty: float) -> None:
    """Do the work over and over, for a share of every period, until killed."""
    while True:
        start = time.monotonic()
        while time.monotonic() - start < duty * PERIOD_S:
            work()
        rest = PERIOD_S - (time.monotonic() - start)
        if duty < 1 and rest > 0:
            time.sleep(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Pin, warm up, say `ready`, and work until killed."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent.calibration.load", description=__doc__)
    parser.add_argument("kind", choices=("matmul", "memory"))
    parser.add_argument("--core", type=int, help="the core to stay on")
    parser.add_argument("--duty", type=float, default=1.0, help="busy share of its time")
    parser.add_argument("--mib", type=int, default=32, help="size of the memory to copy")
    arguments = parser.parse_args(argv)
    if arguments.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {arguments.core})
    work = matmul() if arguments.kind == "matmul" else memory(max(2, arguments.mib))
    for _ in range(8):
        work()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    run(work, arguments.duty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
