"""A browser without a screen, and a store that is written once and copied for every test of the page."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import httpx

from coordinator.live import Live
from coordinator.store.sql import Store
from tests.coordinator.filled_store import Clock, enliven, fill, furnished

VOID = {"meta", "link", "br", "input"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects ids, links and the text of cells by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outer: list[str] = []
        self.nested: set[tuple[str, str]] = set()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.loose = ""
        """Text outside of all pieces with an id, which the script would not put in place."""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.tags.add(tag)
        name = told.get("id") or ""
        if name:
            self.ids.append(name)
            self.nested |= {(outer, name) for outer in self.outer if outer}
        if tag not in VOID:
            self.open.append(tag)
            self.outer.append(name)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name in told), "no scripts in attributes"

    def handle_data(self, data: str) -> None:
        if not any(self.outer):
            self.loose += data.strip()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.outer.pop()


class Visit:
    """A store, a live picture, and a browser without a screen."""

    def __init__(self, store: Store, live: Live, clock: Clock, client: httpx.AsyncClient) -> None:
        self.store, self.live, self.clock, self.client = store, live, clock, client

    async def get(self, path: str = "/") -> str:
        answer = await self.client.get(path)
        assert answer.status_code == 200, answer.text
        outline = Outline(answer.text)
        assert len(outline.ids) == len(set(outline.ids))
        return answer.text


class Prepared:
    """A store, empty or as `fill` leaves it, written once; every test has a copy, as writing takes long."""

    def __init__(self, folder: Path, filled: bool) -> None:
        self.filled, self._folder, clock = filled, folder, Clock()
        with Store.open(folder, clock=clock) as store:
            if filled:
                fill(store, clock)
        self._now = clock.now

    def copy(self, folder: Path, clock: Clock) -> None:
        """Put a copy into `folder`, and the clock to when it was written."""
        shutil.copytree(self._folder, folder, dirs_exist_ok=True)
        clock.now = self._now


@contextmanager
def visiting(folder: Path, prepared: Prepared) -> Iterator[Visit]:
    """Open the application over a copy; the agents of a filled one are at work."""
    clock = Clock()
    prepared.copy(folder, clock)
    with Store.open(folder, clock=clock) as store:
        live = Live(store, clock=clock, monotonic=clock)
        if prepared.filled:
            enliven(live, clock)
        app = furnished(store, live, clock, folder)
        transport = httpx.ASGITransport(app)  # it holds no connection that would have to be closed
        yield Visit(store, live, clock, httpx.AsyncClient(transport=transport, base_url="http://localhost"))


def read(page: str) -> str:
    """Return what a reader sees, without tags, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL))
