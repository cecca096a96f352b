"""The same small federation over more brokers than the embedded ones, with their limits: docs/brokers.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.settings import RunSettings
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.spec import ModelSettings
from foundation.transport import MemoryBroker
from tests.broker import rabbitmq as rabbit
from tests.broker.conftest import LONG, RunBroker
from tests.broker.test_federation import last_state, mqtt
from tests.fleet import memory, run_settings

pytestmark = [pytest.mark.anyio, pytest.mark.broker, pytest.mark.slow]

AWS = """
listener {port} 127.0.0.1
allow_anonymous true
max_packet_size 149504
message_size_limit 131072
max_qos 1
max_inflight_messages 100
max_queued_messages 20000
max_keepalive 1200
max_topic_alias 8
"""
"""The limits of AWS IoT Core as Mosquitto can have them: 128 KB a message, QoS 1, 100 unacknowledged."""


def run() -> RunSettings:
    # Large enough that every frame goes in parts.
    model = ModelSettings(width=64, depth=2, heads=2, ffl_ratio=4, patch=2)
    return run_settings(settings={"learning_rate": 5e-3, "epochs": 1}, model=model)


@pytest.fixture
def aws(run_broker: RunBroker) -> int:
    """The port of a Mosquitto that takes what AWS IoT Core takes, and nothing more."""
    return run_broker("mosquitto", AWS + ("user root\n" if os.getuid() == 0 else ""))


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Iterator[int]:
    if rabbit.script() is None:
        pytest.skip("no rabbitmq-server on this machine: apt install rabbitmq-server")
    with rabbit.rabbitmq(tmp_path / "rabbit") as port:
        yield port


async def equal(tmp_path: Path, settings: MqttSettings) -> None:
    """A run over this broker ends in the bits of one inside this process."""
    expected = await last_state(tmp_path / "memory", memory(MemoryBroker()), run())
    assert await last_state(tmp_path / "mqtt", mqtt(settings), run()) == expected


@pytest.mark.parametrize("version", ["auto", pytest.param("3.1.1", marks=LONG)])
async def test_a_run_within_the_limits_of_aws(tmp_path: Path, aws: int, version: str) -> None:
    settings = MqttSettings.model_validate({"port": aws, "version": version})
    async with MqttTransport(settings, "look", clean=True) as transport:
        assert transport.limits is not None
        assert transport.limits.packet_bytes == (149_504 if version == "auto" else None)
        assert transport.max_body_bytes == settings.max_part_bytes < 131_072
    await equal(tmp_path, settings)


@LONG
async def test_a_run_over_rabbitmq(tmp_path: Path, rabbitmq: int) -> None:
    await equal(tmp_path, MqttSettings(port=rabbitmq))
