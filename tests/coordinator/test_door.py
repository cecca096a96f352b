"""Who may see the page and use the API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.__main__ import checked
from coordinator.app import create_app
from coordinator.fleet.authority import certified
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.tokens import ApiTokens
from coordinator.live import Live
from coordinator.settings import HttpSettings
from coordinator.store.sql import Store
from coordinator.web.door import Buckets
from coordinator.web.models import StartRun
from foundation.errors import SettingsError

pytestmark = pytest.mark.anyio


class Control:
    """What an engine does, counted."""

    def __init__(self) -> None:
        self.done: list[str] = []

    async def start(self, request: StartRun) -> None:
        self.done.append("start")

    async def pause(self, run: str, reason: str) -> None:
        raise AssertionError

    async def resume(self, run: str) -> None:
        raise AssertionError

    async def stop(self, reason: str) -> None:
        self.done.append("stop")


class House:
    """An application with a door, and what stands behind it."""

    def __init__(self, store: Store) -> None:
        self.now = [1_000.0]
        self.control = Control()
        self.tokens = ApiTokens(store, clock=lambda: self.now[0])
        self.records = FleetRecords(store)
        self.app = create_app(
            store, Live(store), self.control, tokens=self.tokens, records=self.records, per_second=5
        )

    def client(self, token: str | None = None, address: str = "10.0.0.1", **more: Any) -> httpx.AsyncClient:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(app=self.app, client=(address, 1))
        return httpx.AsyncClient(transport=transport, base_url="http://here", headers=headers, **more)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with Store.open(tmp_path) as store:
        yield House(store)


async def test_nobody_without_a_token_sees_anything_but_whether_it_is_alive(house: House) -> None:
    async with house.client() as client:
        for path in (
            "/",
            "/api/v1/runs",
            "/api/v1/agents",
            "/api/v1/openapi.json",
            "/api/v1/events",
            "/parts/overview/now",
        ):
            answer = await client.get(path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["content-type"] == "application/problem+json"
        assert (await client.get("/healthz")).status_code == 200
        page = await client.get("/", headers={"accept": "text/html"})
        assert (page.status_code, page.headers["location"]) == (303, "/login")
        assert (await client.get("/login")).status_code == 200


async def test_a_viewer_looks_and_an_operator_changes_and_it_is_written_down(house: House) -> None:
    viewer = house.tokens.make("anna", "viewer", expires_s=None)
    operator = house.tokens.make("otto", "operator", expires_s=None)
    async with house.client(viewer) as client:
        assert (await client.get("/api/v1/runs")).status_code == 200
        answer = await client.post("/api/v1/runs", json={"name": "x"})
        assert answer.status_code == 403
        assert "anna may look" in answer.json()["detail"]
    assert house.control.done == []
    async with house.client(operator) as client:
        answer = await client.post("/api/v1/runs", json={"name": "x"})
        assert answer.status_code < 300, answer.text
    assert house.control.done == ["start"]
    (deed,) = house.records.deeds()
    assert (deed.who, deed.what) == ("otto", "POST /api/v1/runs")


async def test_a_token_ends_with_its_time_or_when_it_is_taken_back(house: House) -> None:
    short = house.tokens.make("short", "viewer", expires_s=60)
    other = house.tokens.make("other", "viewer", expires_s=None)
    async with house.client(short) as one, house.client(other) as two:
        assert (await one.get("/api/v1/runs")).status_code == 200
        house.now[0] += 61
        assert (await one.get("/api/v1/runs")).status_code == 401
        assert (await two.get("/api/v1/runs")).status_code == 200
        house.tokens.take_back("other")
        house.now[0] += 2
        assert (await two.get("/api/v1/runs")).status_code == 401
    with pytest.raises(SettingsError, match="no token"):
        house.tokens.take_back("other")
    with pytest.raises(SettingsError, match="already"):
        house.tokens.make("short", "viewer", expires_s=None)


async def test_a_browser_logs_in_once_and_only_from_its_own_page(house: House) -> None:
    token = house.tokens.make("anna", "viewer", expires_s=None)
    async with house.client() as client:
        assert (await client.post("/login", data={"token": "hgt_wrong"})).status_code == 401
        foreign = {"origin": "http://elsewhere"}
        assert (await client.post("/login", data={"token": token}, headers=foreign)).status_code == 403
        answer = await client.post("/login", data={"token": token}, headers={"origin": "http://here"})
        assert answer.status_code == 303
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert (await client.get("/api/v1/runs")).status_code == 200
        assert (await client.post("/login", content=b"x" * 5_000)).status_code == 413


async def test_guessing_is_slow_and_does_not_lock_others_out(house: House) -> None:
    good = house.tokens.make("anna", "viewer", expires_s=None)
    async with house.client("hgt_guess") as guesser, house.client(good, "10.0.0.2") as other:
        codes = [(await guesser.get("/api/v1/runs")).status_code for _ in range(8)]
        assert codes == [401] * 5 + [429] * 3
        assert (await other.get("/api/v1/runs")).status_code == 200
        asked = await asyncio.gather(*(other.get("/healthz") for _ in range(60)))
        assert {answer.status_code for answer in asked} == {200, 429}
        assert all("retry-after" in answer.headers for answer in asked if answer.status_code == 429)


async def test_no_token_is_in_the_store(tmp_path: Path, house: House) -> None:
    token = house.tokens.make("anna", "viewer", expires_s=None)
    content = b"".join(path.read_bytes() for path in tmp_path.glob("hedgerow.sqlite*"))
    assert token.encode() not in content
    assert house.tokens.find(token) is not None
    assert house.tokens.find(token[:-1]) is None
    assert house.tokens.find("hgt_" + "x" * 10_000) is None


def test_buckets_fill_again() -> None:
    now = [0.0]
    buckets = Buckets(2, 10, lambda: now[0])
    assert [buckets.wait_s("a") for _ in range(3)] == [0, 0, 5]
    assert buckets.wait_s("b") == 0
    now[0] = 5
    assert buckets.wait_s("a") == 0
    assert buckets.wait_s("a") == 5


def test_it_is_not_served_to_others_without_tls_unless_that_is_said(tmp_path: Path) -> None:
    checked(HttpSettings())
    checked(HttpSettings(host="0.0.0.0", enabled=False))
    checked(HttpSettings(host="0.0.0.0", insecure=True))
    with pytest.raises(SettingsError, match=r"http\.tls_cert and http\.tls_key"):
        checked(HttpSettings(host="0.0.0.0"))
    made = certified(tmp_path, ["localhost"])
    checked(HttpSettings(host="0.0.0.0", tls_cert=made.certificate, tls_key=made.key))
    with pytest.raises(SettingsError, match="cannot be used"):
        checked(HttpSettings(host="0.0.0.0", tls_cert=made.key, tls_key=made.key))
