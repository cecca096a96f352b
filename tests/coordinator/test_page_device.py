"""A device's page: what it did, what that cost and how it is known, and what it can be told."""

from __future__ import annotations

import html
import json
import re
from datetime import UTC, datetime

import pytest

from coordinator.fleet.records import FleetRecords
from coordinator.live import AgentStatus
from coordinator.report import update_summary
from coordinator.web.models import UpdateView
from coordinator.web.pages.device import blocks
from coordinator.web.pages.figures import by_stage
from foundation.energy import EnergyReading, Kind, Scope, Stage
from tests.coordinator.filled_store import a_manifest, an_update, joined, with_models
from tests.coordinator.visiting import Visit, read

pytestmark = pytest.mark.anyio


def the_chart(page: str, name: str) -> dict[str, list[dict[str, object]]]:
    found = re.search(rf'id="chart-{name}">(.*?)</script>', page)
    assert found
    chart: dict[str, list[dict[str, object]]] = json.loads(found[1])
    return chart


async def test_what_a_device_is_and_does(shown: Visit) -> None:
    told = read(await shown.get("/fleet/jetson-barn"))
    for piece in (
        "online, train 62 %",
        "jetson_orin_nano",
        "Hedgerow 0.1.0",
        "image 1 × 8 × 8",
        "greenhouse-1, 6",
        "18.4 J measured",
        "ina3221",
        "74 of 128 58 %",
        "2.4e-06",
        "0.84 ms",
    ):
        assert piece in told, piece
    assert (await shown.client.get("/fleet/nobody")).status_code == 404
    assert (await shown.client.get("/fleet/jetson-barn?run=nobody")).status_code == 404
    assert (await shown.client.get("/parts/fleet/jetson-barn/other")).status_code == 422


async def test_its_history_is_of_its_rounds_alone(shown: Visit) -> None:
    page = await shown.get("/fleet/pi-kitchen")
    accuracy = the_chart(page, "device-accuracy")["data"]
    assert [line["x"] for line in accuracy] == [[1, 2, 3, 4, 5]] * 2
    (bars,) = the_chart(page, "device-joules")["data"]
    assert bars["name"] == "≈ modelled"
    assert bars["y"] == [25.5] * 5
    marker = bars["marker"]
    assert isinstance(marker, dict)
    assert marker["pattern"]["shape"], "a model's estimate is hatched"
    (measured,) = the_chart(await shown.get("/fleet/jetson-barn"), "device-joules")["data"]
    assert measured["marker"] == {"color": "--green"}
    assert not the_chart(await shown.get("/fleet/vps-1"), "device-joules")["data"], "nobody knows"


async def test_its_ledger_keeps_kinds_and_places_apart() -> None:
    def of(joules: float | None, kind: Kind, scope: Scope = Scope.MODULE) -> EnergyReading:
        return EnergyReading(joules=joules, kind=kind, scope=scope, seconds=2.0)

    rows = by_stage(
        [
            {"train": of(10.0, Kind.MEASURED), "send": of(1.0, Kind.MODELLED)},
            {"train": of(30.0, Kind.MEASURED), "send": EnergyReading(seconds=2.0)},
            {"train": of(20.0, Kind.MODELLED), "send": of(4.0, Kind.MODELLED, Scope.BOARD_DC)},
        ]
    )
    assert [(r.stage, r.kind, r.joules, r.seconds, r.share) for r in rows] == [
        ("train", Kind.MEASURED, 40.0, 4.0, 1.0),
        ("train", Kind.MODELLED, 20.0, 2.0, 0.5),
        ("send", Kind.MODELLED, 4.0, 2.0, 0.1),
        ("send", Kind.MODELLED, 1.0, 2.0, 0.025),
        ("send", Kind.NONE, None, 2.0, None),
    ]


async def test_a_modelled_bar_never_looks_measured(shown: Visit) -> None:
    for agent, kind in (("jetson-barn", "measured"), ("pi-kitchen", "modelled")):
        page = await shown.get(f"/parts/fleet/{agent}/work")
        rows = re.findall(r'<span class="bar (\w+)".*?class="joules (\w+)">(≈ )?.*?class="kind (\w+)"', page)
        assert len(rows) == 2
        for row in rows:
            assert row == (kind, kind, "≈ " if kind == "modelled" else "", kind)


def test_units_kept_come_from_now_or_else_from_the_last_update() -> None:
    at = datetime(2026, 3, 1, tzinfo=UTC)
    updates = [UpdateView(run="r", round=n, agent="a", received=at, kept_units=(128 - n, 64)) for n in (1, 2)]
    now = AgentStatus(agent="a", kept_units=(32, 16), hidden_units=128)
    assert [(b.kept, b.share) for b in blocks(now, updates)] == [(32, 0.25), (16, 0.125)]
    before = blocks(AgentStatus(agent="a"), updates)
    assert [(b.kept, b.of, b.share) for b in before] == [(126, None, None), (64, None, None)]
    points = blocks(now, updates)[0].points.split()
    assert points[0].startswith("0.0,")
    assert points[-1].startswith("100.0,")
    assert blocks(AgentStatus(agent="a"), []) == []


async def test_what_holds_it_up_is_said(filled: Visit) -> None:
    filled.live.asked("pi-kitchen", skipped="its 40 J are spent")
    filled.live.quarantined("pi-kitchen", "ten times the others")
    filled.store.quarantine.keep(
        "pi-kitchen", b"frame", cause="outside", reason="far away", run="greenhouse-1", round=3
    )
    told = read(await filled.get("/fleet/pi-kitchen"))
    assert "skipped in the present round: its 40 J are spent" in told
    assert "quarantined: ten times the others" in told
    assert "quarantined (outside), round 3: far away" in told
    assert "What holds it up" not in read(await filled.get("/fleet/jetson-barn"))
    assert "refused round 2: free memory is 41 MiB" in read(await filled.get("/fleet/vps-1"))


async def test_its_models_are_pinned_and_rolled_back_by_dialogs_that_ask_once(filled: Visit) -> None:
    address = "/parts/fleet/jetson-barn/models"
    assert "does not tell which models it keeps" in await filled.get(address)
    card = with_models(0)
    filled.store.upsert_agent(card, datetime.fromtimestamp(filled.clock(), UTC))
    page = await filled.get(address)
    asked = re.findall(r'data-send="POST (/api/v1/models/\w+)" data-body="([^"]+)"', page)
    assert [path.rpartition("/")[2] for path, _ in asked] == ["pin", "unpin", "rollback"]
    assert {html.unescape(body) for _, body in asked} == {'{"devices": ["jetson-barn"]}'}
    sha = a_manifest(0, 4).sha256
    assert f'<option value="{sha}">round 4' in page
    path, body = asked[0]
    answer = await filled.client.post(
        path, json={**json.loads(html.unescape(body)), "model": sha, "reason": "better at night"}
    )
    assert answer.status_code == 202, answer.text
    told = read(await filled.get(address))
    assert f"somebody on this machine : pin {sha[:12]}, open (better at night)" in told
    deeds = FleetRecords(filled.store).deeds()
    assert any(deed.what == "POST /api/v1/models/pin" for deed in deeds)


async def test_a_device_that_joined_is_revoked_from_its_page(filled: Visit) -> None:
    asked = 'data-send="POST /api/v1/devices/jetson-barn/revoke"'
    assert asked not in await filled.get("/fleet/jetson-barn"), "it has no key to revoke"
    joined(filled.store, "jetson-barn")
    assert asked in await filled.get("/fleet/jetson-barn")
    without = await filled.client.post("/api/v1/devices/jetson-barn/revoke", json={})
    assert without.status_code == 422
    stranger = await filled.client.post("/api/v1/devices/nobody/revoke", json={"reason": "lost"})
    assert stranger.status_code == 422
    assert "no device 'nobody' has joined" in stranger.json()["detail"]
    answer = await filled.client.post("/api/v1/devices/jetson-barn/revoke", json={"reason": "stolen"})
    assert answer.status_code == 200, answer.text
    page = await filled.get("/fleet/jetson-barn")
    assert "revoked: stolen" in read(page)
    assert asked not in page
    assert [d.what for d in FleetRecords(filled.store).deeds()].count("revoke") == 1


async def test_a_device_before_its_first_round_says_what_comes_next(visit: Visit) -> None:
    visit.live.card(with_models(0).model_copy(update={"models": None}))
    told = read(await visit.get("/fleet/jetson-barn"))
    assert "No update of it is in yet" in told
    assert "It has exported none yet" in told


async def test_what_a_device_says_of_itself_is_escaped_on_its_page(filled: Visit) -> None:
    evil = '"><img src=x onerror=alert(1)>'
    card = with_models(0).model_copy(update={"profile": evil, "problem": evil, "serving": "javascript:x"})
    filled.live.card(card)
    filled.store.upsert_agent(card, datetime.fromtimestamp(filled.clock(), UTC))
    update = an_update(0, 6).model_copy(update={"ledger": {Stage.TRAIN: EnergyReading(seconds=1.0)}})
    filled.store.add_update("greenhouse-1", 6, "jetson-barn", b"f", update_summary(update, 1))
    page = await filled.get("/fleet/jetson-barn")
    assert "<img" not in page
    assert 'href="javascript' not in page
