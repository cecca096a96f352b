"""The whole demo in an empty network namespace: it must end well, and not one packet may try to leave.

    python bench/offline.py                       the demo of this environment, as root
    python bench/offline.py --wheelhouse DIR      installed first, in there too, from a folder of wheels
    pip wheel '.[demo]' -c constraints.txt -w DIR       makes such a folder, on a machine with internet

The namespace has a loopback and a tun device with the default routes, IPv4 and IPv6: whatever any process
sends to another machine, name servers included, arrives there, is counted and goes nowhere. That the counting
works is tried first with one packet to an address that nobody has. What the kernel says by itself on a new
interface (ICMPv6) does not count. Ends with 1 where something failed or tried to leave.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ipaddress
import json
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.tun import ip, namespace, packets, tun

SPACE = "hedgerow-offline"
NOBODY = "192.0.2.1"
"""An address kept for documentation."""
ICMP6, HOP_BY_HOP, UDP, DNS = 58, 0, 17, b"\x00\x35"
TICK_S = 0.1
WITHIN_S = 900.0


def told(packet: bytes) -> str | None:
    """Say where a packet wanted to go; `None` for what the kernel says by itself."""
    version = packet[0] >> 4
    if version == 6:
        own = packet[6] in (ICMP6, HOP_BY_HOP)
        return None if own else f"{ipaddress.ip_address(packet[24:40])} protocol {packet[6]}"
    place = f"{ipaddress.ip_address(packet[16:20])} protocol {packet[9]}"
    question = packet[40:] if packet[9] == UDP and packet[22:24] == DNS else b""
    return f"{place} asking {question[:60]!r}" if question else place


class Empty(threading.Thread):
    """An empty namespace: starts commands in it, and has seen what wanted to leave."""

    def __init__(self, space: str, descriptor: int) -> None:
        super().__init__(daemon=True)
        self.inside = ["ip", "netns", "exec", space]
        self.descriptor, self.done = descriptor, threading.Event()
        self.seen: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        while not self.done.is_set():
            if select.select([self.descriptor], [], [], TICK_S)[0]:
                self.seen.update(filter(None, map(told, packets(self.descriptor))))

    def command(self, words: Sequence[str], within_s: float = WITHIN_S) -> tuple[int, str, float]:
        """Run a command in there; returns its exit code, what it said and the seconds it took."""
        begun = time.monotonic()
        done = subprocess.run(
            [*self.inside, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=within_s,
            check=False,
        )
        return done.returncode, done.stdout, time.monotonic() - begun

    def control(self) -> bool:
        """Send one packet to nobody; returns whether it was seen, and forgets it."""
        code = f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('{NOBODY}', 9))"
        self.command([sys.executable, "-c", code], 60)
        deadline = time.monotonic() + 5
        while not self.seen and time.monotonic() < deadline:
            time.sleep(TICK_S / 10)
        seen = list(self.seen) == [f"{NOBODY} protocol 17"]
        self.seen.clear()
        return seen


@contextlib.contextmanager
def empty(name: str = SPACE) -> Iterator[Empty]:
    """Make the namespace; raises `OSError` or `CalledProcessError` without root or tun."""
    with namespace(name) as space, tun("hgout", "10.233.255.1/30", space) as descriptor:
        ip(f"-n {space} route add default dev hgout")
        with contextlib.suppress(subprocess.CalledProcessError):  # a kernel without IPv6
            ip(f"-n {space} addr add fd00:4ed6::1/64 dev hgout nodad")
            ip(f"-n {space} -6 route add default dev hgout")
        it = Empty(space, descriptor)
        it.start()
        try:
            yield it
        finally:
            it.done.set()
            it.join()


def installed(it: Empty, wheelhouse: Path, folder: Path) -> tuple[Path, float]:
    """Make an environment in there from wheels alone; returns its Python and the seconds."""
    python = folder / "venv" / "bin" / "python"
    spent = 0.0
    wheels = ["--no-index", "--find-links", str(wheelhouse.resolve())]
    for words in (
        [sys.executable, "-m", "venv", str(folder / "venv")],
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", *wheels, "hedgerow[demo]"],
    ):
        code, said, took = it.command(words)
        if code:
            raise SystemExit(f"{' '.join(words)}\n{said[-3000:]}")
        spent += took
    return python, spent


def demo(it: Empty, python: Path, devices: int, rounds: int) -> tuple[int, str, float]:
    """Run the demo in there, from its start to models that answer."""
    program = [str(python), "-c", "import sys; from hedgerow.cli import main; sys.exit(main())", "demo"]
    return it.command([*program, "--devices", str(devices), "--rounds", str(rounds)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheelhouse", type=Path, metavar="DIR", help="install from these wheels first")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    a = parser.parse_args(argv)
    found: dict[str, Any] = {"devices": a.devices, "rounds": a.rounds}
    with empty() as it, tempfile.TemporaryDirectory() as place:
        if not it.control():
            raise SystemExit("a packet that was sent on purpose was not seen: nothing can be said here")
        python = Path(sys.executable)
        if a.wheelhouse is not None:
            print("installing ...", file=sys.stderr, flush=True)
            python, found["install_s"] = installed(it, a.wheelhouse, Path(place))
        print("running the demo ...", file=sys.stderr, flush=True)
        found["code"], said, found["demo_s"] = demo(it, python, a.devices, a.rounds)
        found["tried_to_leave"] = dict(it.seen)
    print(said if found["code"] else "\n".join(said.strip().splitlines()[-12:]))
    if "install_s" in found:
        print(f"installed from {len(list(a.wheelhouse.glob('*.whl')))} wheels in {found['install_s']:.0f} s")
    print(f"the demo ended with {found['code']} after {found['demo_s']:.0f} s")
    print(f"packets that tried to leave: {sum(it.seen.values())} {dict(it.seen) or ''}")
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["code"] or it.seen else 0


if __name__ == "__main__":
    sys.exit(main())
