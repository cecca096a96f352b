"""`python -m edge_agent.training.gpu_load`: keeps the GPU busy with matrix products until it is killed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

SIDE = 1024
PERIOD_S = 0.1
"""A duty of a half is busy for half of each such period."""


def main(argv: Sequence[str] | None = None) -> int:
    """Say `ready` once it is busy, and work; returns 1, with the reason, where torch has no GPU."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent.training.gpu_load", description=__doc__)
    parser.add_argument("--duty", type=float, default=1.0, help="busy share of its time")
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU to load")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("the torch that is installed cannot use a GPU\n")
        return 1
    if not arguments.check:
        _run(arguments.duty)
    return 0


def _run(duty: float) -> None:
    a, b = (torch.randn(SIDE, SIDE, device="cuda") for _ in range(2))
    torch.mm(a, b)
    torch.cuda.synchronize()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        start = time.monotonic()
        while time.monotonic() - start < duty * PERIOD_S:
            torch.mm(a, b)
            torch.cuda.synchronize()
        rest = PERIOD_S - (time.monotonic() - start)
        if duty < 1 and rest > 0:
            time.sleep(rest)


if __name__ == "__main__":
    sys.exit(main())
