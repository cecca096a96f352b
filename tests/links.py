"""A bad link of a test's own: a network namespace behind two tun devices; a thread carries packets.

It does what `tc netem` does with delay, loss and rate, in kernels without it too. Its dice
have a seed. TCP on both ends is the kernel's.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import random
import re
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from bench.tun import DEVICE, namespace, packets, tun

LIMIT = 1000
"""Packets under way in one direction; more are lost, as in netem."""
TICK_S = 0.05


@dataclass(frozen=True)
class Bad:
    """How a link is bad, in each direction."""

    delay_s: float = 0.0
    loss: float = 0.0
    rate_bps: float = float("inf")
    """Bits a second."""

    def __str__(self) -> str:
        words = [f"{2e3 * self.delay_s:g} ms there and back"] if self.delay_s else []
        words += [f"{100 * self.loss:g} % lost"] if self.loss else []
        words += [f"{self.rate_bps / 1e6:g} Mbit/s"] if self.rate_bps < float("inf") else []
        return ", ".join(words) or "a good link"


GOOD, CUT = Bad(), Bad(loss=1.0)


@dataclass
class Link(threading.Thread):
    """Carries packets between `near`, whose address here is `host`, and `far`, in the namespace `space`."""

    space: str
    host: str
    near: int
    far: int
    bad: Bad = GOOD
    carried_bytes: int = 0
    lost: int = 0
    """Packets."""
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._dice = random.Random(0)
        self._under_way: dict[int, list[tuple[float, int, bytes]]] = {self.near: [], self.far: []}
        self._free = {self.near: 0.0, self.far: 0.0}
        self._count = itertools.count()

    __hash__ = threading.Thread.__hash__

    @property
    def inside(self) -> tuple[str, ...]:
        """What starts a command on the far side."""
        return (str(shutil.which("ip")), "netns", "exec", self.space)

    def run(self) -> None:
        while not self.ended.is_set():
            ready, _, _ = select.select([self.near, self.far], [], [], self._patience())
            for source in ready:
                for packet in packets(source):
                    self._take(packet, self.far if source == self.near else self.near)
            self._deliver()

    def _patience(self) -> float:
        due = [queue[0][0] for queue in self._under_way.values() if queue]
        return min(TICK_S, max(0.0, min(due) - time.monotonic())) if due else TICK_S

    def _take(self, packet: bytes, to: int) -> None:
        bad, queue = self.bad, self._under_way[to]
        if self._dice.random() < bad.loss or len(queue) >= LIMIT:
            self.lost += 1
            return
        self._free[to] = max(time.monotonic(), self._free[to]) + 8 * len(packet) / bad.rate_bps
        heapq.heappush(queue, (self._free[to] + bad.delay_s, next(self._count), packet))

    def _deliver(self) -> None:
        for to, queue in self._under_way.items():
            while queue and queue[0][0] <= time.monotonic():
                packet = heapq.heappop(queue)[2]
                os.write(to, packet)
                self.carried_bytes += len(packet)

    def sent_again(self) -> int:
        """TCP segments that the far side sent again so far."""
        told = subprocess.run(
            [*self.inside, "cat", "/proc/net/snmp"], capture_output=True, text=True, check=True, timeout=30
        ).stdout
        names, values = re.findall(r"^Tcp: (.*)$", told, re.MULTILINE)
        return int(dict(zip(names.split(), values.split(), strict=True))["RetransSegs"])


@contextlib.contextmanager
def link() -> Iterator[Link]:
    """Make a link that is good at first; it is gone at the end. Skips where it cannot be made."""
    if os.geteuid() != 0 or not DEVICE.exists():
        pytest.skip(f"a network namespace and {DEVICE} need root and a kernel that has them")
    own = os.getpid() % 16384
    at = f"10.{232 + own // 4096}.{own // 64 % 64}.{4 * (own % 64)}".rsplit(".", 1)
    host, there = (f"{at[0]}.{int(at[1]) + i}" for i in (1, 2))
    with contextlib.ExitStack() as stack:
        try:
            space = stack.enter_context(namespace(f"hedgerow-{os.getpid()}"))
            near = stack.enter_context(tun(f"hgn{own}", f"{host}/30"))
            far = stack.enter_context(tun(f"hgf{own}", f"{there}/30", space))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces or tun devices here: {getattr(error, 'stderr', error)}")
        made = Link(space, host, near, far)
        made.start()
        try:
            yield made
        finally:
            made.ended.set()
            made.join()
