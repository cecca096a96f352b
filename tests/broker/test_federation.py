"""Whole federations over real brokers: the same seed comes to the same bits as inside one process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.settings import Budget, BudgetSettings, RunSettings
from edge_agent.energy.meter import Meter
from edge_agent.limits import Limits
from edge_agent.settings import LimitSettings
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.transport import MemoryBroker
from hedgerow.broker import EmbeddedBroker, find_broker
from tests.broker.conftest import ONE
from tests.conftest import LONG, require_service
from tests.fleet import Dial, Fleet, fleet, memory, run_settings
from tests.metered import Metered

pytestmark = [pytest.mark.anyio, pytest.mark.broker]


def mqtt(settings: MqttSettings) -> Dial:
    """Connect through a real broker."""
    return lambda client, will: MqttTransport(settings, f"test-{client}", will=will)


async def last_state(folder: Path, dial: Dial, run: RunSettings) -> bytes:
    async with fleet(folder, dial, run) as whole:
        assert await whole.finished() == "finished"
        assert whole.store is not None
        assert [len(whole.store.updates("r", n)) for n in (1, 2, 3)] == [3, 3, 3]
        assert not any(agent.vault.outbox() for agent in whole.agents.values())
        return whole.state().to_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("mosquitto", "pfl_tpp"),
        pytest.param("nats", "pfl_tpp", marks=LONG),
        pytest.param("mosquitto", "fedavg", marks=LONG),
        ("nats", "fedtp"),
        pytest.param("mosquitto", "local", marks=LONG),
    ],
)
async def test_a_run_over_a_real_broker_equals_one_in_memory(
    tmp_path: Path, kind: str, strategy: str
) -> None:
    require_service(find_broker(kind) is not None, kind)  # type: ignore[arg-type]
    run = run_settings(strategy=strategy, settings={"learning_rate": 5e-3, "epochs": 1})
    expected = await last_state(tmp_path / "memory", memory(MemoryBroker()), run)
    with EmbeddedBroker(tmp_path / "broker", prefer=kind) as broker:  # type: ignore[arg-type]
        dial = mqtt(MqttSettings.from_url(broker.url))
        assert await last_state(tmp_path / "mqtt", dial, run) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mosquitto", pytest.param("nats", marks=LONG)])
async def test_budgets_and_limits_hold_over_a_real_broker(tmp_path: Path, kind: str) -> None:
    """What a card says of limits, and what an eased assignment asks, survive the wire."""
    require_service(find_broker(kind) is not None, kind)  # type: ignore[arg-type]

    def quiet(meter: Meter, vault: Path) -> Limits:
        return Limits(LimitSettings(quiet_hours=("00:00-24:00",)), meter, vault)

    run = run_settings(strategy="fedavg", settings={"epochs": 4}, min_agents=2)
    with EmbeddedBroker(tmp_path / "broker", prefer=kind) as broker:  # type: ignore[arg-type]
        dial = mqtt(MqttSettings.from_url(broker.url))
        more = {
            "budgets": BudgetSettings(devices={"d1": Budget(joules=24)}),
            "metered": {"d1": Metered()},
            "limits": {"d2": quiet},
        }
        async with fleet(tmp_path / "mqtt", dial, run, **more) as whole:
            assert await whole.finished() == "finished"
            assert whole.store is not None
            for number, steps in ((1, 8), (2, 4), (3, 4)):
                updates = {u.agent: u.summary["metrics"]["steps"] for u in whole.store.updates("r", number)}
                assert updates == {"d0": 8, "d1": steps}
            assert whole.store.round_record("r", 3).skipped == {"d2": "it has quiet hours"}


@pytest.mark.slow
@ONE
async def test_a_broker_killed_in_mid_round_comes_back_and_so_does_the_run(
    tmp_path: Path, broker: EmbeddedBroker, settings: MqttSettings
) -> None:
    """The agents are in the middle of their work when the broker dies, and done before it is back."""
    run = run_settings(settings={"learning_rate": 5e-3, "epochs": 10})
    expected = await last_state(tmp_path / "memory", memory(MemoryBroker()), run)
    async with fleet(tmp_path / "mqtt", mqtt(settings), run) as whole:
        await in_work(whole, 2)
        await asyncio.to_thread(broker.kill)
        async with asyncio.timeout(30):
            while not any(agent.vault.outbox() for agent in whole.agents.values()):
                await asyncio.sleep(0.005)
        await asyncio.to_thread(broker.start)
        assert await whole.finished(120) == "finished"
        assert whole.state().to_bytes() == expected
        assert whole.store is not None
        assert [len(whole.store.updates("r", n)) for n in (1, 2, 3)] == [3, 3, 3]


async def in_work(whole: Fleet, number: int) -> None:
    """Wait until all agents have a checkpoint of their work in round `number`."""
    async with asyncio.timeout(60):
        while not all(
            name in whole.agents
            and whole.agents[name].standing.round == number
            and (whole.folder / name / "work" / "checkpoint.safetensors").exists()
            for name in ("d0", "d1", "d2")
        ):
            await asyncio.sleep(0.001)
