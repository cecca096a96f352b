"""One device in five attacks: the run survives it, says so, and after three strikes does without it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from coordinator.app import create_app
from coordinator.settings import Robust
from edge_agent.samples import LocalData
from foundation.transport import MemoryBroker
from hedgerow.hostile import Attack
from tests.fleet import Fleet, memory, run_settings
from tests.toys import toy_data

pytestmark = pytest.mark.anyio

NAMES = ("d0", "d1", "d2", "d3", "d4")
ROBUST = Robust(outlier=3.0, clip=1.0, examples=2.0)


def alike(seed: int) -> LocalData:
    """Toy data that differ little enough for an average to serve all; the same test part size."""
    return toy_data(seed % 2, examples=48)


@contextlib.asynccontextmanager
async def five(
    folder: Path, robust: Robust, hostile: dict[str, Attack], **run: object
) -> AsyncIterator[Fleet]:
    fields = {"strategy": "fedavg", "settings": {"learning_rate": 5e-3, "epochs": 2}, "min_agents": 5}
    settings = run_settings(**(fields | {"rounds": 5, "robust": robust} | run))
    whole = Fleet(folder, memory(MemoryBroker()), settings, alike, hostile=hostile)
    try:
        for name in ("coordinator", *NAMES):
            whole.start(name)
        yield whole
    finally:
        for name in list(whole.tasks):
            await whole.cut(name)


async def loss_of_the_honest(folder: Path, robust: Robust, attack: Attack | None) -> float:
    async with five(folder, robust, {"d4": attack} if attack else {}) as whole:
        assert await whole.finished() == "finished"
        assert whole.store is not None
        last = {u.agent: u.summary["metrics"] for u in whole.store.updates("r", 5)}
    return sum(last[name]["loss_sent"] for name in NAMES[:4]) / 4


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.slow
async def test_an_attack_costs_next_to_nothing_with_the_robust_setting(tmp_path: Path) -> None:
    clean = await loss_of_the_honest(tmp_path / "clean", Robust(huge=None), None)
    for attack in ("nan", "huge", "sign_flip", "label_flip"):
        held = await loss_of_the_honest(tmp_path / attack, ROBUST, attack)  # type: ignore[arg-type]
        assert held < clean + 0.1, attack
    spoilt = await loss_of_the_honest(tmp_path / "spoilt", Robust(huge=None), "huge")
    assert not spoilt < clean + 0.1, "without it, one device is enough"


async def test_three_strikes_set_a_device_aside_and_api_and_page_say_why(tmp_path: Path) -> None:
    async with five(tmp_path, Robust(), {"d4": "huge", "d3": "nan"}) as whole:
        assert await whole.finished() == "finished"
        assert whole.store is not None
        assert whole.engine is not None
        await whole.engine.live.flush()
        assert [len(r.agents) for r in whole.store.rounds("r")] == [5, 5, 5, 3, 3]
        cases = whole.store.quarantine.cases("r")
        causes = [(c.round, c.agent, c.cause) for c in reversed(cases)]
        assert sorted(c for c in causes if c[1] == "d4") == [(n, "d4", "outside") for n in (1, 2, 3)]
        assert sorted(c for c in causes if c[1] == "d3") == [(n, "d3", "malformed") for n in (1, 2, 3)]
        assert all("times the median of the others'" in c.reason for c in cases if c.agent == "d4")
        assert all("not finite" in c.reason for c in cases if c.agent == "d3")
        kinds = [e.kind for e in whole.store.latest_events(500)]
        assert kinds.count("quarantined") == 3
        assert kinds.count("set_aside") == 2
        aside = whole.engine.roster.entry("d4").set_aside
        assert aside is not None
        assert aside.startswith(
            "set aside after 3 bad answers (3 far from the others, 0 malformed); the last:"
        )
        # The frame is there for a person to look at, and was not merged.
        assert whole.store.quarantine.frame(cases[0].id)
        assert whole.store.rounds("r")[0].metrics["quarantined"] == 1
        app = create_app(whole.store, whole.engine.live, whole.engine)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://here"
        ) as client:
            told = (await client.get("/api/v1/quarantine", params={"limit": 4})).json()
            rest = (await client.get("/api/v1/quarantine", params={"after": told["next"]})).json()
            assert [c["id"] for c in told["items"] + rest["items"]] == [c.id for c in cases]
            assert "quarantined: its change is" in (await client.get("/")).text


async def test_a_killed_coordinator_comes_to_the_same_end(tmp_path: Path) -> None:
    """Verdicts, strikes and what a rule makes of a round are the same when they are made again."""
    hostile: dict[str, Attack] = {"d4": "huge", "d3": "sign_flip"}
    robust = Robust(rule="trimmed_mean", outlier=3.0, clip=1.0)
    async with five(tmp_path / "whole", robust, hostile, snapshot_every=3) as whole:
        assert await whole.finished() == "finished"
        expected = whole.state().to_bytes()
        assert whole.store is not None
        cases = whole.store.quarantine.cases("r")
        assert {(c.round, c.agent) for c in cases} == {(n, a) for n in (1, 2, 3) for a in ("d3", "d4")}
    async with five(tmp_path / "broken", robust, hostile, snapshot_every=3) as broken:
        for closed in (1, 2, 4):
            async with asyncio.timeout(60):
                while broken.store is None or not _closed(broken, closed):
                    await asyncio.sleep(0.005)
            await broken.cut("coordinator")
            broken.engine = None
            broken.start("coordinator")
        assert await broken.finished() == "finished"
        assert broken.state().to_bytes() == expected
        assert broken.store is not None
        again = broken.store.quarantine.cases("r")
        told = [sorted((c.round, c.agent, c.reason) for c in some) for some in (cases, again)]
        assert told[0] == told[1]


def _closed(whole: Fleet, number: int) -> bool:
    assert whole.store is not None
    record = whole.store.round_record("r", number)
    return record is not None and record.state == "closed"
