"""Does pFedLA find who is like whom? Two clusters of devices whose labels mean different things.

    python bench/pfedla_clusters.py                              digits, ten devices, three seeds
    python bench/pfedla_clusters.py --dataset fashion-mnist      with HEDGEROW_DATA or --data-dir
    python bench/pfedla_clusters.py --json                       figures for machines

The second half of the devices has its labels turned by half the classes; images are dealt alike. Each run is
a `hedgerow simulate` by group, with one thread. Figures are means over the devices' test parts and the last
three rounds. Bars, on medians over seeds: mixing weight inside the own cluster over 0.8; accuracy as sent at
least that of FedAvg as sent, and of local training after its last epoch. Ends with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from coordinator.store.sql import Store
from coordinator.strategies.base import State, load_strategy
from coordinator.strategies.pfedla import PFedLA
from edge_agent.datasets import load_shares
from edge_agent.samples import DataSettings
from foundation.spec import ModelSettings
from hedgerow.simulate import simulate, simulation_of
from hedgerow.virtual import RUN

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {}),
    "fedavg": ("fedavg", {}),
    "pfedla": ("pfedla", {}),
    "pfedla, hypernetwork": ("pfedla", {"mixing": "hypernetwork"}),
    "heurpfedla, K = 2": ("pfedla", {"heuristic": 2}),
}
LAST = 3


@dataclass
class Run:
    """What came of one method with one seed."""

    method: str
    seed: int
    sent: float
    after: float
    up_mb: float
    down_mb: float
    mass: float | None = None
    """Mixing weight on the own cluster, self included; mean over agents and layers."""
    own: float | None = None
    """On self."""
    peers: float | None = None
    """Of the weight on others, the part that is on the own cluster."""


def clusters(path: Path, options: argparse.Namespace, seed: int) -> None:
    """Write the two-cluster data set: x, y, group (device) and split; the second half's labels are turned."""
    settings = DataSettings(name=options.dataset, count=options.devices, seed=seed, limit=options.limit)
    xs, ys, groups, splits = [], [], [], []
    for device, data in enumerate(load_shares(settings, options.data_dir)):
        turn = data.classes // 2 if device >= options.devices // 2 else 0
        for number, part in enumerate((data.train, data.validation, data.test)):
            xs.append(part.x)
            ys.append((part.y + turn) % data.classes)
            groups.append(np.full(len(part), device))
            splits.append(np.full(len(part), number))
    arrays = {"x": xs, "y": ys, "group": groups, "split": splits}
    np.savez(path, **{name: np.concatenate(parts) for name, parts in arrays.items()})


def masses(strategy: PFedLA, state: State, cluster: dict[str, int]) -> tuple[float, float, float]:
    """Return means over agents and layers: on the own cluster, on self, the own cluster's part of others."""
    found = []
    for agent in state.private:
        for row in strategy.weights(state, agent).values():
            inside = sum(weight for other, weight in row.items() if cluster[other] == cluster[agent])
            own = row[agent]
            found.append((inside, own, (inside - own) / max(1 - own, 1e-12)))
    mass, own, peers = (statistics.fmean(column) for column in zip(*found, strict=True))
    return mass, own, peers


def measure(method: str, seed: int, options: argparse.Namespace, folder: Path) -> Run:
    """Carry out one run; one that is in the folder is read, or goes on."""
    data = folder / f"{options.dataset}-{seed}.npz"
    if not data.exists():
        clusters(data, options, seed)
    name, settings = METHODS[method]
    settings = settings | {"learning_rate": options.learning_rate}
    simulation = simulation_of(
        devices=options.devices,
        rounds=options.rounds,
        strategy=name,
        settings=settings,
        model=ModelSettings(width=options.width),
        dataset=str(data),
        partition="by:group",
        group="group",
        split="split",
        seed=seed,
    )
    place = folder / f"{method.replace(' ', '')}-{seed}"
    report = simulate(simulation, place, workers=1)
    last = report.rounds[-LAST:]
    run = Run(
        method,
        seed,
        sent=statistics.fmean(r.accuracy_sent for r in last),
        after=statistics.fmean(r.accuracy for r in last),
        up_mb=sum(r.up_bytes for r in report.rounds) / 1e6,
        down_mb=sum(r.down_bytes for r in report.rounds) / 1e6,
    )
    if name == "pfedla":
        strategy = load_strategy(name, settings)
        assert isinstance(strategy, PFedLA)
        with Store.open(place / "coordinator") as store:
            latest = store.latest_state(RUN)
        assert latest is not None
        cluster = {agent: i >= options.devices // 2 for i, agent in enumerate(simulation.names)}
        run.mass, run.own, run.peers = masses(strategy, State.from_bytes(latest[1]), cluster)
    return run


def medians(runs: list[Run], method: str) -> dict[str, float]:
    """Return a method's medians over seeds."""
    own = [asdict(run) for run in runs if run.method == method]
    keys = ("sent", "after", "up_mb", "down_mb", "mass", "own", "peers")
    return {key: statistics.median(run[key] for run in own) for key in keys if own[0][key] is not None}


def bars(runs: list[Run]) -> dict[str, tuple[float, float]]:
    """Return figure and bar of each claim."""
    pfedla, local, fedavg = (medians(runs, name) for name in ("pfedla", "local", "fedavg"))
    return {
        "own-cluster mass": (pfedla["mass"], 0.8),
        "accuracy as sent, against FedAvg as sent": (pfedla["sent"], fedavg["sent"]),
        "accuracy as sent, against local after training": (pfedla["sent"], local["after"]),
    }


def show(runs: list[Run]) -> None:
    """Print medians over seeds, and the bars."""
    head = ("method", "sent", "after", "mass", "on self", "of others", "MB up", "MB down")
    print(f"{head[0]:22}" + "".join(f"{name:>11}" for name in head[1:]))
    for method in dict.fromkeys(run.method for run in runs):
        m = medians(runs, method)
        keys = ("sent", "after", "mass", "own", "peers", "up_mb", "down_mb")
        print(f"{method:22}" + "".join(f"{m[key]:11.3f}" if key in m else f"{'':11}" for key in keys))
    for name, (figure, bar) in bars(runs).items():
        print(f"{'met   ' if figure >= bar else 'MISSED'} {name}: {figure:.3f} (bar {bar:.3f})")


def main() -> int:
    """Measure all methods and seeds; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--limit", type=int, help="samples over all devices together")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("HEDGEROW_DATA"))
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on with those that are there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="hedgerow-clusters-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for seed in map(int, options.seeds.split(",")):
            for method in METHODS:
                runs.append(measure(method, seed, options, folder))
                told = {k: round(v, 3) for k, v in asdict(runs[-1]).items() if isinstance(v, float)}
                print(f"{method}, seed {seed}: {told}", file=sys.stderr, flush=True)
    missed = [name for name, (figure, bar) in bars(runs).items() if figure < bar]
    if options.json:
        told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        del told["data_dir"], told["folder"], told["json"]
        machine = f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}"
        figures = {"settings": told, "machine": machine, "runs": [asdict(run) for run in runs]}
        figures |= {
            "bars": {k: {"figure": f, "bar": b} for k, (f, b) in bars(runs).items()},
            "missed": missed,
        }
        print(json.dumps(figures, indent=2))
    else:
        show(runs)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
