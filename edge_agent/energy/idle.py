"""What the idle device draws, by the sensor that measures it, in natural pauses of the same session.

An idle power from a data sheet under a measured load makes a short stage useless: of 0.4 W above 2.7 W, half
would be error. So whenever the agent has nothing to do for long enough, its idle power is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.energy.uncertainty import REPEATED_IDLE, Idle
from foundation.energy import Stage

RESTING = (Stage.IDLE, Stage.WAIT)
SETTLE_S = 60.0
"""A board cools down and its clocks come down: what it draws in this time is not idle yet."""
HOLD_S = 60.0
BUSY = 0.10
"""With more of its cores busy than this the device is not idle, whoever keeps it so."""
DRIFT = 0.05


@dataclass
class IdleBaseline:
    """Gathers rest until it is long enough: then the idle power is known, and measured anew in each pause."""

    settle_s: float = SETTLE_S
    hold_s: float = HOLD_S
    idle: Idle | None = None
    drifted: bool = False
    """Whether the last two measurements differ by more than 5 %."""
    _settled: float = 0.0
    _held: float = 0.0
    _joules: float = 0.0

    def add(self, stage: Stage, seconds: float, joules: float | None, busy: float | None) -> None:
        """Take `seconds` that `stage` had, `joules` in them, and the share of all cores that was busy.

        Work, a busy machine and a missing read each begin the wait anew.
        """
        if stage not in RESTING or joules is None or busy is None or busy > BUSY:
            self._settled = self._held = self._joules = 0.0
            return
        if self._settled < self.settle_s:
            self._settled += seconds
            return
        self._held += seconds
        self._joules += joules
        if self._held >= self.hold_s:
            self._measured(self._joules / self._held)
            self._held = self._joules = 0.0

    def _measured(self, watts: float) -> None:
        before = self.idle.watts if self.idle is not None else watts
        moved = abs(watts - before)
        self.drifted = moved > DRIFT * before
        self.idle = Idle(watts, max(REPEATED_IDLE * watts, moved), same_sensor=True)
