"""What the strategies do, measured side by side: accuracy, device CPU, modelled joules, bytes.

    python bench/evidence.py --data-dir DIR                  run what is missing, write docs/evidence.json
    python bench/evidence.py --data-dir DIR --only har       one section
    python bench/evidence.py --pages                         docs/evidence.md from docs/evidence.json

Every run is a `hedgerow simulate` of its own, two at a time, each with one thread; one that is done is kept
in --folder and not run again, so it can be stopped at any time. Where a method is tuned, its learning rate is
the best of three by the devices' validation parts with seed 0 (mean of the last three rounds). Figures are on
their test parts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evidence_sections import SECTIONS, Method, Table

ROOT = Path(__file__).resolve().parent.parent
LAST = 3
"""Rounds at the end whose mean is the figure: one round of few devices jumps."""


@dataclass(frozen=True)
class Job:
    """One run."""

    table: Table
    method: Method
    rate: float
    seed: int

    @property
    def fields(self) -> dict[str, Any]:
        """What `Simulation` is told."""
        settings = {"learning_rate": self.rate} | self.method.settings
        own = dict(self.method.fleet)
        return {
            **self.table.fleet,
            **own,
            "strategy": self.method.strategy,
            "settings": settings,
            "seed": self.seed,
        }

    @property
    def key(self) -> str:
        """Name of its result: the same run finds it again."""
        told = json.dumps(self.fields, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass
class Results:
    """The folder of what is done."""

    folder: Path
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def get(self, job: Job) -> dict[str, Any] | None:
        """Return a run's figures, if it is done."""
        if job.key not in self.found:
            path = self.folder / f"{job.key}.json"
            if not path.exists():
                return None
            self.found[job.key] = json.loads(path.read_text())
        return self.found[job.key]


def carry_out(fields: dict[str, Any], label: str, data_dir: str, path: str) -> str:
    """Do one run in this process and write its figures; returns a line about it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from hedgerow.compare_figures import run_figures
    from hedgerow.simulate import simulate, simulation_of

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hedgerow-evidence-") as folder:
        simulation = simulation_of(**fields)
        report = simulate(simulation, Path(folder), data_dir=Path(data_dir), workers=1)
    run = run_figures(label, simulation.seed, report)
    last = {d.agent: d.model_dump(mode="json") for d in run.devices if d.round == run.last.round}
    figures = run.model_dump(mode="json", exclude={"devices", "models"})
    figures |= {"fields": fields, "last": last, "late": [t.model_dump(mode="json") for t in report.late]}
    beside = Path(path).with_suffix(".tmp")
    beside.write_text(json.dumps(figures))
    beside.replace(path)
    end = run.last
    return (
        f"{label} seed {simulation.seed} rate {fields['settings'].get('learning_rate')}:"
        f" sent {end.sent.mean:.3f} after {end.after.mean:.3f} in {time.monotonic() - started:.0f} s"
    )


def score(figures: dict[str, Any], by: str) -> float:
    """Return the mean validation accuracy of the last rounds: `sent`, `after`, or the better one."""
    rounds = figures["rounds"][-LAST:]
    means = {
        "sent": sum(r["validation_sent"] for r in rounds) / len(rounds),
        "after": sum(r["validation"] for r in rounds) / len(rounds),
    }
    return means.get(by, max(means.values()))


def rates_of(table: Table, method: Method) -> tuple[float, ...]:
    """Return the learning rates that are tried for a method."""
    if "learning_rate" in method.settings:
        return (method.settings["learning_rate"],)
    return method.rates or (table.rate,)


def best_rate(results: Results, table: Table, method: Method) -> float | None:
    """Return the chosen learning rate, or `None` while a run of seed 0 is missing."""
    tried = {rate: results.get(Job(table, method, rate, 0)) for rate in rates_of(table, method)}
    if any(figures is None for figures in tried.values()):
        return None
    return max(tried, key=lambda rate: score(tried[rate] or {}, method.by))


def due(results: Results, tables: Iterable[Table]) -> Iterator[Job]:
    """Give what is to be run and can be: seed 0 at every rate, then the other seeds at the best one."""
    for table in tables:
        for method in table.methods:
            for rate in rates_of(table, method):
                yield Job(table, method, rate, 0)
        for seed in table.seeds[1:]:
            for method in table.methods:
                chosen = best_rate(results, table, method)
                if chosen is not None and seed in (method.seeds or table.seeds):
                    yield Job(table, method, chosen, seed)


def run_all(arguments: argparse.Namespace, results: Results, tables: list[Table]) -> None:
    """Run what is missing until nothing is, or the time is over."""
    deadline = time.monotonic() + 60 * arguments.minutes
    running: dict[Future[str], str] = {}
    failed: set[str] = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        while True:
            for job in due(results, tables):
                if len(running) >= arguments.jobs or time.monotonic() > deadline:
                    break
                here = job.key in running.values() or job.key in failed or job.method.label in arguments.skip
                if results.get(job) is None and not here:
                    path = str(results.folder / f"{job.key}.json")
                    label = f"{job.table.title}: {job.method.label}"
                    future = pool.submit(carry_out, job.fields, label, str(arguments.data_dir), path)
                    running[future] = job.key
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                key = running.pop(future)
                if (error := future.exception()) is not None:
                    failed.add(key)
                    say(f"failed: {type(error).__name__}: {error}")
                else:
                    say(future.result())


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    """Run the sections that are asked for, and write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="may be given several times")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("HEDGEROW_DATA"))
    parser.add_argument("--folder", type=Path, default=Path("evidence-runs"), help="results are kept here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, a thread each")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after so many minutes")
    parser.add_argument("--skip", action="append", default=[], help="leave out methods of this label")
    parser.add_argument("--list", action="store_true", help="say what is missing, and run nothing")
    parser.add_argument("--pages", action="store_true", help="write docs/evidence.md from docs/evidence.json")
    arguments = parser.parse_args()
    chosen = arguments.only or list(SECTIONS)
    tables = [table for name in chosen for table in SECTIONS[name]]
    results = Results(arguments.folder)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.list:
        missing = [job for job in due(results, tables) if results.get(job) is None]
        for job in missing:
            print(f"{job.table.title}: {job.method.label}, rate {job.rate}, seed {job.seed}")
        print(f"{len(missing)} runs are missing (more once learning rates are chosen)")
        return 0
    if not arguments.pages:
        if arguments.data_dir is None:
            parser.error("give --data-dir or set HEDGEROW_DATA: the folder of the data sets")
        run_all(arguments, results, tables)
    from bench.evidence_page import write

    write(results, ROOT / "docs", pages_only=arguments.pages)
    return 0


if __name__ == "__main__":
    sys.exit(main())
