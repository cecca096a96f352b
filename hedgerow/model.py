"""`hedgerow model report`: what a personal model costs on this device, beside the uncut one."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edge_agent.benchmark import LARGE, SMALL, Figures, Joules, Report, report
from edge_agent.energy.meter import Meter
from edge_agent.settings import AgentSettings
from foundation import settings
from foundation.errors import HedgerowError, SettingsError
from foundation.profile import DeviceProfile

WIDTH = 100
"""Columns that the table fits; what a pipe gets."""
UNKNOWN = "?"


def run_command(
    folder: Path | None = None,
    *,
    config: Path | None = None,
    profile: str | None = None,
    as_json: bool = False,
) -> int:
    """Measure, show, and return the exit code: 1 for an artifact that cannot be used, 2 for settings."""
    console = Console(stderr=as_json)
    console = console if console.is_terminal else Console(stderr=as_json, width=WIDTH)
    progress = Console(stderr=True)
    try:
        where, which = _where(folder, config)
        found = _profile(profile or which)
        with (
            tempfile.TemporaryDirectory() as scratch,
            Meter(found) as meter,
            progress.status("reading the artifact") as status,
        ):
            result = report(where, Path(scratch), meter, found.id, _say(progress, status.update))
    except HedgerowError as error:
        console.print("[red]no report:[/red] ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2 if isinstance(error, SettingsError) else 1
    if as_json:
        sys.stdout.write(result.model_dump_json(indent=2) + "\n")
    else:
        show(result, console)
    return 0


def _where(folder: Path | None, config: Path | None) -> tuple[Path, str]:
    """Return the folder of artifacts and the profile's name."""
    if (folder is None) == (config is None):
        raise SettingsError("name a vault or its artifacts, or the agent's settings with --config agent.toml")
    if folder is not None:
        return (inside if (inside := folder / "artifacts").is_dir() else folder), "auto"
    loaded, _ = settings.load(AgentSettings, config, os.environ, [], prefix="AGENT")
    return loaded.vault / "artifacts", loaded.profile


def _profile(which: str) -> DeviceProfile:
    return DeviceProfile.detect() if which == "auto" else DeviceProfile.load(which)


def _say(console: Console, update: Callable[[str], None]) -> Callable[[str], None]:
    """Return what tells where the report is: a live line, or lines where nobody sees a live one."""
    return update if console.is_terminal else lambda text: console.print(text, style="dim", highlight=False)


def show(found: Report, console: Console) -> None:
    """Print the sides beside each other."""
    console.print(
        f"{found.agent}, {found.run} round {found.round}, {found.sha256[:12]}  "
        f"[dim]on {found.profile}, joules by {found.energy_source}[/dim]",
        highlight=False,
    )
    console.print(table_of(found))
    for side in found.sides:
        for remark in side.remarks:
            console.print(f"{side.name}: {remark}", style="dim", highlight=False, markup=False)
    for text in remarks(found):
        console.print(text, style="dim", highlight=False, markup=False)


def table_of(found: Report) -> Table:
    """Return one column a side, and what of the uncut model is left."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for side in found.sides:
        table.add_column(side.name, justify="right")
    by_name = {side.name: side for side in found.sides}
    over, under = by_name.get("pruned"), by_name.get("dense")
    table.add_column("pruned / dense", justify="right")
    for title, digits, figure in ROWS:
        values = [figure(side) for side in found.sides]
        shown = [UNKNOWN if value is None else format(value, digits) for value in values]
        both = (over and figure(over), under and figure(under))
        ratio = f"{both[0] / both[1]:.2f}" if both[0] and both[1] and title not in ALONE else ""
        table.add_row(title, *shown, ratio)
    table.add_row("joules of 1,000, gross", *(energy_in_words(side.energy) for side in found.sides), "")
    table.add_row("  above idle", *(above_in_words(side.energy) for side in found.sides), "")
    return table


def _ms(size: int, which: str) -> Callable[[Figures], float | None]:
    def figure(side: Figures) -> float | None:
        latency = side.latency.get(size)
        return None if latency is None else getattr(latency, which)

    return figure


def _megabytes(value: int | None) -> float | None:
    return None if value is None else value / 1e6


ROWS: tuple[tuple[str, str, Callable[[Figures], float | None]], ...] = (
    ("hidden units kept", ",.0f", lambda side: side.hidden_units),
    ("file, kB", ",.1f", lambda side: None if side.bytes is None else side.bytes / 1e3),
    ("batch of 1: p50, ms", ",.3f", _ms(SMALL, "p50_ms")),
    ("  p99, ms", ",.3f", _ms(SMALL, "p99_ms")),
    (f"batch of {LARGE}: p50, ms", ",.2f", _ms(LARGE, "p50_ms")),
    ("  p99, ms", ",.2f", _ms(LARGE, "p99_ms")),
    ("samples a second", ",.0f", lambda side: side.per_second),
    ("server: memory, MB", ",.1f", lambda side: _megabytes(side.rss_bytes)),
    ("  start to first answer, s", ",.2f", lambda side: side.start_s),
    ("parity, logits", ".1e", lambda side: side.parity),
    ("accuracy here", ".3f", lambda side: side.accuracy),
)
ALONE = frozenset({"parity, logits", "accuracy here"})
"""Rows of which a ratio says nothing."""


def energy_in_words(energy: Joules | None) -> str:
    """Return joules with their error bar and kind."""
    if energy is None or energy.joules is None:
        return UNKNOWN
    return f"{_with_bar(energy.joules, energy.uncertainty_joules)} {energy.kind}"


def above_in_words(energy: Joules | None) -> str:
    """Return the same above idle."""
    if energy is None or energy.net_joules is None:
        return UNKNOWN
    return f"{_with_bar(energy.net_joules, energy.net_uncertainty_joules)} {energy.kind}"


def _with_bar(value: float, bar: float | None) -> str:
    return f"{value:.3g} ± {UNKNOWN if bar is None else f'{bar:.2g}'}"


def remarks(found: Report) -> list[str]:
    """Return what a reader of the joules should know."""
    readings = [side.energy for side in found.sides if side.energy is not None]
    if not readings:
        return []
    first = readings[0]
    if first.joules is None:
        return ["joules: no sensor and no power model here; see `hedgerow agent doctor`"]
    flags = sorted({flag for reading in readings for flag in reading.flags})
    told = f"joules: {first.kind}, scope {first.scope}, ± at k = 2, over readings of "
    told += ", ".join(f"{reading.seconds:.1f} s ({reading.runs} runs)" for reading in readings)
    return [told + (f"; {', '.join(flags)}" if flags else "")]
