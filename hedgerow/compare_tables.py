"""The tables of a comparison: for a terminal of 100 columns, and (`wide`) with every range for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foundation.energy import Kind, Stage
from hedgerow.compare_figures import role_bytes_of, stage_sums, worst_devices
from hedgerow.compare_report import ComparisonReport, Over, RunFigures, Summary

DASH = "–"
SHOWN_REFUSALS = 20
LABEL = 20
"""Characters of a row's name on one line."""
WAYS: tuple[Literal["down", "up"], ...] = ("down", "up")
Write = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table as text; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def show(report: ComparisonReport, console: Console) -> None:
    """Print the tables, and what failed or was refused."""
    for grid in grids(report, wide=False).values():
        console.print()
        _print(grid, console)
    for failure in report.failures:
        text = f"failed: {failure.label}, seed {failure.seed}: {failure.reason}"
        console.print(text, style="red", markup=False, highlight=False)
    refusals = [f"{run.label}, seed {run.seed}, {r}" for run in report.runs for r in run.refusals]
    for refusal in refusals[:SHOWN_REFUSALS]:
        console.print(f"refused: {refusal}", style="yellow", markup=False, highlight=False)
    if len(refusals) > SHOWN_REFUSALS:
        console.print(f"... and {len(refusals) - SHOWN_REFUSALS} more refusals: see --json", highlight=False)


def grids(report: ComparisonReport, *, wide: bool) -> dict[str, Grid]:
    """Return the tables that there is something to say in, by name and in order."""
    found = {
        "accuracy": _accuracy(report, wide),
        "reach": _reach(report, wide),
        "total": _total(report, wide),
        "energy": _energy(report),
        "roles": _roles(report),
        "devices": _devices(report, 3 if wide else 1),
        "models": _models(report),
    }
    return {name: grid for name, grid in found.items() if grid is not None}


def _print(grid: Grid, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for number, name in enumerate(grid.columns):
        if number == 0:
            words = (word for row in grid.rows for word in row[0].split())
            table.add_column(
                name, max_width=LABEL, min_width=min(LABEL, max(map(len, words))), overflow="fold"
            )
        else:
            table.add_column(name, justify="right")
    for row in grid.rows:
        table.add_row(*map(Text, row))  # text, not markup: labels and ranges have brackets
    console.print(grid.title, style="bold", highlight=False, markup=False)
    console.print(table)
    for note in grid.notes:
        console.print(note, style="dim", highlight=False, markup=False)


# --- words for figures ---------------------------------------------------------------------------


def ranged(over: Over | None, write: Write) -> str:
    """Return the median, and the range in brackets where it can be seen in the digits that are shown."""
    if over is None:
        return DASH
    low, text, high = write(over.min), write(over.median), write(over.max)
    return text if low == text == high else f"{text} [{low}..{high}]"


def middle(over: Over | None, write: Write) -> str:
    """Return the median alone."""
    return DASH if over is None else write(over.median)


def accuracy_text(value: float) -> str:
    """Return an accuracy in per cent."""
    return f"{100 * value:.1f}"


def percent_text(value: float) -> str:
    """Return whole per cent; what costs more than the reference is negative."""
    return f"{value:.0f}".replace("-", "−") if round(value) else "0"


def number_text(value: float) -> str:
    """Return seconds or joules with two or three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def joules_text(value: float, kind: Kind) -> str:
    """Return joules; what is not measured is marked: `~` modelled, `±` mixed."""
    return {Kind.MODELLED: "~", Kind.MIXED: "±"}.get(kind, "") + number_text(value)


def bytes_text(value: float) -> str:
    """Return bytes in powers of ten."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.2f} {unit}" if value < 10 * size else f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def points_text(value: float) -> str:
    """Return a difference of accuracies in percentage points."""
    return f"{100 * value:.1f}"


# --- tables --------------------------------------------------------------------------------------


def _accuracy(report: ComparisonReport, wide: bool) -> Grid:
    brief = ranged if wide else middle
    rows = []
    for row in report.summaries:
        mark = "†" if row.tuned else ""
        rows.append(
            (
                row.label,
                mark + ranged(row.sent, accuracy_text),
                brief(row.sent_worst_tenth, accuracy_text),
                brief(row.sent_deviation, accuracy_text),
                ranged(row.after, accuracy_text),
                brief(row.after_worst_tenth, accuracy_text),
                mark + brief(row.best, accuracy_text),
            )
        )
    seeds = len({run.seed for run in report.runs})
    over = f"; median [min..max] of {seeds} seeds" if seeds > 1 else ""
    tuned = any(row.tuned for row in report.summaries)
    return Grid(
        f"accuracy in the last round, per cent, mean over devices{over}",
        ("strategy", "as sent", "worst 10 %", "spread", "after training", "worst 10 %", "best sent"),
        tuple(rows),
        ("† after local training: FedAvg's model as a device uses it once it has fine-tuned it",) * tuned,
    )


def _reach(report: ComparisonReport, wide: bool) -> Grid | None:
    reference = next((row for row in report.summaries if row.label == report.reference), None)
    if reference is None:
        return None
    return Grid(
        f"to reach {reference.label}'s best accuracy as sent ({ranged(reference.best, accuracy_text)} %),"
        " all devices together",
        ("strategy", "round", "CPU s", "saved %", "J", "saved %", "bytes", "saved %"),
        tuple(_reach_row(row, ranged if wide else middle) for row in report.summaries),
        (*_missed(report), *energy_words(report)),
    )


def _reach_row(row: Summary, brief: Callable[[Over | None, Write], str]) -> tuple[str, ...]:
    if not row.reached:
        return (row.label, "never", *[""] * 6)
    some = f" ({row.reached}/{row.seeds})" if row.reached < row.seeds else ""
    return (
        row.label,
        brief(row.round, lambda value: f"{value:g}") + some,
        brief(row.reach_cpu_s, number_text),
        ranged(row.reach_saved_cpu, percent_text),
        brief(row.reach_joules, _joules(row)),
        ranged(row.reach_saved_joules, percent_text),
        brief(row.reach_bytes, bytes_text),
        ranged(row.reach_saved_bytes, percent_text),
    )


def _missed(report: ComparisonReport) -> list[str]:
    """Return who did not reach it, in how many seeds, and how close it came."""
    return [
        f"{row.label} did not reach it with {row.seeds - row.reached} of {row.seeds} seeds: its best was"
        f" {ranged(row.short, points_text)} points short"
        for row in report.summaries
        if row.short is not None
    ]


def _joules(row: Summary) -> Write:
    return lambda value: joules_text(value, row.kind)


def energy_words(report: ComparisonReport) -> list[str]:
    """Return how joules are known, for the foot of a table."""
    kinds = {part.kind for run in report.runs for part in run.stages}
    if kinds <= {Kind.NONE}:
        return ["J unknown: --profile names a device whose power model gives modelled joules"]
    words = {
        Kind.MEASURED: "J without a mark: measured, read from a meter",
        Kind.MIXED: "±J: mixed, a meter's reading shared out by CPU time",
        Kind.MODELLED: "~J: modelled, a power model at this machine's CPU time, not a measurement",
        Kind.NONE: "some windows have no joules, and their sums are unknown",
    }
    return [text for kind, text in words.items() if kind in kinds]


def _total(report: ComparisonReport, wide: bool) -> Grid:
    brief = ranged if wide else middle
    rows = [
        (
            row.label,
            brief(row.cpu_s, number_text),
            ranged(row.saved_cpu, percent_text),
            brief(row.joules, _joules(row)),
            ranged(row.saved_joules, percent_text),
            brief(row.down_bytes, bytes_text),
            brief(row.up_bytes, bytes_text),
            ranged(row.saved_bytes, percent_text),
        )
        for row in report.summaries
        if not row.tuned  # its rounds are FedAvg's own
    ]
    against = f", and saved against {report.reference}" if report.reference else ""
    return Grid(
        f"at the last round: all rounds and devices together{against}",
        ("strategy", "CPU s", "saved %", "J", "saved %", "down", "up", "saved %"),
        tuple(rows),
    )


def _energy(report: ComparisonReport) -> Grid | None:
    rows = {label: stage_sums(report.runs_of(label)) for label in report.own_labels}
    stages = [s for s in Stage if any(s in by for kinds in rows.values() for by in kinds.values())]
    if not stages:
        return None
    return Grid(
        "joules by stage, all rounds and devices together",
        ("strategy", "kind", *stages),
        tuple(
            (label, str(kind), *(middle(by.get(s), _of_kind(kind)) for s in stages))
            for label, kinds in rows.items()
            for kind, by in kinds.items()
        ),
        ("wait, idle: virtual devices waiting for this machine's cores and each other; not in J above",),
    )


def _of_kind(kind: Kind) -> Write:
    return lambda value: joules_text(value, kind)


def _roles(report: ComparisonReport) -> Grid | None:
    found = [
        (label, way, role_bytes_of(report.runs_of(label), way)) for label in report.own_labels for way in WAYS
    ]
    roles = list(dict.fromkeys(role for _, _, by in found for role in by))
    if not roles:
        return None
    return Grid(
        "payload by role, mean of one device and round, before compression and without headers",
        ("strategy", "", *roles),
        tuple(
            (
                label if way == "down" else "",
                way,
                *(bytes_text(by[role]) if role in by else DASH for role in roles),
            )
            for label, way, by in found
        ),
    )


def _devices(report: ComparisonReport, count: int) -> Grid:
    several = len({run.seed for run in report.runs}) > 1
    rows = [
        (
            worst.label if number == 0 else "",
            worst.agent,
            str(worst.seed) if several else DASH,
            str(worst.examples),
            accuracy_text(worst.accuracy_sent),
            accuracy_text(worst.accuracy),
        )
        for label in report.own_labels
        for number, worst in enumerate(worst_devices(report, label, count))
    ]
    return Grid(
        "worst devices in the last round, by accuracy as sent, per cent",
        ("strategy", "device", "seed", "examples", "as sent", "after training"),
        tuple(rows),
    )


def _models(report: ComparisonReport) -> Grid:
    return Grid(
        "FFL units kept by block, and the ONNX models: dense → as exported, median over devices",
        ("strategy", "units kept", "parameters", "kB", "ms a sample"),
        tuple((label, kept_text(runs), *_onnx(runs)) for label, runs in _by_label(report).items()),
    )


def _by_label(report: ComparisonReport) -> dict[str, list[RunFigures]]:
    return {label: report.runs_of(label) for label in report.own_labels}


def kept_text(runs: Sequence[RunFigures]) -> str:
    """Return the mean of units kept in each block at the last round, of how many."""
    blocks = zip(*(run.last.kept_units for run in runs), strict=False)
    means = [sum(block) / len(block) for block in blocks]
    return " + ".join(f"{mean:.0f}" for mean in means) + f" of {runs[0].spec.hidden}"


def _onnx(runs: Sequence[RunFigures]) -> tuple[str, str, str]:
    models = [model for run in runs for model in run.models]
    timed = [m for m in models if m.latency_ms is not None and m.dense_latency_ms is not None]
    return (
        _pair([m.dense_parameters for m in models], [m.parameters for m in models], "{:,.0f}"),
        _pair([m.dense_bytes / 1e3 for m in models], [m.bytes / 1e3 for m in models], "{:.0f}"),
        _pair([m.dense_latency_ms for m in timed], [m.latency_ms for m in timed], "{:.2f}"),
    )


def _pair(dense: Sequence[float | None], cut: Sequence[float | None], form: str) -> str:
    if not dense:
        return DASH
    return f"{middle(Over.of(dense), form.format)} → {middle(Over.of(cut), form.format)}"
