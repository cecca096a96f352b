"""All pages together."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter

from coordinator.live import Live
from coordinator.store.sql import Store
from coordinator.web.pages import fleet, models, overview, rounds
from coordinator.web.pages.seen import SeenRounds
from coordinator.web.pages.shell import Shell


def routes(store: Store, live: Live, clock: Callable[[], float]) -> APIRouter:
    """Return every page, its parts and the plotting script. `clock` gives UTC seconds since the epoch."""
    shell, seen = Shell(store, live, clock), SeenRounds(store)
    router = APIRouter()
    for page in (
        overview.routes(shell, seen),
        fleet.routes(shell),
        rounds.routes(shell),
        models.routes(shell),
        shell.routes(),
    ):
        router.include_router(page)
    return router
