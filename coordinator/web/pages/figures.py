"""What several pages draw: bars of joules and seconds by stage and kind, and charts by round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.web.models import UpdateView
from foundation.energy import EnergyReading, Kind, Scope
from foundation.messages import Json

PAINT: Mapping[Kind, Json] = {
    Kind.MEASURED: {"color": "--green"},
    Kind.MIXED: {"color": "--amber", "pattern": {"shape": ".", "fgcolor": "--card"}},
    Kind.MODELLED: {"color": "--amber", "pattern": {"shape": "/", "fgcolor": "--card"}},
    Kind.NONE: {"color": "--soft", "pattern": {"shape": "x", "fgcolor": "--card"}},
}
"""Bars of what was measured are solid; the others are hatched, so that colour is not all that tells them."""


@dataclass(slots=True)
class StageSum:
    """One stage over several updates, in one kind and scope."""

    stage: str
    kind: Kind
    scope: Scope
    joules: float | None = None
    """`None` where nobody knows."""
    seconds: float = 0.0
    share: float | None = None
    """Of the largest joules in the same list, 0 to 1: the length of its bar."""


def by_stage(ledgers: Iterable[Mapping[str, EnergyReading]]) -> list[StageSum]:
    """Add ledgers up by stage; kinds and scopes stay apart. The most joules first, then the unknown."""
    found: dict[tuple[str, Kind, Scope], StageSum] = {}
    for ledger in ledgers:
        for stage, reading in ledger.items():
            kind = Kind.NONE if reading.joules is None else reading.kind
            key = (stage, kind, reading.scope)
            row = found.setdefault(key, StageSum(*key))
            row.seconds += reading.seconds
            if reading.joules is not None:
                row.joules = (row.joules or 0.0) + reading.joules
    rows = sorted(found.values(), key=lambda r: (r.joules is None, -(r.joules or 0.0), -r.seconds, r.stage))
    most = max((row.joules for row in rows if row.joules is not None), default=0.0)
    for row in rows:
        row.share = None if row.joules is None or most <= 0 else max(0.0, row.joules / most)
    return rows


def over_rounds(rounds: Sequence[int], title: str, most: float | None = None) -> Json:
    """Return the layout of a chart by round; `most` is the top of its other axis."""
    axis: Json = {"title": {"text": title}, "rangemode": "tozero"}
    last = max([2, *rounds])
    return {
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "round"}, "tickformat": "d", "range": [0.5, last + 0.5]},
        "yaxis": axis if most is None else {**axis, "range": [0, most]},
    }


def line(
    name: str, x: Sequence[int], y: Sequence[float | None], colour: str, dash: str = "solid", unit: str = "%"
) -> Json:
    """Return one line of a chart; null where nobody told."""
    return {
        "name": name,
        "x": list(x),
        "y": list(y),
        "mode": "lines+markers",
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"size": 5},
        "hovertemplate": f"%{{y:.4~g}} {unit}",
    }


def accuracy_chart(updates: Sequence[UpdateView]) -> Json:
    """Return one device's accuracy by round, in per cent: as the model was sent, and after training."""
    rounds = [update.round for update in updates]

    def per_cent(name: str) -> list[float | None]:
        values = [update.metric(name) for update in updates]
        return [None if value is None else round(100 * value, 2) for value in values]

    sent, after = per_cent("accuracy_sent"), per_cent("accuracy")
    told = any(value is not None for value in (*sent, *after))
    lines = [
        line("after training", rounds, after, "--green"),
        line("as sent", rounds, sent, "--blue", "dot"),
    ]
    return {"data": lines if told else [], "layout": over_rounds(rounds, "accuracy (%)", 102)}


def joules_chart(updates: Sequence[UpdateView]) -> Json:
    """Return one device's joules by round, a colour and a hatch for each kind."""
    known = [(u.round, u.energy) for u in updates if u.energy is not None and u.energy.joules is not None]
    bars = []
    for kind in Kind:
        of_kind = [(number, reading.joules) for number, reading in known if reading.kind is kind]
        if of_kind:
            bars.append(
                {
                    "type": "bar",
                    "name": ("≈ " if kind in (Kind.MODELLED, Kind.MIXED) else "") + kind.value,
                    "x": [number for number, _ in of_kind],
                    "y": [round(joules or 0.0, 3) for _, joules in of_kind],
                    "marker": PAINT[kind],
                    "hovertemplate": "%{y:.4~g} J",
                }
            )
    layout = {**over_rounds([u.round for u in updates], "energy (J)"), "barmode": "stack"}
    return {"data": bars, "layout": layout}


def bytes_chart(updates: Sequence[UpdateView]) -> Json:
    """Return one device's traffic by round, in KiB."""
    rounds = [update.round for update in updates]

    def kib(values: Iterable[int | None]) -> list[float | None]:
        return [None if value is None else round(value / 1024, 2) for value in values]

    up, down = kib(u.wire_bytes for u in updates), kib(u.received_bytes for u in updates)
    told = any(value is not None for value in (*up, *down))
    lines = [
        line("sent up", rounds, up, "--green", unit="KiB"),
        line("received", rounds, down, "--blue", "dot", unit="KiB"),
    ]
    return {"data": lines if told else [], "layout": over_rounds(rounds, "traffic (KiB)")}
