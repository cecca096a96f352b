"""A fleet whose Mosquitto asks for client certificates: joining, strangers, renewing, taking back."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.certificate import PEM, VALIDITY, validity
from foundation.errors import NotConnected
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.topics import client_id
from hedgerow.broker import find_broker
from hedgerow.children import stop_all
from tests.broker.conftest import free_port
from tests.broker.test_fleet import Place
from tests.conftest import require_service
from tests.processes import until

pytest.importorskip("cryptography")
pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.anyio]


class Certified(Place):
    """A place with two listeners: `port` asks for certificates, `joining` is for invitations."""

    joining = 0

    def join_certified(self, name: str, *more: str, code: int = 0) -> str:
        main, self.port = self.port, self.joining
        try:
            token = self.token()
            done = subprocess.run(
                [*self.joins(name, token), *more],
                cwd=self.folder,
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            self.port = main
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def device(self, name: str, *, certificate: str | None, port: int | None = None) -> MqttSettings:
        """How a device connects, with the certificate of that name, or of nobody."""
        shown = None if certificate is None else self.folder / f"vault-{certificate}" / PEM
        return self.of_device(name).model_copy(
            update={"cert_file": shown, "port": port or self.port, "connect_timeout_s": 3.0}
        )


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Certified]:
    require_service(find_broker("mosquitto") is not None, "mosquitto")
    here = Certified(tmp_path, "mosquitto", free_port())
    here.joining = free_port()
    lines = here.said(
        "coordinator", "broker-config", "mosquitto", "--out", "broker", "--host", "localhost",
        "--certificates", "--port", str(here.port), "--join-port", str(here.joining),
        "--set", "federation=green",
    )  # fmt: skip
    (tmp_path / "coordinator.toml").write_text('federation = "green"\nhttp.enabled = false\n' + lines)
    if os.getuid() == 0:
        with (tmp_path / "broker/mosquitto.conf").open("a") as file:
            file.write("user root\n")  # its own user may not enter the tests' folders
    try:
        here.start_broker()
        here.start_coordinator("autostart=false")
        until(lambda: (tmp_path / "coordinator-data/fleet.epoch").exists(), 30)
        yield here
    finally:
        stop_all(list(here.children.values()))


async def connects(settings: MqttSettings, name: str) -> bool:
    try:
        async with MqttTransport(settings, client_id("green", name), clean=True):
            return True
    except NotConnected:
        return False


async def test_only_who_joined_is_let_in_certificates_are_renewed_and_taken_back(place: Certified) -> None:
    assert "--certificate" in place.join_certified("d9", code=1), "it is told what is missing"
    for name in ("d0", "d1"):
        assert f"joined green as {name}" in place.join_certified(name, "--certificate")
        assert f"port = {place.port}\n" in (place.folder / f"{name}.toml").read_text()
    key = (place.folder / "vault-d0/device.key").read_text()
    for folder in ("broker", "coordinator-data"):
        kept = [p.read_bytes() for p in (place.folder / folder).rglob("*") if p.is_file()]
        assert not any(key.encode() in content for content in kept), "the key stays on the device"

    assert await connects(place.device("d0", certificate="d0"), "d0")
    assert not await connects(place.device("d0", certificate=None), "d0")
    assert not await connects(place.device("d0", certificate=None, port=place.joining), "d0")

    # An agent whose certificate is nearly over gets another one by itself, for the same key.
    vault = place.folder / "vault-d1"
    before, life = (vault / PEM).read_text(), validity(vault)
    assert life is not None
    old = life.model_copy(update={"issued": life.issued - 3 * (life.expires - life.issued)})
    (vault / VALIDITY).write_text(old.model_dump_json())
    place.start_agent("d1")
    until(lambda: (vault / PEM).read_text() != before, 90)
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(vault / PEM)
    assert await connects(place.device("d0", certificate="d1"), "d0"), "it is good, and the password is d0's"

    issued = json.loads((place.folder / "coordinator-data/certificates.json").read_text())["issued"]
    assert [one["name"] for one in issued] == ["d0", "d1", "d1"]
    place.coordinator("revoke", "d1", "--reason", "sold")
    until(lambda: "lost the broker" in (place.folder / "d1.log").read_text(), 60)
    assert not await connects(place.device("d1", certificate="d1"), "d1")
    assert not await connects(place.device("d0", certificate="d1"), "d0"), "whatever password it has"
    assert await connects(place.device("d0", certificate="d0"), "d0")
