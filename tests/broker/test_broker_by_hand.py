"""The broker that docs/fleet.md sets up by hand, as written there: certificates, users, rights, queues."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foundation.errors import NotConnected, PublishRefused, TransportError
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.topics import Topics
from hedgerow.broker import find_broker
from tests.conftest import require_service
from tests.docs.pages import blocks

pytestmark = pytest.mark.broker

HOME = Topics("home")
PASSWORD = "a password"


def page(language: str, first: str) -> str:
    """The block of the page that begins with these words, for a broker called localhost."""
    (text,) = [b.text for b in blocks(language) if b.page == "docs/fleet.md" and b.text.startswith(first)]
    return text.replace("laptop.lan", "localhost")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mosquitto")


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    program = find_broker("mosquitto")
    tools = [shutil.which("openssl"), shutil.which("mosquitto_passwd")]
    require_service(program is not None and None not in tools, "Mosquitto with openssl")
    assert program is not None
    (folder / "certs").mkdir()
    for line in page("sh", "cd /etc/mosquitto/certs").splitlines():
        if line.startswith(("openssl", "printf")):
            subprocess.run(line, shell=True, cwd=folder / "certs", check=True, capture_output=True)
    for user in ("coordinator", "pi-kitchen", "pi-garden"):
        create = [] if (folder / "passwords").exists() else ["-c"]
        command = ["mosquitto_passwd", *create, "-b", str(folder / "passwords"), user, PASSWORD]
        subprocess.run(command, check=True, capture_output=True)
    (folder / "hedgerow.acl").write_text(page("acl", "user coordinator"))
    for file in folder.rglob("*"):
        file.chmod(0o700)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free: int = probe.getsockname()[1]
    conf = page("conf", "listener 8883").replace("/etc/mosquitto", str(folder))
    conf = conf.replace("listener 8883", f"listener {free} 127.0.0.1") + "user root\n"
    (folder / "mosquitto.conf").write_text(conf)
    with (folder / "log").open("wb") as log:
        command = [str(program.path), "-c", str(folder / "mosquitto.conf")]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", free), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        assert process.poll() is None, (folder / "log").read_text()
        yield free
    finally:
        process.terminate()
        process.wait(10)


def dial(folder: Path, port: int, user: str, **changes: object) -> MqttTransport:
    fields = {"host": "localhost", "port": port, "username": user, "password": PASSWORD, "tls": True}
    settings = MqttSettings.model_validate(fields | {"ca_file": folder / "certs" / "ca.crt"} | changes)
    return MqttTransport(settings, f"home-{user}")


@pytest.mark.anyio
async def test_both_sides_hear_each_other_and_nobody_else(folder: Path, port: int) -> None:
    async with (
        dial(folder, port, "coordinator") as coordinator,
        dial(folder, port, "pi-kitchen") as kitchen,
        dial(folder, port, "pi-garden") as garden,
    ):
        work = await kitchen.subscribe(HOME.of("pi-kitchen", "assignment"))
        cards = await coordinator.subscribe(HOME.every("card"))
        await coordinator.publish(HOME.of("pi-kitchen", "assignment"), b"work")
        assert (await anext(aiter(work))).body == b"work"
        with pytest.raises(PublishRefused, match="must let user pi-garden"):  # MQTT 5 has words for it
            await garden.publish(HOME.of("pi-kitchen", "card"), b"forged")
        await kitchen.publish(HOME.of("pi-kitchen", "card"), b"mine")
        assert (await anext(aiter(cards))).body == b"mine"


@pytest.mark.anyio
async def test_another_branch_is_refused_or_silent(folder: Path, port: int) -> None:
    async with dial(folder, port, "coordinator") as coordinator, dial(folder, port, "pi-garden") as garden:
        try:
            letters = await garden.subscribe(HOME.every("assignment"))
        except TransportError:
            return  # Mosquitto from some version on says no at once
        own = await garden.subscribe(HOME.of("pi-garden", "assignment"))
        await coordinator.publish(HOME.of("pi-kitchen", "assignment"), b"not yours")
        await coordinator.publish(HOME.of("pi-garden", "assignment"), b"yours")
        assert (await anext(aiter(own))).body == b"yours"
        assert (await anext(aiter(letters))).body == b"yours"


@pytest.mark.anyio
async def test_strangers_stay_outside(folder: Path, port: int) -> None:
    with pytest.raises(NotConnected):
        async with dial(folder, port, "pi-kitchen", password="wrong", connect_timeout_s=2):
            pass
    with pytest.raises(NotConnected):
        async with dial(folder, port, "pi-kitchen", ca_file=None, connect_timeout_s=2):
            pass
