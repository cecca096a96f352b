"""Whether a host is this machine alone."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether all addresses of a host stay on this machine; false for a name that nobody knows."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)} if host else set()
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(address).is_loopback for address in found)


def names_loopback(header: bytes) -> bool:
    """Whether a `Host` is a name of loopback: a foreign page can give this machine a name of its own."""
    try:
        name = urlsplit(f"//{header.decode('ascii')}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
