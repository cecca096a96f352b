"""Training gives way to answering: it stands still between two steps while answers take too long.

A pause ends when the p95 of the last seconds is back within its bound. One that lasts a minute has shown
that training is not what makes answers slow: then it goes on, for as long, before it gives way again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from edge_agent.energy.meter import Meter
from edge_agent.serving.pressure import Load
from foundation.energy import Stage

logger = logging.getLogger(__name__)

LEAST_REQUESTS = 20
"""In the last five seconds; a p95 of fewer says too little."""
LONGEST_PAUSE_S = 60.0
LOOK_S = 0.1


class Yielding:
    """Whether training should stand still at this moment; asked by the training thread before every step."""

    def __init__(
        self,
        bound_ms: float | None,
        load: Callable[[], Load | None],
        meter: Meter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep answers' p95 under `bound_ms`; `None` never pauses."""
        self._bound_ms, self._load, self._meter, self._clock = bound_ms, load, meter, clock
        self._not_before_s = -float("inf")
        self.paused_s = 0.0
        """Seconds of all pauses so far."""

    def pause(self, called_off: threading.Event) -> float:
        """Stand still while answers take too long, or until the work is called off; returns the seconds.

        They are counted as waiting, not as training.
        """
        p95_ms = self._too_long()
        if p95_ms is None or self._clock() < self._not_before_s:
            return 0.0
        logger.info(
            "training yields to serving", extra={"p95_ms": round(p95_ms, 2), "bound_ms": self._bound_ms}
        )
        began = self._clock()
        with self._meter.stage(Stage.WAIT):
            while self._too_long() is not None and not called_off.wait(LOOK_S):
                if self._clock() - began >= LONGEST_PAUSE_S:
                    self._not_before_s = self._clock() + LONGEST_PAUSE_S
                    logger.warning("answers stay slow without training: it goes on", extra={"p95_ms": p95_ms})
                    break
        seconds = self._clock() - began
        self.paused_s += seconds
        return seconds

    def _too_long(self) -> float | None:
        """Return the p95 where it is over its bound."""
        if self._bound_ms is None:
            return None
        load = self._load()
        if load is None or load.p95_ms is None or load.requests < LEAST_REQUESTS:
            return None
        return load.p95_ms if load.p95_ms > self._bound_ms else None
