"""How long answers take at present, told to the agent through a pipe: nothing of it touches the disk."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from pydantic import Field, ValidationError

from edge_agent.serving.trial import p95
from foundation.frozen import Frozen

logger = logging.getLogger(__name__)

WINDOW_S = 5.0
REPORT_S = 0.25
_MOST = 4096
_LONGEST_LINE = 200


class Load(Frozen):
    """What was answered in the last five seconds."""

    requests: int = Field(ge=0)
    p95_ms: float | None = Field(None, ge=0)
    """From a request being read to its answer being computed, waiting for the model included; `None`
    without requests."""


class Pressure:
    """Times of the answers of the last five seconds; any thread may add."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._answers: deque[tuple[float, float]] = deque(maxlen=_MOST)
        self._news = threading.Event()

    def answered(self, seconds: float) -> None:
        """Count one answer."""
        with self._lock:
            self._answers.append((self._clock(), 1e3 * seconds))
        self._news.set()

    def load(self) -> Load:
        """Return what was answered in the last five seconds."""
        oldest = self._clock() - WINDOW_S
        with self._lock:
            while self._answers and self._answers[0][0] < oldest:
                self._answers.popleft()
            times = sorted(ms for _, ms in self._answers)
        return Load(requests=len(times), p95_ms=p95(times) if times else None)

    def _until_older(self) -> float | None:
        """Return the seconds until the oldest answer no longer counts; `None` without answers."""
        with self._lock:
            return max(0.0, self._answers[0][0] + WINDOW_S - self._clock()) if self._answers else None

    def report(self, descriptor: int) -> threading.Thread:
        """Start a thread that writes the load to a pipe, at most four times a second, and sleeps while idle.

        A new answer wakes it, and so does the end of the last one's five seconds.
        """
        thread = threading.Thread(target=self._write, args=(descriptor,), name="pressure", daemon=True)
        thread.start()
        return thread

    def _write(self, descriptor: int) -> None:
        told: Load | None = None
        while True:
            now = self.load()
            if now != told:
                told = now
                try:
                    os.write(descriptor, now.model_dump_json().encode() + b"\n")
                except OSError as error:
                    logger.warning("nobody listens how long answers take: %s", error)
                    return
            time.sleep(REPORT_S)
            self._news.wait(self._until_older())
            self._news.clear()


class Gauge:
    """The other end of the pipe: the newest load that was told."""

    def __init__(self, descriptor: int) -> None:
        """Read from a pipe until its writer ends; the descriptor is closed then."""
        self._told: Load | None = None
        self._thread = threading.Thread(target=self._read, args=(descriptor,), name="gauge", daemon=True)
        self._thread.start()

    def load(self) -> Load | None:
        """Return the newest load; `None` before one was told, and after the server has ended."""
        return self._told

    def join(self, timeout_s: float) -> None:
        """Wait until the writer has ended."""
        self._thread.join(timeout_s)

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as pipe:
            while line := pipe.readline(_LONGEST_LINE):
                try:
                    self._told = Load.model_validate_json(line)
                except ValidationError as error:
                    logger.warning("the server's load is not understood: %s", _first(error))
        self._told = None


def _first(error: ValidationError) -> str:
    return error.errors(include_url=False, include_input=False)[0]["msg"]
