"""All pages together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import APIRouter

from coordinator.live import Live
from coordinator.store.sql import Store
from coordinator.web.pages import compare, device, fleet, models, neighbours, overview, rounds
from coordinator.web.pages import settings as effective
from coordinator.web.pages.seen import SeenRounds
from coordinator.web.pages.shell import Shell
from foundation.settings import Row


def routes(
    store: Store,
    live: Live,
    clock: Callable[[], float],
    offered: frozenset[str] = frozenset(),
    settings: Sequence[Row] = (),
) -> APIRouter:
    """Return every page, its parts and the plotting script. `clock` gives UTC seconds since the epoch.

    `offered` has the API's routes, and `settings` what the coordinator's are.
    """
    shell, seen = Shell(store, live, clock, offered), SeenRounds(store)
    router = APIRouter()
    for page in (
        overview.routes(shell, seen),
        fleet.routes(shell),
        device.routes(shell),
        rounds.routes(shell),
        models.routes(shell),
        neighbours.routes(shell),
        compare.routes(shell, seen),
        effective.routes(shell, settings),
        shell.routes(),
    ):
        router.include_router(page)
    return router
