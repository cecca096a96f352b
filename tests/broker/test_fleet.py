"""A fleet at a real broker with TLS, users and an access list: joining, work, strangers, revoking."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.store.sql import Store
from foundation.errors import NotConnected, TransportError
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.topics import Topics, client_id
from hedgerow.broker import find_broker
from hedgerow.children import Child, spawn, stop_all
from tests.broker.conftest import LONG, free_port
from tests.conftest import require_service
from tests.processes import until
from tests.toys import LABELS, toy_data

pytest.importorskip("cryptography")
pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.anyio]
TOPICS = Topics("green")
RUN = ("name=r", "strategy=fedavg", "rounds=2", "min_agents=2", "model.width=8", "model.heads=2",
       "model.patch=2", "model.ffl_ratio=2", "deadline_s=120")  # fmt: skip


ONE_PLACE = pytest.mark.parametrize("place", ["mosquitto", pytest.param("nats", marks=LONG)], indirect=True)


@dataclass
class Place:
    """A folder with a broker, a coordinator and devices, all as processes with files of their own."""

    folder: Path
    broker: str
    port: int
    children: dict[str, Child] = field(default_factory=dict)

    def said(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def coordinator(self, *words: str, code: int = 0) -> str:
        return self.said("coordinator", *words, "--config", "coordinator.toml", code=code)

    def start(self, name: str, command: Sequence[str]) -> None:
        command = [shutil.which("env") or "env", "-C", str(self.folder), *command]
        self.children[name] = spawn(name, command, self.folder / f"{name}.log", dict(os.environ))

    def start_broker(self) -> None:
        program = find_broker(self.broker)  # type: ignore[arg-type]
        assert program is not None
        self.start("broker", [str(program.path), "-c", str(self.folder / f"broker/{self.broker}.conf")])
        until(lambda: list((self.folder / "broker").glob("*.pid")) != [], 20)

    def start_coordinator(self, *sets: str) -> None:
        options = [option for one in sets for option in ("--set", one)]
        self.start(
            "coordinator", [sys.executable, "-m", "coordinator", "--config", "coordinator.toml", *options]
        )

    def start_agent(self, name: str) -> None:
        self.start(name, [sys.executable, "-m", "edge_agent", "--config", f"{name}.toml"])

    def token(self, *words: str) -> str:
        token: str = json.loads(self.coordinator("invite", "--json", *words))["tokens"][0]
        return token

    def join(self, name: str, token: str, code: int = 0) -> str:
        return self.said(*self.joins(name, token)[2:], code=code)

    def joins(self, name: str, token: str) -> list[str]:
        """Write a device's data; returns the command by which it joins."""
        data = toy_data(int(name[-1]), examples=96)
        np.savez(self.folder / f"{name}.npz", x=data.train.x, y=data.train.y)
        return [
            sys.executable, "-m", "edge_agent", "join", f"mqtts://localhost:{self.port}", "--token", token,
            "--name", name, "--vault", f"vault-{name}", "--config", f"{name}.toml", "--data", "kind=npz",
            "--data", f"path={self.folder / name}.npz", "--data", f"labels={json.dumps(LABELS)}",
        ]  # fmt: skip

    def mqtt(self, user: str, password: str) -> MqttSettings:
        return MqttSettings(
            host="localhost", port=self.port, username=user, password=password, tls=True,
            ca_file=self.folder / "broker/authority.pem",
        )  # fmt: skip

    def of_device(self, name: str) -> MqttSettings:
        return self.mqtt(name, (self.folder / f"vault-{name}/broker.password").read_text().strip())

    def events(self) -> list[tuple[str, str | None]]:
        with Store.open_to_read(self.folder / "coordinator-data") as store:
            return [(event.kind, event.agent) for event in store.events(limit=1000)]


@pytest.fixture(params=["mosquitto", "nats"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    require_service(find_broker(request.param) is not None, request.param)
    here = Place(tmp_path, request.param, free_port())
    lines = here.said("coordinator", "broker-config", here.broker, "--out", "broker", "--host", "localhost",
                      "--port", str(here.port), "--set", "federation=green")  # fmt: skip
    (tmp_path / "coordinator.toml").write_text('federation = "green"\nhttp.enabled = false\n' + lines)
    if here.broker == "mosquitto" and os.getuid() == 0:
        with (tmp_path / "broker/mosquitto.conf").open("a") as file:
            file.write("user root\n")  # its own user may not enter the tests' folders
    try:
        here.start_broker()
        yield here
    finally:
        stop_all(list(here.children.values()))


@ONE_PLACE
async def test_devices_join_work_and_one_is_shut_out(place: Place) -> None:
    place.start_coordinator("autostart=false")
    until(lambda: (place.folder / "coordinator-data/fleet.epoch").exists(), 30)
    for name in ("d0", "d1"):
        assert f"joined green as {name}" in place.join(name, place.token())
        place.start_agent(name)
    stop_all([place.children.pop("coordinator")])
    place.start_coordinator(*(f"run.{one}" for one in RUN))
    until(lambda: ("run_finished", None) in place.events(), 120)
    assert {("joined", "d0"), ("joined", "d1")} <= set(place.events())
    for name in ("d0", "d1"):
        assert (place.folder / f"vault-{name}/artifacts/current/model.onnx").exists()
    place.coordinator("revoke", "d1", "--reason", "sold")
    until(lambda: ("revoked", "d1") in place.events(), 30)
    # Its connection is cut at once, and no new one is let in.
    until(lambda: "lost the broker" in (place.folder / "d1.log").read_text(), 60)
    with pytest.raises(NotConnected):
        async with MqttTransport(place.of_device("d1"), client_id("green", "d1"), clean=True):
            pass
    listed = {d["agent"]: d["reason"] for d in json.loads(place.coordinator("devices", "--json"))}
    assert listed == {"d0": "", "d1": "sold"}


async def test_a_device_reads_and_writes_its_own_branch_only(place: Place) -> None:
    place.start_coordinator("autostart=false")
    until(lambda: (place.folder / "coordinator-data/fleet.epoch").exists(), 30)
    for name in ("d0", "d1"):
        place.join(name, place.token())
    password = (place.folder / "broker/coordinator.password").read_text().strip()
    stop_all([place.children.pop("coordinator")])
    coordinator = MqttTransport(
        place.mqtt("coordinator", password), client_id("green", "coordinator"), clean=True
    )
    device = MqttTransport(place.of_device("d0"), client_id("green", "d0"), clean=True)
    async with coordinator, device:
        everything = await coordinator.subscribe("hedgerow/v1/green/agents/+/card")
        own = await device.subscribe(TOPICS.of("d0", "assignment"))
        foreign: list[Any] = []
        with contextlib.suppress(TransportError):  # NATS says no; Mosquitto says yes and delivers nothing
            foreign.append(await device.subscribe(TOPICS.of("d1", "assignment")))
        with contextlib.suppress(TransportError):
            foreign.append(await device.subscribe("hedgerow/v1/green/#"))
        await coordinator.publish(TOPICS.of("d1", "assignment"), b"for d1")
        await coordinator.publish(TOPICS.of("d0", "assignment"), b"for d0")
        async with asyncio.timeout(20):
            assert (await anext(own)).body == b"for d0"
        readable = {TOPICS.of("d0", "assignment"), TOPICS.coordinator_presence}
        for letters in foreign:  # what else came it may read: `#` overlaps with it
            while letters._letters:
                assert (await anext(letters)).topic in readable
        # A refused publish ends the connection on NATS, and is acknowledged and dropped on Mosquitto.
        with contextlib.suppress(TransportError):
            async with asyncio.timeout(5):
                await device.publish(TOPICS.of("d1", "card"), b"I am d1")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                raise AssertionError(f"this came through: {await anext(everything)}")
        await device.publish(TOPICS.of("d0", "card"), b"I am d0")
        async with asyncio.timeout(20):
            assert (await anext(everything)).body == b"I am d0"


@LONG
@ONE_PLACE
def test_tokens_that_are_used_changed_or_for_another_broker_are_refused(place: Place) -> None:
    place.start_coordinator("autostart=false")
    until(lambda: (place.folder / "coordinator-data/fleet.epoch").exists(), 30)
    token = place.token()
    place.join("d0", token)
    assert "joined green as d0" in place.join("d0", token), "what was interrupted is done again"
    assert "used already" in place.join("d1", token, code=1)
    assert "copy all of it" in place.join("d1", token[:-3], code=2)
    fresh = place.token("--name", "d2")
    assert "called 'd2'" in place.join("d1", fresh, code=1)
    before = json.loads(place.coordinator("invites", "--json"))
    assert [invite["name"] for invite in before] == ["d2"]
    # Somebody in between has another certificate.
    place.said("coordinator", "broker-config", place.broker, "--out", "elsewhere", "--host", "localhost",
               "--set", "federation=green", "--set", "folder=other")  # fmt: skip
    os.kill(place.children["broker"].process.pid, signal.SIGKILL)
    place.children.pop("broker").process.wait()
    for name in ("server.pem", "server.key"):
        (place.folder / "broker" / name).write_bytes((place.folder / "elsewhere" / name).read_bytes())
    for path in (place.folder / "broker").glob("*.pid"):
        path.unlink()
    place.start_broker()
    assert "another certificate" in place.join("d2", fresh, code=1)


@ONE_PLACE
def test_a_fleet_that_has_keys_does_not_go_on_without_them(place: Place) -> None:
    place.start_coordinator("autostart=false")
    until(lambda: (place.folder / "coordinator-data/fleet.epoch").exists(), 30)
    place.join("d0", place.token())
    stop_all([place.children.pop("coordinator")])
    place.start_coordinator("autostart=false", "enrolment.enabled=false")
    until(lambda: place.children["coordinator"].process.poll() is not None, 30)
    assert "enrolment.enabled = true" in (place.folder / "coordinator.log").read_text()
