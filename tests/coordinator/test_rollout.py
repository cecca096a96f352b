"""Rings and their evidence, what an order means, orders that are said until they are answered, the API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from coordinator.app import create_app
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.tokens import ApiTokens
from coordinator.live import Live
from coordinator.rollout.choice import chosen
from coordinator.rollout.orders import AGAIN_S, Orders
from coordinator.rollout.rings import evidence, holds_up, rings_of
from coordinator.rollout.steward import Steward
from coordinator.roster import Roster
from coordinator.settings import RolloutSettings
from coordinator.store.rollouts import Member
from coordinator.store.sql import Store
from foundation.errors import SettingsError
from foundation.messages import AgentCard, Command, Done, KeptModel, Models, command_of
from tests.coordinator.filled_store import Clock, Engine, a_manifest

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 11, 25, tzinfo=UTC)
SHA = {n: f"{n:064x}" for n in range(1, 9)}
NAMES = st.sets(st.from_regex(r"d[0-9]{1,3}", fullmatch=True), min_size=1, max_size=60)
SHARES = st.lists(st.floats(0.01, 0.99), max_size=3, unique=True).map(lambda s: (*sorted(s), 1.0))


def card(
    agent: str, *, serving: int = 1, rounds: int = 2, done: tuple[Done, ...] = (), **links: int
) -> AgentCard:
    found = {"serving": serving, **links}
    kept = tuple(
        KeptModel.model_validate(
            {"sha256": SHA[n], "run": "r", "round": n, "links": {k for k, v in found.items() if v == n}}
        )
        for n in range(1, rounds + 1)
    )
    models = Models(serves=True, kept=kept, done=done)
    return AgentCard(agent=agent, version="1", profile="pi", examples=3, models=models)


# --- rings -----------------------------------------------------------------------------------------


@given(NAMES, NAMES, st.integers(1, 9), SHARES)
def test_everybody_is_in_one_ring_and_the_run_decides_which(
    agents: set[str], able: set[str], canary: int, shares: tuple[float, ...]
) -> None:
    s = RolloutSettings(canary=canary, rings=shares)
    rings = rings_of(s, "r", agents, able)
    assert sorted(a for ring in rings for a in ring) == sorted(agents)
    assert all(rings)
    assert rings == rings_of(s, "r", sorted(agents), sorted(able)), (
        "the order they are named in does not matter"
    )
    if able & agents:
        assert len(rings[0]) >= min(canary, len(able & agents))
        assert set(rings[0]) & able


def test_named_canaries_go_first_and_another_run_draws_anew() -> None:
    agents = [f"d{i}" for i in range(50)]
    s = RolloutSettings(canary=("d7", "d9", "elsewhere"), rings=(0.1, 1.0))
    rings = rings_of(s, "r", agents, agents)
    assert set(rings[0]) == {"d7", "d9"}
    assert [len(ring) for ring in rings] == [2, 3, 45]
    assert rings_of(s, "another", agents, agents)[1] != rings[1]


@pytest.mark.parametrize("rings", [(), (0.5,), (0.5, 0.2, 1.0), (0.0, 1.0), (1.0, 1.0)])
def test_shares_rise_to_all(rings: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="rising shares above 0, and the last"):
        RolloutSettings(rings=rings)


def member(agent: str, state: Any, ring: int = 0) -> Member:
    return Member("r", 2, agent, ring, state, SHA[2], SHA[1], 0.0)


def test_errors_are_counted_over_those_who_tried() -> None:
    s = RolloutSettings(errors=0.5)
    tried = [member("a", "serving"), member("b", "refused"), member("c", "released"), member("d", "pinned")]
    assert evidence(tried, {}).breach(s) is None
    found = evidence([*tried, member("e", "rolled_back")], {})
    assert found.breach(s) == "2 of 3 devices refused the new model or rolled it back; 50% is allowed"
    assert evidence([member("c", "released")], {}).points is None, "nobody knows"


def test_a_ring_waits_for_those_who_are_here() -> None:
    both = [member("a", "serving"), member("b", "released")]
    assert holds_up(both, 0, {"a", "b"}) == "b to take it"
    assert holds_up(both, 0, {"a"}) is None
    assert (
        holds_up([member("b", "released")], 0, ())
        == "b: not here or not serving, and nobody else of the ring has it"
    )
    assert "pinned" in (holds_up([member("b", "pinned")], 0, {"b"}) or "")
    assert holds_up([member("a", "serving"), member("b", "pinned", 1)], 1, {"a", "b"}) is None


# --- orders ----------------------------------------------------------------------------------------


def test_what_is_meant_by_an_order() -> None:
    cards = {
        "d0": card("d0"),
        "d1": card("d1", rounds=1),
        "old": card("old").model_copy(update={"models": None}),
    }
    wanted, problems = chosen("rollback", None, None, cards)
    assert wanted == [("d0", "rollback", SHA[1]), ("d1", "rollback", SHA[1])]
    assert problems == {"old": "it does not tell its models: install a newer version on it"}
    wanted, problems = chosen("pin", ["d0", "d1"], "2", cards)
    assert wanted == [("d0", "pin", SHA[2])]
    assert "it has no model '2'; there are rounds 1" in problems["d1"]
    assert "several models" in chosen("pin", ["d0"], "0" * 6, cards)[1]["d0"]
    with pytest.raises(SettingsError, match="did you mean 'd1'"):
        chosen("pin", ["d11"], None, cards)


async def test_an_order_is_said_until_it_is_answered_and_outlives_the_coordinator(tmp_path: Path) -> None:
    said: list[Command] = []

    async def send(agent: str, body: bytes) -> None:
        assert agent == "d0"
        said.append(command_of(body))

    with Store.open(tmp_path) as store:
        async with Live(store) as live:
            roster, now = Roster(), Clock()
            orders = Orders(store, live, roster, send, clock=now)
            (order,) = await orders.add([("d0", "pin", SHA[1])], reason="", who="anna")
            assert said == [], "it is offline"
            entry = roster.entry("d0")
            entry.online, entry.session = True, "one"
            await orders.say()
            await orders.say()
            assert [(c.verb, c.id, c.model, c.by) for c in said] == [("pin", order.id, SHA[1], "anna")]
            now.now += AGAIN_S + 1
            await orders.say()
            assert len(said) == 2, "it has not answered for long"
            entry.session = "two"
            await orders.say()
            assert len(said) == 3, "a new process may have lost it"

            again = Orders(store, live, roster, send)
            await again.remember()
            answer = Done(id=order.id, verb="pin", done=False, said="its owner's")
            await again.heard("d1", card("d1", done=(answer,)))
            assert store.orders(only_open=True) == [order], "another device does not answer for it"
            await again.heard("d0", card("d0", done=(answer,)))
            await again.say()
            assert len(said) == 3
            (kept,) = store.orders()
            assert (kept.state, kept.said) == ("refused", "its owner's")
            await live.flush()
            assert [event.kind for event in store.latest_events()] == ["order_refused"]


def test_a_newer_order_withdraws_what_it_undoes(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        for verb, model in (("pin", SHA[1]), ("unpin", ""), ("release", SHA[2]), ("rollback", SHA[2])):
            store.add_orders([("d0", verb, model)], reason="", who="anna")  # type: ignore[list-item]
        states = [(order.verb, order.state) for order in store.orders()]
        assert states == [
            ("pin", "withdrawn"), ("unpin", "open"), ("release", "withdrawn"), ("rollback", "open"),
        ]  # fmt: skip
        assert next(deed.what for deed in FleetRecords(store).deeds()) == "model pin"


# --- the API ---------------------------------------------------------------------------------------


@asynccontextmanager
async def api(folder: Path) -> AsyncIterator[tuple[Store, httpx.AsyncClient, ApiTokens]]:
    async def send(agent: str, body: bytes) -> None:
        raise AssertionError("nobody is online")

    with Store.open(folder) as store:
        async with Live(store) as live:
            steward = Steward(RolloutSettings(), store=store, live=live, roster=Roster(), send=send)
            records, tokens = FleetRecords(store), ApiTokens(store)
            engine = Engine(store, live)
            app = create_app(store, live, engine, models=steward, tokens=tokens, records=records)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                yield store, client, tokens


async def test_operators_order_viewers_look_and_the_audit_says_who(tmp_path: Path) -> None:
    async with api(tmp_path) as (store, client, tokens):
        for name in ("d0", "d1"):
            store.upsert_agent(card(name), NOW)
        anna = {"Authorization": f"Bearer {tokens.make('anna', 'operator', expires_s=None)}"}
        otto = {"Authorization": f"Bearer {tokens.make('otto', 'viewer', expires_s=None)}"}
        assert (await client.post("/api/v1/models/pin", json={"all": True})).status_code == 401
        refused = await client.post("/api/v1/models/pin", json={"all": True}, headers=otto)
        assert refused.status_code == 403
        assert store.orders() == []

        answer = await client.post("/api/v1/models/pin", json={"devices": ["d1"], "model": "2"}, headers=anna)
        assert answer.status_code == 202
        (order,) = answer.json()["orders"]
        assert (order["device"], order["model"], order["who"], order["state"]) == (
            "d1",
            SHA[2],
            "anna",
            "open",
        )
        found = (await client.get("/api/v1/orders", params={"id": order["id"]}, headers=otto)).json()
        assert found == [order]
        assert ("anna", "model pin", "d1") in [(d.who, d.what, d.of) for d in FleetRecords(store).deeds()]

        for body, status in (({}, 422), ({"all": True, "devices": ["d0"]}, 422), ({"devices": ["d9"]}, 422)):
            assert (await client.post("/api/v1/models/pin", json=body, headers=anna)).status_code == status
        nothing = {"devices": ["d0"], "model": "9"}
        assert (await client.post("/api/v1/models/rollback", json=nothing, headers=anna)).status_code == 409
        assert (
            await client.post("/api/v1/models/dance", json={"all": True}, headers=anna)
        ).status_code == 422
        assert (await client.post("/api/v1/rollouts/go", headers=anna)).status_code == 409
        assert (await client.get("/api/v1/rollouts", headers=otto)).json() == []


async def test_models_of_devices_with_their_states(tmp_path: Path) -> None:
    async with api(tmp_path) as (store, client, tokens):
        token = {"Authorization": f"Bearer {tokens.make('otto', 'viewer', expires_s=None)}"}
        store.upsert_agent(card("d0", serving=1, pinned=1), NOW)
        store.upsert_agent(card("d1", serving=2), NOW)
        page = (await client.get("/api/v1/models", params={"limit": 3}, headers=token)).json()
        rest = (await client.get("/api/v1/models", params={"after": page["next"]}, headers=token)).json()
        found = {(one["device"], one["round"]): one for one in page["items"] + rest["items"]}
        assert len(page["items"]) == 3
        states = {key: (one["state"], one["pinned_by"]) for key, one in found.items()}
        assert states == {
            ("d0", 1): ("pinned", "owner"), ("d0", 2): ("proven", None),
            ("d1", 1): ("proven", None), ("d1", 2): ("serving", None),
        }  # fmt: skip
        assert all(one["accuracy"] is None for one in found.values()), "they keep it to themselves"
        one = (await client.get("/api/v1/models", params={"device": "d1", "run": "r"}, headers=token)).json()
        assert {item["device"] for item in one["items"]} == {"d1"}


async def test_the_page_says_how_models_stand(tmp_path: Path) -> None:
    async with api(tmp_path) as (store, client, tokens):
        token = {"Authorization": f"Bearer {tokens.make('otto', 'viewer', expires_s=None)}"}
        manifest = a_manifest(0, 2)
        store.add_artifact(manifest)
        store.add_artifact(a_manifest(1, 2))
        kept = {"sha256": manifest.sha256, "run": manifest.run, "round": 2, "links": {"serving", "ordered"}}
        models = Models(serves=True, kept=(KeptModel.model_validate(kept),))
        store.upsert_agent(card(manifest.agent).model_copy(update={"models": models}), NOW)
        assert store.begin_rollout(manifest.run, 2, [["another"], [manifest.agent]])
        page = (await client.get("/models", headers=token)).text
        assert '<td data-label="Ring" class="number">2</td>' in page
        assert '<td data-label="State">pinned by coordinator</td>' in page
        assert '<td data-label="State">proven</td>' in page, "of an agent that has told nothing"
