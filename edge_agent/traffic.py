"""Bytes through the network interface that leads to the broker: headers, encryption and repeats included.

The operating system counts them for the whole device, so other programs' bytes are among them: they stand
beside the payload that agent and coordinator count themselves, and never replace it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

Counters = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one window."""

    interface: str
    received: int
    sent: int


class InterfaceMeter:
    """Counts from the last `take` on, as long as the way to the broker goes through the same interface."""

    def __init__(self, host: str, port: int, counters: Counters | None = None) -> None:
        self._host, self._port = host, port
        self._counters = counters or (lambda: psutil.net_io_counters(pernic=True))
        self._last: Traffic | None = None
        self.take()

    def take(self) -> Traffic | None:
        """Return the bytes since the last call; `None` if unknown, as after a change of ways."""
        last, self._last = self._last, self._now()
        now = self._last
        if now is None or last is None or now.interface != last.interface:
            return None
        received, sent = now.received - last.received, now.sent - last.sent
        # An interface that was taken down and up again counts from 0.
        return Traffic(now.interface, received, sent) if received >= 0 and sent >= 0 else None

    def _now(self) -> Traffic | None:
        name = interface_to(self._host, self._port)
        try:
            counted = self._counters().get(name) if name is not None else None
        except (OSError, psutil.Error):
            return None
        return Traffic(str(name), counted.bytes_recv, counted.bytes_sent) if counted is not None else None


def interface_to(host: str, port: int) -> str | None:
    """Return the interface that packets to `host` leave by; `None` without a way there. Nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
        everything = psutil.net_if_addrs()
    except (OSError, psutil.Error):
        return None
    return next((name for name, of in everything.items() if any(a.address == own for a in of)), None)
