"""A ledger as tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coordinator.ledger.accuracy import PerPoint
from coordinator.ledger.pairs import Missing, Ratio
from coordinator.ledger.report import DeviceLedger, EnergyReport
from coordinator.ledger.sums import Joules, Split
from coordinator.ledger.wall import WallDevice, WallLedger
from coordinator.wall.join import WallRecord
from foundation.energy import Kind
from hedgerow.demo_screen import bytes_text

DASH = "–"
SHOWN = 24
"""Devices, rounds and remarks that a table lists before it counts the rest."""
NAME = 16
"""Characters of a name on one line."""
LEFT = frozenset({"device", "kind", "scope", "sensor", "stage", "model", "own kind", "own scope"})

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table as text."""

    title: str
    columns: Row
    rows: list[Row]
    notes: tuple[str, ...] = ()
    newest: bool = False
    """Whether the last rows are shown where there are too many."""


def show(report: EnergyReport, console: Console) -> None:
    """Print the ledger, and what there is to know of it."""
    told = sum(device.updates for device in report.devices)
    rounds = f"{len(report.rounds)} of {report.planned} rounds"
    head = f"run {report.run}: {report.strategy}, {report.state}, {rounds}"
    counts = f"{_count(len(report.devices), 'device')}, {_count(told, 'update')}"
    console.print(f"{head}, {counts}", style="bold", markup=False, highlight=False)
    for grid in grids(report):
        console.print()
        _print(grid, console)
    if found := remarks(report):
        console.print()
        for remark in found:
            console.print(remark, style="yellow", markup=False, highlight=False)


def _print(grid: Grid, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for name in grid.columns:
        if name in LEFT:
            table.add_column(name, overflow="fold", max_width=NAME)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    shown = grid.rows[-SHOWN:] if grid.newest else grid.rows[:SHOWN]
    for row in shown:
        table.add_row(*map(Text, row))  # text, not markup: names may have brackets
    console.print(grid.title, style="bold", markup=False, highlight=False)
    console.print(table)
    if rest := len(grid.rows) - len(shown):
        console.print(f"{rest} {'earlier' if grid.newest else 'more'} rows: see --json or --csv")
    for note in grid.notes:
        console.print(note, style="dim", markup=False, highlight=False)


def grids(report: EnergyReport) -> Iterator[Grid]:
    """Give the tables that there is something to say in, in order."""
    yield Grid(
        "all devices and rounds: joules by how they are known and where the meter sits, never added",
        ("kind", "scope", "joules ± (k=2)", "of it idle", "agents’ own", "seconds", "readings"),
        list(_totals(report.total)),
    )
    yield _devices(report.devices)
    if report.wall is not None:
        yield from _walls(report.wall)
    yield _bytes(report)
    yield Grid(
        "stages",
        ("stage", "kind", "scope", "joules ± (k=2)", "seconds"),
        [(stage.stage, *row) for stage in report.stages for row in _energy(stage.energy)],
    )
    yield Grid(
        "rounds: mean accuracy as sent and after training",
        ("round", "updates", "kind", "scope", "joules ± (k=2)", "seconds", "sent", "after", "J/point"),
        list(_rounds(report)),
        ("J/point: all joules of that kind so far, for each point gained (after) since the first model",),
        newest=True,
    )
    yield from _asked_for(report)


def _asked_for(report: EnergyReport) -> Iterator[Grid]:
    if report.accuracy.target is not None:
        yield Grid(
            f"joules until accuracy {report.accuracy.target:g}",
            ("device", "model", "round", "kind", "scope", "joules ± (k=2)", "seconds"),
            list(_reached(report)),
            ("mean: over all devices, with all their joules; sent: before that round, after: with it",),
        )
    if report.pruning.devices:
        kinds = {device.kind for device in report.pruning.devices}
        modelled = ("modelled: how long and how busy, not what was drawn",) if Kind.MODELLED in kinds else ()
        yield Grid(
            "training, pruned over dense, on the same device",
            ("device", "kind", "sensor", "rounds", "units", "per", "joules", "seconds"),
            list(_pruning(report)),
            (*_missing(report.pruning.missing), *modelled),
        )
    if report.against is not None:
        yield Grid(
            f"{report.run} over {report.against.run}, round by round on the same device",
            ("device", "stage", "kind", "sensor", "rounds", "joules", "seconds"),
            list(_against(report)),
            (*_missing(report.against.missing), *_two_sensors(report)),
        )


# --- rows ------------------------------------------------------------------------------------------


def _totals(split: Split) -> Iterator[Row]:
    for part in split.parts:
        idle = DASH if part.idle_joules is None else number(part.idle_joules)
        own = DASH if part.process_joules is None else number(part.process_joules)
        yield part.kind, part.scope, _joules(part), idle, own, number(part.seconds), str(part.readings)
    if split.unknown.readings:
        dashes = (DASH,) * 4
        yield "unknown", *dashes, number(split.unknown.seconds), str(split.unknown.readings)


def _energy(split: Split) -> Iterator[Row]:
    """Give kind, scope, joules and seconds of every part."""
    for part in split.parts:
        yield part.kind, part.scope, _joules(part), number(part.seconds)
    if split.unknown.readings:
        yield "unknown", DASH, DASH, number(split.unknown.seconds)


def _devices(devices: Sequence[DeviceLedger]) -> Grid:
    """Return the devices, with how hot they were where any of them told."""
    columns: Row = ("device", "kind", "scope", "sensor", "joules ± (k=2)", "seconds", "seen")
    warm = any(device.conditions.most_c is not None for device in devices)
    rows = []
    for device in devices:
        most_c = device.conditions.most_c
        for row in _device(device):
            rows.append((*row, DASH if most_c is None else f"{most_c:.0f}") if warm else row)
    notes = (*_flags(devices), *_states(devices))
    return Grid("devices", (*columns, "most °C") if warm else columns, rows, notes)


def _states(devices: Sequence[DeviceLedger]) -> Iterator[str]:
    """Say which power modes there were, and who was throttled."""
    modes = [
        f"{d.agent} {' and '.join(d.conditions.power_modes)}" for d in devices if d.conditions.power_modes
    ]
    if modes:
        yield f"power modes: {_some(modes)}"
    slowed = [f"{d.agent} {n} times" for d in devices if (n := d.conditions.throttle_events)]
    if slowed:
        yield f"throttled: {_some(slowed)}; their seconds and joules are those of a slowed processor"


def _some(words: Sequence[str]) -> str:
    rest = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _device(device: DeviceLedger) -> Iterator[Row]:
    sensors = "+".join(device.sensors) or DASH
    seen = DASH if device.coverage is None else f"{device.coverage:.0%}"
    for kind, scope, joules, seconds in _energy(device.energy):
        known = kind != "unknown"
        yield device.agent, kind, scope, sensors if known else DASH, joules, seconds, seen if known else DASH


def _walls(wall: WallLedger) -> Iterator[Grid]:
    yield Grid(
        "at the wall, by smart plugs, beside the devices' own figures of the same rounds; never added",
        ("device", "rounds", "kind", "wall J ± (k=2)", "seconds", "own kind", "own scope", "own J ± (k=2)"),
        [row for device in wall.devices for row in _wall_device(device)],
        (*_supplies(wall), *(f"{device.agent}: {_plug(device)}" for device in wall.devices[:SHOWN])),
    )
    phases = [row for record in wall.records for row in _wall_phases(record)]
    if phases:
        yield Grid(
            "at the wall: stretches of a minute or more",
            ("round", "device", "stage", "kind", "wall J ± (k=2)", "seconds", "also in it"),
            phases,
            newest=True,
        )


def _wall_device(device: WallDevice) -> Iterator[Row]:
    """Give the wall's figures beside the device's own, which have rows of their own."""
    walls = [(kind, joules, seconds) for kind, _, joules, seconds in _energy(device.energy)]
    owns = [(kind, scope, joules) for kind, scope, joules, _ in _energy(device.own)]
    rounds = f"{len(device.rounds)}/{len(device.rounds) + len(device.missing)}"
    for place in range(max(1, len(walls), len(owns))):
        at_wall = walls[place] if place < len(walls) else (DASH,) * 3
        own = owns[place] if place < len(owns) else (DASH,) * 3
        yield (device.agent, rounds if place == 0 else "", *at_wall, *own)


def _wall_phases(record: WallRecord) -> Iterator[Row]:
    for phase in record.phases:
        reading = phase.reading
        known = reading.joules is not None
        bar = "?" if reading.uncertainty_joules is None else number(reading.uncertainty_joules)
        joules = f"{number(reading.joules)} ± {bar}" if reading.joules is not None else DASH
        also = "+".join(phase.also) or DASH
        kind = reading.kind if known else "unknown"
        yield str(record.round), record.agent, phase.stage, kind, joules, number(reading.seconds), also


def _supplies(wall: WallLedger) -> Iterator[str]:
    told = [f"{d.agent} {d.own_over_wall:.2f}" for d in wall.devices if d.own_over_wall is not None]
    if told:
        yield f"own over wall: {', '.join(told[:SHOWN])}"


def _plug(device: WallDevice) -> str:
    flags = f" (flags: {', '.join(device.flags)})" if device.flags else ""
    return "+".join(device.plugs) + flags


def _bytes(report: EnergyReport) -> Grid:
    radiated = report.radiated
    columns: Row = ("device", "updates", "payload down", "payload up", "interface down", "interface up")
    rows = []
    for device in report.devices:
        b = device.bytes
        counts = (b.payload_down, b.payload_up, b.interface_received, b.interface_sent)
        row = (device.agent, str(device.updates), *map(bytes_text, counts))
        rows.append((*row, _radiated(device.radiated_j)) if radiated else row)
    if radiated is None:
        return Grid("bytes", columns, rows)
    notes = (f"radiated J: {radiated.label}, in no sum", f"({radiated.how})")
    return Grid("bytes", (*columns, "radiated J"), rows, notes)


def _rounds(report: EnergyReport) -> Iterator[Row]:
    points = {(point.round, point.model): point for point in report.accuracy.points}
    for r in report.rounds:
        sent, after = points.get((r.round, "sent")), points.get((r.round, "after"))
        shown = [DASH if point is None else f"{point.accuracy:.3f}" for point in (sent, after)]
        for kind, scope, joules, seconds in _energy(r.energy):
            gained = _per_point(after.per_point if after else (), kind, scope)
            yield str(r.round), f"{r.updates}/{r.agents}", kind, scope, joules, seconds, *shown, gained


def _per_point(found: Sequence[PerPoint], kind: str, scope: str) -> str:
    return next((number(one.joules) for one in found if (one.kind, one.scope) == (kind, scope)), DASH)


def _reached(report: EnergyReport) -> Iterator[Row]:
    for one in report.accuracy.reached:
        name = one.agent or "mean"
        if one.spent is None:
            yield name, one.model, "never", DASH, DASH, DASH, DASH
            continue
        rows = list(_energy(one.spent)) or [(DASH, DASH, "0", "0")]
        for row in rows:
            yield name, one.model, str(one.round), *row


def _pruning(report: EnergyReport) -> Iterator[Row]:
    for d in report.pruning.devices:
        yield (
            d.agent,
            _kind(d.kind),
            d.sensor,
            f"{len(d.pruned.rounds)} over {len(d.dense.rounds)}",
            f"{d.pruned.units_kept:.0%}",
            d.per,
            _ratio(d.joules),
            _ratio(d.seconds),
        )


def _against(report: EnergyReport) -> Iterator[Row]:
    assert report.against is not None
    for d in report.against.devices:
        joules = _ratio(d.joules) + ("" if d.joules is None or d.joules.gain_cancels else " †")
        yield (
            d.agent,
            d.stage or "all",
            _kind(d.kind),
            d.sensor,
            str(len(d.rounds)),
            joules,
            _ratio(d.seconds),
        )


def _two_sensors(report: EnergyReport) -> Iterator[str]:
    pairs = report.against.devices if report.against else ()
    if any(pair.joules is not None and not pair.joules.gain_cancels for pair in pairs):
        yield "† of two sensors, whose own error bars are in it"


# --- remarks ---------------------------------------------------------------------------------------


def remarks(report: EnergyReport) -> list[str]:
    """Return what one has to know: devices without joules, silent ones, what could not be read."""
    found = list(_without_joules(report.devices))
    silent = sum(max(0, r.agents - r.updates) for r in report.rounds if r.closed)
    if silent:
        times = "once" if silent == 1 else f"{silent} times"
        found.append(f"{times} an agent of a round sent no update: what it used is in no figure")
    found += _wall_remarks(report.wall)
    if not report.pruning.devices and report.pruning.missing:
        why = "; ".join(dict.fromkeys(missing.why for missing in report.pruning.missing))
        found.append(f"dense against pruned is not available: {why}")
    if report.skipped:
        found.append(f"unreadable, and in no figure ({_count(len(report.skipped), 'part')} of updates):")
        found += [f"  round {s.round}, {s.agent}: {s.what}" for s in report.skipped[:SHOWN]]
    return found


def _wall_remarks(wall: WallLedger | None) -> Iterator[str]:
    for device in wall.devices if wall is not None else ():
        if device.implausible:
            yield (
                f"{device.agent}: its plug says less than the board behind it measured, beyond both error"
                " bars: one of the two is wrong, or the plug is another device's"
            )
        for why in dict.fromkeys(missing.why for missing in device.missing):
            rounds = [str(missing.round) for missing in device.missing if missing.why == why]
            shown = ", ".join(rounds[:SHOWN]) + (" ..." if len(rounds) > SHOWN else "")
            yield f"{device.agent}: no joules at the wall in round {shown}: {why}"


def _without_joules(devices: Sequence[DeviceLedger]) -> Iterator[str]:
    """Say of devices whose joules nobody knows what would change that, by profile."""
    without: dict[str, list[str]] = {}
    for device in devices:
        if not device.energy.parts:
            without.setdefault(device.profile or "unknown", []).append(device.agent)
    for profile, agents in without.items():
        names = ", ".join(agents[:SHOWN]) + (
            f" and {len(agents) - SHOWN} more" if len(agents) > SHOWN else ""
        )
        yield (
            f"profile {profile}: seconds only, nobody knows the joules of {names}. Choose a profile with a"
            ' power model (profile = "raspberry-pi-4b" in agent.toml, --profile with demo, simulate and'
            " compare); `hedgerow agent doctor` says which sensor is missing"
        )


def _flags(devices: Sequence[DeviceLedger]) -> tuple[str, ...]:
    counted: dict[str, int] = {}
    for device in devices:
        for flag in device.flags:
            counted[flag] = counted.get(flag, 0) + 1
    told = ", ".join(f"{flag} ({_count(count, 'device')})" for flag, count in counted.items())
    notes = [f"flags: {told}"] if told else []
    if "placeholder_model" in counted:
        notes.append("placeholder_model: another machine's watts, not fit for comparisons")
    return tuple(notes)


def _missing(missing: Sequence[Missing]) -> tuple[str, ...]:
    return tuple(f"not compared: {one.agent}: {one.why}" for one in missing[:SHOWN])


# --- words for figures -----------------------------------------------------------------------------


def number(value: float) -> str:
    """Return joules or seconds with the digits that count."""
    if value >= 10:
        return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _joules(part: Joules) -> str:
    bar = part.uncertainty_joules
    return f"{number(part.joules)} ± {'?' if bar is None else number(bar)}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return DASH
    bar = "?" if ratio.uncertainty is None else f"{ratio.uncertainty:.3f}"
    return f"{ratio.ratio:.3f} ± {bar}"


def _radiated(joules: float | None) -> str:
    return DASH if joules is None else f"{joules:.3g}"


def _kind(kind: Kind) -> str:
    return "unknown" if kind is Kind.NONE else kind
