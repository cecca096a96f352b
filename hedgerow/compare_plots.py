"""The figures of a comparison, as plotly's traces and layouts.

Colours are names (`@c3`, `@c3/20` for 20 per cent of it, `@ink`): the page's script looks them up in its
style sheet, so the same figure is drawn for a light and for a dark screen. Rows are told apart by colour and
by marker. Accuracies and units are in per cent, bytes in powers of ten.
"""

from __future__ import annotations

import html
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal

from foundation.energy import Kind, Stage
from foundation.messages import Json
from hedgerow.compare_figures import role_bytes_of, stage_sums
from hedgerow.compare_report import ComparisonReport, CurvePoint, Over, RoundFigures, RunFigures

SENT, AFTER = "accuracy as sent (%)", "accuracy after local training (%)"
COLOURS = 8
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down")
DASHES = {Kind.MEASURED: "solid", Kind.MIXED: "dot", Kind.MODELLED: "dash", Kind.NONE: "solid"}
HATCHES = {Kind.MEASURED: "", Kind.MIXED: "x", Kind.MODELLED: "/", Kind.NONE: ""}
ENERGY_WORDS = {
    Kind.MEASURED: "measured",
    Kind.MIXED: "mixed: partly a model",
    Kind.MODELLED: "modelled, not measured",
    Kind.NONE: "unknown",
}
RESTING = (Stage.WAIT, Stage.IDLE)
"""Stages that say how long devices waited for this machine; the table has them, the figure has not."""
WRAP = 20
"""Characters of a label on one line of an axis."""


def figures_of(report: ComparisonReport) -> dict[str, Json]:
    """Return the page's figures by name."""
    found = {
        "sent": _by_round(report, "accuracy as sent (%)", lambda r: 100 * r.sent.mean, tuned=True),
        "after": _by_round(
            report, "accuracy after local training (%)", lambda r: 100 * r.after.mean, tuned=False
        ),
        "bytes": _against(
            report, "down and up, all devices (MB)", lambda p: p.cost.total_bytes / 1e6, log=True
        ),
        "cpu": _against(report, "CPU time, all devices (s)", lambda p: p.cost.cpu_s),
        "joules": _energy_curve(report),
        "devices_sent": _strip(report, SENT, "accuracy_sent"),
        "devices_after": _strip(report, AFTER, "accuracy"),
        "kept": _kept(report),
        "kept_rounds": _by_round(report, "FFL units kept (%)", None, tuned=False),
        "down": _roles(report, "down"),
        "up": _roles(report, "up"),
        "stages": _stages(report),
    }
    return {name: figure for name, figure in found.items() if figure["traces"]}


def colour(index: int) -> str:
    """Return the name of a row's colour."""
    return f"@c{index % COLOURS}"


def symbol(index: int) -> str:
    """Return a row's marker; a row with the colour of one before has another one, and open."""
    turn, place = divmod(index, COLOURS)
    return SYMBOLS[(place + 3 * turn) % len(SYMBOLS)] + ("-open" if turn % 2 else "")


def rows(report: ComparisonReport) -> dict[str, int]:
    """Return every row's number, which colour and marker follow from."""
    return {label: index for index, label in enumerate(report.labels)}


def shown(label: str) -> str:
    """Return a label for an axis: broken into lines, and safe where plotly reads tags."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(label, WRAP))


# --- lines ---------------------------------------------------------------------------------------


def _line(label: str, index: int, x: Sequence[Any], y: Sequence[Any], dash: str = "solid") -> Json:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(label),
        "row": index,
        "x": x,
        "y": y,
        "line": {"color": colour(index), "width": 2, "dash": dash},
        "marker": {"color": colour(index), "symbol": symbol(index), "size": 8},
    }


def _band(index: int, x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Json:
    return {
        "type": "scatter",
        "mode": "lines",
        "row": index,
        "hoverinfo": "skip",
        "x": [*x, *reversed(x)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "fillcolor": f"{colour(index)}/16",
        "line": {"width": 0},
    }


def _by_round(
    report: ComparisonReport, what: str, figure: Callable[[RoundFigures], float] | None, *, tuned: bool
) -> Json:
    """Return a figure by round: the median over seeds, and a band from the least to the most."""
    traces = []
    for label, index in rows(report).items():
        row = report.curves_of(label)[0]
        if row.tuned and not tuned:
            continue  # the same as FedAvg's own line
        read = (lambda r: 100 * r.after.mean) if row.tuned else figure
        runs = report.runs_of(row.run)
        numbers = sorted({r.round for run in runs for r in run.rounds})
        overs = [_over(runs, number, read) for number in numbers]
        low, middle, high = ([getattr(o, name) for o in overs] for name in ("min", "median", "max"))
        if len(runs) > 1:
            traces.append(_band(index, numbers, low, high))
        line = _line(label, index, numbers, middle)
        traces.append(line | {"hovertemplate": "round %{x}: %{y:.1f} %"})
    step = max(1, math.ceil(report.comparison["fleet"]["rounds"] / 10))
    y: Json = {"title": {"text": what}}
    if figure is None:
        y["range"] = [0, 105]
    return {"traces": traces, "layout": {"xaxis": {"title": {"text": "round"}, "dtick": step}, "yaxis": y}}


def _over(
    runs: Sequence[RunFigures], number: int, figure: Callable[[RoundFigures], float] | None
) -> Over | None:
    return Over.of(
        figure(r) if figure else _share(run, r) for run in runs for r in run.rounds if r.round == number
    )


def _share(run: RunFigures, figures: RoundFigures) -> float:
    """Return FFL units kept in a round, per cent."""
    return 100 * sum(figures.kept_units) / (len(figures.kept_units) * run.spec.hidden)


def _against(
    report: ComparisonReport,
    what: str,
    read: Callable[[CurvePoint], float | None],
    *,
    log: bool = False,
    dash: Callable[[str], str] = lambda label: "solid",
) -> Json:
    """Return accuracy by what it took: medians over seeds of both."""
    traces = []
    for label, index in rows(report).items():
        curves = report.curves_of(label)
        points = list(zip(*(curve.points for curve in curves), strict=False))
        x = [Over.of(read(point) for point in each) for each in points]
        y = [statistics.median(100 * point.accuracy for point in each) for each in points]
        if any(over is None for over in x):
            continue  # unknown for some device: no line is better than a wrong one
        line = _line(label, index, [over.median for over in x if over], y, dash(label))
        traces.append(line | {"hovertemplate": "%{y:.1f} % at %{x:.3~g}"})
    axis: Json = {"title": {"text": what}, "type": "log" if log else "linear"}
    return {"traces": traces, "layout": {"xaxis": axis, "yaxis": {"title": {"text": SENT}}}}


def _energy_curve(report: ComparisonReport) -> Json:
    kinds = {row.label: row.kind for row in report.summaries}
    words = ", ".join(sorted({ENERGY_WORDS[kind] for kind in kinds.values()}))
    return _against(
        report,
        f"J ({words})",
        lambda point: part.joules if (part := point.cost.joules) else (None if point.cost.energy else 0.0),
        dash=lambda label: DASHES[kinds[label]],
    )


# --- bars and boxes ------------------------------------------------------------------------------


def _categories(report: ComparisonReport, labels: Sequence[str], x: Json, **layout: Any) -> Json:
    """Return a layout with a row for every label, the first on top."""
    lines = sum(shown(label).count("<br>") + 1 for label in labels)
    return {
        "height": 90 + 17 * lines + 14 * len(labels),
        "xaxis": x,
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        **layout,
    }


def _strip(report: ComparisonReport, what: str, field: Literal["accuracy_sent", "accuracy"]) -> Json:
    """Return every device of every seed in the last round: a box, and the devices as points."""
    traces = []
    for label in report.own_labels:
        index = rows(report)[label]
        last = [
            (run.seed, d) for run in report.runs_of(label) for d in run.devices if d.round == run.last.round
        ]
        traces.append(
            {
                "type": "box",
                "orientation": "h",
                "row": index,
                "name": shown(label),
                "x": [100 * getattr(d, field) for _, d in last],
                "y": [shown(label)] * len(last),
                "text": [f"{html.escape(d.agent)}, seed {seed}" for seed, d in last],
                "boxpoints": "all",
                "jitter": 0.6,
                "pointpos": 0,
                "hovertemplate": "%{text}: %{x:.1f} %<extra></extra>",
                "line": {"color": colour(index), "width": 1.5},
                "fillcolor": f"{colour(index)}/16",
                "marker": {"color": colour(index), "symbol": symbol(index), "size": 5, "opacity": 0.75},
            }
        )
    return {"traces": traces, "layout": _categories(report, report.own_labels, {"title": {"text": what}})}


def _kept(report: ComparisonReport) -> Json:
    """Return the units kept in each block at the last round, mean over devices and seeds."""
    labels = report.own_labels
    depth = max(len(run.last.kept_units) for run in report.runs)
    traces = []
    for block in range(depth):
        values = [
            statistics.fmean(
                100 * run.last.kept_units[block] / run.spec.hidden
                for run in report.runs_of(label)
                if len(run.last.kept_units) > block
            )
            if any(len(run.last.kept_units) > block for run in report.runs_of(label))
            else None
            for label in labels
        ]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": f"block {block}",
                "x": values,
                "y": [shown(label) for label in labels],
                "hovertemplate": f"block {block}: %{{x:.1f}} %<extra></extra>",
                "marker": {
                    "color": f"@c0/{100 - 60 * block // max(1, depth - 1)}",
                    "line": {"color": "@c0", "width": 1},
                },
            }
        )
    x = {"title": {"text": "units kept, last round (%)"}, "range": [0, 105]}
    return {"traces": traces, "layout": _categories(report, labels, x, barmode="group", showlegend=True)}


def _roles(report: ComparisonReport, way: Literal["down", "up"]) -> Json:
    """Return payload by role, stacked, and what was on the wire beside it; one device and round."""
    labels = report.own_labels
    found = {label: role_bytes_of(report.runs_of(label), way) for label in labels}
    roles = role_order(report)
    names = [shown(label) for label in labels]
    traces: list[Json] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": html.escape(role),
            "x": [found[label].get(role, 0) / 1e3 for label in labels],
            "y": names,
            "hovertemplate": f"{html.escape(role)}: %{{x:.4~g}} kB<extra></extra>",
            "marker": {"color": colour(index), "line": {"color": "@card", "width": 1}},
        }
        for index, role in enumerate(roles)
        if any(role in found[label] for label in labels)
    ]
    if traces:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "on the wire",
                "x": [_wire(report.runs_of(label), way) / 1e3 for label in labels],
                "y": names,
                "hovertemplate": "on the wire: %{x:.4~g} kB<extra></extra>",
                "marker": {"color": "@ink", "symbol": "diamond-open", "size": 10, "line": {"width": 2}},
            }
        )
    x = {"title": {"text": f"{way}, one device and round (kB)"}, "rangemode": "tozero"}
    return {"traces": traces, "layout": _categories(report, labels, x, barmode="stack", showlegend=True)}


def role_order(report: ComparisonReport) -> list[str]:
    """Return all roles that travelled, so that each has one colour in both directions."""
    both = [role_bytes_of(report.runs, way) for way in ("down", "up")]
    return list(dict.fromkeys(role for found in both for role in found))


def _wire(runs: Sequence[RunFigures], way: Literal["down", "up"]) -> float:
    return statistics.fmean(
        d.down_bytes if way == "down" else d.up_bytes for run in runs for d in run.devices
    )


def _stages(report: ComparisonReport) -> Json:
    """Return joules by stage, stacked; what is not measured is hatched, and says so in its name."""
    labels = report.own_labels
    sums = {label: stage_sums(report.runs_of(label)) for label in labels}
    told = {stage for kinds in sums.values() for by in kinds.values() for stage in by}
    stages = [stage for stage in Stage if stage in told and stage not in RESTING]
    traces: list[Json] = []
    for index, stage in enumerate(stages):
        for kind in Kind:
            values = [
                over.median if (over := sums[label].get(kind, {}).get(stage)) else 0 for label in labels
            ]
            if not any(values):
                continue
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": f"{stage} ({kind})",
                    "x": values,
                    "y": [shown(label) for label in labels],
                    "hovertemplate": f"{stage}: %{{x:.4~g}} J, {ENERGY_WORDS[kind]}<extra></extra>",
                    "marker": {
                        "color": colour(index),
                        "line": {"color": "@card", "width": 1},
                        "pattern": {
                            "shape": HATCHES[kind],
                            "fillmode": "overlay",
                            "fgcolor": "@card",
                            "size": 6,
                        },
                    },
                }
            )
    words = ", ".join(dict.fromkeys(ENERGY_WORDS[kind] for found in sums.values() for kind in found))
    x = {"title": {"text": f"J ({words})"}, "rangemode": "tozero"}
    return {"traces": traces, "layout": _categories(report, labels, x, barmode="stack", showlegend=True)}
