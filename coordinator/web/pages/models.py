"""Personal models: what every device made, how it proved itself, and which ring it is in."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from coordinator.rollout.picture import stands
from coordinator.store.sql import Store
from coordinator.web.pages.shell import Shell
from foundation.messages import Json

HERE = "/models"
SHOWN = 100


def routes(shell: Shell) -> APIRouter:
    """Return the page of the models and its list."""
    router = APIRouter(include_in_schema=False)

    async def render(template: str) -> HTMLResponse:
        return shell.render(template, HERE, **await asyncio.to_thread(_told, shell.store))

    @router.get("/models")
    async def page() -> HTMLResponse:
        """The newest models of all devices."""
        return await render("models.html")

    @router.get("/parts/models")
    async def part() -> HTMLResponse:
        """The list, as it would be rendered now."""
        return await render("models_list.html")

    return router


def _told(store: Store) -> Json:
    artifacts = store.artifacts(limit=SHOWN)
    return {"artifacts": artifacts, "stands": stands(store, artifacts)}
