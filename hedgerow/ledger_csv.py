"""A ledger as rows of a CSV file: one for every device, round and stage."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from coordinator.ledger.entries import Entry, Turn, grouped
from coordinator.ledger.report import EnergyReport
from coordinator.ledger.sums import is_known
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
COLUMNS = ("run", "round", "device", "profile", "stage", *READING, "flags", *ONCE, *STATE, "kept_units")


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
    for turn in report.turns:
        device = {
            "run": report.run,
            "round": turn.round,
            "device": turn.agent,
            "profile": profiles[turn.agent],
        }
        first = _once(turn)
        for entry in entries.get((turn.round, turn.agent), []):
            yield device | _reading(entry) | first
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
