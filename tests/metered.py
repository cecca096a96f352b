"""A device whose joules depend on its work alone: every optimizer step takes half a second at ten watts."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from edge_agent.energy.meter import Meter
from edge_agent.energy.sensor import PowerSensor
from edge_agent.training.trainer import Hooks, Outcome, Task, carry_out
from foundation.energy import Kind, Scope, Stage
from foundation.profile import DeviceProfile

STEP_S = 0.5
WATTS = 10.0
STEP_J = STEP_S * WATTS


class Ticks:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Steady(PowerSensor):
    """Ten watts for ever; read at edges alone, as nothing happens between them."""

    name: ClassVar[str] = "steady"

    def __init__(self) -> None:
        super().__init__(Scope.BOARD_DC, Kind.MODELLED)
        self.cumulative = True

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        return cls()

    def watts(self) -> float | None:
        return WATTS


class Metered:
    """A meter on such a clock, and the training that moves it."""

    def __init__(self, *, known: bool = True, one_thread_s: float = STEP_S) -> None:
        """Let a step take `one_thread_s` where the work allows one thread alone."""
        self._one_thread_s = one_thread_s
        self.clock = Ticks()
        sensors = [Steady()] if known else []
        profile = DeviceProfile.load("unknown-linux")
        self.meter = Meter(profile, sensors, clock=self.clock, threaded=False)

    def carry_out(self, task: Task, hooks: Hooks) -> Outcome:
        """Train as always, and let the clock go on by the steps that it took."""
        outcome = carry_out(task, hooks)
        with hooks.stage(Stage.TRAIN):
            limit = task.work.thread_limit()
            alone = limit is not None and limit.most == 1
            self.clock.now_s += (self._one_thread_s if alone else STEP_S) * outcome.metrics["steps"]
        return outcome
