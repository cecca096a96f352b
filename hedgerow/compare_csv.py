"""A comparison as rows of a CSV file: one for every strategy, seed, round and device."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from foundation.energy import Stage
from hedgerow.compare_report import ComparisonReport, DeviceFigures, RunFigures


def csv_text(report: ComparisonReport) -> str:
    """Return one row for every strategy, seed, round and device; a cell is empty where nobody knows."""
    settings = {entry["label"]: entry for entry in report.comparison["entries"]}
    rows = [_row(run, d, settings[run.label]) for run in report.runs for d in run.devices]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    target = io.StringIO()
    writer = csv.DictWriter(target, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


def _row(run: RunFigures, d: DeviceFigures, entry: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "label": run.label,
        "strategy": entry["strategy"],
        "settings": json.dumps(entry["settings"], sort_keys=True),
        "seed": run.seed,
    }
    fixed = ("kept_units", "down_role_bytes", "up_role_bytes", "stages")
    row |= {name: getattr(d, name) for name in DeviceFigures.model_fields if name not in fixed}
    return row | dict(_unfolded(d))


def _unfolded(d: DeviceFigures) -> Iterator[tuple[str, Any]]:
    """Give what has several parts a column for each."""
    for block, units in enumerate(d.kept_units):
        yield f"kept_units_{block}", units
    for way, found in (("down", d.down_role_bytes), ("up", d.up_role_bytes)):
        for role, size in found.items():
            yield f"{way}_{role}_bytes", size
    for stage in Stage:
        if stage in d.stages:
            yield f"{stage}_s", d.stages[stage].seconds
            yield f"{stage}_joules", d.stages[stage].joules
            yield f"{stage}_joules_kind", str(d.stages[stage].kind)
