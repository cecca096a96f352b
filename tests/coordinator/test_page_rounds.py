"""A round's bars: derived from arrivals and durations, and said to be."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from coordinator.web.models import RoundView, UpdateView
from coordinator.web.pages.gantt import gantt
from foundation.energy import EnergyReading
from tests.coordinator.visiting import Visit, read

OPENED = datetime(2026, 3, 1, 12, tzinfo=UTC)


def update(agent: str, arrived_s: float, round: int = 1, **seconds: float) -> UpdateView:
    return UpdateView(
        run="r",
        round=round,
        agent=agent,
        received=OPENED + timedelta(seconds=arrived_s),
        ledger={stage: EnergyReading(seconds=s) for stage, s in seconds.items()},
    )


def a_round(updates: Sequence[UpdateView], *agents: str, took_s: float | None = 100.0) -> RoundView:
    return RoundView(
        run="r",
        round=1,
        state="open" if took_s is None else "closed",
        agents=agents,
        eased={},
        skipped={},
        opened=OPENED,
        closed=None if took_s is None else OPENED + timedelta(seconds=took_s),
        deadline=OPENED,
        seconds=took_s,
        metrics={},
        updates=len(updates),
        accuracy_sent=None,
        accuracy=None,
        joules={},
        unknown_energy=0,
        wire_bytes=0,
        received_bytes=None,
    )


def test_stages_lie_end_to_end_and_end_at_the_arrival() -> None:
    updates = [update("a", 80, receive=10, train=40, evaluate=5, wait=500, send=7)]
    after = [update("a", 190, round=2, send=4, train=40)]
    (row,) = gantt(a_round(updates, "a"), updates, after).rows
    laid = [(p.stage.value, round(p.left, 6), round(p.width, 6)) for p in row.pieces]
    # Sending took 4 s, as the next update tells; the 7 s are of the update before, and waiting is a gap.
    assert laid == [("receive", 21, 10), ("train", 31, 40), ("evaluate", 71, 5), ("send", 76, 4)]
    assert row.arrived_s == 80
    assert row.note == ""


def test_what_does_not_fit_is_cut_and_said() -> None:
    updates = [update("a", 50, train=300), update("b", 60)]
    found = gantt(a_round(updates, "a", "b", "c"), updates)
    a, b, c = found.rows
    assert [(p.left, p.width) for p in a.pieces] == [(0.0, 50.0)]
    assert a.pieces[0].seconds == 300
    assert a.note.startswith("it told more seconds")
    assert (b.pieces, b.note) == ((), "it told no durations")
    assert (c.pieces, c.arrived_s, c.note) == ((), None, "nothing came")


def test_an_open_round_ends_with_its_last_arrival_and_a_late_one_widens_it() -> None:
    updates = [update("a", 50, train=10)]
    assert gantt(a_round(updates, "a", took_s=None), updates).span_s == 50
    late = [update("a", 250, train=10)]
    assert gantt(a_round(late, "a"), late).span_s == 250
    assert gantt(a_round([], "a", took_s=None), []).rows[0].pieces == ()


@pytest.mark.anyio
async def test_the_page_says_that_times_are_derived(shown: Visit) -> None:
    told = read(await shown.get("/runs/greenhouse-1/rounds/3"))
    assert "Who did what when derived" in told
    assert "train 7.5 s, send 0.6 s, arrived after 0.0 s" in told
    assert "vps-1 nothing came" in read(await shown.get("/runs/greenhouse-1/rounds/6")).replace("  ", " ")
