"""Real brokers for the tests: both kinds where both are installed, and one with a config of the test."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from foundation.mqtt import MqttSettings
from hedgerow.broker import EmbeddedBroker, find_broker
from tests.conftest import LONG, require_service
from tests.processes import AGENTS, Processes, write_data

ONE = pytest.mark.parametrize("broker", ["mosquitto", pytest.param("nats", marks=LONG)], indirect=True)
"""For what is about processes more than about brokers: NATS only in long runs."""


@pytest.fixture(params=["mosquitto", "nats"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A running broker; every test that asks for it runs on Mosquitto and on NATS."""
    require_service(find_broker(request.param) is not None, request.param)
    with EmbeddedBroker(tmp_path / "broker", prefer=request.param) as running:
        yield running


@pytest.fixture
def settings(broker: EmbeddedBroker) -> MqttSettings:
    return MqttSettings.from_url(broker.url)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


RunBroker = Callable[[str, str], int]


@pytest.fixture
def run_broker(tmp_path: Path) -> Iterator[RunBroker]:
    """Run a broker by name with the test's own config, `{port}` filled in; returns the port."""
    running: list[subprocess.Popen[bytes]] = []

    def run(name: str, config: str) -> int:
        program = find_broker("mosquitto" if name == "mosquitto" else "nats")
        require_service(program is not None, name)
        assert program is not None
        port = free_port()
        file = tmp_path / f"{name}.conf"
        file.write_text(config.replace("{port}", str(port)))
        log = tmp_path / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen([program.path, "-c", file], stdout=out, stderr=out)
        running.append(process)
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return port
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        raise AssertionError(log.read_text())

    yield run
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def running_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    require_service(find_broker() is not None, "MQTT broker")
    with EmbeddedBroker(tmp_path_factory.mktemp("broker") / "it") as broker:
        yield broker


@pytest.fixture(scope="module")
def processes(
    tmp_path_factory: pytest.TempPathFactory, running_broker: EmbeddedBroker
) -> Iterator[Processes]:
    whole = Processes(tmp_path_factory.mktemp("processes"), running_broker.port)
    for agent in AGENTS:
        write_data(whole.folder, int(agent[1:]))
        whole.start_agent(agent)
    yield whole
    whole.close()
