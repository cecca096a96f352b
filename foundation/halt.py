"""Named points at which a process stops itself, so that it can be killed right there; off by default.

Only for tests of faults (`hedgerow doctor --chaos`). `HEDGEROW_HALT` in the environment names a folder. A
file `STAGE-ROUND` in it makes the process that comes to that point of that round write its pid into it, call
it `STAGE-ROUND.reached` and stop (SIGSTOP) until it is killed or gets SIGCONT. Each file works once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "HEDGEROW_HALT"
REACHED = ".reached"


def at(stage: str, round: int | None) -> None:
    """Stop here if somebody asked for it; without the variable this is one look into the environment."""
    folder = os.environ.get(VARIABLE)
    if not folder or not hasattr(signal, "SIGSTOP"):
        return
    asked = Path(folder) / f"{stage}-{round}"
    if not asked.exists():
        return
    asked.write_text(str(os.getpid()))
    try:
        asked.replace(asked.with_suffix(REACHED))
    except FileNotFoundError:
        return  # taken back at this very moment
    os.kill(os.getpid(), signal.SIGSTOP)
