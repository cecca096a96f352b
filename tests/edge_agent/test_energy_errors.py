from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest

from edge_agent.energy import meter as meter_module
from edge_agent.energy.board import Board, throttle_bits
from edge_agent.energy.container import busy_is_hidden, in_container
from edge_agent.energy.idle import IdleBaseline
from edge_agent.energy.sensor import PowerSensor
from edge_agent.energy.uncertainty import Errors, Idle, Spread
from edge_agent.energy.utilisation import CpuShare, Utilisation
from edge_agent.surroundings import on_mains
from foundation.energy import EnergyReading, Kind, Scope, Stage
from foundation.profile import DeviceProfile

UNKNOWN = DeviceProfile.load("unknown-linux")
PI = DeviceProfile.load("raspberry-pi-4b")
Meter = partial(meter_module.Meter, root=Path("/nowhere"), threaded=False)


class Clock:
    """Monotonic time that only moves when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Scripted(PowerSensor):
    """Watts from a function of time; `None` is a read error."""

    name: ClassVar[str] = "scripted"

    def __init__(self, clock: Callable[[], float], watts: Callable[[float], float | None]) -> None:
        super().__init__(Scope.BOARD_DC)
        self.u_rel = 0.05
        self._clock, self._watts = clock, watts

    @classmethod
    def probe(cls, profile: DeviceProfile, root: object) -> Self | None:
        return None

    def watts(self) -> float | None:
        return self._watts(self._clock())


class Cpu:
    """CPU times that one can set."""

    def __init__(self, cores: int = 4) -> None:
        self.busy, self.own = 0.0, 0.0
        self.share = CpuShare(busy=lambda: self.busy, own=lambda: self.own, cores=cores)


def run(meter: Any, clock: Clock, seconds: float, step_s: float = 0.2) -> None:
    for _ in range(round(seconds / step_s)):
        clock.now_s += step_s
        meter.sample()


# --- how far a figure may be off -----------------------------------------------------------------


def square_wave(
    seed: int, seconds: float
) -> tuple[Callable[[float], float], Callable[[float, float], float]]:
    """A load of 6.4 and 4.0 W, a period of 137 ms that varies by a tenth: its power, and its true energy."""
    rng = random.Random(seed)
    edges, t, high = [(-rng.random() * 0.137, True)], -1.0, True
    while t < seconds + 1:
        t = edges[-1][0] + 0.137 / 2 * rng.uniform(0.9, 1.1)
        high = not high
        edges.append((t, high))

    def watts(at: float) -> float:
        return 6.4 if next(h for begin, h in reversed(edges) if begin <= at) else 4.0

    def joules(begin: float, end: float) -> float:
        total = 0.0
        for (a, h), (b, _) in itertools.pairwise(edges):
            total += max(0.0, min(b, end) - max(a, begin)) * (6.4 if h else 4.0)
        return total

    return watts, joules


def test_edges_and_trapezoid_beat_the_rectangle_and_the_error_bar_holds() -> None:
    errors, rectangle, inside = [], [], 0
    for seed in range(200):
        rng, clock = random.Random(1000 + seed), Clock()
        watts, truth = square_wave(seed, 4.0)
        sensor = Scripted(clock, watts)
        meter = Meter(UNKNOWN, [sensor], clock=clock)
        meter.start()
        clock.now_s = begin = rng.random()
        last = (begin, watts(begin))
        flat = 0.0
        with meter.stage(Stage.TRAIN):
            tick = begin + rng.random() * 0.1
            while tick < begin + 2.0:
                clock.now_s = tick
                meter.sample()
                flat += watts(tick) * (tick - last[0])
                last = (tick, watts(tick))
                tick += 0.1 * rng.uniform(0.95, 1.05)
            clock.now_s = begin + 2.0
        reading = meter.take()[Stage.TRAIN]
        true = truth(begin, begin + 2.0)
        assert reading.joules is not None
        assert reading.uncertainty_joules is not None
        errors.append(reading.joules / true - 1)
        rectangle.append(flat / true - 1)
        inside += abs(reading.joules - true) <= reading.uncertainty_joules
    assert sum(abs(error) <= 0.06 for error in errors) >= 0.95 * 200
    assert abs(statistics.mean(errors)) <= 0.005
    assert statistics.mean(rectangle) < -0.02  # the last poll is not the end: what a naive meter loses
    assert inside >= 0.95 * 200


def test_a_power_that_does_not_vary_has_no_sampling_error_and_a_slow_one_a_large_one() -> None:
    steady, fast, slow = Spread(), Spread(), Spread()
    for i in range(100):
        steady.add(5.0)
        fast.add(4.0 + 2 * (i % 2))
        slow.add(4.0 + 2 * (i // 25 % 2))
    assert steady.error(10.0) == 0
    assert Spread().error(10.0) == 0
    assert fast.error(10.0) == pytest.approx(2 * 1.005 * 10 / 10, rel=0.01)
    assert slow.error(10.0) > 3 * fast.error(10.0)


def test_a_short_upload_above_idle_needs_the_same_sensor() -> None:
    """0.4 W above 2.7 W at a gain of 5 %: 51 % with an idle power from elsewhere, 14 % with its own."""
    errors, seconds = Errors(gain=0.05), 10.0
    other = errors.net(3.1 * seconds, seconds, Idle(2.7, 0.05 * 2.7, same_sensor=False))
    own = errors.net(3.1 * seconds, seconds, Idle(2.7, 0.02 * 2.7, same_sensor=True))
    assert other / (0.4 * seconds) == pytest.approx(0.51, abs=0.01)
    assert own / (0.4 * seconds) == pytest.approx(0.144, abs=0.01)


def test_offset_and_edges_add_in_quadrature() -> None:
    errors = Errors(gain=0.03, offset_j=4.0, sampling_j=0.0, edges_j=12.0)
    assert errors.gross(100.0) == pytest.approx(math.sqrt(9 + 16 + 144))


def test_an_edge_of_a_sensor_that_averages_costs_both_stages() -> None:
    clock = Clock()
    sensor = Scripted(clock, lambda t: 3.0 if t < 5.1 else 6.0)
    sensor.u_rel, sensor.delay_s = 0.0, 0.2
    meter = Meter(UNKNOWN, [sensor], clock=clock)
    meter.start()
    run(meter, clock, 5)
    with meter.stage(Stage.TRAIN):
        run(meter, clock, 5)
    ledger = meter.take()
    assert ledger[Stage.IDLE].uncertainty_joules == pytest.approx(3.0 * 0.2)
    assert (
        ledger[Stage.TRAIN].uncertainty_joules or 0
    ) > 3.0 * 0.2  # and its first sample is unlike the rest


def test_missing_samples_make_a_reading_mixed_with_a_larger_error_bar() -> None:
    clock, missing = Clock(), False
    sensor = Scripted(clock, lambda t: None if missing else 5.0)
    assert PI.model is not None
    model = Utilisation(PI.model, busy=lambda: 0.0, cores=4)
    meter = Meter(PI, [sensor, model], clock=clock)
    meter.start()
    run(meter, clock, 14)
    before = meter.peek()[Stage.IDLE]
    missing = True
    run(meter, clock, 6)
    reading = meter.take()[Stage.IDLE]
    assert reading.kind is Kind.MIXED
    assert reading.coverage == pytest.approx(0.7)
    assert reading.uncertainty_joules is not None
    assert before.uncertainty_joules is not None
    assert reading.uncertainty_joules > 1.5 * before.uncertainty_joules


# --- idle ----------------------------------------------------------------------------------------


def test_the_idle_power_is_measured_in_a_long_pause_and_then_used() -> None:
    clock, cpu = Clock(), Cpu()
    sensor = Scripted(clock, lambda t: 2.5 if t < 199.9 else 6.5)
    meter = Meter(UNKNOWN, [sensor], clock=clock, cpu=cpu.share, base=Stage.WAIT)
    meter.start()
    run(meter, clock, 100)
    assert meter.peek()[Stage.WAIT].idle_joules is None  # 60 s to settle, 60 s to hold
    run(meter, clock, 100)
    meter.take()
    with meter.stage(Stage.TRAIN):
        run(meter, clock, 10)
    reading = meter.take()[Stage.TRAIN]
    assert reading.idle_joules == pytest.approx(25.0)
    assert reading.net_joules == pytest.approx(40.0, rel=0.02)
    assert reading.net_uncertainty_joules == pytest.approx(math.hypot(0.05 * 40, 0.02 * 25), rel=0.1)
    assert "idle_published" not in reading.flags


def test_a_busy_machine_is_not_idle_whoever_keeps_it_busy() -> None:
    clock, cpu = Clock(), Cpu()
    meter = Meter(UNKNOWN, [Scripted(clock, lambda t: 4.0)], clock=clock, cpu=cpu.share, base=Stage.WAIT)
    meter.start()
    for _ in range(1000):
        cpu.busy += 0.2  # one core of four
        run(meter, clock, 0.2)
    assert meter.take()[Stage.WAIT].idle_joules is None


def test_an_idle_power_that_moves_is_said_and_widens_the_bar() -> None:
    baseline = IdleBaseline(settle_s=1.0, hold_s=2.0)
    for watts in (2.0, 2.0, 3.0):
        baseline.add(Stage.TRAIN, 1.0, 6.0, 0.9)
        for _ in range(3):
            baseline.add(Stage.IDLE, 1.0, watts, 0.0)
    assert baseline.idle == Idle(3.0, 1.0, same_sensor=True)
    assert baseline.drifted
    baseline.add(Stage.IDLE, 1.0, 3.0, 0.0)
    baseline.add(Stage.IDLE, 1.0, 3.0, 0.0)
    assert baseline.idle == Idle(3.0, pytest.approx(0.06), same_sensor=True)
    assert not baseline.drifted


def test_a_published_idle_power_is_used_until_then_with_its_error_and_a_flag() -> None:
    clock = Clock()
    meter = Meter(PI, [Scripted(clock, lambda t: 3.1)], clock=clock)
    meter.start()
    run(meter, clock, 10)
    reading = meter.take()[Stage.IDLE]
    assert reading.idle_joules == pytest.approx(27.0)  # the profile's 2.7 W at the board's input
    assert "idle_published" in reading.flags
    assert reading.net_uncertainty_joules == pytest.approx(math.hypot(0.05 * 31, 0.25 * 27))


def test_less_than_idle_is_0_above_it_and_said() -> None:
    clock = Clock()
    meter = Meter(PI, [Scripted(clock, lambda t: 2.0)], clock=clock)
    meter.start()
    run(meter, clock, 10)
    reading = meter.take()[Stage.IDLE]
    assert reading.net_joules == 0
    assert "net_clamped" in reading.flags
    assert reading.joules == pytest.approx(20.0)
    assert EnergyReading(seconds=1.0).net_joules is None


# --- the agent's own part ------------------------------------------------------------------------


def test_what_is_above_idle_is_the_agents_by_its_share_of_the_busy_time() -> None:
    clock, cpu = Clock(), Cpu()
    sensor = Scripted(clock, lambda t: 6.0)
    sensor.idle_w = 2.0
    meter = Meter(UNKNOWN, [sensor], clock=clock, cpu=cpu.share)
    meter.start()
    with meter.stage(Stage.TRAIN):
        for _ in range(50):
            cpu.busy, cpu.own = cpu.busy + 0.4, cpu.own + 0.3
            run(meter, clock, 0.2)
    for _ in range(50):
        cpu.busy, cpu.own = cpu.busy + 0.2, cpu.own + 0.3  # never more than all of it
        run(meter, clock, 0.2)
    ledger = meter.take()
    assert ledger[Stage.TRAIN].process_joules == pytest.approx(0.75 * 40)
    assert ledger[Stage.IDLE].process_joules == pytest.approx(40)
    run(meter, clock, 10)
    assert meter.take()[Stage.IDLE].process_joules == 0  # nobody was busy, so not the agent either


def test_a_container_that_hides_the_machines_time_has_no_share(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/1").mkdir()
    (tmp_path / "proc/self/mounts").write_text("lxcfs /proc/stat fuse.lxcfs rw 0 0\n")
    (tmp_path / "proc/1/cgroup").write_text("0::/kubepods/besteffort/pod1\n")
    assert busy_is_hidden(tmp_path)
    assert in_container(tmp_path)
    assert not in_container(tmp_path / "proc")
    clock = Clock()
    sensor = Scripted(clock, lambda t: 6.0)
    sensor.idle_w = 2.0
    meter = meter_module.Meter(UNKNOWN, [sensor], clock=clock, threaded=False, root=tmp_path)
    meter.start()
    run(meter, clock, 10)
    reading = meter.take()[Stage.IDLE]
    assert reading.process_joules is None
    assert "host_scope" in reading.flags


# --- what happens to a board ---------------------------------------------------------------------


def test_a_suspended_machine_has_no_joules_for_that_time() -> None:
    clock, slept = Clock(), 0.0
    meter = Meter(UNKNOWN, [Scripted(clock, lambda t: 5.0)], clock=clock, asleep=lambda: slept)
    meter.start()
    run(meter, clock, 10)
    slept = 3600.0
    run(meter, clock, 10)
    reading = meter.take()[Stage.IDLE]
    assert "suspend" in reading.flags
    assert reading.coverage == pytest.approx(19.8 / 20)
    assert reading.kind is Kind.MIXED
    assert reading.seconds == pytest.approx(20)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("throttled=0x0", 0),
        ("throttled=0x50005", 0x50005),
        ("50005", 0x50005),
        ("0", 0),
        ("", None),
        ("?", None),
    ],
)
def test_the_firmwares_bits_in_both_forms(text: str, bits: int | None) -> None:
    assert throttle_bits(text) == bits


def test_recorded_texts_of_the_firmware() -> None:
    folder = Path(__file__).parents[1] / "fixtures" / "power" / "vcgencmd"
    bits = {path.name: throttle_bits(path.read_text()) for path in folder.glob("*.txt")}
    assert bits == {"throttled.txt": 0x50005, "sysfs.txt": 0x50005, "well.txt": 0}


def board(root: Path, bits: str = "0", online: str = "1", count: str = "0") -> Path:
    """Write a board that says something of itself."""
    for name, text in {
        "sys/devices/platform/soc/soc:firmware/get_throttled": bits,
        "sys/class/power_supply/AC/type": "Mains",
        "sys/class/power_supply/AC/online": online,
        "sys/class/power_supply/BAT0/type": "Battery",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": count,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_board_says_when_it_is_throttled_and_when_its_supply_changes(tmp_path: Path) -> None:
    told = Board(board(tmp_path))
    assert told.flags() == ()
    board(tmp_path, bits="50005")
    assert told.flags() == ("under_voltage", "throttled")
    board(tmp_path, bits="50000")  # it has happened, it does not happen now
    assert told.flags() == ()
    board(tmp_path, count="3")
    assert told.flags() == ("throttled",)
    assert told.flags() == ()
    board(tmp_path, count="3", online="0")
    assert told.flags() == ("supply_changed",)
    assert told.flags() == ()


def test_a_charger_is_what_is_no_battery_and_a_mouse_is_no_supply(tmp_path: Path) -> None:
    """One rule for flags and limits: the kernel's chargers are Mains, USB, USB_C, USB_PD, Wireless and more.

    A list of two of these words missed the others: a laptop that charges over USB-C never changed its supply.
    """
    folder = tmp_path / "sys/class/power_supply"

    def plug(name: str, **files: str) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / name / file).write_text(f"{text}\n")

    plug("BAT0", type="Battery", status="Charging")
    plug("ucsi", type="USB_C", online="1")
    told = Board(tmp_path)
    plug("ucsi", online="0")
    plug("BAT0", status="Discharging")
    assert told.flags() == ("supply_changed",)
    assert not on_mains(tmp_path)
    plug("mouse", type="Battery", scope="Device", status="Charging")
    assert told.flags() == ()
    bare = Board(tmp_path / "elsewhere")  # without a battery a device is on mains, and stays there
    assert bare.flags() == ()


def test_a_stage_carries_what_happened_in_it_and_no_other(tmp_path: Path) -> None:
    clock = Clock()
    sensor = Scripted(clock, lambda t: 5.0)
    meter = meter_module.Meter(UNKNOWN, [sensor], clock=clock, threaded=False, root=board(tmp_path))
    meter.start()
    with meter.stage(Stage.TRAIN):
        run(meter, clock, 2)
        board(tmp_path, bits="4")
    board(tmp_path, bits="0")
    run(meter, clock, 2)
    ledger = meter.take()
    assert ledger[Stage.TRAIN].flags == ("throttled",)
    assert ledger[Stage.IDLE].flags == ()


def test_a_lost_sensor_is_looked_for_and_goes_on_after_one_gap(tmp_path: Path) -> None:
    clock = Clock()

    class Replugged(Scripted):
        """One that has to be opened anew, as behind a driver that was loaded again."""

        there: ClassVar[bool] = True
        looks: ClassVar[list[float]] = []

        def __init__(self) -> None:
            super().__init__(clock, lambda t: 5.0)
            self._lost = False

        @classmethod
        def probe(cls, profile: DeviceProfile, root: object) -> Self | None:
            cls.looks.append(clock.now_s)
            return cls() if cls.there else None

        def watts(self) -> float | None:
            self._lost |= not self.there
            return None if self._lost else 5.0

    meter = Meter(UNKNOWN, [Replugged()], clock=clock)
    meter._probe = lambda: Replugged.probe(UNKNOWN, None)  # as for sensors that the meter found itself
    meter.start()
    run(meter, clock, 300)
    Replugged.there = False
    run(meter, clock, 12)
    Replugged.there = True
    run(meter, clock, 20)
    assert Replugged.looks == pytest.approx([310.2, 320.4], abs=0.5)
    run(meter, clock, 100)
    reading = meter.take()[Stage.IDLE]
    assert reading.kind is Kind.MIXED
    assert 0.94 < reading.coverage < 0.96
    assert reading.joules == pytest.approx(5.0 * 432)


def test_a_slow_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    meter = Meter(UNKNOWN, [Scripted(clock, lambda t: 5.0)], clock=clock)
    ticks = iter([i * 0.06 for i in range(1000)])
    meter._main._timer = lambda: next(ticks)
    meter.start()
    run(meter, clock, 1)
    assert meter.take()[Stage.IDLE].flags == ("slow_read",)


def test_a_busy_interpreter_does_not_bend_a_constant_power() -> None:
    sensor = Scripted(time.monotonic, lambda t: 5.0)
    meter = meter_module.Meter(UNKNOWN, [sensor], rate_hz=20, root=Path("/nowhere"))
    with meter, meter.stage(Stage.TRAIN):
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            sum(range(2000))
    reading = meter.take()[Stage.TRAIN]
    assert reading.joules == pytest.approx(5.0 * reading.seconds, rel=0.01)
