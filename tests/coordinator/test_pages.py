"""The first page: what it says, that it escapes, and that it needs no other machine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from coordinator.app import create_app
from coordinator.live import Live
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.web import pages
from foundation.energy import Stage
from foundation.messages import AgentCard, Telemetry, Unavailable
from tests.coordinator.filled_store import NOON, SPEC, Clock, Engine, enliven, fill

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


@pytest.fixture
async def visit(tmp_path: Path) -> AsyncIterator[Visit]:
    clock = Clock()
    with Store.open(tmp_path, clock=clock) as store:
        live = Live(store, clock=clock, monotonic=clock)
        app = create_app(store, live, Engine(store, live), clock=clock)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client:
            yield Visit(store, live, clock, client)


def words(page: str) -> str:
    """Return what a reader sees, without tags, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL))


@pytest.mark.anyio
async def test_an_empty_page_says_what_to_do_next(visit: Visit) -> None:
    told = words(await visit.get())
    assert "No run is under way" in told
    assert "hedgerow agent --config agent.toml" in told
    visit.live.card(AgentCard(agent="pi", version="0", profile="p", examples=1))
    told = words(await visit.get())
    assert "1 agent known, none online" in told
    visit.live.presence("pi", online=True)
    told = words(await visit.get())
    assert "1 of 1 agent online. Begin a run: curl -X POST" in told


@pytest.mark.anyio
async def test_a_run_under_way(visit: Visit) -> None:
    fill(visit.store, visit.clock)
    enliven(visit.live, visit.clock)
    page = await visit.get()
    told = words(page)
    for piece in (
        "greenhouse-1 collecting",
        "Round 6 of 10",
        "about 1 min 48 s",
        "Agents online 3 of 4",
        "Updates in 2 of 4",
        "162 of 256 63 %",
        "jetson-barn online · jetson_orin_nano",
        "train 62 % 12 s left",
        "18.4 J measured",
        "≈ 9.7 J modelled",
        "300.0 KiB",
        "free memory is 41 MiB",
        "round 5 closed: 4 of 4 updates",
        "22 updates in all",
    ):
        assert piece in told, piece
    assert 'href="http://192.0.2.7:8000"' in page


@pytest.mark.anyio
async def test_modelled_joules_never_look_measured(visit: Visit) -> None:
    fill(visit.store, visit.clock)
    page = await visit.get()
    figures = re.findall(
        r'class="joules (\w+)">(≈ )?[\d.]+ k?J</span> <span class="kind (\w+)"[^>]*>(\w+)<', page
    )
    assert {kind for kind, *_ in figures} == {"measured", "modelled"}
    for kind, about, badge, said in figures:
        assert kind == badge == said
        assert bool(about) == (kind == "modelled")
    assert "1 not known" in words(page)
    assert page.count(" J</span>") + page.count("kJ</span>") == len(figures)  # no joules without their kind


@pytest.mark.anyio
async def test_the_fleet_says_who_is_skipped_eased_or_not_available_and_why(visit: Visit) -> None:
    for name in ("a", "b"):
        visit.live.card(AgentCard(agent=name, version="0", profile="p", examples=1))
    visit.live.asked("a", skipped="its 40 J are spent")
    visit.live.asked("b", eased="1 of 2 local epochs")
    told = words(await visit.get("/parts/fleet"))
    assert "skipped: its 40 J are spent" in told
    assert "eased: 1 of 2 local epochs" in told
    visit.live.asked("b")
    hot = Unavailable(cause="heat", reason="it is too hot: 81 °C, the limit is 75 °C")
    visit.live.card(AgentCard(agent="a", version="0", profile="p", examples=1, unavailable=hot))
    told = words(await visit.get("/parts/fleet"))
    assert "not available: it is too hot: 81 °C, the limit is 75 °C" in told
    assert "eased" not in told
    assert "skipped" not in told


@pytest.mark.anyio
async def test_what_agents_say_is_escaped(visit: Visit) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    card = AgentCard(
        agent="a",
        version="0",
        profile=evil,
        examples=1,
        problem=evil,
        serving="javascript:alert(1)",
        unavailable=Unavailable(cause="heat", reason=evil),
    )
    visit.live.card(card)
    visit.live.card(AgentCard(agent="b", version="0", profile="p", examples=1))
    visit.live.asked("b", skipped=evil)
    visit.live.phase("r", 1, 1, "collecting", {evil: evil})
    visit.store.open_run(RunRecord("r", evil, "{}", "{}", 1, 0))
    visit.store.set_run_state("r", "failed", evil)
    visit.store.open_round("r", 1, [evil], 0)
    visit.store.add_update(
        "r", 1, "</script>" + evil, b"f", {"metrics": {"accuracy": 0.5, evil: 1.0}, "problem": evil}
    )
    visit.store.add_refusal("r", 1, evil, evil, NOON)
    visit.store.add_event("note", text=evil)
    page = await visit.get()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert 'href="javascript' not in page
    assert "serving at javascript:alert(1)" in page


@pytest.mark.anyio
async def test_figures_that_are_not_finite_or_not_there_are_dashes(visit: Visit) -> None:
    visit.store.open_run(RunRecord("r", "fedavg", "{}", SPEC, 1, 0))
    visit.store.open_round("r", 1, ["a"], 0)
    visit.store.add_update("r", 1, "a", b"f", {"metrics": {"accuracy": math.nan, "loss": math.inf}})
    visit.live.telemetry(Telemetry(agent="a", stage=Stage.TRAIN, kept_units=(0, 0), hidden_units=4))
    page = await visit.get()
    assert not re.search(r"\b[Nn]a[Nn]\b|\binf\b|\bNone\b|undefined", words(page))
    assert "– → –" in words(page)
    assert "0 of 8 0 %" in words(page)


@pytest.mark.anyio
async def test_the_chart_has_the_four_lines(visit: Visit) -> None:
    fill(visit.store, visit.clock)
    page = await visit.get()
    found = re.search(r'id="chart-data">(.*?)</script>', page)
    assert found
    chart = json.loads(found.group(1))
    assert chart["rounds"] == [1, 2, 3, 4, 5]  # the sixth is open
    assert chart["sent"]["worst"] == [10.0] * 5
    assert all(w <= m for w, m in zip(chart["trained"]["worst"], chart["trained"]["mean"], strict=True))


@pytest.mark.anyio
async def test_parts_are_pieces_of_the_page(visit: Visit) -> None:
    fill(visit.store, visit.clock)
    enliven(visit.live, visit.clock)
    page = await visit.get()
    for part in ("now", "fleet", "run"):
        assert f'id="{part}"' in page
        assert (await visit.get(f"/parts/{part}")).strip() in page
        # The script replaces innermost pieces with an id, so what holds another must not change itself.
        holders = {outer for outer, _ in Outline(await visit.get(f"/parts/{part}")).nested}
        assert holders <= {"fleet-table"}
    assert (await visit.client.get("/parts/other")).status_code == 422


@pytest.mark.anyio
async def test_an_older_run_can_be_looked_at(visit: Visit) -> None:
    fill(visit.store, visit.clock, rounds=1, run="old")
    visit.clock.now += 60
    fill(visit.store, visit.clock, rounds=2, run="new")
    assert "Rounds of new" in await visit.get()
    assert 'data-run="old"' in await visit.get("/?run=old")
    assert "Rounds of old" in await visit.get("/parts/run?run=old")
    assert (await visit.client.get("/?run=nobody")).status_code == 404


@pytest.mark.anyio
async def test_nothing_is_loaded_from_another_machine(visit: Visit) -> None:
    answer = await visit.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    for address in Outline(answer.text).loads:
        assert address.startswith(("/", "data:,"))
        if address.startswith("/static/"):
            loaded = await visit.client.get(address)
            assert loaded.status_code == 200
            assert loaded.headers["content-type"].partition(";")[0] in ("text/javascript", "text/css")
    script = pages.plotly_script()
    assert script is not None
    assert script.stat().st_size > 1_000_000
    for path in (pages.HERE / "static").iterdir():
        assert "://" not in path.read_text()


def test_the_script_stays_small() -> None:
    assert len((pages.HERE / "static" / "page.js").read_text().splitlines()) < 100


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (pages.percent(0.8768), "87.7 %"),
        (pages.percent(math.nan), "–"),
        (pages.percent(None), "–"),
        (pages.percent("0.5"), "–"),
        (pages.joules(0.04), "0.04 J"),
        (pages.joules(0), "0 J"),
        (pages.joules(123.4), "123 J"),
        (pages.joules(12_345), "12.3 kJ"),
        (pages.joules(math.inf), "–"),
        (pages.seconds(0.42), "0.4 s"),
        (pages.seconds(59.7), "1 min 00 s"),
        (pages.seconds(7800), "2 h 10 min"),
        (pages.seconds(-1), "–"),
        (pages.size(0), "0 B"),
        (pages.size(1023), "1023 B"),
        (pages.size(1024), "1.0 KiB"),
        (pages.size(5 * 1024**4), "5120.0 GiB"),
        (pages.size(None), "–"),
        (pages.ago(None, NOON), "never"),
        (pages.ago(NOON + timedelta(seconds=3), NOON), "now"),
        (pages.ago(NOON - timedelta(seconds=44), NOON), "40 s ago"),
        (pages.ago(NOON - timedelta(days=3), NOON), "3 d ago"),
        (pages.figure(0.123456), "0.123"),
        (pages.clock_time(NOON), "2026-03-01 12:00:00"),
        (pages.short(None), "–"),
    ],
)
def test_figures_are_written_with_their_units(written: str, expected: str) -> None:
    assert written == expected
