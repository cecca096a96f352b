"""The overview: what goes on, how far it is, and what it has cost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import HTMLResponse
from pydantic import ValidationError

from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.strategies.base import available
from coordinator.web.models import RoundView
from coordinator.web.pages.seen import SeenRounds
from coordinator.web.pages.shell import Shell
from foundation.energy import Kind
from foundation.messages import Json
from foundation.spec import ModelSpec

HERE = "/"
ROUNDS_SHOWN = 200
"""Rounds that chart and sums look back on; the API has all."""
ROUNDS_LISTED = 20
EVENTS_SHOWN = 15
FEW = 12
"""So many devices are shown here in full; more have their own page."""

Part = Literal["now", "sums", "run"]
NOW = "overview_now.html"


def routes(shell: Shell, rounds: SeenRounds) -> APIRouter:
    """Return the overview and its parts."""
    router = APIRouter(include_in_schema=False)

    async def render(template: str, wanted: str | None) -> HTMLResponse:
        present = shell.live.snapshot(shell.live.version).run
        run = await asyncio.to_thread(chosen, shell.store, wanted, present)
        told = await asyncio.to_thread(_present, shell.store, present)
        if template != NOW:
            told |= await asyncio.to_thread(_told, shell.store, rounds, run)
        return shell.render(template, HERE, run=run, few=FEW, **told)

    @router.get("/")
    async def page(run: str | None = Query(None, max_length=200)) -> HTMLResponse:
        """The overview of the run under way, the newest, or the one asked for."""
        return await render("overview.html", run)

    @router.get("/parts/overview/{part}")
    async def parts(part: Part, run: str | None = Query(None, max_length=200)) -> HTMLResponse:
        """One part of it, as it would be rendered now."""
        return await render(f"overview_{part}.html", run)

    return router


def chosen(store: Store, wanted: str | None, present: str | None) -> RunRecord | None:
    """Return the run to show: the one asked for, the one under way, or the newest; 404 for an unknown one."""
    if wanted is not None and not store.has_run(wanted):
        raise HTTPException(404, f"there is no run {wanted!r} in this store")
    name = wanted or present
    if name is not None and store.has_run(name):
        return store.run(name)
    runs = store.runs()
    return runs[0] if runs else None


def chart(rounds: Sequence[RoundView]) -> Json:
    """Return accuracy by round as plotly draws it: four lines in per cent, null where nobody told.

    Closed rounds only: the mean over the first few agents of an open one would jump as the others come in.
    """
    told = [view for view in rounds if view.state == "closed" and (view.accuracy_sent or view.accuracy)]
    numbers = [view.round for view in told]

    def line(
        which: Literal["accuracy_sent", "accuracy"], figure: Literal["mean", "worst"], name: str
    ) -> Json:
        spreads = [getattr(view, which) for view in told]
        return {
            "name": name,
            "x": numbers,
            "y": [None if s is None else round(100 * getattr(s, figure), 2) for s in spreads],
            "mode": "lines+markers",
            "line": {
                "color": "--green" if which == "accuracy" else "--blue",
                "dash": "solid" if figure == "mean" else "dot",
                "width": 2,
            },
            "marker": {"size": 5},
            "hovertemplate": "%{y:.1f} %",
        }

    return {
        "data": [
            line("accuracy", "mean", "after training, mean"),
            line("accuracy", "worst", "after training, worst"),
            line("accuracy_sent", "mean", "as sent, mean"),
            line("accuracy_sent", "worst", "as sent, worst"),
        ]
        if told
        else [],
        "layout": {
            "hovermode": "x unified",
            "xaxis": {
                "title": {"text": "round"},
                "tickformat": "d",
                "range": [0.5, max([2, *numbers]) + 0.5],
            },
            "yaxis": {"title": {"text": "accuracy (%)"}, "range": [0, 102]},
        },
    }


class Sums:
    """What a run has cost so far, over the rounds that are looked at."""

    def __init__(self, run: RunRecord, rounds: Sequence[RoundView]) -> None:
        self.updates = sum(view.updates for view in rounds)
        self.up_bytes = sum(view.wire_bytes for view in rounds)
        down = [view.received_bytes for view in rounds if view.received_bytes is not None]
        self.down_bytes = sum(down) if down else None
        self.joules: dict[Kind, float] = {}
        for view in rounds:
            for kind, joules in view.joules.items():
                self.joules[kind] = self.joules.get(kind, 0.0) + joules
        self.unknown_energy = sum(view.unknown_energy for view in rounds)
        self.dense_bytes = _dense_bytes(run)
        """Of one dense float32 model, one way: what FedAvg sends; computed from the model's sizes."""

    @property
    def fedavg_bytes(self) -> int | None:
        """What FedAvg would send, dense and as float32, for as many updates: computed, both ways."""
        return None if self.dense_bytes is None else 2 * self.updates * self.dense_bytes

    @property
    def bytes_share(self) -> float | None:
        """This run's bytes of those of FedAvg."""
        if not self.fedavg_bytes or self.down_bytes is None:
            return None
        return (self.up_bytes + self.down_bytes) / self.fedavg_bytes


def _dense_bytes(run: RunRecord) -> int | None:
    try:
        spec = ModelSpec.model_validate_json(run.spec_json)
    except ValidationError:  # of another version: unknown
        return None
    total = 0
    for name, shape in spec.layout:
        size = 1
        for length in shape:
            size *= length
        total += 0 if name.endswith(".threshold") else 4 * size
    return total


def _present(store: Store, present: str | None) -> Json:
    """Return what is written down of the run under way: nothing while it waits for its first agents."""
    there = present is not None and store.has_run(present)
    return {"standing": store.run(present) if present and there else None, "strategies": available()}


def _told(store: Store, seen: SeenRounds, run: RunRecord | None) -> Json:
    """Return what the templates show of one run."""
    rounds = seen.latest(run.run, ROUNDS_SHOWN) if run is not None else []
    closed = [view for view in rounds if view.state == "closed"]
    return {
        "runs": store.runs(),
        "rounds": rounds,
        "listed": ROUNDS_LISTED,
        "last": closed[-1] if closed else None,
        "sums": Sums(run, rounds) if run is not None else None,
        "sums_rounds": len(rounds),
        "chart": chart(rounds),
        "refusals": store.refusals(run.run)[-EVENTS_SHOWN:][::-1] if run else [],
        "events": store.latest_events(EVENTS_SHOWN),
    }
