"""What a fleet costs beside its work, and what a kill costs it, side by side with Flower in the same run.

    python bench/fleet.py                                           Hedgerow alone, as root; ten minutes
    python bench/fleet.py --flower-python X/bin/python --json FILE  both; half an hour
    python bench/fleet.py --quick                                   2 agents, 1 MB, three rounds; five minutes

Flower is installed apart: `python -m venv X; X/bin/pip install flwr==1.41.0` (torch, for the row about
training, is that of this environment, lent, unless X has its own). It runs without internet: telemetry and
update check off, nothing installed at run time. Without it its column says that it was not there.

Real processes on both sides: the server and, for Hedgerow, a Mosquitto here; the agents in a network
namespace of their own behind a pair of virtual interfaces, whose counters say the bytes (IP, both directions,
acknowledgements included). Work is empty: each agent adds a scalar of its own to what arrived. Without root
or `ip` all of it is on loopback, and bytes are unknown.

Seconds are from the end of one round to the end of the next, medians; the first round is counted apart. CPU
is that of all processes of an agent over those rounds. RSS and PSS of an agent are those of all its processes
together. Figures of another day are in a column of their own, quoted, and enter nothing. Ends with 1 where a
bar is missed, or something of Hedgerow failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import fleet_flower as flower
from bench import fleet_ours as ours
from bench.fleet_net import Wire, compiled, network
from bench.fleet_table import ROUND_BARS_S, Row, markdown, rows

IDLE_S = 300.0
MB = 1_000_000


def attempt(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure one case; where it does not come to its end, the reason is what was found."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    load = os.getloadavg()[0]
    try:
        return measure() | {"load": [load, os.getloadavg()[0]]}
    except (SystemExit, TimeoutError) as error:
        last = [line for line in str(error).splitlines() if line.strip()][-1:]
        print(f"{what}: {error}", file=sys.stderr)
        return {"failed": last[0] if last else type(error).__name__}


class Bench:
    """Both sides, case by case in turn."""

    def __init__(self, base: Path, wire: Wire, a: argparse.Namespace) -> None:
        self.base, self.wire, self.a = base, wire, a
        self.python: Path | None = a.flower_python
        self.ours: dict[str, Any] = {}
        self.peer: dict[str, Any] = {}

    def our(self, case: str, measure: Callable[[], dict[str, Any]]) -> None:
        self.ours[case] = attempt(f"Hedgerow: {case}", measure)

    def their(self, case: str, measure: Callable[[Path], dict[str, Any]]) -> None:
        python = self.python
        if python is not None:
            self.peer[case] = attempt(f"Flower: {case}", lambda: measure(python))

    def overheads(self) -> None:
        base, wire, rounds = self.base, self.wire, self.a.rounds + 1
        for agents, mb in ((n, m) for n in self.a.agents for m in self.a.mb):
            case = f"{agents}x{mb}"
            self.our(case, lambda n=agents, m=mb: ours.overhead(base, wire, n, m, rounds))  # type: ignore[misc]
            size = int(MB * self.ours[case].get("payload_mb", mb))
            self.their(
                case,
                lambda python, n=agents, s=size: flower.overhead(base, python, wire, n, s, rounds),  # type: ignore[misc]
            )
        self.our("own codec", lambda: ours.overhead(base, wire, 2, 1, 4, ours.OWN_ENCODING))

    def training(self) -> None:
        self.our("training", lambda: ours.training(self.base, self.wire))
        self.their("training", lambda python: flower.training(self.base, python, self.wire))

    def kills(self) -> None:
        base, wire = self.base, self.wire
        self.our("unbroken", lambda: ours.unbroken(base, wire))
        self.our("agent killed", lambda: ours.agent_killed(base, wire))
        self.their("agent killed", lambda python: flower.node_killed(base, python, wire, MB))
        self.our("coordinator killed", lambda: ours.coordinator_killed(base, wire))
        self.their("coordinator killed", lambda python: flower.link_killed(base, python, wire, MB))

    def idle(self) -> None:
        if self.a.idle > 0:
            self.our("idle", lambda: ours.idle(self.base, self.wire, self.a.idle))
            self.their(
                "idle", lambda python: flower.idle(self.base, python, self.wire, min(self.a.idle, 60.0))
            )


def wishes(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what is asked for; ends with 2 where there is no Flower in what was named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--flower-python", type=Path, metavar="PATH", help="the Python that Flower is installed for"
    )
    sizes = sorted({mb for _, mb in ROUND_BARS_S})
    parser.add_argument("--agents", type=int, action="append", choices=(2, 10), help="may be given again")
    parser.add_argument("--mb", type=int, action="append", choices=sizes, help="may be given again")
    parser.add_argument("--rounds", type=int, help="rounds the median is of, 5; the first comes on top")
    parser.add_argument(
        "--idle", type=float, help=f"seconds of idling, {IDLE_S:g}; 0 leaves it out; Flower's 60 at most"
    )
    parser.add_argument("--quick", action="store_true", help="2 agents, 1 MB, 3 rounds, 60 s of idling")
    parser.add_argument(
        "--only",
        action="append",
        choices=("rounds", "training", "kills", "idle"),
        help="leave the others out",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too, for machines")
    a = parser.parse_args(argv)
    quick = a.quick
    a.agents, a.mb = a.agents or ([2] if quick else [2, 10]), a.mb or ([1] if quick else sizes)
    a.rounds = (3 if quick else 5) if a.rounds is None else a.rounds
    a.idle = (60.0 if quick else IDLE_S) if a.idle is None else a.idle
    if a.rounds < 1:
        parser.error("--rounds: at least 1")
    return a


def told(bench: Bench, peer: str | None, before: float) -> tuple[list[Row], str]:
    """Return the table so far and what to know of it; written to the file that was asked for."""
    found = rows(bench.ours, bench.peer if peer else None)
    where = "two network namespaces" if bench.wire.interface else "loopback: bytes unknown"
    about = f"{os.cpu_count()} cores, {where}, load {before:.1f} before and {os.getloadavg()[0]:.1f} after"
    about += f"; Python {platform.python_version()}"
    if bench.a.json:
        text = {"flower": peer, "about": about, "rows": [row.as_json() for row in found]}
        bench.a.json.write_text(json.dumps(text | {"ours": bench.ours, "peer": bench.peer}, indent=1) + "\n")
    return found, about


def main(argv: Sequence[str] | None = None) -> int:
    a = wishes(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the namespace goes, whatever ends this
    peer = flower.version(a.flower_python) if a.flower_python else None
    parts = {"rounds": "overheads", "training": "training", "kills": "kills", "idle": "idle"}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place, network() as wire:
        compiled()
        bench = Bench(Path(place), wire, a)
        for part in a.only or parts:
            getattr(bench, parts[part])()
            told(bench, peer, load)  # half an hour that is cut short is not lost
    found, about = told(bench, peer, load)
    print(f"{markdown(found, peer)}\n\n{about}.")
    if peer is None:
        print("Flower was not there: see --help for how to make an environment for it, then --flower-python.")
    print("Not by this bench: 1,000 connected virtual agents.")
    failed = any("failed" in case for case in bench.ours.values())
    return 1 if failed or any(row.met is False for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
