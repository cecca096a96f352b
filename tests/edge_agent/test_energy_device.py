"""On a real board alone: its own sensor under load, and beside an in-line meter where there is one."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from edge_agent.energy.meter import Meter
from edge_agent.energy.sensor import EnergySensor, find_sensors
from foundation.energy import Kind, Stage
from foundation.profile import DeviceProfile

SECONDS = 60.0


def measuring() -> list[EnergySensor]:
    """Return the sensors of this device that measure."""
    return [sensor for sensor in find_sensors(DeviceProfile.detect()) if sensor.kind is Kind.MEASURED]


def spin() -> None:
    """Keep one core busy."""
    while True:
        sum(range(10_000))


@pytest.mark.device
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not measuring(), reason="no sensor of this device's profile measures here")
def test_a_busy_board_draws_more_and_agrees_with_the_meter_in_its_supply_line() -> None:
    profile, sensors = DeviceProfile.detect(), measuring()
    meters = [Meter(profile, [sensor]) for sensor in sensors]
    workers = [multiprocessing.Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for meter in meters:
        meter.start()
    time.sleep(SECONDS)
    try:
        for meter in meters:
            meter.switch(Stage.TRAIN)
        for worker in workers:
            worker.start()
        time.sleep(SECONDS)
    finally:
        for meter in meters:
            meter.stop()
        for worker in workers:
            worker.kill()
    powers = {}
    for meter in meters:
        ledger = meter.take()
        idle, busy = ledger[Stage.IDLE], ledger[Stage.TRAIN]
        assert idle.joules is not None
        assert busy.joules is not None
        assert busy.coverage > 0.99
        powers[meter.source] = busy.joules / busy.seconds
        assert idle.joules / idle.seconds < powers[meter.source]
    inline = powers.pop("inline_ina", None)
    for name, watts in powers.items():
        assert inline is None or abs(watts / inline - 1) <= 0.25, (name, watts, inline)
