"""`hedgerow compare`: several strategies on the same fleet with the same seeds, and one report.

Every strategy and seed is a simulation in a folder of its own, so a comparison that is stopped, or killed,
goes on where it was, and one that is asked for more strategies runs those alone.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from coordinator.live import Event
from foundation.errors import HedgerowError, RoundError, SettingsError
from foundation.messages import Json
from hedgerow.compare_csv import csv_text
from hedgerow.compare_figures import report_of, run_figures
from hedgerow.compare_plan import REFERENCE, Comparison, comparison_of, run_folder
from hedgerow.compare_report import ComparisonReport, Failure, RunFigures
from hedgerow.compare_tables import show
from hedgerow.files import check_writable, write_whole
from hedgerow.simulate import Simulation, problems_of, simulate
from hedgerow.simulate_report import Watch, figures

WIDTH = 100
"""Columns that all tables fit."""


def run_command(
    fields: dict[str, Any],
    *,
    folder: Path | None = None,
    data_dir: Path | None = None,
    workers: int | None = None,
    json_to: str | None = None,
    html_to: Path | None = None,
    csv_to: Path | None = None,
) -> int:
    """Compare what `fields` describe, show and write the report, and return the exit code.

    `json_to` is a path, or `-` for the standard output, and then everything else goes to stderr.
    """
    console = _console(json_to == "-")
    try:
        for path in (html_to, csv_to, Path(json_to) if json_to and json_to != "-" else None):
            check_writable(path)
        comparison = comparison_of(**fields)
        place = folder or comparison.folder()
        _announce(comparison, place, console)
        _warn(comparison, data_dir, console)
        with Board(console, comparison) as board:
            report = compare(comparison, place, data_dir=data_dir, workers=workers, board=board)
        show(report, console)
        _write(report, json_to, html_to, csv_to, console)
    except KeyboardInterrupt:
        console.print("\n[yellow]stopped[/yellow]: the same command goes on where it was", highlight=False)
        return 130
    except HedgerowError as error:
        console.print("[red]the comparison failed:[/red] ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2 if isinstance(error, SettingsError) else 1
    return 1 if report.failures else 0


def compare(
    comparison: Comparison,
    folder: Path,
    *,
    data_dir: Path | None = None,
    workers: int | None = None,
    board: Board | None = None,
) -> ComparisonReport:
    """Run all simulations in sub-folders of `folder`, or go on with those that are there, and report.

    A run that fails is told among the failures, and the others go on; it is tried again at the next call.
    Raises `SettingsError` and `DataError`, which meet all runs alike, and `RoundError` when every run failed.
    """
    runs: list[RunFigures] = []
    failures: list[Failure] = []
    for entry, seed, simulation in comparison.runs():
        watch = board.watch(entry.label, simulation) if board else None
        place = folder / run_folder(entry.label, simulation)
        try:
            report = simulate(simulation, place, data_dir=data_dir, workers=workers, watch=watch)
        except RoundError as error:
            outcome: RunFigures | Failure = Failure(label=entry.label, seed=seed, reason=str(error))
        else:
            outcome = run_figures(entry.label, seed, report)
        if isinstance(outcome, Failure):
            failures.append(outcome)
        else:
            runs.append(outcome)
        if board:
            board.over(entry.label, seed, outcome)
        gc.collect()  # a simulation's rings of tasks and agents hold its data
    if not runs:
        raise RoundError("every run failed: " + "; ".join(f"{f.label}: {f.reason}" for f in failures))
    order = [entry.label for entry in comparison.entries]
    return report_of(
        sorted(runs, key=lambda run: (order.index(run.label), comparison.seeds.index(run.seed))),
        comparison=comparison.model_dump(mode="json"),
        reference=comparison.reference,
        averages=[e.label for e in comparison.entries if e.strategy == REFERENCE],
        machine=machine(),
        hedgerow=version("hedgerow"),
        failures=failures,
    )


def machine() -> Json:
    """Return what figures of time and energy depend on."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "onnxruntime": version("onnxruntime"),
    }


# --- words and files -----------------------------------------------------------------------------


def _console(to_stderr: bool) -> Console:
    """Return where people read; a pipe has no width of its own, so tables get theirs."""
    console = Console(stderr=to_stderr)
    return console if console.is_terminal else Console(stderr=to_stderr, width=WIDTH)


def _announce(comparison: Comparison, folder: Path, console: Console) -> None:
    fleet = comparison.simulation(comparison.entries[0], 0)
    lines = (
        f"{', '.join(entry.label for entry in comparison.entries)}",
        f"{fleet.devices} devices, {fleet.dataset} ({fleet.partition}), {fleet.rounds} rounds,"
        f" seed{'s' * (len(comparison.seeds) > 1)} {', '.join(map(str, comparison.seeds))}:"
        f" {_count(comparison)} runs in {folder}",
    )
    console.print("[bold]hedgerow compare[/bold]", highlight=False)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _warn(comparison: Comparison, data_dir: Path | None, console: Console) -> None:
    """Say what is odd about the devices' shares; raises what `problems_of` raises, before anything runs."""
    for seed in comparison.seeds:
        for warning in problems_of(comparison.simulation(comparison.entries[0], seed), data_dir):
            text = f"warning, seed {seed}: {warning}"
            console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _count(comparison: Comparison) -> int:
    return len(comparison.entries) * len(comparison.seeds)


def _write(
    report: ComparisonReport, json_to: str | None, html_to: Path | None, csv_to: Path | None, console: Console
) -> None:
    if json_to == "-":
        sys.stdout.write(report.model_dump_json() + "\n")
    elif json_to:
        _save(Path(json_to), report.model_dump_json() + "\n", console)
    if csv_to:
        _save(csv_to, csv_text(report), console)
    if html_to:
        from hedgerow.compare_page import page  # with jinja2, which nothing else here needs

        _save(html_to, page(report), console)


def _save(path: Path, text: str, console: Console) -> None:
    write_whole(path, text)
    console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


# --- while it runs -------------------------------------------------------------------------------


class Board:
    """Shows how far all runs are: a bar with the time left on a terminal, plain lines in a pipe."""

    def __init__(self, console: Console, comparison: Comparison) -> None:
        self._console = console
        self._runs, first = _count(comparison), next(comparison.runs())[2]
        self._size = sum(first.asked(number) for number in range(1, first.rounds + 1))
        """Updates of one run."""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[eta]}  {task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=self._runs * self._size, eta="", figures="")
        self._began: float | None = None
        self._over, self._here, self._seen = 0, 0, 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def watch(self, label: str, simulation: Simulation) -> Watch:
        """Return what follows the next run."""
        self._here = 0
        name = f"{label}, seed {simulation.seed}"
        self.say(name)
        return _RunWatch(self, self._console, name, simulation)

    def say(self, what: str, told: str = "") -> None:
        """Show what is being done, and its latest figures."""
        self._progress.update(
            self._task,
            completed=self._over * self._size + self._here,
            description=f"run {min(self._over + 1, self._runs)}/{self._runs}  {what}",
            eta=self.eta(),
            figures=told,
        )

    def heard(self, done: int) -> None:
        """Note that so many updates of the present run are in, of which one came just now."""
        self._began = self._began or time.monotonic()
        self._here, self._seen = done, self._seen + 1

    def line(self, text: str, style: str | None = None) -> None:
        """Print one line above the bar."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def over(self, label: str, seed: int, outcome: RunFigures | Failure) -> None:
        """Count a run as over and say what came of it."""
        self._over, self._here = self._over + 1, 0
        head = f"run {self._over}/{self._runs}  {label}, seed {seed}: "
        if isinstance(outcome, Failure):
            self.line(f"{head}failed: {outcome.reason}", "red")
            return
        last = outcome.last
        self.line(f"{head}accuracy {last.sent.mean:.3f} sent, {last.after.mean:.3f} after  {self.eta()}")

    def eta(self) -> str:
        """Return the time left at the pace of the updates heard since the first."""
        left = (self._runs - self._over) * self._size - self._here
        if self._began is None or self._seen < 2 or not left:
            return ""
        seconds = (time.monotonic() - self._began) / (self._seen - 1) * left
        if seconds < 100:
            return f"ETA {seconds:.0f} s"
        hours, minutes = divmod(math.ceil(seconds / 60), 60)
        return f"ETA {hours} h {minutes:02d} min" if hours else f"ETA {minutes} min"


class _RunWatch(Watch):
    """Tells the board what one simulation's event bus says."""

    def __init__(self, board: Board, console: Console, name: str, simulation: Simulation) -> None:
        asked = [simulation.asked(number) for number in range(1, simulation.rounds + 1)]
        super().__init__(console, simulation.rounds, asked)
        self._board, self._name = board, name

    def say(self, what: str) -> None:
        """Say what is being done before the first round."""
        self._board.say(f"{self._name}: {what}")

    def tell(self, text: str) -> None:
        """Print something that stays to be read."""
        self._board.line(f"{self._name}: {text}")

    def _heard(self, event: Event, hidden: int) -> None:
        if event.kind == "update" and event.round is not None:
            if event.round != self._round:
                self._round, self._updates = event.round, 0
            self._updates += 1
            self._board.heard(self._done)
        elif event.kind == "round_closed" and event.round is not None:
            metrics = event.data["metrics"]
            self._figures = f"{metrics['accuracy_sent']:.3f} sent, {metrics['accuracy']:.3f} after"
            if not self._console.is_terminal:
                told = f"round {event.round}/{self._rounds}  {figures(metrics, hidden)}"
                self._board.line(f"{self._name}: {told}  {self._board.eta()}")
        elif event.kind in ("refusal", "problem"):
            self._board.line(f"{self._name}: {event.text}", "yellow")
        self._board.say(f"{self._name}: round {max(1, self._round)}/{self._rounds}", self._figures)
