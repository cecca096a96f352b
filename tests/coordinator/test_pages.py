"""The first page: what it says, that it escapes, and that it needs no other machine."""

from __future__ import annotations

import html
import json
import math
import re
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from coordinator.fleet.tokens import ApiTokens, Role
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.web.pages import overview, shell, words
from coordinator.web.pages.seen import SeenRounds
from foundation.energy import Stage
from foundation.messages import AgentCard, Telemetry, Unavailable
from foundation.spec import ModelSpec
from tests.coordinator.filled_store import NOON, SPEC, Clock, fill, furnished, joined, with_models
from tests.coordinator.visiting import Outline, Prepared, Visit, read


@pytest.mark.anyio
async def test_an_empty_page_says_what_to_do_next(visit: Visit) -> None:
    told = read(await visit.get())
    assert "No run is under way" in told
    assert "hedgerow agent --config agent.toml" in told
    visit.live.card(AgentCard(agent="pi", version="0", profile="p", examples=1))
    told = read(await visit.get())
    assert "1 agent known, none online" in told
    visit.live.presence("pi", online=True)
    told = read(await visit.get())
    assert "1 of 1 agent online. Begin a run here, or from a shell: Start a run curl -X POST" in told


@pytest.mark.anyio
async def test_a_run_under_way(shown: Visit) -> None:
    page = await shown.get()
    told = read(page)
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
        "FedAvg, dense float32 computed",
    ):
        assert piece in told, piece
    assert 'href="http://192.0.2.7:8000"' in page


@pytest.mark.anyio
async def test_a_run_can_be_stopped_from_the_page_while_it_is_under_way(filled: Visit) -> None:
    asked = 'data-send="POST /api/v1/runs/greenhouse-1/stop"'
    assert asked in await filled.get()
    answer = await filled.client.post("/api/v1/runs/greenhouse-1/stop", json={"reason": "paint"})
    assert answer.status_code == 200
    filled.live.phase("greenhouse-1", 6, 10, "stopped")
    assert asked not in await filled.get()


@pytest.mark.anyio
async def test_a_run_is_paused_and_resumed_as_it_stands(filled: Visit) -> None:
    def buttons(page: str) -> set[str]:
        return set(re.findall(r'data-send="POST /api/v1/runs/greenhouse-1/(\w+)"', page))

    assert buttons(await filled.get()) == {"pause", "stop"}
    answer = await filled.client.post("/api/v1/runs/greenhouse-1/pause", json={"reason": "harvest"})
    assert answer.status_code == 200
    page = await filled.get()
    assert buttons(page) == {"resume", "stop"}
    assert "collecting pauses when round 6 has ended: harvest" in read(page)
    filled.live.phase("greenhouse-1", 7, 10, "paused")
    page = await filled.get("/parts/overview/now")
    assert buttons(page) == {"resume", "stop"}
    assert "greenhouse-1 paused harvest" in read(page)
    assert "Time left –" in read(page)
    assert (await filled.client.post("/api/v1/runs/greenhouse-1/resume", json={})).status_code == 200
    filled.live.phase("greenhouse-1", 7, 10, "planning")
    page = await filled.get()
    assert buttons(page) == {"pause", "stop"}
    assert "harvest" not in read(page)
    filled.live.phase("greenhouse-2", 0, 10, "waiting for agents")
    page = await filled.get()
    assert 'data-ask="stop-run"' in page
    assert 'data-ask="pause-run"' not in page, "it is not among the runs before its agents are there"


@pytest.mark.anyio
async def test_what_changes_things_is_shown_to_operators_alone(filled: Visit, tmp_path: Path) -> None:
    joined(filled.store, "jetson-barn")
    filled.store.upsert_agent(with_models(0), NOON)
    tokens = ApiTokens(filled.store, clock=filled.clock)
    app = furnished(filled.store, filled.live, filled.clock, tmp_path, tokens)
    there = ("/", "/fleet", "/fleet/jetson-barn")
    seen: dict[str, list[str]] = {}
    roles: tuple[Role, ...] = ("viewer", "operator")
    for role in roles:
        headers = {"Authorization": f"Bearer {tokens.make(role, role, expires_s=None)}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", headers=headers) as client:
            filled.live.phase("greenhouse-1", 6, 10, "collecting")
            seen[role] = [(await client.get(path)).text for path in (*there, *PAGES)]
            filled.live.phase("greenhouse-1", 10, 10, "finished")
            seen[role].append((await client.get("/")).text)
    for page in seen["viewer"]:
        assert "data-send" not in page
        assert "data-ask" not in page
        assert "You look as a viewer" in read(page)
    offered = set(re.findall(r'data-send="POST ([^"]+)"', " ".join(seen["operator"])))
    ends = ("stop", "pause", "runs", "invites", "revoke", "pin", "unpin", "rollback")
    assert {address.rpartition("/")[2] for address in offered} == set(ends)
    assert not any("You look as a viewer" in page for page in seen["operator"])
    assert "An operator begins a run" not in read(await filled.get("/")), "on loopback everybody is one"


@pytest.mark.anyio
async def test_modelled_joules_never_look_measured(shown: Visit) -> None:
    page = await shown.get()
    figures = re.findall(
        r'class="joules (\w+)">(≈ )?[\d.]+ k?J</span> <span class="kind (\w+)"[^>]*>(\w+)<', page
    )
    assert {kind for kind, *_ in figures} == {"measured", "modelled"}
    for kind, about, badge, said in figures:
        assert kind == badge == said
        assert bool(about) == (kind == "modelled")
    assert "1 not known" in read(page)
    assert page.count(" J</span>") + page.count("kJ</span>") == len(figures)  # no joules without their kind


@pytest.mark.anyio
async def test_the_fleet_says_who_is_skipped_eased_or_not_available_and_why(visit: Visit) -> None:
    for name in ("a", "b"):
        visit.live.card(AgentCard(agent=name, version="0", profile="p", examples=1))
    visit.live.asked("a", skipped="its 40 J are spent")
    visit.live.asked("b", eased="1 of 2 local epochs")
    told = read(await visit.get("/parts/fleet"))
    assert "skipped: its 40 J are spent" in told
    assert "eased: 1 of 2 local epochs" in told
    visit.live.asked("b")
    hot = Unavailable(cause="heat", reason="it is too hot: 81 °C, the limit is 75 °C")
    visit.live.card(AgentCard(agent="a", version="0", profile="p", examples=1, unavailable=hot))
    told = read(await visit.get("/parts/fleet"))
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
    assert not re.search(r"\b[Nn]a[Nn]\b|\binf\b|\bNone\b|undefined", read(page))
    assert "– → –" in read(await visit.get("/runs/r/rounds/1"))
    assert "0 of 8 0 %" in read(page)


@pytest.mark.anyio
async def test_the_chart_has_the_four_lines(shown: Visit) -> None:
    page = await shown.get()
    found = re.search(r'id="chart-accuracy">(.*?)</script>', page)
    assert found
    chart = json.loads(found.group(1))
    lines = {line["name"]: line for line in chart["data"]}
    assert len(lines) == 4
    assert all(line["x"] == [1, 2, 3, 4, 5] for line in lines.values())  # the sixth is open
    assert lines["as sent, worst"]["y"] == [10.0] * 5
    worst, mean = (lines[f"after training, {which}"]["y"] for which in ("worst", "mean"))
    assert all(w <= m for w, m in zip(worst, mean, strict=True))


PAGES = (
    "/",
    "/fleet",
    "/fleet/pi-greenhouse",
    "/models",
    "/neighbours",
    "/compare",
    "/settings",
    "/runs/greenhouse-1/rounds/3",
    "/runs/greenhouse-1/rounds/6",
)


STILL = ("/compare", "/settings")
"""What does not change while one looks: finished runs, and what a coordinator began with."""


@pytest.mark.anyio
@pytest.mark.parametrize("address", PAGES)
async def test_parts_are_pieces_of_their_page(shown: Visit, address: str) -> None:
    page = await shown.get(address)
    parts = re.findall(r'data-part="([^"]+)"', page)
    assert parts or address in STILL
    for part in parts:
        told = await shown.get(html.unescape(part))
        assert told.strip() in page
        # The script replaces innermost pieces with an id, so what holds another must not change itself.
        outline = Outline(told)
        assert {outer for outer, _ in outline.nested} <= {"fleet-table"}
        assert outline.ids
        assert outline.loose == ""


@pytest.mark.anyio
@pytest.mark.parametrize("address", PAGES)
async def test_every_page_has_one_heading_a_title_and_the_way_to_the_others(
    bare: Visit, shown: Visit, address: str
) -> None:
    for each in (bare, shown):
        answer = await each.client.get(address)
        if answer.status_code == 200:
            assert re.search(r"<title>[^<]*Hedgerow[^<]*</title>", answer.text)
            assert answer.text.count("<h1") == 1
            assert {place.path for place in shell.PLACES} <= set(Outline(answer.text).loads)
            assert len(answer.content) < 300_000
    assert answer.status_code == 200


@pytest.mark.anyio
async def test_an_unknown_part_round_or_run_is_not_found(shown: Visit) -> None:
    assert (await shown.client.get("/parts/overview/other")).status_code == 422
    assert (await shown.client.get("/runs/nobody/rounds/1")).status_code == 404
    assert (await shown.client.get("/runs/greenhouse-1/rounds/99")).status_code == 404


@pytest.mark.anyio
async def test_a_round_says_who_took_part_and_who_did_not(filled: Visit) -> None:
    filled.store.add_refusal("greenhouse-1", 3, "pi-kitchen", "the disk is full", NOON)
    filled.store.quarantine.keep(
        "vps-1", b"frame", cause="outside", reason="ten times the others", run="greenhouse-1", round=3
    )
    told = read(await filled.get("/runs/greenhouse-1/rounds/3"))
    assert "Updates 4 of 4" in told
    assert "pi-kitchen refused: the disk is full" in told
    assert "vps-1 quarantined (outside): ten times the others" in told
    assert "the disk is full" not in read(await filled.get("/runs/greenhouse-1/rounds/2"))


@pytest.mark.anyio
async def test_a_large_fleet_comes_in_pages(visit: Visit) -> None:
    for n in range(250):
        visit.live.card(AgentCard(agent=f"pi-{n:03}", version="0", profile="p", examples=1))
    assert "pi-000" not in await visit.get("/")  # too many for the overview
    seen: list[str] = []
    address: str | None = "/fleet"
    while address is not None:
        page = await visit.get(address)
        seen += re.findall(r'id="agent-(pi-\d+)"', page)
        following = re.search(r'href="(/fleet\?after=[^"]+)"', page)
        address = following and following[1]
    assert seen == [f"pi-{n:03}" for n in range(250)]


@pytest.mark.anyio
async def test_sums_stand_beside_what_fedavg_would_send(shown: Visit) -> None:
    spec = ModelSpec.model_validate_json(SPEC)
    dense = sum(4 * math.prod(shape) for name, shape in spec.layout if not name.endswith(".threshold"))
    run = shown.store.run("greenhouse-1")
    rounds = SeenRounds(shown.store).latest("greenhouse-1", 200)
    sums = overview.Sums(run, rounds)
    assert sums.updates == 22
    assert sums.fedavg_bytes == 2 * 22 * dense
    told = read(await shown.get("/parts/overview/sums"))
    assert f"computed {words.size(2 * 22 * dense)} this run: " in told
    assert "Worst 10 % of devices, after" in told


def test_a_closed_round_is_read_once_until_a_late_update_comes(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    prepared.copy(tmp_path / "store", clock)
    with Store.open(tmp_path / "store", clock=clock) as store:
        asked: list[int] = []
        plain = store.updates
        monkeypatch.setattr(store, "updates", lambda run, n: (asked.append(n), plain(run, n))[1])
        seen = SeenRounds(store)
        first = seen.latest("greenhouse-1", 200)
        assert asked == [1, 2, 3, 4, 5, 6]
        assert seen.latest("greenhouse-1", 200) == first
        assert asked[6:] == [6]  # the open one
        store.add_update("greenhouse-1", 2, "late", b"f", {"metrics": {"accuracy": 0.0}})
        assert seen.latest("greenhouse-1", 200)[1].updates == 5
        assert asked[7:] == [2, 6]


@pytest.mark.anyio
async def test_an_older_run_can_be_looked_at(visit: Visit) -> None:
    fill(visit.store, visit.clock, rounds=1, run="old")
    visit.clock.now += 60
    fill(visit.store, visit.clock, rounds=2, run="new")
    assert "Rounds of new" in await visit.get()
    assert 'data-part="/parts/overview/run?run=old"' in await visit.get("/?run=old")
    assert "Rounds of old" in await visit.get("/parts/overview/run?run=old")
    assert (await visit.client.get("/?run=nobody")).status_code == 404


@pytest.mark.anyio
async def test_nothing_is_loaded_from_another_machine(bare: Visit) -> None:
    answer = await bare.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    for address in Outline(answer.text).loads:
        assert address.startswith(("/", "data:,", "#"))
        if address.startswith("/static/"):
            loaded = await bare.client.get(address)
            assert loaded.status_code == 200
            assert loaded.headers["content-type"].partition(";")[0] in ("text/javascript", "text/css")
    script = shell.plotly_script()
    assert script is not None
    assert script.stat().st_size > 1_000_000
    for path in (shell.HERE / "static").iterdir():
        assert "://" not in path.read_text()


def test_the_script_stays_small() -> None:
    assert len((shell.HERE / "static" / "page.js").read_text().splitlines()) < 140


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.percent(0.8768), "87.7 %"),
        (words.percent(math.nan), "–"),
        (words.percent(None), "–"),
        (words.percent("0.5"), "–"),
        (words.joules(0.04), "0.04 J"),
        (words.joules(0), "0 J"),
        (words.joules(123.4), "123 J"),
        (words.joules(12_345), "12.3 kJ"),
        (words.joules(math.inf), "–"),
        (words.seconds(0.42), "0.4 s"),
        (words.seconds(59.7), "1 min 00 s"),
        (words.seconds(7800), "2 h 10 min"),
        (words.seconds(-1), "–"),
        (words.size(0), "0 B"),
        (words.size(1023), "1023 B"),
        (words.size(1024), "1.0 KiB"),
        (words.size(5 * 1024**4), "5120.0 GiB"),
        (words.size(None), "–"),
        (words.ago(None, NOON), "never"),
        (words.ago(NOON + timedelta(seconds=3), NOON), "now"),
        (words.ago(NOON - timedelta(seconds=44), NOON), "40 s ago"),
        (words.ago(NOON - timedelta(days=3), NOON), "3 d ago"),
        (words.figure(0.123456), "0.123"),
        (words.clock_time(NOON), "2026-03-01 12:00:00"),
        (words.short(None), "–"),
    ],
)
def test_figures_are_written_with_their_units(written: str, expected: str) -> None:
    assert written == expected
