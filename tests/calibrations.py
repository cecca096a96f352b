"""Calibrations without a meter: steps of a known power model, and the file they make."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np

from edge_agent.calibration.fit import fit, model_of
from edge_agent.calibration.host import facts
from edge_agent.calibration.loads import Load, plan
from foundation.calibration import Calibration, MeterFacts, Step
from foundation.energy import Scope
from foundation.profile import DeviceProfile

METER = MeterFacts(name="shelly:plug", kind="plug", scope=Scope.WALL_AC, accuracy=0.02)
MADE = datetime(2026, 5, 1, 12, tzinfo=UTC)
IDLE_W, FULL_W = 2.4, 6.2
SLOW_MHZ, FAST_MHZ = 600.0, 1500.0


def step_of(load: Load, watts: float, utilisation: float, **more: Any) -> Step:
    usual: dict[str, Any] = {
        "name": load.name,
        "block": load.block,
        "hold_out": load.hold_out,
        "start": MADE,
        "settle_s": 60,
        "seconds": 59.0,
        "hold_s": 60.0,
        "least_hold_s": 60.0,
        "utilisation": utilisation,
        "watts": watts,
        "u_w": 0.002 * watts,
        "how": "counter",
        "samples": 60,
        "temperature_c": 61.0,
        "throttled": False,
    }
    return Step.model_validate({**usual, **more})


def steps_of(
    *,
    seed: int = 0,
    noise: float = 0.01,
    exponent: float = 1.0,
    memory_w: float = 0.0,
    quick: bool = False,
    idle_w: float = IDLE_W,
    full_w: float = FULL_W,
    clock: bool = False,
    gpu_w: float | None = None,
    link: tuple[float, float] | None = None,
) -> list[Step]:
    """Holds of 60 one-second readings, each with noise, at utilisations near those that are meant.

    With `clock` the processor runs at 600, 1050 or 1500 MHz, and draws above idle as the square of it; `link`
    is W per Mbit/s up and down.
    """
    rng = np.random.default_rng(seed)
    steps = []
    for load in plan(seed, quick=quick, clock=clock, gpu=gpu_w is not None, net=link is not None):
        busy = {"training": 0.75, "gpu": 0.1, "network": 0.2}.get(load.block, load.busy)
        u = float(np.clip(busy + rng.uniform(0, 0.03), 0, 1))
        mhz = SLOW_MHZ + load.clock * (FAST_MHZ - SLOW_MHZ)
        watts = idle_w + (full_w - idle_w) * (mhz / FAST_MHZ) ** 2 * u**exponent
        watts += memory_w * (load.block == "memory")
        more: dict[str, Any] = {}
        if clock:
            more |= {"mhz": mhz, "most_mhz": mhz if load.clock < 1 else None}
        if gpu_w is not None:
            more |= {"gpu": load.busy * (load.block == "gpu")}
            watts += gpu_w * more["gpu"]
        if link is not None:
            up = 40.0 * load.busy if load.block == "network" else 0.01
            down = 0.8 * up if load.way == "both" else 0.02 * up
            more |= {"up_mbit_s": up, "down_mbit_s": down}
            watts += link[0] * up + link[1] * down
        seen = float(np.mean(watts * rng.normal(1, noise, 60)))
        steps.append(step_of(load, seen, u, u_w=2 * noise * watts / 60**0.5, **more))
    return steps


def calibration_of(steps: list[Step] | None = None, **more: Any) -> Calibration:
    """A calibration of this very machine for the Raspberry Pi 4's profile."""
    steps = steps or steps_of()
    usual: dict[str, Any] = {
        "schema": 1,
        "agent": "pi",
        "made": MADE,
        "hedgerow": "0.1.0",
        "seed": 0,
        "device": facts(),
        "profile": DeviceProfile.load("raspberry-pi-4b").facts,
        "meter": METER,
        "model": model_of(fit(steps, METER.accuracy), steps, METER.accuracy),
        "step": tuple(steps),
    }
    return Calibration.model_validate({**usual, **more})
