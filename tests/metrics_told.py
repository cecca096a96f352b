"""Every metric that Hedgerow has, as its programs write it, with everything known that can be."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import psutil

from coordinator.live import AgentStatus, Status
from coordinator.web.metrics import Costs
from coordinator.web.metrics import families as coordinator_families
from edge_agent.agent import Agent
from edge_agent.datasets import DataSettings
from edge_agent.energy.meter import Meter
from edge_agent.metrics import families
from edge_agent.serving.metrics import Metrics
from edge_agent.serving.predictor import Predictor
from edge_agent.settings import AgentSettings
from foundation.energy import Kind, Scope, Stage
from foundation.profile import DeviceProfile
from foundation.prometheus import render
from foundation.transport import MemoryBroker, MemoryTransport
from tests.exposition import Told, read
from tests.toys import toy_data


def crowd(devices: int) -> Status:
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    agents = tuple(
        AgentStatus(
            agent=f"d{i:05d}",
            online=i % 2 == 0,
            profile="p" * 10_000,
            version='1"\n',
            stage=Stage.TRAIN,
            round=3,
            progress=0.5,
            accuracy=0.9,
            kept_units=(3, 4),
            hidden_units=8,
            joules=12.5,
            watts=3.25,
            energy_kind=Kind.MODELLED,
            energy_source="utilisation",
            sent_bytes=5,
            received_bytes=6,
            rss_bytes=7,
            last_seen=noon,
        )
        for i in range(devices)
    )
    return Status(run="r", round=3, rounds=9, phase="collecting", since=noon, online=devices, agents=agents)


def told_by(folder: Path, profile: str, *stages: Stage) -> dict[str, Told]:
    settings = AgentSettings(agent="d0", vault=folder / "d0", data=DataSettings(kind="builtin"))
    now = [0.0]
    with Meter(DeviceProfile.load(profile), clock=lambda: now[0], threaded=False) as meter:
        agent = Agent(
            settings,
            transport=MemoryTransport(MemoryBroker()),
            meter=meter,
            profile=profile,
            threads=1,
            load_data=lambda: toy_data(0),
        )
        for stage in stages:
            with meter.stage(stage):
                now[0] += 2.0
            meter.take()
            now[0] += 1.0
        return dict(read(render(families(agent, psutil.Process()))))


def of_coordinator() -> dict[str, Told]:
    costs = Costs(3, 1, 100, 200, {(Kind.MEASURED, Scope.MODULE): 4.0})
    return dict(read(render(coordinator_families(crowd(1), costs, psutil.Process()))))


def of_agent(folder: Path) -> dict[str, Told]:
    return told_by(folder, "raspberry-pi-4b", Stage.TRAIN)


def of_serving(artifacts: Path) -> dict[str, Told]:
    metrics = Metrics(0.1)
    metrics.requests[200] += 1
    return dict(read(metrics.text(Predictor(artifacts).handle, 0)))
