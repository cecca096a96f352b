"""Holds the processor's clock down for a step of a calibration, and puts it back whatever happens.

The highest allowed clock of every domain (`scaling_max_freq`) is written. Putting it back is a small
process's work: it waits for the end of this one, however that comes, and then writes what was there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edge_agent.energy.clocks import Clocks, number_in, policies_of
from edge_agent.energy.files import text_of
from foundation.errors import HedgerowError

MOST = "scaling_max_freq"
LEAST_RANGE = 1.2
"""The highest clock must be so many times the lowest for steps between to say anything."""
PATIENCE_S = 10.0

GUARD = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.buffer.read()
failed = 0
for place, value in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        with open(place, "w") as file:
            file.write(value)
    except OSError:
        failed = 1
sys.exit(failed)
"""


@dataclass(frozen=True, slots=True)
class Domain:
    """One clock domain: its file, and the range in kHz in which it was found."""

    file: Path
    least: int
    most: int
    steps: tuple[int, ...]
    """Clocks that it can run at, in kHz; empty where it does not say."""

    def khz(self, share: float) -> int:
        """Return a clock: 0 is the lowest allowed, 1 the highest; the nearest that it can run at."""
        wanted = self.least + share * (self.most - self.least)
        inside = [khz for khz in self.steps if self.least <= khz <= self.most]
        return min(inside, key=lambda khz: abs(khz - wanted)) if inside else round(wanted)


def domains_of(root: Path) -> tuple[list[Domain], str | None]:
    """Return the domains whose clock can be held down, or why it cannot be."""
    found = []
    for place in policies_of(root):
        least, most = number_in(place / "scaling_min_freq"), number_in(place / MOST)
        if least is None or most is None or not os.access(place / MOST, os.W_OK):
            return [], f"{place / MOST} cannot be written: run this as root"
        words = (text_of(place / "scaling_available_frequencies") or "").split()
        steps = tuple(int(word) for word in words if word.isdecimal())
        found.append(Domain(place / MOST, least, most, steps))
    if not found or Clocks(root).mhz() is None:
        return [], "the kernel does not show the processor's clock"
    if all(domain.most < LEAST_RANGE * domain.least for domain in found):
        return [], "the clock is fixed"
    return found, None


class ClockPins:
    """`with ClockPins(domains) as pins:` then `pins.hold(0.5)`; without domains it does nothing."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        self._domains = domains
        self._guard: subprocess.Popen[bytes] | None = None
        self._held = 1.0

    def __enter__(self) -> Self:
        if self._domains:
            words = [word for domain in self._domains for word in (str(domain.file), str(domain.most))]
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", GUARD, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # so that what ends us does not end it
            )
            assert self._guard.stdout is not None
            if self._guard.stdout.readline().strip() != b"ready":
                raise HedgerowError("what puts the clock back did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.communicate(timeout=PATIENCE_S)
            wrong = [domain for domain in self._domains if number_in(domain.file) != domain.most]
            if wrong:
                told = ", ".join(f"echo {domain.most} > {domain.file}" for domain in wrong)
                raise HedgerowError(f"the clock could not be put back, which does it: {told}")

    def hold(self, share: float) -> float | None:
        """Hold all domains to a share of their range; returns the highest clock in MHz, if that is held."""
        if not self._domains:
            return None
        if share != self._held:
            for domain in self._domains:
                self._write(domain, domain.khz(share))
            self._held = share
        return None if share == 1 else max(domain.khz(share) for domain in self._domains) / 1000

    def _write(self, domain: Domain, khz: int) -> None:
        try:
            domain.file.write_text(str(khz))
        except OSError as error:
            raise HedgerowError(f"{domain.file} cannot be written: {error.strerror}") from error
