"""What the kill matrix found: as a table, and as JSON."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table

from foundation.frozen import Frozen
from hedgerow.chaos_plan import STAGES

Verdict = Literal["same", "close", "differs", "lost"]
MARKS: dict[str, str] = {
    "same": "[green]same[/green]",
    "close": "[yellow]close[/yellow]",
    "differs": "[red]DIFFERS[/red]",
    "lost": "[red]LOST[/red]",
}


class Result(Frozen):
    """One run in which something was killed."""

    case: str
    kind: Literal["single", "pair", "instant"]
    who: tuple[str, ...]
    stage: str | None
    verdict: Verdict
    """`same` to the bit, `close` within 1e-6, `differs` by more, `lost`: it did not come to a whole end."""
    seconds: float
    largest: float | None = None
    """Largest difference of any number; `None` where there was nothing to compare."""
    where: str = ""
    said: str = ""
    hit: bool = True
    """Whether what was to be killed was still running."""


class Report(Frozen):
    """All of them."""

    broker: str
    seed: int
    sealed: bool = False
    """Whether the agents had joined, and every letter had a seal."""
    reference_s: float
    """Seconds of the unbroken run, from the start of its coordinator."""
    results: tuple[Result, ...]
    logs: str | None
    """Folder of the logs, where they are kept."""

    @property
    def good(self) -> bool:
        """Whether every run came to the end of the unbroken one."""
        return all(result.verdict in ("same", "close") for result in self.results)

    def counts(self) -> dict[str, int]:
        """Return how many runs had which verdict."""
        found = [result.verdict for result in self.results]
        return {verdict: found.count(verdict) for verdict in MARKS if verdict in found}


def show(report: Report, console: Console) -> None:
    """Print who was killed when, and what came of it."""
    for kind, title in (("single", "one process"), ("pair", "two at once")):
        of_kind = [result for result in report.results if result.kind == kind]
        if of_kind:
            console.print(_matrix(title, of_kind))
    instants = [result for result in report.results if result.kind == "instant"]
    if instants:
        console.print(_instants(instants))
    for result in report.results:
        if result.verdict != "same":
            what = result.said or f"largest difference {result.largest:.3g}, {result.where}"
            console.print(f"{result.case}: {result.verdict}: {what}", markup=False, highlight=False)
    told = ", ".join(f"{count} {verdict}" for verdict, count in report.counts().items())
    console.print(f"{len(report.results)} runs on {report.broker}: {told}", highlight=False)
    if report.logs:
        console.print(f"logs: {report.logs}", markup=False, highlight=False)


def _matrix(title: str, results: list[Result]) -> Table:
    table = Table(title=f"killed as the round enters a stage: {title}", title_justify="left", box=None)
    table.add_column("stage")
    columns = list(dict.fromkeys(result.who for result in results))
    for who in columns:
        table.add_column("+".join(who))
    cells = {(result.stage, result.who): result for result in results}
    for stage in STAGES:
        row = [cells.get((stage, who)) for who in columns]
        if any(row):
            table.add_row(stage, *(_cell(result) for result in row))
    return table


def _cell(result: Result | None) -> str:
    return "" if result is None else f"{MARKS[result.verdict]} {result.seconds:.1f} s"


def _instants(results: list[Result]) -> Table:
    table = Table(title=f"killed at {len(results)} random instants", title_justify="left", box=None)
    for name in ("who", "runs", "same to the bit", "within 1e-6", "other", "slowest"):
        table.add_column(name)
    for who in dict.fromkeys(result.who for result in results):
        mine = [result for result in results if result.who == who]
        same = sum(result.verdict == "same" for result in mine)
        close = sum(result.verdict == "close" for result in mine)
        slowest = max(result.seconds for result in mine)
        counts = (len(mine), same, close, len(mine) - same - close)
        table.add_row("+".join(who), *map(str, counts), f"{slowest:.1f} s")
    return table
