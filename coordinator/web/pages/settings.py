"""The settings that hold, and where each came from; secrets are hidden."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from coordinator.web.pages.shell import Shell
from foundation.settings import Row

HERE = "/settings"


def routes(shell: Shell, settings: Sequence[Row]) -> APIRouter:
    """Return the page of the settings; they do not change while a coordinator runs."""
    router = APIRouter(include_in_schema=False)
    tables = [(name, list(rows)) for name, rows in groupby(settings, key=_table)]
    changed = sum(row.origin != "default" for row in settings)

    @router.get("/settings")
    async def page() -> HTMLResponse:
        """All of them, table by table."""
        return shell.render("settings.html", HERE, tables=tables, changed=changed)

    return router


def _table(row: Row) -> str:
    """Return the table that a setting stands in, "" for those above all tables."""
    first, dot, _ = row.key.partition(".")
    return first if dot else ""
