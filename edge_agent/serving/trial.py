"""A new model's first hour: does it stay within the band of the model before it?

Two things end a trial early. Inputs that the new model cannot answer and the one before can: since both
were asked the same, one per cent is no chance. And a p95 of the run that leaves the band of the one
before: since a busy neighbour does that too, both are then run side by side, and only if the new one is
slower there is it at fault. Nothing is decided on fewer than 100 requests.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

TRIAL_REQUESTS = 1000
TRIAL_S = 3600.0
LEAST_REQUESTS = 100
SLACK_MS = 1.0
"""A p95 is out of its band only if it is also so much above: tenths of a millisecond are the system's."""


@dataclass(frozen=True, slots=True)
class Band:
    """How far a new model may be from the one before."""

    errors: float = 0.01
    """Share of its requests that it cannot answer and the one before can."""
    p95: float = 2.0
    """p95 of the run, as a multiple of that of the one before."""


class Window:
    """What came of the newest requests that one model was asked; any thread may add."""

    def __init__(self, size: int = TRIAL_REQUESTS) -> None:
        self._ms: deque[float] = deque(maxlen=size)
        self._lock = threading.Lock()
        self.requests = 0
        self.failed = 0
        """Requests that this model could not answer, and the one before could."""

    def answered(self, seconds: float) -> None:
        """Count a request and the wall time of its run."""
        with self._lock:
            self._ms.append(1e3 * seconds)
            self.requests += 1

    def missed(self) -> None:
        """Count a request that the model before had to answer."""
        with self._lock:
            self.requests += 1
            self.failed += 1

    def forget_times(self) -> None:
        """Begin the p95 anew."""
        with self._lock:
            self._ms.clear()

    def p95_ms(self) -> float | None:
        """Return the p95 of the newest runs; `None` for fewer than 100."""
        with self._lock:
            times = sorted(self._ms)
        return p95(times) if len(times) >= LEAST_REQUESTS else None


def p95(ordered: list[float]) -> float:
    """Return the 95th percentile of sorted, non-empty values: the smallest that 95 % do not exceed."""
    return ordered[-(-95 * len(ordered) // 100) - 1]


class Trial:
    """Judges one new model."""

    def __init__(
        self,
        window: Window,
        before_ms: float | None,
        band: Band,
        ratio: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Judge the model that fills `window`.

        `before_ms` is the p95 of the model before, `None` where too few asked it: then only errors count.
        `ratio` runs both side by side and returns the new one's time as a multiple of the other's.
        """
        self._window, self._before_ms, self._band, self._ratio = window, before_ms, band, ratio
        self._clock, self._began = clock, clock()

    def judge(self) -> Literal["passed"] | tuple[Literal["failed"], str] | None:
        """Return whether the trial is over, and for a model that failed it why; `None` while it goes on."""
        window = self._window
        requests, failed = window.requests, window.failed
        if requests >= LEAST_REQUESTS:
            if failed / requests > self._band.errors:
                return "failed", (
                    f"it could not answer {failed} of {requests} requests that the model before it could;"
                    f" {self._band.errors:.1%} is allowed"
                )
            if (slow := self._slow()) is not None:
                return "failed", slow
        over = requests >= TRIAL_REQUESTS or self._clock() - self._began >= TRIAL_S
        return "passed" if over else None

    def _slow(self) -> str | None:
        now, before = self._window.p95_ms(), self._before_ms
        if now is None or before is None or now <= max(self._band.p95 * before, before + SLACK_MS):
            return None
        ratio = self._ratio()
        if ratio <= self._band.p95:
            self._window.forget_times()  # something else on this device: look again after 100 more
            return None
        return (
            f"its p95 is {now:.2f} ms, that of the model before it was {before:.2f} ms; side by side it takes"
            f" {ratio:.1f} times as long, {self._band.p95:g} times is allowed"
        )
