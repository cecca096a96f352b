"""The first page: rendered here, then kept fresh by one small script that asks for its parts again.

There is one renderer, the templates: the script replaces pieces of the page by what `/parts/{name}` returns.
Templates escape everything; figures carry their units, and what is not known is a dash.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import FileResponse, HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from coordinator.live import Live
from coordinator.rollout.picture import stands
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.web.models import RoundView, UpdateView, number, views
from foundation.energy import Kind
from foundation.messages import Json

HERE = Path(__file__).parent
DASH = "–"
ROUNDS_SHOWN = 200
"""Rounds that chart and tables look back on; the API has all."""
UPDATES_SHOWN = 100
ARTIFACTS_SHOWN = 50
EVENTS_SHOWN = 15

KIND_WORDS: Mapping[Kind, str] = {
    Kind.MEASURED: "read from a meter on the device",
    Kind.MIXED: "partly read from a meter, partly a model's estimate",
    Kind.MODELLED: "a power model's estimate, not read from a meter",
    Kind.NONE: "nobody knows",
}

Part = Literal["now", "fleet", "run"]


def routes(store: Store, live: Live, clock: Callable[[], float]) -> APIRouter:
    """Return the page, its parts, and the plotting script. `clock` gives UTC seconds since the epoch."""
    router = APIRouter(include_in_schema=False)
    templates = _templates()

    async def render(template: str, wanted: str | None) -> HTMLResponse:
        chosen = await asyncio.to_thread(_chosen, store, wanted, live.snapshot(live.version).run)
        values = await asyncio.to_thread(_told, store, chosen) if template != "fleet.html" else {}
        now = datetime.fromtimestamp(clock(), UTC)
        page = templates.get_template(template).render(status=live.snapshot(), now=now, run=chosen, **values)
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    @router.get("/")
    async def page(run: str | None = Query(None, max_length=200)) -> HTMLResponse:
        """The page, for the run under way, the newest, or the one asked for."""
        return await render("page.html", run)

    @router.get("/parts/{part}")
    async def parts(part: Part, run: str | None = Query(None, max_length=200)) -> HTMLResponse:
        """One part of the page, as it would be rendered now."""
        return await render(f"{part}.html", run)

    @router.get("/static/plotly.js")
    def plotly() -> FileResponse:
        """The plotting script of the installed package: no other machine is asked for it."""
        path = plotly_script()
        if path is None:
            raise HTTPException(404, "plotly is not installed: the page shows its tables without the chart")
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


def chart(rounds: Sequence[RoundView]) -> Json:
    """Return accuracy by round as the script draws it: four lines in per cent, null where nobody told.

    Closed rounds only: the mean over the first few agents of an open one would jump as the others come in.
    """
    told = [view for view in rounds if view.state == "closed" and (view.accuracy_sent or view.accuracy)]

    def line(
        which: Literal["accuracy_sent", "accuracy"], figure: Literal["mean", "worst"]
    ) -> list[float | None]:
        spreads = [getattr(view, which) for view in told]
        return [None if spread is None else round(100 * getattr(spread, figure), 2) for spread in spreads]

    return {
        "rounds": [view.round for view in told],
        "trained": {"mean": line("accuracy", "mean"), "worst": line("accuracy", "worst")},
        "sent": {"mean": line("accuracy_sent", "mean"), "worst": line("accuracy_sent", "worst")},
    }


def _chosen(store: Store, wanted: str | None, present: str | None) -> RunRecord | None:
    """Return the run to show: the one asked for, the one under way, or the newest."""
    if wanted is not None and not store.has_run(wanted):
        raise HTTPException(404, f"there is no run {wanted!r} in this store")
    name = wanted or present
    if name is not None and store.has_run(name):
        return store.run(name)
    runs = store.runs()
    return runs[0] if runs else None


def _told(store: Store, run: RunRecord | None) -> Json:
    """Return what the templates show of one run."""
    rounds: list[RoundView] = []
    updates: list[UpdateView] = []
    if run is not None:
        records = store.latest_rounds(run.run, ROUNDS_SHOWN)
        before = (records[0].round, "") if records else None  # names have at least one letter
        updates = [UpdateView.of(record) for record in store.history(run.run, after=before)]
        rounds = views(records, updates)
    artifacts = store.artifacts(run.run if run else None, limit=ARTIFACTS_SHOWN)
    return {
        "runs": store.runs(),
        "rounds": rounds,
        "chart": chart(rounds),
        "updates": _latest(updates),
        "updates_total": store.count_updates(run.run) if run else 0,
        "artifacts": artifacts,
        "stands": stands(store, artifacts),
        "refusals": store.refusals(run.run)[-EVENTS_SHOWN:][::-1] if run else [],
        "events": store.latest_events(EVENTS_SHOWN),
    }


def _latest(updates: Sequence[UpdateView]) -> list[UpdateView]:
    """Return every agent's last update, by agent."""
    last = {update.agent: update for update in updates}
    return [last[agent] for agent in sorted(last)][:UPDATES_SHOWN]


def _templates() -> Environment:
    loader = FileSystemLoader(HERE / "templates")
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    templates.filters.update(
        percent=percent,
        joules=joules,
        seconds=seconds,
        size=size,
        figure=figure,
        ago=ago,
        clock=clock_time,
        short=short,
        weblink=weblink,
    )
    templates.globals.update(
        kind_words={str(kind): words for kind, words in KIND_WORDS.items()},
        plotly_version=importlib.metadata.version("plotly") if plotly_script() else None,
        hedgerow_asset=_asset_version(),
    )
    return templates


def _asset_version() -> str:
    """Return a word that changes when the page's own files do, so that browsers ask for the new ones."""
    return str(max(path.stat().st_mtime_ns for path in (HERE / "static").iterdir()))


def percent(value: object, digits: int = 1) -> str:
    """Write a share of 1 as per cent."""
    share = number(value)
    return DASH if share is None else f"{100 * share:.{digits}f} %"


def joules(value: object) -> str:
    """Write joules, kilojoules above ten thousand."""
    found = number(value)
    if found is None:
        return DASH
    if abs(found) >= 10_000:
        return f"{found / 1000:.1f} kJ"
    if abs(found) < 1:
        return f"{found:.2g} J"
    return f"{found:.0f} J" if abs(found) >= 100 else f"{found:.1f} J"


def seconds(value: object) -> str:
    """Write seconds as one reads them: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    found = number(value)
    if found is None or found < 0:
        return DASH
    if found < 10:
        return f"{found:.1f} s"
    minutes, rest = divmod(round(found), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(value: object) -> str:
    """Write bytes in powers of 1024."""
    found = number(value)
    if found is None or found < 0:
        return DASH
    step = 0 if found < 1024 else min(3, int(math.log(found, 1024)))
    return f"{found:.0f} B" if step == 0 else f"{found / 1024**step:.1f} {('KiB', 'MiB', 'GiB')[step - 1]}"


def figure(value: object) -> str:
    """Write a number without a unit to three significant digits."""
    found = number(value)
    return DASH if found is None else f"{found:.3g}"


def weblink(address: str) -> bool:
    """Whether an address that an agent told may become a link: no scheme but the web's."""
    return address.startswith(("http://", "https://"))


def ago(then: datetime | None, now: datetime) -> str:
    """Write how long ago something was."""
    if then is None:
        return "never"
    past = (now - then).total_seconds()
    if past < 5:
        return "now"
    # Coarse on purpose: a cell that changes every second would never stand still.
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if past >= length:
            return f"{past // length:.0f} {unit} ago"
    return f"{past // 5 * 5:.0f} s ago"


def clock_time(when: datetime | None) -> str:
    """Write a moment in UTC to the second."""
    return DASH if when is None else f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def short(digest: str | None) -> str:
    """Write the first twelve digits of a digest."""
    return digest[:12] if digest else DASH
