"""A RabbitMQ with its MQTT plugin as a child of the test, on one scheduler, with everything in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.broker.conftest import free_port

SCRIPTS = ("/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/opt/homebrew/sbin")
"""Where the server's own script is; the one on Debian's PATH changes user and folder first."""
START_S = 60.0


def script() -> Path | None:
    """Return the server's script, `None` where RabbitMQ is not installed."""
    found = shutil.which("rabbitmq-server", path=os.pathsep.join(SCRIPTS)) or shutil.which("rabbitmq-server")
    return Path(found) if found else None


@contextmanager
def rabbitmq(folder: Path, *, max_message: int = 16_000_000) -> Iterator[int]:
    """Run it and give the MQTT port; `max_message` bytes is the largest message it takes."""
    server = script()
    assert server is not None
    folder.mkdir(parents=True)
    port, amqp, dist, mapper = (free_port() for _ in range(4))
    (folder / "rabbitmq.conf").write_text(
        f"listeners.tcp.default = 127.0.0.1:{amqp}\n"
        f"mqtt.listeners.tcp.default = 127.0.0.1:{port}\n"
        "mqtt.allow_anonymous = true\nmqtt.default_user = guest\nmqtt.default_pass = guest\n"
        f"max_message_size = {max_message}\n"
    )
    (folder / "enabled_plugins").write_text("[rabbitmq_mqtt].\n")
    environment = os.environ | {
        "RABBITMQ_NODENAME": f"hedgerow{port}@localhost",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_DIST_PORT": str(dist),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
        "ERL_EPMD_PORT": str(mapper),
        "ERL_EPMD_RELAXED_COMMAND_CHECK": "1",
        "HOME": str(folder),
    }
    log = folder / "out"
    with log.open("wb") as out:
        process = subprocess.Popen([server], env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not _listens(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # Erlang's name server leaves the group of who started it; it ends when it is told to.
        ended = subprocess.run(
            ["epmd", "-kill"], env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
