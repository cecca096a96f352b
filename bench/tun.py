"""A tun device: a network interface, in any namespace, whose IP packets this process reads and writes.

It needs root and `/dev/net/tun`, which kernels have that know neither `tc netem` nor dummy interfaces.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEVICE = Path("/dev/net/tun")
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
LARGEST = 65536


def ip(words: str, within_s: float = 30) -> None:
    """Run `ip`; raises `CalledProcessError`, whose `stderr` is what it said."""
    subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=True, timeout=within_s)


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A network namespace with nothing but a loopback; gone at the end."""
    ip(f"netns add {name}")
    try:
        ip(f"-n {name} link set lo up")
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def tun(name: str, address: str, space: str | None = None) -> Iterator[int]:
    """An interface with an address (`10.0.0.1/30`), here or in a namespace; gives its packets' descriptor."""
    descriptor = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
        inside = ""
        if space is not None:
            ip(f"link set {name} netns {space}")
            inside = f"-n {space} "
        ip(f"{inside}addr add {address} dev {name}")
        ip(f"{inside}link set {name} up")
        yield descriptor
    finally:
        os.close(descriptor)


def packets(descriptor: int) -> Iterator[bytes]:
    """Yield the packets that are there now."""
    while True:
        try:
            yield os.read(descriptor, LARGEST)
        except BlockingIOError:
            return
