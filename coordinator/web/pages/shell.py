"""What every page has: templates, the way to the other pages, and the scripts.

There is one renderer, the templates. A page is made of parts, each of which has an address of its own; the
script asks for a part again when something happened and puts it in place. Templates escape everything;
figures carry their units, and what is not known is a dash.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from coordinator.live import Live
from coordinator.store.sql import Store
from coordinator.web.asker import LOOKS_ONLY
from coordinator.web.pages import words
from foundation.energy import Kind

HERE = Path(__file__).parent.parent

KIND_WORDS: Mapping[Kind, str] = {
    Kind.MEASURED: "read from a meter on the device",
    Kind.MIXED: "partly read from a meter, partly a model's estimate",
    Kind.MODELLED: "a power model's estimate, not read from a meter",
    Kind.NONE: "nobody knows",
}


class Place(NamedTuple):
    """One entry of the navigation."""

    path: str
    title: str


PLACES = (
    Place("/", "Overview"),
    Place("/fleet", "Fleet"),
    Place("/neighbours", "Neighbours"),
    Place("/compare", "Compare"),
    Place("/models", "Models"),
    Place("/settings", "Settings"),
)


class Shell:
    """Renders pages over a store and the live picture. `clock` gives UTC seconds since the epoch."""

    def __init__(
        self, store: Store, live: Live, clock: Callable[[], float], offered: frozenset[str] = frozenset()
    ) -> None:
        """`offered` has the API's routes, such as "POST /api/v1/runs": no page asks for another."""
        self.store, self.live, self._clock, self._offered = store, live, clock, offered
        self._templates = _templates()

    def render(self, template: str, here: str = "", **values: object) -> HTMLResponse:
        """Return a page, or a part of one, as it is now; `here` is the path of its entry in the navigation.

        Call it from the event loop: the live picture belongs to it. A viewer is offered no change.
        """
        now = datetime.fromtimestamp(self._clock(), UTC)
        always = {"status": self.live.snapshot(), "now": now, "here": here, "places": PLACES}
        looks_only = LOOKS_ONLY.get()
        offered = frozenset[str]() if looks_only else self._offered
        told = {**always, "offered": offered, "looks_only": looks_only, **values}
        page = self._templates.get_template(template).render(**told)
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    def routes(self) -> APIRouter:
        """Return the route of the plotting script."""
        router = APIRouter(include_in_schema=False)

        @router.get("/static/plotly.js")
        def plotly() -> FileResponse:
            """The plotting script of the installed package: no other machine is asked for it."""
            path = plotly_script()
            if path is None:
                raise HTTPException(404, "plotly is not installed: pages show their tables without charts")
            headers = {"Cache-Control": "public, max-age=31536000, immutable"}
            return FileResponse(path, media_type="text/javascript", headers=headers)

        return router


def plotly_script() -> Path | None:
    """Return plotly's script in the installed package, or `None`."""
    found = importlib.util.find_spec("plotly")  # finds without importing: the Python side is not needed
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.is_file():
            return path
    return None


@functools.cache  # compiling them takes longer than a page
def _templates() -> Environment:
    loader = FileSystemLoader(HERE / "templates")
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    templates.filters.update(
        percent=words.percent,
        joules=words.joules,
        seconds=words.seconds,
        size=words.size,
        figure=words.figure,
        ago=words.ago,
        clock=words.clock_time,
        moment=words.moment,
        short=words.short,
        weblink=words.weblink,
    )
    templates.globals.update(
        kind_words={str(kind): told for kind, told in KIND_WORDS.items()},
        plotly_version=importlib.metadata.version("plotly") if plotly_script() else None,
        hedgerow_asset=_asset_version(),
    )
    return templates


def _asset_version() -> str:
    """Return a word that changes when the page's own files do, so that browsers ask for the new ones."""
    return str(max(path.stat().st_mtime_ns for path in (HERE / "static").iterdir()))
