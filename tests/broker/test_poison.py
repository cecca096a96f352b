"""Hostile, private and late devices over real brokers: what a wire may do to them it must not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from coordinator.settings import Robust
from edge_agent.settings import PrivacySettings
from foundation.mqtt import MqttSettings
from hedgerow.broker import EmbeddedBroker, find_broker
from tests.broker.test_federation import mqtt
from tests.conftest import require_service
from tests.fleet import Fleet, run_settings
from tests.rounds.test_late import Gates, is_open, until
from tests.toys import toy_data

pytestmark = [pytest.mark.anyio, pytest.mark.broker, pytest.mark.slow]

FEDAVG = {"strategy": "fedavg", "settings": {"learning_rate": 5e-3, "epochs": 1}}


@pytest.mark.parametrize("kind", ["mosquitto", "nats"])
async def test_poison_is_quarantined_and_the_others_go_on(tmp_path: Path, kind: str) -> None:
    require_service(find_broker(kind) is not None, kind)  # type: ignore[arg-type]
    run = run_settings(**FEDAVG, min_agents=5, rounds=4, robust=Robust(clip=2.0))
    with EmbeddedBroker(tmp_path / "broker", prefer=kind) as broker:  # type: ignore[arg-type]
        whole = Fleet(
            tmp_path / "fleet",
            mqtt(MqttSettings.from_url(broker.url)),
            run,
            toy_data,
            hostile={"d3": "nan", "d4": "huge"},
            privacy={"d0": PrivacySettings(clip=0.5, noise=0.1)},
        )
        try:
            for name in ("coordinator", "d0", "d1", "d2", "d3", "d4"):
                whole.start(name)
            assert await whole.finished() == "finished"
            assert whole.store is not None
            assert [len(r.agents) for r in whole.store.rounds("r")] == [5, 5, 5, 3]
            cases = {(c.agent, c.cause) for c in whole.store.quarantine.cases("r")}
            assert cases == {("d3", "malformed"), ("d4", "outside")}
            told = [u.summary["metrics"] for u in whole.store.history("r") if u.agent == "d0"]
            assert [set(metrics) for metrics in told] == [{"epsilon", "delta"}] * 4
        finally:
            for name in list(whole.tasks):
                await whole.cut(name)


@pytest.mark.parametrize("kind", ["mosquitto", "nats"])
async def test_an_async_run_merges_who_was_slow(tmp_path: Path, kind: str) -> None:
    require_service(find_broker(kind) is not None, kind)  # type: ignore[arg-type]
    gates = Gates({"d2": [threading.Event()], "d1": [threading.Event() for _ in range(3)]})
    for gate in gates.shut["d1"][:2]:
        gate.set()
    run = run_settings(**FEDAVG, mode="async", buffer=2, rounds=4)
    with EmbeddedBroker(tmp_path / "broker", prefer=kind) as broker:  # type: ignore[arg-type]
        whole = Fleet(
            tmp_path / "fleet",
            mqtt(MqttSettings.from_url(broker.url)),
            run,
            toy_data,
            carry_out={name: gates.work(name) for name in ("d0", "d1", "d2")},
        )
        try:
            for name in ("coordinator", "d0", "d1", "d2"):
                whole.start(name)
            # Round 3 cannot fill: d1 is held, d2 is at round 1 still; whichever comes first fills it.
            await until(lambda: is_open(whole, 3))
            gates.shut["d2"][0].set()
            await until(lambda: is_open(whole, 4))
            gates.open()
            assert await whole.finished() == "finished"
            assert whole.store is not None
            rounds = whole.store.rounds("r")
            assert rounds[2].late == ((1, "d2"),)
            assert [one for r in rounds for one in r.late].count((1, "d2")) == 1
        finally:
            gates.open()
            for name in list(whole.tasks):
                await whole.cut(name)
