"""Runs side by side, devices side by side, and the settings."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from coordinator.fleet.records import FleetRecords
from coordinator.strategies.base import State
from coordinator.web.pages.neighbours import chart, embeddings, mapped
from foundation.parameters import Parameters
from tests.coordinator.filled_store import AGENTS, a_state, fill, finish
from tests.coordinator.visiting import Visit, read

pytestmark = pytest.mark.anyio
STATELESS = State(2, Parameters({"model/head": np.ones(2, np.float32)})).to_bytes()


async def test_finished_runs_stand_side_by_side(bare: Visit, filled: Visit) -> None:
    assert "No run has finished yet" in read(await bare.get("/compare"))
    finish(filled.store, filled.clock, "one", "fedavg")
    finish(filled.store, filled.clock, "two", "fedtp", rounds=5)
    page = await filled.get("/compare")
    told = read(page)
    assert "one fedavg, seed 7" in told
    assert "two fedtp, seed 7" in told
    assert "greenhouse-1" not in told, "it goes on"
    found = re.search(r'id="chart-compare">(.*?)</script>', page)
    assert found
    lines = json.loads(found[1])["data"]
    assert [(line["name"], len(line["x"])) for line in lines] == [("two (fedtp)", 5), ("one (fedavg)", 3)]
    assert "99.5 + 107" in told, "units kept in the last closed round, by block"
    figures = re.findall(r'class="joules (\w+)">(≈ )?[^<]+</span> <span class="kind (\w+)"', page)
    assert len(figures) == 4
    assert all(kind == badge and bool(about) == (kind == "modelled") for kind, about, badge in figures)


async def test_runs_to_compare_are_chosen_by_query(filled: Visit) -> None:
    finish(filled.store, filled.clock, "one", rounds=1)
    finish(filled.store, filled.clock, "two", rounds=1)
    page = await filled.get("/compare?run=one&run=greenhouse-1&run=one")
    assert re.findall(r'<th scope="row"><a href="/\?run=([^"]+)"', page) == ["one", "greenhouse-1"]
    assert 'value="one" checked' in page
    assert 'value="two">' in page
    assert (await filled.client.get("/compare?run=nobody")).status_code == 404
    assert (await filled.client.get("/compare?" + "run=one&" * 9)).status_code == 422


async def test_devices_near_each_other_are_neighbours(bare: Visit, shown: Visit) -> None:
    assert "No run has begun" in read(await bare.get("/neighbours"))
    page = await shown.get("/neighbours")
    told = read(page)
    assert re.search(r"jetson-barn pi-greenhouse 0\.283 ,", told)
    assert "vps-1 new to the run" in told
    assert re.search(r"The map shows \d+ % of the variance of 8 numbers", told)
    assert "goes by" not in told


async def test_a_map_is_drawn_once_for_every_state(filled: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    read_from, decode = list[bytes](), State.from_bytes
    monkeypatch.setattr(State, "from_bytes", lambda body: (read_from.append(body), decode(body))[1])
    for _ in range(2):
        assert "after round 5" in read(await filled.get("/neighbours"))
        assert "after round 5" in read(await filled.get("/parts/neighbours"))
    assert len(read_from) == 1
    filled.store.close_round("greenhouse-1", 6, a_state(6), {})
    assert "after round 6" in read(await filled.get("/parts/neighbours"))
    assert len(read_from) == 2


async def test_a_strategy_without_a_hypernetwork_has_no_map(visit: Visit) -> None:
    fill(visit.store, visit.clock, rounds=1, strategy="fedavg")
    visit.store.close_round("greenhouse-1", 2, STATELESS, {})
    told = read(await visit.get("/neighbours"))
    assert "goes by fedavg , which has no embeddings after round 2" in told
    assert (await visit.client.get("/neighbours?run=nobody")).status_code == 404


def test_the_map_keeps_what_two_directions_can() -> None:
    line = {f"d{i}": np.array([float(i), 2.0 * i, 0.0]) for i in range(4)}
    found = mapped(line, ["d3"])
    assert found is not None
    assert found.explained is not None
    assert found.explained[0] == pytest.approx(1.0)
    xs = [place.x for place in found.places]
    assert np.diff(xs) == pytest.approx([5**0.5] * 3) or np.diff(xs) == pytest.approx([-(5**0.5)] * 3)
    assert [name for name, _ in found.places[0].nearest] == ["d1", "d2", "d3"]
    assert found.places[0].nearest[0][1] == pytest.approx(5**0.5)
    groups = {group["name"]: group["text"] for group in chart(found)["data"]}
    assert groups == {"taught by rounds": ["d0", "d1", "d2"], "new to the run": ["d3"]}
    assert mapped(line, ["d3"]) == found, "the same map every time"


def test_maps_of_few_or_equal_embeddings() -> None:
    assert mapped({}) is None
    assert mapped({"a": np.ones(3)}) is None
    assert mapped({"a": np.ones(3), "b": np.ones(4)}) is None
    same = mapped({"a": np.ones(3), "b": np.ones(3)})
    assert same is not None
    assert same.explained is None
    one = mapped({"a": np.zeros(1), "b": np.ones(1)})
    assert one is not None
    assert one.explained == (1.0, 0.0)
    assert chart(None)["data"] == []


def test_chunked_embeddings_count_by_their_mean() -> None:
    found = embeddings({"a": {"embedding": np.array([[0.0, 2.0], [2.0, 4.0]])}, "b": {"head": np.ones(2)}})
    assert {name: row.tolist() for name, row in found.items()} == {"a": [1.0, 3.0]}


async def test_settings_say_where_they_came_from_and_hide_secrets(bare: Visit) -> None:
    page = await bare.get("/settings")
    told = read(page)
    assert "keep this to yourself" not in page
    assert re.search(r"mqtt\.password \S+ COORDINATOR__MQTT__PASSWORD", told)
    assert re.search(r"folder \S+ --set folder", told)
    assert "run.rounds 10 default" in told
    assert "2 are not as by default" in told


async def test_a_device_is_invited_from_the_fleets_page(visit: Visit) -> None:
    assert 'data-send="POST /api/v1/invites" data-shows="line"' in await visit.get("/fleet")
    answer = await visit.client.post("/api/v1/invites", json={"name": "pi-new", "hours": 1})
    assert answer.status_code == 201, answer.text
    line = answer.json()["line"]
    assert line == f"hedgerow agent join mqtts://broker.local:8883 --token {answer.json()['token']}"
    records = FleetRecords(visit.store, clock=visit.clock)
    (place,) = records.open_invites()
    assert (place.name, place.expires - place.created) == ("pi-new", 3600)
    assert answer.json()["token"] not in " ".join(str(deed) for deed in records.deeds())
    assert (await visit.client.post("/api/v1/invites", json={"name": "no/slash"})).status_code == 422
    assert (await visit.client.post("/api/v1/invites", json={"hours": 0})).status_code == 422


async def test_a_run_is_started_from_the_overview_when_somebody_is_there(bare: Visit, filled: Visit) -> None:
    asked = 'data-send="POST /api/v1/runs"'
    assert asked not in await bare.get()
    assert asked not in await filled.get(), "one is under way"
    filled.live.phase("greenhouse-1", 10, 10, "finished")
    page = await filled.get()
    assert asked in page
    assert "<option>pfl_tpp</option>" in page
    assert "pause-run" not in page, "it is over"
    for agent in AGENTS:
        filled.live.presence(agent, online=False)
    assert asked not in await filled.get()
