"""The fleet as a table on a terminal, as lines in a pipe; modelled joules never look like measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from rich.console import Group
from rich.table import Table
from rich.text import Text

Device: TypeAlias = Mapping[str, Any]
"""An `AgentStatus` of the API."""
DASH = "–"
STYLES = {"measured": "green", "mixed": "yellow", "modelled": "italic yellow"}
WIDE = 130
"""Columns from which on there is room for reasons beside the figures."""
COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("device", "left"),
    ("doing", "left"),
    ("acc.", "right"),
    ("FFL\nunits", "right"),
    ("energy", "right"),
    ("°C", "right"),
    ("model\nround", "right"),
    ("seen", "left"),
)
REASONS = ("quarantined", "unavailable", "skipped", "eased", "problem")
"""Why a device does not do everything, the gravest first."""


def table(devices: Sequence[Device], now: datetime, width: int) -> Group:
    """Return one row a device, in `width` columns; `now` is what ages count from.

    Why a device does not do everything stands in its row where there is room, else below.
    """
    found, wide = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0)), width >= WIDE
    for title, justify in COLUMNS:
        found.add_column(title, justify=justify, no_wrap=True)
    if wide:
        found.add_column("why not", ratio=1)
    for one in devices:
        found.add_row(*_cells(one, now), *([_reason(one)] if wide else []))
    below = [] if wide else [one for one in devices if why(one)]
    return Group(found, *(Text.assemble(plain(one["agent"]), ": ", _reason(one)) for one in below))


def _cells(one: Device, now: datetime) -> tuple[str | Text, ...]:
    return (
        Text(plain(one["agent"]), style="bold" if one["online"] else "dim"),
        doing(one),
        percent(one["accuracy"]),
        units(one),
        Text(energy(one), style="" if one["joules"] is None else STYLES.get(one["energy_kind"], "")),
        degrees(one),
        model(one),
        seen(one, now),
    )


def _reason(one: Device) -> Text:
    return Text(why(one), style="red" if one["quarantined"] or one["problem"] else "yellow")


def line(one: Device) -> str:
    """Return a device in one line: what it does, what it knows, what it took, why it does not."""
    parts = [
        plain(one["agent"]),
        doing(one),
        f"accuracy {percent(one['accuracy'])}",
        f"units {units(one)}",
        f"energy {energy(one)}",
        *([f"{degrees(one)} °C"] if one.get("temperature_c") is not None else []),
        f"model of round {model(one)}",
        f"seen {one['last_seen'] or 'never'}",
    ]
    reason = why(one)
    return "  ".join([*parts, *([f"({reason})"] if reason else [])])


def said(one: Device) -> tuple[Any, ...]:
    """Return what has to change before a device is worth another line."""
    return one["online"], one["stage"], one["round"], model(one), why(one)


def doing(one: Device) -> str:
    """Return whether it is there, its stage, how far that is and how long it still takes."""
    if not one["online"]:
        return "offline"
    if one["stage"] is None:
        return "online"
    share = "" if one["progress"] is None else f" {one['progress']:.0%}"
    left = "" if one["eta_s"] is None else f" {seconds(one['eta_s'])}"
    return f"{plain(one['stage'])}{share}{left}"


def energy(one: Device) -> str:
    """Return joules since its program started, always with how they are known."""
    if one["joules"] is None:
        return DASH
    kind = "of unknown kind" if one["energy_kind"] == "none" else plain(one["energy_kind"])
    about = "≈ " if one["energy_kind"] in ("modelled", "mixed") else ""
    joules = f"{one['joules'] / 1000:.1f} kJ" if one["joules"] >= 10_000 else f"{one['joules']:.3g} J"
    return f"{about}{joules} {kind}"


def units(one: Device) -> str:
    """Return the kept FFL units of all blocks, of how many."""
    kept, each = one["kept_units"], one["hidden_units"]
    if not kept:
        return DASH
    return f"{sum(kept)}/{each * len(kept)}" if each else f"{sum(kept)}"


def model(one: Device) -> str:
    """Return which round made the model that answers there."""
    if one.get("model_round") is None:
        return DASH
    elsewhere = (
        "" if one["model_run"] == one["run"] or one["run"] is None else f" of {plain(one['model_run'])}"
    )
    return f"{one['model_round']}{elsewhere}"


def why(one: Device) -> str:
    """Return why a device is left out, asked for less or not well; empty for one that is in order."""
    names = {"problem": "", "unavailable": "not available: "}
    told = [f"{names.get(key, f'{key}: ')}{plain(one[key])}" for key in REASONS if one[key]]
    return "; ".join(told)


def degrees(one: Device) -> str:
    """Return °C of the hottest zone when its last round ended."""
    celsius = one.get("temperature_c")
    return DASH if celsius is None else f"{celsius:.1f}"


def seen(one: Device, now: datetime) -> str:
    """Return how long ago it was heard; "now" for a clock that is behind the coordinator's."""
    if one["last_seen"] is None:
        return "never"
    then = datetime.fromisoformat(one["last_seen"])
    past = (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()
    return "now" if past < 5 else f"{seconds(past)} ago"


def percent(share: float | None) -> str:
    """Return a share of 1 as per cent."""
    return DASH if share is None else f"{share:.1%}"


def seconds(value: float) -> str:
    """Return seconds in the unit that suits them."""
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if value >= length:
            return f"{value / length:.0f} {unit}"
    return f"{value:.0f} s"


def plain(text: str) -> str:
    """Return what a device said without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
