"""One device: what it is and does, what its rounds gave and cost, and its models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import HTMLResponse

from coordinator.fleet.records import FleetRecords
from coordinator.live import AgentStatus
from coordinator.rollout.picture import pictures
from coordinator.store.sql import Store
from coordinator.web.models import RefusalView, UpdateView
from coordinator.web.pages.figures import accuracy_chart, by_stage, bytes_chart, joules_chart
from coordinator.web.pages.shell import Shell
from foundation.messages import Json

HERE = "/fleet"
ROUNDS_SHOWN = 200
"""Rounds that charts and sums look back on; the API has all."""
MODELS_SHOWN = 20
NOTES_SHOWN = 10

Part = Literal["now", "work", "models"]


@dataclass(frozen=True, slots=True)
class Block:
    """FFL units of one block: how many are kept now, and a line of how many were, by round."""

    kept: int
    of: int | None
    """Of the dense block; `None` where nobody told."""
    points: str
    """An SVG polyline in 100 by 24, the first round at the left; empty for fewer than two rounds."""

    @property
    def share(self) -> float | None:
        """Of the dense block's units, 0 to 1."""
        return min(1.0, self.kept / self.of) if self.of else None


def routes(shell: Shell) -> APIRouter:
    """Return the page of a device and its parts."""
    router = APIRouter(include_in_schema=False)

    async def render(template: str, agent: str, run: str | None) -> HTMLResponse:
        status = shell.live.agent(agent)
        if status is None:
            raise HTTPException(404, f"no device {agent!r} was ever heard of")
        told = await asyncio.to_thread(_told, shell.store, status, run)
        return shell.render(template, HERE, a=status, **told)

    @router.get("/fleet/{agent}")
    async def page(agent: str, run: str | None = Query(None, max_length=200)) -> HTMLResponse:
        """The whole page, over the newest run that the device took part in, or the one asked for."""
        return await render("device.html", agent, run)

    @router.get("/parts/fleet/{agent}/{part}")
    async def parts(agent: str, part: Part, run: str | None = Query(None, max_length=200)) -> HTMLResponse:
        """One part of it, as it would be rendered now."""
        return await render(f"device_{part}.html", agent, run)

    return router


def blocks(status: AgentStatus, updates: Sequence[UpdateView]) -> list[Block]:
    """Return the blocks of a device's model; from what it says now, or else from its last update."""
    told = [update.kept_units for update in updates if update.kept_units]
    now = status.kept_units or (told[-1] if told else ())
    dense = status.hidden_units
    result = []
    for place, kept in enumerate(now):
        past = [units[place] for units in told if place < len(units)]
        result.append(Block(kept, dense, _points([*past, kept], dense or max([*past, kept, 1]))))
    return result


def _points(values: Sequence[int], most: int) -> str:
    if len(values) < 2:
        return ""
    step = 100 / (len(values) - 1)
    return " ".join(f"{i * step:.1f},{23 - 22 * min(1.0, v / most):.1f}" for i, v in enumerate(values))


def _told(store: Store, status: AgentStatus, wanted: str | None) -> Json:
    agent = status.agent
    if wanted is not None and not store.has_run(wanted):
        raise HTTPException(404, f"there is no run {wanted!r} in this store")
    runs = [record.run for record in store.runs()]
    newest = store.latest_of(runs, [agent], 1)
    run = wanted or (newest[0].run if newest else None)
    latest = [] if run is None else store.latest_of([run], [agent], ROUNDS_SHOWN)
    updates = [UpdateView.of(record) for record in reversed(latest)]
    manifests = {m.sha256: m for m in store.artifacts(agent=agent)}
    models = pictures(store, device=agent)
    record = next((r for r in store.agents() if r.card.agent == agent), None)
    return {
        "run": run,
        "asked_run": wanted,
        "runs": runs,
        "updates": updates,
        "state": updates[-1].state if updates else None,
        "stages": by_stage(update.ledger for update in updates),
        "blocks": blocks(status, updates),
        "charts": {
            "device-accuracy": accuracy_chart(updates),
            "device-joules": joules_chart(updates),
            "device-bytes": bytes_chart(updates),
        },
        "card": record and record.card,
        "first_seen": record and record.first_seen,
        "joined": next((d for d in FleetRecords(store).devices() if d.agent == agent), None),
        "models": models[:MODELS_SHOWN],
        "models_in_all": len(models),
        "manifests": manifests,
        "orders": store.orders(agent=agent, limit=NOTES_SHOWN)[::-1],
        "refusals": [RefusalView.of(r) for r in store.refusals(run) if r.agent == agent][-NOTES_SHOWN:][::-1]
        if run
        else [],
        "cases": [case for case in store.quarantine.cases() if case.agent == agent][:NOTES_SHOWN],
    }
