"""`hedgerow run` and `hedgerow.client` against the coordinator's application, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coordinator.app import create_app
from coordinator.live import Live
from coordinator.store.sql import Store
from foundation.errors import SettingsError
from hedgerow.cli import app
from hedgerow.client import ApiProblem, Client, NoAnswer, read_events
from tests.coordinator.filled_store import AGENTS, Clock, Engine, enliven, fill
from tests.coordinator.test_api import served

pytestmark = pytest.mark.anyio


@dataclass
class House:
    store: Store
    live: Live
    client: Client

    async def run(self, *words: str) -> tuple[int, str, str]:
        words = ("run", *words, "--coordinator", self.client.address)
        result = await asyncio.to_thread(CliRunner().invoke, app, words)
        return result.exit_code, result.stdout, result.stderr


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = Clock()
    with Store.open(tmp_path, clock=clock) as store:
        async with Live(store, clock=clock, monotonic=clock) as live:
            fill(store, clock)
            enliven(live, clock)
            told = create_app(store, live, Engine(store, live), clock=clock, status_every_s=0.05)
            async with served(told) as (http, _):
                yield House(store, live, Client(str(http.base_url)))


async def test_a_run_is_paused_resumed_and_stopped(house: House) -> None:
    assert await house.run("pause", "--reason", "a storm") == (0, "run greenhouse-1: paused\n", "")
    assert house.store.run("greenhouse-1").reason == "a storm"
    code, _, said = await house.run("pause")
    assert (code, said) == (3, "hedgerow run: run 'greenhouse-1' is paused, not running\n")
    code, said, _ = await house.run("resume", "greenhouse-1", "--json")
    assert (code, json.loads(said)) == (0, {"run": "greenhouse-1", "state": "running"})
    code, _, said = await house.run("stop", "nobody")
    assert (code, "no run 'nobody'" in said) == (1, True)


async def test_runs_are_shown_with_kinds_apart(house: House) -> None:
    code, said, _ = await house.run("show")
    assert (code, "measured" in said, "modelled" in said, "1 unknown" in said) == (0, True, True, True)
    code, said, _ = await house.run("list", "--json")
    assert (code, [one["run"] for one in json.loads(said)]) == (0, ["greenhouse-1"])


async def test_a_run_is_started_and_a_wrong_one_is_misuse(house: House) -> None:
    code, said, _ = await house.run("start", "two", "--strategy", "fedtp", "--set", "epochs=1")
    assert (code, said) == (0, "run two: waiting\n")
    code, _, said = await house.run("start", "a/b")
    assert (code, "name" in said) == (2, True)


async def test_every_page_is_turned_and_events_are_followed(house: House) -> None:
    client = house.client
    found = await asyncio.to_thread(lambda: [one["agent"] for one in client.pages("fleet", {"limit": 3})])
    assert found == list(AGENTS)
    events = client.events()
    first = await asyncio.to_thread(next, events)
    assert (first.name, first.data["run"]) == ("status", "greenhouse-1")
    await asyncio.to_thread(events.close)  # type: ignore[attr-defined]
    with pytest.raises(ApiProblem, match="no run 'x'") as caught:
        await asyncio.to_thread(client.ask, "runs/x")
    assert (caught.value.status, caught.value.instance) == (404, "/api/v1/runs/x")


def test_nobody_there_and_no_address_are_said() -> None:
    with pytest.raises(NoAnswer, match="is it running there"):
        Client("http://127.0.0.1:9").ask("status")
    with pytest.raises(NoAnswer, match="is it running there"):
        next(Client("http://127.0.0.1:9").events())
    with pytest.raises(SettingsError, match="no address"):
        Client("ftp://x").ask("status")


@given(st.lists(st.text(max_size=20) | st.sampled_from(["", "data: {}", "id: 7", "event: status"])))
def test_any_lines_are_messages_or_refused(lines: list[str]) -> None:
    with contextlib.suppress(ValueError):
        assert all(isinstance(event.data, dict) for event in read_events(lines))
