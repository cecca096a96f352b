"""What the engine can be told: starting, stopping, and every no in words."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.engine import Engine
from coordinator.live import Live
from coordinator.settings import CoordinatorSettings, HttpSettings, RunSettings
from coordinator.store.sql import Store
from coordinator.web.models import StartRun
from foundation.errors import RoundError, SettingsError
from foundation.messages import Presence
from foundation.topics import Topics
from foundation.transport import MemoryBroker, MemoryTransport
from tests.fleet import fleet, memory, run_settings

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def engine_of(
    folder: Path, broker: MemoryBroker, *, autostart: bool = False, **run: Any
) -> AsyncIterator[Engine]:
    settings = CoordinatorSettings(
        federation="test",
        folder=folder,
        autostart=autostart,
        http=HttpSettings(enabled=False),
        run=RunSettings(**({"wait_s": 20.0} | run)),
    )
    with Store.open(folder) as store:
        async with Live(store) as live:
            engine = Engine(settings, transport=MemoryTransport(broker), store=store, live=live)
            serving = asyncio.create_task(engine.serve())
            while Topics("test").coordinator_presence not in broker.retained and not serving.done():
                await asyncio.sleep(0.001)
            yield engine
            serving.cancel()
            await asyncio.wait([serving])
            if not serving.cancelled():
                serving.result()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"strategy": "fedbest"}, "there is no strategy 'fedbest'"),
        ({"strategy": "fedavg", "settings": {"epoch": 1}}, "strategy fedavg: there is no setting 'epoch'"),
        ({"strategy": "fedavg", "settings": {"epochs": -1}}, "strategy fedavg: epochs: "),
    ],
)
async def test_a_run_that_cannot_be_is_refused_before_it_begins(
    tmp_path: Path, request_: dict[str, Any], words: str
) -> None:
    async with engine_of(tmp_path, MemoryBroker()) as engine:
        with pytest.raises(SettingsError, match=words):
            await engine.start(StartRun(**request_))
        assert engine.store.runs() == []
        with pytest.raises(RoundError, match="no run is in progress"):
            await engine.stop("for fun")


async def test_one_run_at_a_time_and_a_stopped_one_makes_room(tmp_path: Path) -> None:
    async with engine_of(tmp_path, MemoryBroker()) as engine:
        await engine.start(StartRun(name="a", strategy="fedavg"))
        with pytest.raises(RoundError, match="run 'a' is in progress: stop it first"):
            await engine.start(StartRun(name="b", strategy="fedavg"))
        await engine.stop("enough")
        assert (engine.outcome, engine.finished.is_set()) == ("stopped", True)
        with pytest.raises(RoundError, match="no run is in progress"):
            await engine.stop("again")
        await engine.start(StartRun(name="b", strategy="fedavg"))
        assert not engine.finished.is_set()


async def test_the_presence_says_online_and_offline(tmp_path: Path) -> None:
    broker = MemoryBroker()
    topic = Topics("test").coordinator_presence
    async with engine_of(tmp_path, broker):
        assert Presence.model_validate_json(broker.retained[topic]).state == "online"
    assert Presence.model_validate_json(broker.retained[topic]).state == "offline"


async def test_a_finished_run_is_not_run_again_and_says_so(tmp_path: Path) -> None:
    broker, run = MemoryBroker(), run_settings(rounds=1, strategy="local", settings={"epochs": 0})
    async with fleet(tmp_path, memory(broker), run) as whole:
        assert await whole.finished() == "finished"
        assert whole.engine is not None
        with pytest.raises(SettingsError, match="run 'r' is finished: choose another name"):
            await whole.engine.start(StartRun(name="r", strategy="local"))
        assert whole.store is not None
        assert whole.store.run("r").state == "finished", "the old run stays what it was"


async def test_an_agent_that_left_for_good_does_not_hold_the_next_round(tmp_path: Path) -> None:
    """`min_agents` is for the start; later on the quorum of it is enough, after a grace."""
    settings = {"learning_rate": 5e-3, "epochs": 1}
    run = run_settings(rounds=4, strategy="fedavg", settings=settings, grace_s=0.3, quorum=0.5)
    async with fleet(tmp_path, memory(MemoryBroker()), run) as whole:
        async with asyncio.timeout(30):
            while whole.store is None or len(whole.store.rounds("r") if whole.store.has_run("r") else []) < 2:
                await asyncio.sleep(0.002)
        await whole.cut("d1")
        assert await whole.finished() == "finished"
        assert len(whole.store.updates("r", 4)) == 2
