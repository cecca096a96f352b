"""A sensor that speaks MQTT becomes training data of an agent that is already running."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from edge_agent.agent import Agent
from edge_agent.datasets import DataSettings, load
from edge_agent.energy.meter import Meter
from edge_agent.settings import AgentSettings
from edge_agent.stream import StreamRecorder
from foundation.profile import DeviceProfile
from foundation.spec import ModelSettings
from foundation.transport import MemoryBroker, MemoryTransport
from tests.fleet import TOPICS, Fleet, memory, run_settings

pytestmark = pytest.mark.anyio

LABELS = ("rest", "shake")


def _table(name: str) -> DataSettings:
    return DataSettings(
        kind="mqtt_stream",
        topic=f"plant/{name}/imu",
        label_topic=f"plant/{name}/label",
        fields=("ax", "ay"),
        window=8,
        stride=4,
        sample_rate_hz=50,
        labels=LABELS,
    )


class StreamFleet(Fleet):
    """Agents that learn from what they record."""

    async def agent(self, name: str, seed: int) -> None:
        data, vault = _table(name), self.folder / name
        settings = AgentSettings(agent=name, federation="test", vault=vault, data=data)
        with Meter(DeviceProfile.load("unknown-linux")) as meter:
            self.agents[name] = Agent(
                settings,
                transport=self.dial(name, (TOPICS.of(name, "presence"), b"{}")),
                meter=meter,
                profile="unknown-linux",
                threads=1,
                load_data=lambda: load(data, None, vault / "stream"),
                recorder=StreamRecorder(data, vault / "stream"),
                retry_s=0.1,
            )
            await self.agents[name].run()


async def _shake(broker: MemoryBroker, name: str) -> None:
    """Publish forty stretches of each label: resting is still, shaking is not."""
    rng = np.random.default_rng(int(name[1:]))
    async with MemoryTransport(broker) as sensor:
        for stretch in range(80):
            label = LABELS[stretch % 2]
            await sensor.publish(f"plant/{name}/label", label.encode())
            still = 0.05 if label == "rest" else 2.0
            rows = rng.normal(size=(40, 2)) * still
            body = json.dumps([{"ax": ax, "ay": ay} for ax, ay in rows.tolist()])
            await sensor.publish(f"plant/{name}/imu", body.encode())
        await sensor.publish(f"plant/{name}/label", b"")


async def test_agents_learn_from_a_live_stream(tmp_path: Path) -> None:
    broker = MemoryBroker()
    run = run_settings(
        min_agents=2,
        rounds=3,
        settings={"learning_rate": 1e-2, "epochs": 3},
        model=ModelSettings(width=8, depth=1, heads=2, ffl_ratio=2, patch=2),
    )
    whole = StreamFleet(tmp_path, memory(broker), run)
    try:
        for name in ("coordinator", "d0", "d1"):
            whole.start(name)
        async with asyncio.timeout(20):
            while len(whole.agents) < 2 or not all(a.card().problem for a in whole.agents.values()):
                await asyncio.sleep(0.01)
        assert "data" in str(whole.agents["d0"].card().problem), "nothing is recorded yet, and it says so"
        await asyncio.gather(_shake(broker, "d0"), _shake(broker, "d1"))
        assert await whole.finished() == "finished"
        assert whole.store is not None
        last = whole.store.rounds("r")[-1].metrics
        assert last["updates"] == 2
        assert last["accuracy"] > 0.9
    finally:
        for name in list(whole.tasks):
            await whole.cut(name)
