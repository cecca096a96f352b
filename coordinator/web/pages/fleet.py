"""The fleet: every device, what it does, and why it does not."""

from __future__ import annotations

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from coordinator.web.pages.shell import Shell

HERE = "/fleet"
SHOWN = 100
"""Devices on one page."""


def routes(shell: Shell) -> APIRouter:
    """Return the fleet's page and its table, which the overview shows as well."""
    router = APIRouter(include_in_schema=False)

    @router.get("/fleet")
    async def page(after: str = Query("", max_length=200)) -> HTMLResponse:
        """Devices by name, those after one."""
        return shell.render("fleet.html", HERE, after=after, shown=SHOWN)

    @router.get("/parts/fleet")
    async def part(after: str = Query("", max_length=200)) -> HTMLResponse:
        """The table, as it would be rendered now."""
        return shell.render("fleet_table.html", HERE, after=after, shown=SHOWN)

    return router
