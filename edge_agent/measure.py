"""`hedgerow agent measure`: what this device draws, by every source it has, and how well that is known."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edge_agent.calibration.use import calibrated
from edge_agent.conditions import Conditions, in_words
from edge_agent.energy.meter import Meter
from edge_agent.energy.sensor import find_sensors
from foundation.energy import EnergyReading, Stage
from foundation.errors import HedgerowError, SettingsError
from foundation.profile import DeviceProfile

NOTHING = (
    "no energy source here: the profile {profile!r} has no sensor that answers and no power model. The agent"
    " will report seconds, and none for energy. Choose a profile that fits with --profile (an id or a file of"
    " your own, see firmware_profiles/README.md)."
)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="hedgerow agent measure",
        description="Show watts and joules of this device, by every energy source it has; Ctrl-C ends it.",
        epilog="The first source is the one the agent counts; sources of different scope are never added.",
    )
    result.add_argument(
        "--profile", default="auto", help="id or .toml file of a device profile (default: auto)"
    )
    result.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="what `hedgerow agent calibrate` wrote for this device",
    )
    result.add_argument("--seconds", type=float, help="end after so long")
    result.add_argument(
        "--every", type=float, default=1.0, metavar="S", help="seconds between lines (default: 1)"
    )
    result.add_argument("--json", action="store_true", help="a JSON object a line, for machines")
    result.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Measure until told to stop; returns the exit code: 1 where there is nothing to measure with."""
    arguments = parser().parse_args(argv)
    console = console or Console()
    try:
        return _measure(arguments, console)
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow agent measure: {error}\n")
        return 2 if isinstance(error, SettingsError) else 1


def _measure(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.every <= 0 or (arguments.seconds is not None and arguments.seconds <= 0):
        raise SettingsError("--every and --seconds must be above 0")
    root, which = arguments.root, arguments.profile
    profile = DeviceProfile.detect(root) if which == "auto" else DeviceProfile.load(which)
    use = calibrated(profile, arguments.calibration, root=root)
    if use.reason is not None:
        sys.stderr.write(f"hedgerow agent measure: {use.reason}; the published power model is used\n")
    profile = use.profile
    sensors = find_sensors(profile, root)
    if not sensors:
        sys.stderr.write(f"hedgerow agent measure: {NOTHING.format(profile=profile.id)}\n")
        return 1
    with ExitStack() as stack:
        meters = [stack.enter_context(Meter(profile, [sensor])) for sensor in sensors]
        rows = _rows(meters, arguments.every, arguments.seconds)
        conditions = Conditions(root)
        try:
            if arguments.json:
                for each in rows:
                    state = conditions.end().model_dump(
                        mode="json", exclude={"threads", "own_threads", "eased"}
                    )
                    line = {"profile": profile.id, "sources": each, "state": state}
                    sys.stdout.write(json.dumps(line) + "\n")
                    sys.stdout.flush()
            else:
                _show(rows, profile, conditions, console)
        except KeyboardInterrupt:
            pass  # the way to end it
    return 0


def _rows(meters: Sequence[Meter], every_s: float, seconds: float | None) -> Iterator[list[dict[str, Any]]]:
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        left = every_s if end is None else min(every_s, end - time.monotonic())
        if left <= 0:
            return
        time.sleep(left)
        yield [_row(meter) for meter in meters]


def _row(meter: Meter) -> dict[str, Any]:
    """Return one source's figures since the start."""
    watts = meter.watts()
    reading = meter.peek().get(Stage.IDLE, EnergyReading(seconds=0.0))
    share = None
    if reading.joules and reading.uncertainty_joules is not None:
        share = reading.uncertainty_joules / reading.joules
    return {
        "source": meter.source,
        "kind": meter.kind.value,
        "scope": meter.scope.value,
        "watts": watts,
        "watts_uncertainty": None if watts is None or share is None else watts * share,
        "joules": reading.joules,
        "joules_uncertainty": reading.uncertainty_joules,
        "idle_joules": reading.idle_joules,
        "net_joules": reading.net_joules,
        "net_joules_uncertainty": reading.net_uncertainty_joules,
        "process_joules": reading.process_joules,
        "seconds": reading.seconds,
        "coverage": reading.coverage,
        "flags": list(reading.flags),
    }


def _show(
    rows: Iterator[list[dict[str, Any]]], profile: DeviceProfile, conditions: Conditions, console: Console
) -> None:
    console.print(f"{profile.title} [dim]({profile.id})[/dim]   error bars at k = 2   Ctrl-C ends")
    with Live(console=console, auto_refresh=False) as live:
        for each in rows:
            state = in_words(conditions.end()) or "nothing here says clock, heat or power mode"
            live.update(Group(table_of(each), Text(state, style="dim")), refresh=True)
    console.print()


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the sources as a table; the first is the one that counts."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("source", "kind", "scope"):
        table.add_column(name, no_wrap=True, min_width=8)
    for name in ("W", "±", "J", "± ", "idle", "above", "s", "seen"):
        table.add_column(name, justify="right")
    table.add_column("remarks")
    for number, row in enumerate(rows):
        table.add_row(
            row["source"],
            row["kind"],
            row["scope"],
            _figure(row["watts"]),
            _figure(row["watts_uncertainty"]),
            _figure(row["joules"]),
            _figure(row["joules_uncertainty"]),
            _figure(row["idle_joules"]),
            _figure(row["net_joules"]),
            f"{row['seconds']:.0f}",
            f"{row['coverage']:.0%}",
            ", ".join(row["flags"]),
            style="bold" if number == 0 else "",
        )
    return table


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
