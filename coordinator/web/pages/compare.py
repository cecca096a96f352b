"""Finished runs side by side: what each reached, and what it cost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import HTMLResponse

from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.web.models import RoundView, UpdateView
from coordinator.web.pages.figures import line, over_rounds
from coordinator.web.pages.overview import Sums
from coordinator.web.pages.seen import SeenRounds
from coordinator.web.pages.shell import Shell
from foundation.messages import Json

HERE = "/compare"
ROUNDS_SHOWN = 200
"""Rounds of each run that its figures are over."""
SHOWN = 4
"""Runs that are compared where nobody chose."""
MOST = 8
LISTED = 50
COLOURS = ("--green", "--blue", "--amber", "--red")
DASHES = ("solid", "dash", "dot", "dashdot")


class Column:
    """One run, as it stands in the comparison."""

    def __init__(self, run: RunRecord, rounds: Sequence[RoundView], updates: Sequence[UpdateView]) -> None:
        """`updates` are those of the last closed round, which `kept` is the mean of."""
        self.run = run
        self.rounds = [view for view in rounds if view.state == "closed"]
        self.last = self.rounds[-1] if self.rounds else None
        self.sums = Sums(run, self.rounds)
        self.kept = kept(updates)


def routes(shell: Shell, seen: SeenRounds) -> APIRouter:
    """Return the page that compares runs."""
    router = APIRouter(include_in_schema=False)

    @router.get("/compare")
    async def page(run: Annotated[list[str] | None, Query(max_length=MOST)] = None) -> HTMLResponse:
        """The runs that were asked for, or the newest finished ones."""
        return shell.render("compare.html", HERE, **await asyncio.to_thread(_told, shell.store, seen, run))

    return router


def kept(updates: Sequence[UpdateView]) -> list[float]:
    """Return the FFL units kept in every block, in the mean over devices; empty where their models differ."""
    told = [update.kept_units for update in updates if update.kept_units]
    if len({len(units) for units in told}) != 1:
        return []
    return [sum(block) / len(told) for block in zip(*told, strict=True)]


def chart(columns: Sequence[Column]) -> Json:
    """Return accuracy after local training by round, one line for each run, in per cent."""
    lines, numbers = [], []
    for place, column in enumerate(columns):
        told = [(v.round, 100 * v.accuracy.mean) for v in column.rounds if v.accuracy is not None]
        if told:
            numbers += [number for number, _ in told]
            colour = COLOURS[place % len(COLOURS)]
            # Eight runs are told apart by colour and dash together: no two share both.
            dash = DASHES[(place + place // len(COLOURS)) % len(DASHES)]
            name = f"{column.run.run} ({column.run.strategy})"
            lines.append(line(name, [n for n, _ in told], [round(a, 2) for _, a in told], colour, dash))
    return {"data": lines, "layout": over_rounds(numbers, "accuracy after training (%)", 102)}


def _told(store: Store, seen: SeenRounds, wanted: Sequence[str] | None) -> Json:
    runs = store.runs()
    known = {record.run: record for record in runs}
    for name in wanted or ():
        if name not in known:
            raise HTTPException(404, f"there is no run {name!r} in this store")
    finished = [record for record in runs if record.state == "finished"]
    chosen = [known[name] for name in dict.fromkeys(wanted)] if wanted else finished[:SHOWN]
    columns = [_column(store, seen, record) for record in chosen]
    return {
        "columns": columns,
        "names": {column.run.run for column in columns},
        "finished": finished[:LISTED],
        "most": MOST,
        "rounds_shown": ROUNDS_SHOWN,
        "chart": chart(columns),
    }


def _column(store: Store, seen: SeenRounds, record: RunRecord) -> Column:
    rounds = seen.latest(record.run, ROUNDS_SHOWN)
    closed = [view.round for view in rounds if view.state == "closed"]
    last = store.updates(record.run, closed[-1]) if closed else []
    return Column(record, rounds, [UpdateView.of(update) for update in last])
