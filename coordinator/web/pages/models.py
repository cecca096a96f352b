"""Personal models: what every device made, how it proved itself, and which ring it is in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from coordinator.rollout.picture import stands
from coordinator.store.rollouts import Member
from coordinator.store.sql import Store
from coordinator.web.pages.shell import Shell
from foundation.messages import Json

HERE = "/models"
SHOWN = 100
FALLEN = ("refused", "rolled_back")
FALLEN_SHOWN = 20


class Ring(NamedTuple):
    """How many devices of one ring serve the new models."""

    number: int
    """From 1."""
    serving: int
    devices: int
    let_go: bool
    """Whether its devices may serve them."""


def routes(shell: Shell) -> APIRouter:
    """Return the page of the models and its list."""
    router = APIRouter(include_in_schema=False)

    async def render(template: str, after: int) -> HTMLResponse:
        return shell.render(template, HERE, **await asyncio.to_thread(_told, shell.store, after))

    @router.get("/models")
    async def page(after: Annotated[int, Query(ge=0, le=10**9)] = 0) -> HTMLResponse:
        """The models of all devices, the newest first; so many are left out."""
        return await render("models.html", after)

    @router.get("/parts/models")
    async def part(after: Annotated[int, Query(ge=0, le=10**9)] = 0) -> HTMLResponse:
        """The list, as it would be rendered now."""
        return await render("models_list.html", after)

    return router


def rings(members: Sequence[Member], let_go: int) -> list[Ring]:
    """Return how far each ring is; `let_go` is the last ring that has its models, from 0."""
    count = 1 + max((member.ring for member in members), default=-1)
    of = [[member for member in members if member.ring == n] for n in range(count)]
    return [
        Ring(n + 1, sum(m.state == "serving" for m in ring), len(ring), n <= let_go)
        for n, ring in enumerate(of)
    ]


def _told(store: Store, after: int) -> Json:
    found = store.artifacts(after=after, limit=SHOWN + 1)
    artifacts, newest = found[:SHOWN], store.rollouts(1)
    rollout = newest[0] if newest else None
    members = store.members(rollout.run, rollout.round) if rollout else []
    return {
        "artifacts": artifacts,
        "stands": stands(store, artifacts),
        "after": after,
        "following": after + SHOWN if len(found) > SHOWN else None,
        "rollout": rollout,
        "rings": rings(members, rollout.ring) if rollout else [],
        "fallen": [member for member in members if member.state in FALLEN][:FALLEN_SHOWN],
    }
