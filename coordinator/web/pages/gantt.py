"""When the devices of a round did what, derived: only arrivals and durations are stored.

A device's stages are laid end to end, in their usual order, so that the last one ends when its update arrived
here. What it waited is a gap, and clocks of devices are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from coordinator.web.models import RoundView, UpdateView
from foundation.energy import EnergyReading, Stage

ORDER = (Stage.RECEIVE, Stage.TRAIN, Stage.PRUNE, Stage.EVALUATE, Stage.EXPORT, Stage.SEND)
"""Evaluation before training counts with that after it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One stage of one device; `left` and `width` are shares of the round, in per cent."""

    stage: Stage
    seconds: float
    left: float
    width: float


@dataclass(frozen=True, slots=True)
class Row:
    """One device."""

    agent: str
    pieces: tuple[Piece, ...]
    arrived_s: float | None
    """Seconds after the round was opened; `None` while nothing came."""
    note: str = ""
    """Why the row is not whole."""


@dataclass(frozen=True, slots=True)
class Gantt:
    """A round as bars."""

    rows: tuple[Row, ...]
    span_s: float
    """Seconds from the opening to the right edge."""


def gantt(view: RoundView, updates: Sequence[UpdateView], after: Sequence[UpdateView] = ()) -> Gantt:
    """Return the bars of a round; `after` are the updates of the next, which tell how long this was sent.

    The right edge is the closing, or the last arrival where that came later or the round is open.
    """
    came = {update.agent: update for update in updates}
    sent = {update.agent: _seconds(update.ledger, Stage.SEND) for update in after}
    ends = [_since(view.opened, update.received) for update in updates]
    span = max([*ends, _since(view.opened, view.closed or view.opened), 1e-3])
    agents = list(dict.fromkeys((*view.agents, *sorted(came))))
    rows = (_row(agent, came.get(agent), view.opened, span, sent.get(agent)) for agent in agents)
    return Gantt(tuple(rows), span)


def _row(agent: str, update: UpdateView | None, opened: datetime, span: float, sent: float | None) -> Row:
    if update is None:
        return Row(agent, (), None, "nothing came")
    end = at = _since(opened, update.received)
    pieces: list[Piece] = []
    for stage in reversed(ORDER):
        # An update's own ledger has the sending of the one before it.
        seconds = sent if stage is Stage.SEND else _seconds(update.ledger, stage)
        if seconds:
            begin = max(0.0, at - seconds)
            pieces.append(Piece(stage, seconds, 100 * begin / span, 100 * max(0.0, at - begin) / span))
            at -= seconds
    note = "" if pieces else "it told no durations"
    if at < -0.05 * span:
        note = "it told more seconds than the round had by then: cut at the opening"
    return Row(agent, tuple(reversed(pieces)), end, note)


def _seconds(ledger: Mapping[str, EnergyReading], stage: Stage) -> float | None:
    reading = ledger.get(stage.value)
    return None if reading is None or "unreadable" in reading.flags else reading.seconds


def _since(opened: datetime, then: datetime) -> float:
    return max(0.0, (then - opened).total_seconds())
