"""`hedgerow doctor --chaos`: kills every process at every stage of a round, and looks what comes of it.

One unbroken run comes first. Each case is a run of the same seed in which one process or two get SIGKILL, are
started again, and which has to come to the very same end: state, personal parameters, models and counts.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from foundation.errors import HedgerowError, SettingsError
from hedgerow.broker import find_broker
from hedgerow.chaos_bed import RUN_S, VICTIM, Bed
from hedgerow.chaos_check import CLOSE, Ending, distance, ending, proven
from hedgerow.chaos_joined import JoinedBed
from hedgerow.chaos_plan import QUICK_KILLS, Case, plan
from hedgerow.chaos_report import Report, Result, Verdict, show
from hedgerow.demo import broker_table, interruptible

KILLS = 20
WIDTH = 110
"""Columns of what is printed into a pipe."""


@dataclass(frozen=True)
class ChaosOptions:
    """What a person can ask of the matrix."""

    quick: bool = False
    kills: int | None = None
    """Random instants; not set: 2 with `quick`, else 20."""
    seed: int = 0
    broker: str | None = None
    sealed: bool = False
    """Whether the agents join first, and every letter has a seal."""
    logs: Path | None = None
    """Folder that is kept; not set: one that goes when everything came to the same end."""
    json: bool = False

    def cases(self) -> list[Case]:
        """Return what is killed, and when."""
        kills = self.kills if self.kills is not None else (QUICK_KILLS if self.quick else KILLS)
        return plan(kills=kills, seed=self.seed, quick=self.quick, broker=self.broker is None)


class Matrix:
    """Runs cases on a bed, and makes a new bed after one that broke."""

    def __init__(self, folder: Path, broker: str | None, seed: int, *, sealed: bool = False) -> None:
        """Work in `folder`; see `Bed`, and with `sealed` (on a broker of its own) `JoinedBed`."""
        self._folder, self._broker, self._seed, self._sealed = folder, broker, seed, sealed
        self._bed: Bed | None = None
        self._beds = self._runs = 0
        self.reference: Ending | None = None
        self.reference_s = 0.0

    @property
    def bed(self) -> Bed:
        """The bed in use; raises `HedgerowError` after a case that broke it."""
        if self._bed is None:
            raise HedgerowError("there is no bed: begin first")
        return self._bed

    @property
    def run(self) -> str:
        """Name of the last run."""
        return f"run-{self._runs}"

    def close(self) -> None:
        """End every process."""
        if self._bed is not None:
            self._bed.close()
            self._bed = None

    def begin(self, *, twice: bool = True) -> None:
        """Make a bed with an unbroken run; raises `HedgerowError` when even that fails.

        `twice`: on the first bed there are two, the second of which is the reference: agents have torch
        loaded then, and it says at once whether two unbroken runs come to the same end.
        """
        bed = self._fresh()
        first = self._unbroken(bed)
        if self.reference is None and not twice:
            self.reference = first
        elif self.reference is None:
            self.reference = self._unbroken(bed)
        if not (far := distance(first, self.reference)).bits:
            raise HedgerowError(f"two unbroken runs differ: {far.largest:.3g}, {far.where}")

    def _fresh(self) -> Bed:
        self.close()
        self._beds += 1
        place = self._folder / f"bed-{self._beds}"
        joined = self._sealed
        self._bed = JoinedBed(place, self._seed) if joined else Bed(place, self._broker, self._seed)
        self._bed.start()
        return self._bed

    def _unbroken(self, bed: Bed) -> Ending:
        run, started = self._name(), time.monotonic()
        bed.start_run(run)
        bed.until(bed.over, "the unbroken run ended", RUN_S)
        self.reference_s = time.monotonic() - started
        return ending(bed, run)

    def _name(self) -> str:
        self._runs += 1
        return self.run

    def result(self, case: Case) -> Result:
        """Run one case; an end that is not whole is a verdict, not an error."""
        started, hit = time.monotonic(), True
        verdict: Verdict = "lost"
        said, where, largest = "", "", None
        try:
            if self._bed is None:
                self.begin()
            hit = self._killed(case)
            assert self.reference is not None
            far = distance(ending(self.bed, self.run), self.reference)
            largest, where = far.largest, far.where
            verdict = "same" if far.bits else "close" if far.largest <= CLOSE else "differs"
        except HedgerowError as error:
            said = str(error)
            if self._bed is not None:
                said += f"; its logs: {self._bed.folder}"
            self.close()  # the next one begins on a new bed: this one may be in any state
        return Result(
            case=str(case),
            kind=case.kind,
            who=case.who,
            stage=case.stage,
            verdict=verdict,
            seconds=time.monotonic() - started,
            largest=largest,
            where=where,
            said=said,
            hit=hit,
        )

    def _killed(self, case: Case) -> bool:
        """Run a case to the end of its coordinator; returns whether all that was to be killed was there."""
        bed, run = self.bed, self._name()
        if "serving" in case.who or case.stage == "swap":
            bed.until(lambda: bed.served() is not None, f"{VICTIM} answered")
        reached = bed.arm(case.stage) if case.stage else None
        started = time.monotonic()
        bed.start_run(run)
        if reached is not None:
            bed.stopped(reached)
        else:
            assert case.instant is not None
            moment = started + case.instant * self.reference_s
            bed.until(lambda: time.monotonic() >= moment, "its moment came", RUN_S)
        # The serving process first: it dies with its agent.
        there = [bed.kill(who) for who in sorted(case.who, key=lambda who: who != "serving")]
        proven(bed, VICTIM)  # what the device has at that moment
        bed.go_on()
        for who in sorted(case.who, key=lambda who: who != "broker"):
            bed.start_again(who)
        bed.until(bed.over, "the run ended", RUN_S)
        return all(there)


def run_matrix(
    matrix: Matrix, cases: Sequence[Case], tell: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """Run all cases, one after another; `tell` hears of each."""
    results = []
    for case in cases:
        results.append(matrix.result(case))
        tell(results[-1])
    return results


def run_command(options: ChaosOptions) -> int:
    """Run the matrix and tell; 0: every run came to the same end, 1: one did not, 2: a setting is wrong."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=WIDTH)
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        try:
            report = _report(options, console, stack)
        except KeyboardInterrupt:
            console.print("\n[yellow]stopped[/yellow]; every process is being ended")
            return 130
        except HedgerowError as error:
            console.print(f"hedgerow doctor --chaos: {error}", markup=False, highlight=False)
            return 2 if isinstance(error, SettingsError) else 1
    if options.json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    else:
        show(report, Console() if console.is_terminal else Console(width=WIDTH))
    return 0 if report.good else 1


def _report(options: ChaosOptions, console: Console, stack: ExitStack) -> Report:
    if options.kills is not None and options.kills < 0:
        raise SettingsError("give --kills 0 or more")
    if options.broker is not None:
        broker_table(options.broker)
        if options.sealed:
            raise SettingsError("--sealed needs a broker of its own: leave --broker out")
    cases = options.cases()
    kept = options.logs is not None
    folder = options.logs or Path(tempfile.mkdtemp(prefix="hedgerow-chaos-"))
    program = find_broker()
    broker = options.broker or (program.name if program else "none")
    matrix = Matrix(folder.resolve(), options.broker, options.seed, sealed=options.sealed)
    stack.callback(matrix.close)
    with console.status("two unbroken runs first"):
        matrix.begin()
    if options.broker is not None:
        console.print("the broker is not ours: it is not killed", style="yellow")
    with _progress(console) as progress:
        task = progress.add_task("kills", total=len(cases), now="")

        def tell(result: Result) -> None:
            progress.update(task, advance=1, now=f"{result.case}: {result.verdict}")
            if result.verdict != "same" or not console.is_terminal:
                text = f"{result.case}: {result.verdict} ({result.seconds:.1f} s) {result.said}"
                progress.console.print(text, markup=False, highlight=False)

        results = run_matrix(matrix, cases, tell)
    matrix.close()
    report = Report(
        broker=broker,
        seed=options.seed,
        sealed=options.sealed,
        reference_s=matrix.reference_s,
        results=tuple(results),
        logs=str(folder),
    )
    if report.good and not kept:
        shutil.rmtree(folder, ignore_errors=True)
        report = report.model_copy(update={"logs": None})
    return report


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[now]}"), console=console)
