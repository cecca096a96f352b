"""Which devices are alike: the embeddings from which a hypernetwork makes their models, on a plane."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.strategies.base import State
from coordinator.web.pages.overview import chosen
from coordinator.web.pages.shell import Shell
from foundation.messages import Json
from foundation.parameters import Array

HERE = "/neighbours"
NEAREST = 3
"""Devices that are named beside each."""
KEPT = 4
"""Runs whose last map is kept in memory."""
LISTED = 100
NAMED = 40
"""So many have their names on the map; with more, pointing at one tells it."""
EMBEDDING, FRESH = "embedding", "fresh"
"""As strategies name them among what belongs to one device."""


@dataclass(frozen=True, slots=True)
class Place:
    """One device on the map."""

    agent: str
    x: float
    y: float
    nearest: tuple[tuple[str, float], ...]
    """Others by distance in the whole space, nearest first."""
    new: bool
    """Whether its embedding is still the one it was given, as it has not answered yet."""


@dataclass(frozen=True, slots=True)
class Map:
    """Embeddings along the two directions in which they differ most."""

    places: tuple[Place, ...]
    explained: tuple[float, float] | None
    """Share of the variance along each; `None` where all embeddings are the same."""
    size: int
    """Numbers in one embedding."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the state after one round has of embeddings; a round's state never changes."""

    after: int
    """The round."""
    devices: int
    """How many have one."""
    map: Map | None
    chart: Json


class Maps:
    """The last map of some runs, drawn once for every state. All verbs may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Snapshot] = OrderedDict()

    def latest(self, run: str) -> Snapshot | None:
        """Return what a run's last state has, `None` before any; raises `StoreError` for a damaged one."""
        with self._lock:  # held while it is drawn: who asks meanwhile would only draw the same
            kept = self._kept.get(run)
            if kept is not None and kept.after == self._store.state_round(run):
                return kept
            latest = self._store.latest_state(run)
            if latest is None:
                return None
            self._kept[run] = drawn = _drawn(*latest)
            self._kept.move_to_end(run)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return drawn


def _drawn(after: int, body: bytes) -> Snapshot:
    state = State.from_bytes(body)
    found = embeddings(state.private)
    there = mapped(found, [agent for agent, own in state.private.items() if FRESH in own])
    return Snapshot(after, len(found), there, chart(there))


def routes(shell: Shell) -> APIRouter:
    """Return the page of the neighbours and its part."""
    router, maps = APIRouter(include_in_schema=False), Maps(shell.store)

    async def render(template: str, wanted: str | None) -> HTMLResponse:
        present = shell.live.snapshot(shell.live.version).run
        told = await asyncio.to_thread(_told, shell.store, maps, wanted, present)
        return shell.render(template, HERE, asked_run=wanted, **told)

    @router.get("/neighbours")
    async def page(run: str | None = Query(None, max_length=200)) -> HTMLResponse:
        """The map of the run under way, the newest, or the one asked for."""
        return await render("neighbours.html", run)

    @router.get("/parts/neighbours")
    async def part(run: str | None = Query(None, max_length=200)) -> HTMLResponse:
        """The map, as it would be rendered now."""
        return await render("neighbours_map.html", run)

    return router


def embeddings(private: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """Return the embedding of every device that has one; of several, as with chunked models, the mean."""
    found: dict[str, Array] = {}
    for agent, own in private.items():
        if EMBEDDING in own:
            rows = np.asarray(own[EMBEDDING], np.float64)
            found[agent] = rows.reshape(-1, rows.shape[-1]).mean(axis=0)
    return found


def mapped(found: Mapping[str, Array], new: Sequence[str] = ()) -> Map | None:
    """Return the map of these embeddings by their principal components; `None` below two devices."""
    if len(found) < 2 or len({len(row) for row in found.values()}) != 1:
        return None
    agents = sorted(found)
    rows = np.stack([found[agent] for agent in agents])
    centred = rows - rows.mean(axis=0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((len(agents), 2))
    plane[:, : min(2, len(lengths))] = (left * lengths)[:, :2]
    # A component's sign means nothing: fixed, so that the map does not turn over between two rounds.
    plane *= np.where(plane[np.abs(plane).argmax(axis=0), (0, 1)] < 0, -1.0, 1.0)
    shares = [*(lengths**2 / total if (total := float((lengths**2).sum())) > 0 else []), 0.0]
    places = tuple(
        Place(agent, float(plane[i, 0]), float(plane[i, 1]), _nearest(agents, rows, i), agent in new)
        for i, agent in enumerate(agents)
    )
    return Map(places, (float(shares[0]), float(shares[1])) if len(shares) > 1 else None, rows.shape[1])


def _nearest(agents: Sequence[str], rows: Array, i: int) -> tuple[tuple[str, float], ...]:
    away = np.linalg.norm(rows - rows[i], axis=1)
    order = [int(j) for j in np.argsort(away, kind="stable") if j != i]
    return tuple((agents[j], float(away[j])) for j in order[:NEAREST])


def chart(found: Map | None) -> Json:
    """Return the map as plotly draws it; who is new is an open ring."""
    if found is None:
        return {"data": [], "layout": {}}
    shares = found.explained or (0.0, 0.0)
    named = "markers+text" if len(found.places) <= NAMED else "markers"
    data = []
    for new, name, symbol, colour in (
        (False, "taught by rounds", "circle", "--blue"),
        (True, "new to the run", "circle-open", "--amber"),
    ):
        group = [place for place in found.places if place.new is new]
        if group:
            data.append(
                {
                    "name": name,
                    "x": [round(place.x, 4) for place in group],
                    "y": [round(place.y, 4) for place in group],
                    "text": [place.agent for place in group],
                    "mode": named,
                    "textposition": "top center",
                    "cliponaxis": False,
                    "marker": {"size": 11, "symbol": symbol, "color": colour, "line": {"width": 2}},
                    "hovertemplate": "%{text}<extra></extra>",
                }
            )
    axes = [{"title": {"text": f"component {n + 1} ({100 * shares[n]:.0f} %)"}} for n in (0, 1)]
    layout = {"xaxis": axes[0], "yaxis": {**axes[1], "scaleanchor": "x"}, "hovermode": "closest"}
    return {"data": data, "layout": layout}


def _told(store: Store, maps: Maps, wanted: str | None, present: str | None) -> Json:
    run: RunRecord | None = chosen(store, wanted, present)
    latest = None if run is None else maps.latest(run.run)
    return {
        "run": run,
        "after": None if latest is None else latest.after,
        "devices": 0 if latest is None else latest.devices,
        "map": None if latest is None else latest.map,
        "listed": LISTED,
        "chart": chart(None) if latest is None else latest.chart,
    }
