"""A federation whose device serves: what its server decides is told upward, once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from edge_agent.serving import canary, owner
from edge_agent.settings import ServeSettings
from export.folder import linked, publish, resolve
from export.folder import load_artifact as load
from export.sign import DEVICE_KEY, DeviceKey
from foundation.transport import MemoryBroker
from tests.artifacts import family
from tests.fleet import Fleet, fleet, memory, run_settings

pytestmark = pytest.mark.anyio


async def until(condition: Callable[[], bool], within_s: float = 60) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


def told(whole: Fleet, kind: str) -> list[str]:
    assert whole.store is not None
    return [event.text for event in whole.store.latest_events(500) if event.kind == kind]


async def test_a_refused_and_a_rolled_back_model_are_events_of_the_coordinator(tmp_path: Path) -> None:
    run = run_settings(rounds=2, export_every=1)
    serve = {"d0": ServeSettings(enabled=True)}
    async with fleet(tmp_path, memory(MemoryBroker()), run, serve=serve) as whole:
        assert await whole.finished() == "finished"
        agent, root = whole.agents["d0"], tmp_path / "d0" / "artifacts"
        await until(lambda: agent.card().serving is not None)
        url = agent.card().serving
        async with httpx.AsyncClient(base_url=str(url)) as client:

            async def serves(sha256: str) -> bool:
                properties = (await client.get("/v2/models/model")).json()["properties"]
                return bool(properties["sha256"] == sha256)

            async with asyncio.timeout(30):
                while not await serves(resolve(root).name):
                    await asyncio.sleep(0.05)
            found = canary.read(tmp_path / "d0" / canary.FILE)
            assert found is not None
            assert len(found.y) == 8, "all of the validation part"

            # Another device's model finds its way here.
            manifest, model, _ = load(resolve(tmp_path / "d1" / "artifacts"))
            probe = (resolve(tmp_path / "d1" / "artifacts") / "probe.npz").read_bytes()
            key = DeviceKey.load(tmp_path / "d0" / DEVICE_KEY)
            publish(root, manifest, model, probe, key)
            await until(lambda: len(told(whole, "model_refused")) == 1)
            (text,) = told(whole, "model_refused")
            assert "d0: the model of round 2 was refused: the artifact was made for 'd1'" in text

            before = linked(root, "serving")
            newer = family(tmp_path / "family").variant(7)
            newer.publish(root, key)
            async with asyncio.timeout(30):
                while not await serves(newer.sha256):
                    await asyncio.sleep(0.05)
            owner.roll_back(root, "the owner does not like it")
            await until(lambda: len(told(whole, "model_rolled_back")) == 1)
            async with asyncio.timeout(30):
                while not await serves(str(before)):
                    await asyncio.sleep(0.05)

        await whole.cut("coordinator")
        whole.start("coordinator")
        await whole.cut("d0")
        whole.start("d0")
        await until(lambda: whole.agents["d0"] is not agent)
        await until(lambda: whole.agents["d0"].card().serving is not None)
        await until(lambda: len(whole.agents["d0"].card().verdicts) == 2)
        assert len(told(whole, "model_refused")) == len(told(whole, "model_rolled_back")) == 1, "told once"


@pytest.mark.slow
async def test_training_gives_way_to_answers_and_comes_to_the_same_end(tmp_path: Path) -> None:
    run = run_settings(rounds=6, export_every=1, settings={"epochs": 30, "learning_rate": 5e-3})
    async with fleet(tmp_path / "straight", memory(MemoryBroker()), run) as whole:
        assert await whole.finished() == "finished"
        straight = whole.state().to_bytes()
    serve = {"d0": ServeSettings(enabled=True, p95_ms=1e-6)}  # no answer is as fast
    async with fleet(tmp_path / "busy", memory(MemoryBroker()), run, serve=serve) as whole:
        await until(lambda: "d0" in whole.agents and whole.agents["d0"].card().serving is not None)
        agent = whole.agents["d0"]
        shape = agent.card().shape
        sample = [[0.0] * shape[-1]] * shape[-2]
        async with httpx.AsyncClient(base_url=str(agent.card().serving)) as client:
            for _ in range(40):
                answer = await client.post("/predict", json={"inputs": [sample]})
                assert answer.status_code == 200
        assert await whole.finished(120) == "finished"
        assert agent.paused_s > 0
        assert whole.state().to_bytes() == straight, "to the bit"
        assert whole.store is not None
        ledgers = [
            update.summary["ledger"]
            for number in range(1, run.rounds + 1)
            for update in whole.store.updates("r", number)
            if update.agent == "d0"
        ]
    waited = sum(ledger["wait"]["seconds"] for ledger in ledgers if "wait" in ledger)
    assert waited >= agent.paused_s, "a pause is waiting, not training"
