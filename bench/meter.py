"""What the energy meter costs, and how far its joules are off on a load that changes faster than it looks.

    python bench/meter.py                    some four minutes: 30 s for each sensor and rate, then errors
    python bench/meter.py --seconds 5 --seeds 50
    python bench/meter.py --only error --json

Cost: the real meter with its real thread, on sensors over a made-up file tree (in memory where that can be)
and on the power model of a board without a sensor. CPU is the sampling thread's own time over wall time; on
real hardware a read may wait longer (half a millisecond for an I2C register), which is time but hardly CPU.
Ends with 1 if the thread takes 1 % of a core at 5 Hz, a process was started, or files were left open.

Error: the real meter on a sensor that reads watts of a square wave (6.4 and 4.0 W, period 137 ms, each half
drawn within 10 %), with a clock that is turned by hand. The sampler looks at the rate, 0 to 20 ms late each
time, and once at both edges of the phase; where in its beat a phase begins is drawn. Beside it, from the same
looks, the rectangle rule that many tools use: the last watts times the time to the next look, up to the last
look within the phase.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import psutil

from edge_agent.energy.meter import Meter
from edge_agent.energy.sensor import PowerSensor
from foundation.energy import Scope, Stage
from foundation.profile import DeviceProfile

COST_HZ = (5.0, 10.0)
MOST_SHARE = 0.01
"""Of one core, that the thread may take at 5 Hz."""
ERROR_HZ = (1.0, 5.0, 10.0, 20.0)
PHASES_S = (0.5, 2.0, 5.0, 20.0)
HIGH_W, LOW_W, PERIOD_S, DRAWN = 6.4, 4.0, 0.137, 0.1
LATE_S = 0.02
SEEDS = 400
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")
"""Audit events of a process being started."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="for each sensor and rate")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="loads for each rate and phase")
    parser.add_argument("--only", choices=("cost", "error"), help="one of the two")
    parser.add_argument("--json", action="store_true", help="figures for machines")
    options = parser.parse_args(argv)
    report: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    if options.only != "error":
        report["cost"] = costs(options.seconds)
    if options.only != "cost":
        report["error"] = errors(options.seeds)
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if options.json else table(report))
    return 0 if all(map(is_cheap, report.get("cost", ()))) else 1


def progress(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# --- cost --------------------------------------------------------------------------------------------


def costs(seconds: float) -> list[dict[str, Any]]:
    """Return one row for each sensor and rate."""
    memory = Path("/dev/shm")
    rows = []
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        for profile, files in TREES.items():
            root = Path(folder) / profile
            for name, text in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
            root.mkdir(exist_ok=True)
            for rate in COST_HZ:
                progress(f"cost: {profile} at {rate:g} Hz for {seconds:g} s")
                rows.append(cost(profile, root, rate, seconds))
    return rows


RAPL = "sys/class/powercap/intel-rapl:0"
INA = "sys/bus/i2c/devices/1-0040/hwmon/hwmon3"
TREES: dict[str, dict[str, str]] = {
    "generic-x86-server": {
        f"{RAPL}/name": "package-0\n",
        f"{RAPL}/enabled": "1\n",
        f"{RAPL}/energy_uj": "64930873566\n",
        f"{RAPL}/max_energy_range_uj": "262143328850\n",
        f"{RAPL}/intel-rapl:0:0/name": "dram\n",
        f"{RAPL}/intel-rapl:0:0/enabled": "1\n",
        f"{RAPL}/intel-rapl:0:0/energy_uj": "31041919121\n",
        f"{RAPL}/intel-rapl:0:0/max_energy_range_uj": "65712999613\n",
    },
    "jetson-orin-nano": {
        f"{INA}/{name}{number}_{what}": text
        for number, label, millivolts, milliamperes in (
            (1, "VDD_IN", 4904, 1048),
            (2, "VDD_CPU_GPU_CV", 4896, 152),
            (3, "VDD_SOC", 4904, 312),
        )
        for name, what, text in (
            ("in", "label", f"{label}\n"),
            ("in", "input", f"{millivolts}\n"),
            ("curr", "input", f"{milliamperes}\n"),
        )
    },
    "raspberry-pi-4b": {},
}
"""By profile, the files of its sensors; where there are none, the power model of its load is left."""


def cost(profile: str, root: Path, rate_hz: float, seconds: float) -> dict[str, Any]:
    """Let the real meter run for a while and return what it took."""
    before = open_files()
    meter = Meter(DeviceProfile.load(profile), rate_hz=rate_hz, root=root)
    with starts() as started:
        began = time.monotonic()
        with meter:
            meter.sample()
            held = open_files() - before
            time.sleep(seconds)
            kept = open_files() - before
        wall = time.monotonic() - began
    return {
        "profile": profile,
        "sensor": meter.source,
        "kind": meter.kind.value,
        "rate_hz": rate_hz,
        "seconds": wall,
        "share": meter.cpu_s / wall,
        "us_per_sample": 1e6 * meter.cpu_s / (rate_hz * wall),
        "files_held": held,
        "files_at_end": kept,
        "processes_started": len(started),
    }


def is_cheap(row: dict[str, Any]) -> bool:
    small = row["rate_hz"] > 5 or row["share"] < MOST_SHARE
    return small and row["files_at_end"] <= row["files_held"] and not row["processes_started"]


def open_files() -> int:
    return psutil.Process().num_fds()


_watched: list[list[str]] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event in STARTS:
        for heard in _watched:
            heard.append(event)


@functools.cache
def _listen() -> None:
    sys.addaudithook(_audit)  # it cannot be taken away again


@contextmanager
def starts() -> Iterator[list[str]]:
    """Note every process that this one starts meanwhile, however it does it."""
    _listen()
    heard: list[str] = []
    _watched.append(heard)
    try:
        yield heard
    finally:
        _watched.remove(heard)


# --- error -------------------------------------------------------------------------------------------


class Load:
    """A square wave with halves of drawn lengths, and how many joules it has used until any time."""

    def __init__(self, rng: np.random.Generator, seconds: float) -> None:
        count = int(seconds / (0.5 * PERIOD_S * (1 - DRAWN))) + 4
        halves = 0.5 * PERIOD_S * rng.uniform(1 - DRAWN, 1 + DRAWN, count)
        self.edges = np.concatenate([[0.0], np.cumsum(halves)]) - rng.uniform(0, PERIOD_S)
        self.joules_at_edges = np.concatenate([[0.0], np.cumsum(halves * self._powers(count))])

    @staticmethod
    def _powers(count: int) -> np.ndarray:
        return np.where(np.arange(count) % 2 == 0, HIGH_W, LOW_W)

    def watts(self, at: float) -> float:
        half = int(np.searchsorted(self.edges, at, side="right")) - 1
        return HIGH_W if half % 2 == 0 else LOW_W

    def joules(self, at: float) -> float:
        half = int(np.searchsorted(self.edges, at, side="right")) - 1
        return float(self.joules_at_edges[half] + self.watts(at) * (at - self.edges[half]))


class Ideal(PowerSensor):
    """Reads the load's watts of the moment, exactly; notes every look."""

    name: ClassVar[str] = "ideal"

    def __init__(self, load: Load, clock: Clock) -> None:
        super().__init__(Scope.BOARD_DC)
        self._load, self._clock = load, clock
        self.looks: list[tuple[float, float]] = []

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        """Nobody finds this one: it is handed over."""
        return None

    def watts(self) -> float:
        self.looks.append((self._clock.now_s, self._load.watts(self._clock.now_s)))
        return self.looks[-1][1]


class Clock:
    """A clock that is turned by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def errors(seeds: int) -> list[dict[str, Any]]:
    """Return one row for each phase and rate."""
    rows = []
    for phase_s in PHASES_S:
        progress(f"error: phases of {phase_s:g} s, {seeds} loads at each of {len(ERROR_HZ)} rates")
        for rate in ERROR_HZ:
            both = np.array([one_error(seed, rate, phase_s) for seed in range(seeds)])
            meter, rectangle = (figures(column) for column in both.T)
            row = {"phase_s": phase_s, "rate_hz": rate, "meter": meter, "rectangle": rectangle}
            rows.append({**row, "ratio": rectangle["rms"] / meter["rms"]})
    return rows


def figures(relative: np.ndarray) -> dict[str, float]:
    """Return mean, twice the standard deviation, and root mean square of relative errors."""
    return {
        "bias": float(relative.mean()),
        "two_sigma": float(2 * relative.std()),
        "rms": float(np.sqrt((relative**2).mean())),
    }


def one_error(seed: int, rate_hz: float, phase_s: float) -> tuple[float, float]:
    """Return the relative errors of the meter and of the rectangle rule on one phase of one load."""
    rng = np.random.default_rng([seed, int(10 * rate_hz), int(10 * phase_s)])
    lead_s = 2 / rate_hz
    load, clock = Load(rng, lead_s + phase_s + 1), Clock()
    sensor = Ideal(load, clock)
    meter = Meter(unknown(), [sensor], rate_hz=rate_hz, clock=clock, threaded=False)
    meter.start()
    begins, ends = lead_s, lead_s + phase_s
    looks = list(beats(rng, rate_hz, ends))
    for at in (look for look in looks if look < begins):
        clock.now_s = at
        meter.sample()
    clock.now_s = begins
    with meter.stage(Stage.TRAIN):
        for at in (look for look in looks if look >= begins):
            clock.now_s = at
            meter.sample()
        clock.now_s = ends
    told = meter.take()[Stage.TRAIN].joules
    assert told is not None
    truth = load.joules(ends) - load.joules(begins)
    seen = [look for look in dict.fromkeys(sensor.looks) if begins <= look[0] < ends]
    rectangle = sum(watts * (after - at) for (at, watts), (after, _) in itertools.pairwise(seen))
    return told / truth - 1, rectangle / truth - 1


@functools.cache
def unknown() -> DeviceProfile:
    return DeviceProfile.load("unknown-linux")


def beats(rng: np.random.Generator, rate_hz: float, until: float) -> Iterator[float]:
    """Yield when a sampler looks that waits a period after each look, and is a little late."""
    at = rng.uniform(0, 1 / rate_hz)
    while at < until:
        yield at
        at += 1 / rate_hz + rng.uniform(0, LATE_S)


# --- tables ------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['machine']}, {report['cores']} cores"]
    if "cost" in report:
        lines += [
            "",
            "sensor        profile               Hz   CPU of a core   us a sample    files   processes",
        ]
        lines += map(cost_line, report["cost"])
    if "error" in report:
        lines += ["", "phase s    Hz   meter: bias   2 sigma   rectangle: bias   2 sigma   rms ratio"]
        lines += map(error_line, report["error"])
    return "\n".join(lines) + "\n"


def cost_line(row: dict[str, Any]) -> str:
    return (
        f"{row['sensor']:12}  {row['profile']:18}  {row['rate_hz']:4g}   {row['share']:13.3%}"
        f"   {row['us_per_sample']:11.0f}   {row['files_held']:2}->{row['files_at_end']:2}"
        f"   {row['processes_started']:9}"
    )


def error_line(row: dict[str, Any]) -> str:
    meter, rectangle = row["meter"], row["rectangle"]
    return (
        f"{row['phase_s']:7g} {row['rate_hz']:5g}   {meter['bias']:+11.2%}   {meter['two_sigma']:7.2%}"
        f"   {rectangle['bias']:+15.2%}   {rectangle['two_sigma']:7.2%}   {row['ratio']:9.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
