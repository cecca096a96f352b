"""`/metrics` of the coordinator: what stands there, who may read it, how large it gets."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import pytest

from coordinator.app import create_app
from coordinator.fleet.tokens import ApiTokens
from coordinator.live import AgentStatus, Live, Status
from coordinator.store.sql import Store
from coordinator.web.metrics import MOST_DEVICES, PER_DEVICE, RunCosts, families
from foundation.prometheus import render
from tests.coordinator.filled_store import AGENTS, Clock, Engine, an_update, enliven, fill
from tests.exposition import Told, follows_the_conventions, read
from tests.metrics_told import crowd

pytestmark = pytest.mark.anyio


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    clock = Clock()
    with Store.open(tmp_path, clock=clock) as store:
        fill(store, clock)
        yield store


def lively(store: Store) -> Live:
    live = Live(store, clock=Clock(), monotonic=Clock())
    live.restore(store.agents())
    enliven(live, Clock())
    return live


async def scraped(store: Store) -> dict[str, Told]:
    live = lively(store)
    app = create_app(store, live, Engine(store, live))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return dict(read(answer.text))


async def test_it_says_what_the_page_says(store: Store) -> None:
    found = await scraped(store)
    follows_the_conventions(found)
    assert found["hedgerow_run_info"].value(run="greenhouse-1") == 1
    assert found["hedgerow_run_round"].value() == 6
    assert found["hedgerow_run_progress_ratio"].value() == pytest.approx(0.55)
    assert found["hedgerow_run_phase"].value(phase="collecting") == 1
    assert sum(found["hedgerow_run_phase"].samples.values()) == 1
    assert found["hedgerow_devices_online"].value() == 3
    assert found["hedgerow_devices_known"].value() == len(AGENTS)
    assert found["hedgerow_devices_untold"].value() == 0
    for name, told in found.items():
        if name.startswith("hedgerow_device_"):
            assert "device" in told.labels() or not told.samples


async def test_joules_stand_by_kind_and_scope_and_their_sums_are_the_updates(store: Store) -> None:
    joules = (await scraped(store))["hedgerow_run_energy_joules_total"].samples
    wanted: dict[tuple[str, str], float] = {}
    for round, count in store.counts("greenhouse-1").items():
        for record in store.updates("greenhouse-1", round):
            for reading in an_update(AGENTS.index(record.agent), round).ledger.values():
                if reading.joules is not None:
                    key = str(reading.kind), str(reading.scope)
                    wanted[key] = wanted.get(key, 0.0) + reading.joules
        assert count
    told = {(dict(own)["kind"], dict(own)["scope"]): value for (_, own), value in joules.items()}
    assert told == pytest.approx(wanted)
    assert len(told) == 2


def test_costs_are_read_once_and_grow_with_what_comes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = RunCosts(store)
    before = costs.of("greenhouse-1")
    assert before is not None
    asked: list[int] = []
    plain = store.updates

    def counted(run: str, round: int):  # type: ignore[no-untyped-def]
        asked.append(round)
        return plain(run, round)

    monkeypatch.setattr(store, "updates", counted)
    assert costs.of("greenhouse-1") == before
    assert asked == []
    open_round = max(store.counts("greenhouse-1"))
    missing = next(a for a in AGENTS if a not in {u.agent for u in plain("greenhouse-1", open_round)})
    assert store.add_update("greenhouse-1", open_round, missing, b"frame", {"wire_bytes": 7})
    after = costs.of("greenhouse-1")
    assert after is not None
    assert (after.updates, after.up_bytes) == (before.updates + 1, before.up_bytes + 7)
    assert asked == [open_round]
    assert costs.of(None) is None


def series(status: Status) -> tuple[dict[str, Told], int]:
    found = dict(read(render(families(status, None, psutil.Process()))))
    return found, sum(len(told.samples) for told in found.values())


def test_series_are_bounded_whatever_the_fleet() -> None:
    (_, none), (found, few), (told, many) = series(crowd(0)), series(crowd(10)), series(crowd(1_500))
    assert (few - none) == 10 * PER_DEVICE, "PER_DEVICE is what a device has where it tells everything"
    assert many - none == MOST_DEVICES * PER_DEVICE
    assert told["hedgerow_devices_known"].value() == 1_500
    assert told["hedgerow_devices_untold"].value() == 500
    # All that are online are told, before any that is not.
    assert sum(told["hedgerow_device_online"].samples.values()) == 750
    assert found["hedgerow_device_info"].value(device="d00000", version='1"\n') == 1
    assert max(len(v) for _, own in found["hedgerow_device_info"].samples for _, v in own) == 100
    follows_the_conventions(told)


def test_what_nobody_knows_is_not_told() -> None:
    status = Status(since=datetime.now(UTC), agents=(AgentStatus(agent="new", joules=5.0, watts=1.0),))
    found, _ = series(status)
    for name in ("energy_joules_total", "power_watts", "accuracy_ratio", "sent_bytes_total", "round"):
        assert not found[f"hedgerow_device_{name}"].samples
    assert not found["hedgerow_run_round"].samples


async def test_a_scraper_has_a_viewers_token(store: Store) -> None:
    live, tokens = lively(store), ApiTokens(store)
    app = create_app(store, live, Engine(store, live), tokens=tokens)
    token = tokens.make("prometheus", "viewer", expires_s=None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        assert (await client.get("/metrics")).status_code == 401
        with_token = await client.get("/metrics", headers={"Authorization": f"Bearer {token}"})
        assert with_token.status_code == 200
        assert "hedgerow_run_info" in with_token.text
