"""`python -m tests.scripted_plug`: a smart plug on a real broker, whose watts follow the machine's load.

Watts are `idle + (full - idle) * busy share` over each interval, with 1 % noise; the counter adds the same
joules. With `--ramp` they do not: `idle + ramp * (UTC - start)`, so that every second has its own power. It
writes down everything that others publish to it, and begins with a retained lie.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path

import psutil

from edge_agent.energy.utilisation import machine_busy_seconds
from foundation.mqtt import MqttSettings, MqttTransport

CORES = psutil.cpu_count() or 1
EVERY_S = 0.1
LIE_W = 99_999


class Device:
    """The device behind the plug."""

    def __init__(self, idle_w: float, full_w: float, seed: int, busy: Path | None = None) -> None:
        """Follow the machine, or a file: a time, CPU seconds until then, and how many a second since."""
        self._busy = _busy_s if busy is None else lambda: _told_s(busy)
        self.idle_w, self.full_w = idle_w, full_w
        self.watts, self.joules = idle_w, 1e6
        self._rng = random.Random(seed)
        self._time_s, self._busy_s = time.monotonic(), self._busy()

    def step(self) -> None:
        now_s, busy_s = time.monotonic(), self._busy()
        busy_s = max(busy_s, self._busy_s)  # what was told ahead of a load's end is not taken back
        seconds = now_s - self._time_s
        share = (busy_s - self._busy_s) / (CORES * seconds)
        self.watts = (self.idle_w + (self.full_w - self.idle_w) * share) * self._rng.gauss(1, 0.01)
        self.joules += self.watts * seconds
        self._time_s, self._busy_s = now_s, busy_s


class Ramp(Device):
    """A device whose power follows the clock."""

    def __init__(self, idle_w: float, per_s: float, start_s: float) -> None:
        super().__init__(idle_w, idle_w, 0)
        self._per_s, self._start_s = per_s, start_s

    def step(self) -> None:
        now_s = time.time()
        self.watts = self.idle_w + self._per_s * (now_s - self._start_s)
        self.joules = 1e6 + ramp_joules(self.idle_w, self._per_s, 0.0, now_s - self._start_s)


def ramp_joules(idle_w: float, per_s: float, start_s: float, end_s: float) -> float:
    """The energy of such a device between two times since its start."""
    return (end_s - start_s) * (idle_w + per_s * (start_s + end_s) / 2)


def _busy_s() -> float:
    busy_s = machine_busy_seconds()
    assert busy_s is not None
    return busy_s


def _told_s(file: Path) -> float:
    then_s, seconds, rate = map(float, file.read_text().split())
    return seconds + rate * (time.monotonic() - then_s)


def tasmota(watts: float, joules: float) -> dict[str, object]:
    """As with EnergyRes 5: kWh with five decimals."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    return {"Time": now, "ENERGY": {"Total": round(joules / 3.6e6, 5), "Power": round(watts, 2)}}


def shelly(watts: float, joules: float) -> dict[str, object]:
    """Watt-hours with three decimals."""
    return {"id": 0, "apower": round(watts, 1), "aenergy": {"total": round(joules / 3600, 3)}}


async def run(kind: str, name: str, port: int, device: Device, heard: Path) -> None:
    async with MqttTransport(MqttSettings(port=port), f"plug-{name}", clean=True) as broker:
        topic = f"tele/{name}/SENSOR" if kind == "tasmota" else f"{name}/status/switch:0"
        make = tasmota if kind == "tasmota" else shelly
        await broker.publish(topic, json.dumps(make(LIE_W, 0.0)).encode(), retain=True)
        letters = await broker.subscribe("cmnd/#", f"{name}/command/#", f"{name}/rpc/#")
        heard.touch()

        async def answer() -> None:
            with heard.open("a") as file:
                async for letter in letters:
                    file.write(f"{letter.topic} {letter.body.decode()}\n")
                    file.flush()
                    if letter.topic == f"cmnd/{name}/Status" and letter.body == b"8":
                        device.step()
                        said = {"StatusSNS": tasmota(device.watts, device.joules)}
                        await broker.publish(f"stat/{name}/STATUS8", json.dumps(said).encode(), qos=0)

        answering = asyncio.create_task(answer())
        while not answering.done():
            await asyncio.sleep(EVERY_S)
            if kind == "shelly":
                device.step()
                await broker.publish(topic, json.dumps(shelly(device.watts, device.joules)).encode(), qos=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("tasmota", "shelly"))
    parser.add_argument("name")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--idle", type=float, required=True)
    parser.add_argument("--full", type=float, required=True)
    parser.add_argument("--heard", type=Path, required=True)
    parser.add_argument("--busy", type=Path)
    parser.add_argument("--ramp", type=float)
    parser.add_argument("--start", type=float)
    told = parser.parse_args()
    load = Device(told.idle, told.full, 0, told.busy)
    behind = load if told.ramp is None else Ramp(told.idle, told.ramp, told.start)
    asyncio.run(run(told.kind, told.name, told.port, behind, told.heard))
