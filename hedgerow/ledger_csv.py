"""A ledger as rows of a CSV file: one for every device, round and stage."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from coordinator.ledger.entries import Entry, Turn, grouped
from coordinator.ledger.report import EnergyReport
from coordinator.ledger.sums import is_known
from coordinator.wall.join import WallRecord
from foundation.energy import total
from foundation.messages import DeviceState

READING = (
    "joules",
    "uncertainty_joules",
    "idle_joules",
    "net_uncertainty_joules",
    "process_joules",
    "seconds",
    "kind",
    "scope",
    "sensor",
    "coverage",
)
ONCE = (
    "down_bytes",
    "up_bytes",
    "interface_received_bytes",
    "interface_sent_bytes",
    "radiated_j",
    "accuracy_sent",
    "accuracy",
    "steps",
)
"""Of a device's whole round: in its first row only, so that a column can be added up."""
STATE = tuple(DeviceState.model_fields)
"""The device's conditions in that round: in its first row as well."""
WALL = ("wall_joules", "wall_uncertainty_joules", "wall_seconds", "wall_kind", "wall_plug", "wall_flags")
"""What a smart plug said of the whole round: in its first row as well."""
PHASE = ("wall_stage_joules", "wall_stage_uncertainty_joules", "wall_stage_seconds")
"""The same of those stretches of the row's stage that lasted a minute or more; a part of `wall_joules`."""
COLUMNS = (
    *("run", "round", "device", "profile", "stage"),
    *READING,
    "flags",
    *ONCE,
    *STATE,
    "kept_units",
    *WALL,
    *PHASE,
)


def csv_text(report: EnergyReport) -> str:
    """Return the rows; a cell is empty where nobody knows, joules are of the kind and scope beside them."""
    target = io.StringIO()
    writer = csv.DictWriter(target, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(report))
    return target.getvalue()


def _rows(report: EnergyReport) -> Iterator[dict[str, Any]]:
    profiles = {device.agent: device.profile for device in report.devices}
    entries = grouped(report.entries, lambda entry: (entry.round, entry.agent))
    walls = {(record.round, record.agent): record for record in report.wall.records} if report.wall else {}
    for turn in report.turns:
        device = {
            "run": report.run,
            "round": turn.round,
            "device": turn.agent,
            "profile": profiles[turn.agent],
        }
        record = walls.get((turn.round, turn.agent))
        first = _once(turn) | _wall(record)
        for entry in entries.get((turn.round, turn.agent), []):
            yield device | _reading(entry) | _phases(entry, record) | first
            first = {}
        if first:
            yield device | first  # an update without readings


def _reading(entry: Entry) -> dict[str, Any]:
    row = {name: getattr(entry.reading, name) for name in READING}
    if not is_known(entry.reading):
        row |= {name: None for name in READING if name.endswith("joules")} | {"kind": "none"}
    return row | {"stage": entry.stage, "flags": " ".join(entry.reading.flags)}


def _once(turn: Turn) -> dict[str, Any]:
    state = {name: None if turn.state is None else getattr(turn.state, name) for name in STATE}
    kept = {"kept_units": "+".join(map(str, turn.kept_units))}
    return {name: getattr(turn, name) for name in ONCE} | state | kept


def _wall(record: WallRecord | None) -> dict[str, Any]:
    if record is None:
        return {}
    reading = record.reading
    values = (reading.joules, reading.uncertainty_joules, reading.seconds, reading.kind, record.plug)
    return dict(zip(WALL, (*values, " ".join(reading.flags)), strict=True))


def _phases(entry: Entry, record: WallRecord | None) -> dict[str, Any]:
    """Add up the stretches of one stage: one plug's error bars add up, as they share its gain."""
    phases = record.phases if record is not None else ()
    found = [phase.reading for phase in phases if phase.stage is entry.stage and is_known(phase.reading)]
    if not found or len({reading.kind for reading in found}) > 1:
        return {}
    whole = total(found)
    return dict(zip(PHASE, (whole.joules, whole.uncertainty_joules, whole.seconds), strict=True))
