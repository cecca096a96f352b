"""The JSON API and the event stream."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from coordinator.app import create_app
from coordinator.ledger.entries import read
from coordinator.ledger.report import EnergyReport, energy_report
from coordinator.live import Live
from coordinator.settings import RunSettings
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.web.models import StartRun, UpdateView
from tests.coordinator.filled_store import AGENTS, SPEC, Clock, Engine, enliven, fill

pytestmark = pytest.mark.anyio

START = {"strategy": "fedper", "rounds": 3}


@dataclass
class House:
    store: Store
    live: Live
    engine: Engine
    clock: Clock
    app: FastAPI
    client: httpx.AsyncClient


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = Clock()
    with Store.open(tmp_path, clock=clock) as store:
        async with Live(store, clock=clock, monotonic=clock) as live:
            engine = Engine(store, live)
            app = create_app(store, live, engine, clock=clock, status_every_s=0.05)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                yield House(store, live, engine, clock, app, client)


@pytest.fixture
async def full(house: House) -> House:
    fill(house.store, house.clock)
    enliven(house.live, house.clock)
    return house


async def test_an_empty_house_answers(house: House) -> None:
    assert (await house.client.get("/healthz")).json() == {"status": "ok"}
    status = (await house.client.get("/api/v1/status")).json()
    assert (status["run"], status["agents"], status["eta_s"]) == (None, [], None)
    for path in ("fleet", "runs", "artifacts", "refusals"):
        assert (await house.client.get(f"/api/v1/{path}")).json() == {"items": [], "next": None}


async def test_status_and_fleet(full: House) -> None:
    status = (await full.client.get("/api/v1/status")).json()
    assert (status["run"], status["round"], status["rounds"]) == ("greenhouse-1", 6, 10)
    assert (status["phase"], status["online"]) == ("collecting", 3)
    assert status["eta_s"] == pytest.approx(5 * 21.5)
    assert status["progress"] == pytest.approx(0.55)
    later = (await full.client.get("/api/v1/status", params={"since": status["version"]})).json()
    assert later["agents"] == []
    first = (await full.client.get("/api/v1/fleet", params={"limit": 3})).json()
    rest = (await full.client.get("/api/v1/fleet", params={"limit": 3, "after": first["next"]})).json()
    assert [a["agent"] for a in first["items"] + rest["items"]] == list(AGENTS)
    assert rest["next"] is None
    jetson = (await full.client.get("/api/v1/fleet/jetson-barn")).json()
    assert (jetson["status"]["joules"], jetson["status"]["energy_kind"]) == (18.4, "measured")
    assert jetson["card"]["profile"] == "jetson_orin_nano"
    assert [m["agent"] for m in jetson["artifacts"]] == ["jetson-barn"]


async def test_runs_and_rounds(full: House) -> None:
    full.clock.now += 1
    full.store.open_run(RunRecord("next", "fedavg", "{}", SPEC, 2, 1))
    runs = (await full.client.get("/api/v1/runs", params={"limit": 1})).json()
    assert ([r["run"] for r in runs["items"]], runs["next"]) == (["next"], "next")
    runs = (await full.client.get("/api/v1/runs", params={"limit": 1, "after": "next"})).json()
    assert ([r["run"] for r in runs["items"]], runs["next"]) == (["greenhouse-1"], None)
    run = (await full.client.get("/api/v1/runs/greenhouse-1")).json()
    assert (run["state"], run["settings"], run["spec"]["width"]) == ("running", {"lr": 0.05}, 32)
    rounds = (await full.client.get("/api/v1/runs/greenhouse-1/rounds", params={"limit": 4})).json()
    assert ([r["round"] for r in rounds["items"]], rounds["next"]) == ([1, 2, 3, 4], "4")
    last = (await full.client.get("/api/v1/runs/greenhouse-1/rounds", params={"after": 4})).json()["items"]
    assert [(r["round"], r["state"], r["updates"]) for r in last] == [(5, "closed", 4), (6, "open", 2)]
    closed = last[0]
    assert closed["seconds"] == 21.5
    assert closed["accuracy"]["worst"] < closed["accuracy"]["mean"]
    assert closed["accuracy_sent"]["worst"] == pytest.approx(0.1)
    # Measured and modelled stay apart, and what nobody knows is said.
    assert closed["joules"] == {"measured": pytest.approx(19.5 + 22.5), "modelled": pytest.approx(25.5)}
    assert closed["unknown_energy"] == 1


async def test_updates_page_and_keep_their_unknowns(full: House) -> None:
    path = "/api/v1/runs/greenhouse-1/updates"
    seen, after = [], None
    while True:
        page = (await full.client.get(path, params={"limit": 5} | ({"after": after} if after else {}))).json()
        seen += [(u["round"], u["agent"]) for u in page["items"]]
        after = page["next"]
        if after is None:
            break
    assert seen == [(r, a) for r in range(1, 6) for a in AGENTS] + [(6, a) for a in AGENTS[:2]]
    one = (await full.client.get("/api/v1/runs/greenhouse-1/rounds/1/updates")).json()
    assert [u["agent"] for u in one] == list(AGENTS)
    assert one[0]["energy"]["kind"] == "measured"
    assert one[2]["energy"]["kind"] == "modelled"
    assert (one[3]["energy"]["joules"], one[3]["energy"]["kind"]) == (None, "none")
    assert one[0]["wire_bytes"] == 61_440


async def test_a_round_says_who_was_asked_for_less_and_who_was_left_out(house: House) -> None:
    house.store.open_run(RunRecord("r", "fedavg", "{}", "{}", 1, 0))
    eased = {"a": {"epochs": 1, "gone": None, "reason": "1 of 2 local epochs"}}
    house.store.open_round("r", 1, ["a"], 0, eased=eased, skipped={"b": "it is offline"})
    (round,) = (await house.client.get("/api/v1/runs/r/rounds")).json()["items"]
    assert (round["eased"], round["skipped"]) == ({"a": "1 of 2 local epochs"}, {"b": "it is offline"})


async def test_a_summary_of_another_version_is_unknown_not_wrong(house: House) -> None:
    house.store.open_run(RunRecord("r", "fedavg", "{}", "{}", 1, 0))
    house.store.open_round("r", 1, ["a"], 0)
    odd = {
        "examples": "many",
        "metrics": {"accuracy": float("nan"), "loss": "low"},
        "kept_units": 3,
        "ledger": {"train": {"joules": 5.0}},
        "wire_bytes": True,
    }
    house.store.add_update("r", 1, "a", b"f", odd)
    house.store.add_update("r", 1, "b", b"f", {})
    (a, b) = [UpdateView.of(record) for record in house.store.updates("r", 1)]
    assert (a.examples, a.metrics, a.kept_units) == (None, {"accuracy": None, "loss": None}, ())
    assert (a.energy, a.wire_bytes, b.energy) == (None, None, None)
    (round,) = (await house.client.get("/api/v1/runs/r/rounds")).json()["items"]
    assert (round["accuracy"], round["joules"], round["unknown_energy"]) == (None, {}, 2)


async def test_lists(full: House) -> None:
    artifacts = (await full.client.get("/api/v1/artifacts", params={"limit": 1})).json()
    assert [m["agent"] for m in artifacts["items"]] == ["pi-greenhouse"]
    more = (await full.client.get("/api/v1/artifacts", params={"after": artifacts["next"]})).json()
    assert [m["agent"] for m in more["items"]] == ["jetson-barn"]
    assert (await full.client.get("/api/v1/artifacts", params={"run": "x"})).json()["items"] == []
    (refusal,) = (await full.client.get("/api/v1/refusals", params={"run": "greenhouse-1"})).json()["items"]
    assert refusal["reason"].startswith("free memory")


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("runs/nobody", 404, "no run 'nobody'"),
        ("runs/nobody/rounds", 404, "no run 'nobody'"),
        ("runs/greenhouse-1/rounds/99/updates", 404, "no round 99"),
        ("runs/greenhouse-1/updates?after=nonsense", 400, "round/agent"),
        ("fleet/nobody", 404, "no agent 'nobody'"),
        ("fleet?limit=0", 422, "query.limit"),
        ("events?after=-1", 400, "not the id"),
        ("nowhere", 404, "Not Found"),
    ],
)
async def test_errors_are_problems(full: House, path: str, status: int, words: str) -> None:
    answer = await full.client.get(f"/api/v1/{path}")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    told = answer.json()
    assert (told["status"], told["instance"]) == (status, f"/api/v1/{path}".partition("?")[0])
    assert words in told["detail"]


async def test_a_failing_store_says_so(house: House, caplog: pytest.LogCaptureFixture) -> None:
    with house.store._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE artifacts")
    answer = await house.client.get("/api/v1/artifacts")
    assert (answer.status_code, answer.json()["title"]) == (500, "Internal Server Error")
    assert "the store failed" in answer.json()["detail"]
    assert "artifacts failed" in caplog.text


async def test_a_run_is_started_and_stopped(house: House) -> None:
    started = await house.client.post("/api/v1/runs", json=START)
    assert started.status_code == 202
    name = "fedper-20260301-120000"
    assert started.json() == {"run": name, "state": "waiting"}
    asked = house.engine.started[0].model_dump(exclude_none=True)
    assert asked == {
        "name": name,
        "strategy": "fedper",
        "rounds": 3,
    }  # the rest is the coordinator's settings'
    assert set(asked) <= set(RunSettings.model_fields)
    house.engine.gathered()
    again = await house.client.post("/api/v1/runs", json=START)
    assert (again.status_code, "already" in again.json()["detail"]) == (409, True)
    other = await house.client.post("/api/v1/runs", json={**START, "name": "other"})
    assert (other.status_code, other.json()["detail"]) == (409, "a run is under way: stop it first")
    stopped = await house.client.post(f"/api/v1/runs/{name}/stop", json={"reason": "enough"})
    assert stopped.json() == {"run": name, "state": "stopped"}
    assert (house.engine.stopped, house.store.run(name).reason) == (["enough"], "enough")
    assert (await house.client.post("/api/v1/runs/nobody/stop", json={})).status_code == 404


async def test_a_run_is_paused_and_resumed(full: House) -> None:
    path = "/api/v1/runs/greenhouse-1"
    paused = await full.client.post(f"{path}/pause", json={"reason": "a storm"})
    assert paused.json() == {"run": "greenhouse-1", "state": "paused"}
    row = (await full.client.get(path)).json()
    assert (row["state"], row["reason"]) == ("paused", "a storm")
    again = await full.client.post(f"{path}/pause", json={})
    assert (again.status_code, again.json()["detail"]) == (409, "run 'greenhouse-1' is paused, not running")
    assert (await full.client.post(f"{path}/resume")).json()["state"] == "running"
    assert (await full.client.post(f"{path}/resume")).status_code == 409
    for verb in ("pause", "resume"):
        assert (await full.client.post(f"/api/v1/runs/nobody/{verb}", json={})).status_code == 404


async def test_a_run_that_still_waits_for_agents_can_be_stopped(house: House) -> None:
    await house.client.post("/api/v1/runs", json={"name": "early"})
    answer = await house.client.post("/api/v1/runs/early/stop", json={})
    assert answer.json() == {"run": "early", "state": "stopped"}
    assert house.engine.stopped == ["stopped by hand"]


def test_whatever_a_request_may_say_is_a_setting_of_a_run() -> None:
    assert set(StartRun.model_fields) <= set(RunSettings.model_fields)


async def test_only_the_run_under_way_can_be_stopped(full: House) -> None:
    full.store.open_run(RunRecord("older", "fedavg", "{}", "{}", 1, 0))
    answer = await full.client.post("/api/v1/runs/older/stop", json={})
    assert (answer.status_code, full.engine.stopped) == (409, [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../../x"},
        {"rounds": 0},
        {"quorum": 0},
        {"misspelt": 1},
        {"deadline_s": float("nan")},
    ],
)
async def test_a_request_that_cannot_be_is_refused_by_name(house: House, wrong: dict[str, object]) -> None:
    answer = await house.client.post(
        "/api/v1/runs", content=json.dumps({**START, **wrong}), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422
    assert f"body.{next(iter(wrong))}" in answer.json()["detail"]
    assert house.engine.started == []


async def test_foreign_pages_may_not_change_anything(house: House) -> None:
    foreign = {"sec-fetch-site": "cross-site"}
    assert (await house.client.post("/api/v1/runs", json=START, headers=foreign)).status_code == 403
    text = {"content-type": "text/plain"}
    assert (
        await house.client.post("/api/v1/runs", content=json.dumps(START), headers=text)
    ).status_code == 422
    assert house.engine.started == []
    assert (await house.client.get("/api/v1/status", headers=foreign)).status_code == 200
    own = {"sec-fetch-site": "same-origin"}
    assert (await house.client.post("/api/v1/runs", json=START, headers=own)).status_code == 202


async def test_only_given_hosts_are_answered(house: House) -> None:
    app = create_app(house.store, house.live, house.engine, hosts=["localhost"])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost:8080"
    ) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/healthz", headers={"host": "evil.example"})).status_code == 400


async def test_openapi_tells_of_every_route(house: House) -> None:
    told = (await house.client.get("/api/v1/openapi.json")).json()
    assert {
        "/api/v1/status",
        "/api/v1/fleet",
        "/api/v1/fleet/{agent}",
        "/api/v1/runs",
        "/api/v1/runs/{run}",
        "/api/v1/runs/{run}/energy",
        "/api/v1/runs/{run}/rounds",
        "/api/v1/runs/{run}/rounds/{n}/updates",
        "/api/v1/runs/{run}/updates",
        "/api/v1/runs/{run}/stop",
        "/api/v1/runs/{run}/pause",
        "/api/v1/runs/{run}/resume",
        "/api/v1/artifacts",
        "/api/v1/refusals",
        "/api/v1/quarantine",
        "/api/v1/events",
        "/healthz",
    } == set(told["paths"])
    assert (
        "application/problem+json"
        in told["paths"]["/api/v1/runs/{run}"]["get"]["responses"]["404"]["content"]
    )


# The stream, over a real socket


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[tuple[httpx.AsyncClient, uvicorn.Server]]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()  # who comes before the server is ready waits, and is not refused
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=2))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server._serve([listening]))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}") as client:
            yield client, server
    finally:
        server.should_exit = True
        await serving
        listening.close()


@dataclass
class Message:
    event: str = "message"
    id: str | None = None
    data: str = ""


async def messages(lines: AsyncIterator[str]) -> AsyncIterator[Message]:
    message = Message()
    async for line in lines:
        name, _, value = line.partition(": ")
        if not line:
            if message.data:
                yield message
            message = Message()
        elif name in ("event", "id", "data"):
            setattr(message, name, value)


async def test_the_stream_tells_events_and_the_picture(full: House) -> None:
    async with served(full.app) as (client, _), client.stream("GET", "/api/v1/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = messages(answer.aiter_lines())
        first = await anext(told)
        assert first.event == "status"
        assert [a["agent"] for a in json.loads(first.data)["agents"]] == list(AGENTS)
        full.live.presence("pi-kitchen", online=True)
        second = await anext(told)
        assert [a["agent"] for a in json.loads(second.data)["agents"]] == ["pi-kitchen"]
        full.live.emit(
            "update", "pi-kitchen <sent>\nits update", run="greenhouse-1", round=6, agent="pi-kitchen"
        )
        third = await anext(told)
        assert (third.event, json.loads(third.data)["text"]) == ("message", "pi-kitchen <sent>\nits update")
        assert third.id == str(full.store.latest_events(1)[0].id)
        answer_two = await client.get("/api/v1/events", params={"after": "x"})
        assert answer_two.status_code == 400


async def test_the_stream_resumes_after_the_last_id(full: House) -> None:
    ids = [event.id for event in full.store.events()]
    headers = {"Last-Event-ID": str(ids[1])}
    async with (
        served(full.app) as (client, _),
        client.stream("GET", "/api/v1/events", headers=headers) as answer,
    ):
        told = messages(answer.aiter_lines())
        heard: list[Message] = []
        full.live.emit("note", "new")
        while len(heard) < len(ids) - 1:
            message = await anext(told)
            if message.event == "message":
                heard.append(message)
    assert [int(m.id or 0) for m in heard[:-1]] == ids[2:]
    assert json.loads(heard[-1].data)["text"] == "new"


async def test_a_listener_who_leaves_is_forgotten(full: House) -> None:
    async with served(full.app) as (client, _):
        async with client.stream("GET", "/api/v1/events") as answer:
            await anext(answer.aiter_lines())
            assert len(full.live._listeners) == 1
        for _ in range(100):
            await asyncio.sleep(0.02)
            if not full.live._listeners:
                break
    assert full.live._listeners == []


async def test_open_streams_do_not_hold_the_server_up(full: House) -> None:
    async with served(full.app) as (client, _), client.stream("GET", "/api/v1/events") as answer:
        told = messages(answer.aiter_lines())
        await anext(told)
        await full.live.__aexit__(None, None, None)
        assert [message async for message in told] == []


async def test_a_stopping_server_ends_open_streams_in_order(
    full: House, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(full.app) as (client, server), client.stream("GET", "/api/v1/events") as answer:
        told = messages(answer.aiter_lines())
        await anext(told)
        server.should_exit = True
        # The library finds the server through the signal handlers, which a test does not install.
        AppStatus.should_exit = True
        try:
            assert [message async for message in told] == []
        finally:
            AppStatus.should_exit = False
    assert "without completing" not in caplog.text


async def test_the_ledger_of_a_run(full: House) -> None:
    said = await full.client.get(
        "/api/v1/runs/greenhouse-1/energy", params={"accuracy": 0.5, "radio_km": 0.25}
    )
    assert said.status_code == 200
    found = EnergyReport.model_validate(said.json())
    assert found == energy_report(read(full.store, "greenhouse-1"), accuracy=0.5, radio_km=0.25)
    assert set(said.json()["total"]) == {"measured", "mixed", "modelled", "unknown"}
    assert found.total.measured
    assert found.total.modelled
    assert found.total.unknown.readings == 2 * 5
    schema = (await full.client.get("/api/v1/openapi.json")).json()
    answer = schema["paths"]["/api/v1/runs/{run}/energy"]["get"]["responses"]["200"]
    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/EnergyReport")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("nothing/energy", 404),
        ("greenhouse-1/energy?against=nothing", 404),
        ("greenhouse-1/energy?accuracy=2", 422),
        ("greenhouse-1/energy?radio_km=0", 422),
        ("greenhouse-1/energy?radio_km=nan", 422),
    ],
)
async def test_a_ledger_that_cannot_be_is_a_problem(full: House, path: str, status: int) -> None:
    said = await full.client.get(f"/api/v1/runs/{path}")
    assert said.status_code == status
    assert said.headers["content-type"] == "application/problem+json"
