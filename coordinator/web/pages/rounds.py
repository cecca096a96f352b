"""One round: who took part, what it made of the models, and what it cost."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, HTTPException
from fastapi.responses import HTMLResponse

from coordinator.store.sql import Store
from coordinator.web.api import RoundNumber
from coordinator.web.models import RefusalView, RoundView, UpdateView
from coordinator.web.pages.gantt import ORDER, gantt
from coordinator.web.pages.shell import Shell
from foundation.messages import Json


def routes(shell: Shell) -> APIRouter:
    """Return the page of a round and its part."""
    router = APIRouter(include_in_schema=False)

    async def render(template: str, run: str, round: int) -> HTMLResponse:
        told = await asyncio.to_thread(_told, shell.store, run, round)
        return shell.render(template, **told)

    @router.get("/runs/{run}/rounds/{round}")
    async def page(run: str, round: RoundNumber) -> HTMLResponse:
        """The whole page."""
        return await render("round.html", run, round)

    @router.get("/parts/runs/{run}/rounds/{round}")
    async def part(run: str, round: RoundNumber) -> HTMLResponse:
        """What changes of it while the round is open."""
        return await render("round_told.html", run, round)

    return router


def _told(store: Store, run: str, round: int) -> Json:
    record = store.round_record(run, round) if store.has_run(run) else None
    if record is None:
        raise HTTPException(404, f"there is no round {round} of a run {run!r} in this store")
    updates = [UpdateView.of(update) for update in store.updates(run, round)]
    refusals = [RefusalView.of(r) for r in store.refusals(run) if r.round == round]
    view = RoundView.of(record, updates)
    after = [UpdateView.of(update) for update in store.updates(run, round + 1)]
    return {
        "view": view,
        "gantt": gantt(view, updates, after),
        "stages": ORDER,
        "updates": updates,
        "refusals": refusals,
        "cases": [case for case in store.quarantine.cases(run) if case.round == round],
    }
