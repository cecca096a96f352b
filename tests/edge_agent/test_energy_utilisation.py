from __future__ import annotations

import subprocess
import sys
import time

import pytest

from edge_agent.energy.meter import Meter
from edge_agent.energy.utilisation import ProcessShare, ProcessTree, Utilisation, machine_busy_seconds
from foundation.energy import Kind, Scope, Stage
from foundation.profile import DeviceProfile, Number, PowerModel

MODEL = PowerModel(
    scope=Scope.WALL_AC,
    basis="published",
    p_idle_w=Number(v=10.0, kind="measured", src="x"),
    p_cpu_full_w=Number(v=50.0, kind="measured", src="x"),
    u_rel_gross=Number(v=0.3, kind="derived", src="x"),
    u_rel_net=Number(v=0.5, kind="derived", src="x"),
)


class Cpu:
    """CPU times one can set."""

    def __init__(self) -> None:
        self.busy: float | None = 1000.0
        self.own: float | None = 3.0

    def busy_seconds(self) -> float | None:
        return self.busy

    def own_seconds(self) -> float | None:
        return self.own


def test_watts_are_linear_in_the_busy_share():
    cpu = Cpu()
    sensor = Utilisation(MODEL, busy=cpu.busy_seconds, cores=4)
    assert sensor.joules(5.0) == 0
    assert sensor.joules(6.0) == pytest.approx(10)  # idle
    cpu.busy = 1002.0
    assert sensor.joules(7.0) == pytest.approx(10 + 30)  # two of four cores
    cpu.busy = 1006.0
    assert sensor.joules(8.0) == pytest.approx(10 + 30 + 50)
    assert sensor.joules(8.0) == pytest.approx(10 + 30 + 50)


def test_an_exponent_bends_the_line():
    cpu = Cpu()
    bent = Utilisation(MODEL.model_copy(update={"exponent": 0.5}), busy=cpu.busy_seconds, cores=4)
    bent.joules(0.0)
    cpu.busy = 1001.0
    assert bent.joules(1.0) == pytest.approx(10 + 40 * 0.5)


def test_the_kernels_steps_do_not_add_joules_however_often_one_reads():
    cpu = Cpu()
    often = Utilisation(MODEL, busy=cpu.busy_seconds, cores=4)
    start = 1000.0
    for millisecond in range(1, 2001):
        used = 4 * 0.25 * millisecond / 1000
        cpu.busy = start + int(used * 100) / 100  # counted in steps of 10 ms
        joules = often.joules(millisecond / 1000)
    assert joules == pytest.approx(2 * 20, rel=0.01)


def test_an_unreadable_cpu_time_is_none_and_nothing_is_lost():
    cpu = Cpu()
    sensor = Utilisation(MODEL, busy=cpu.busy_seconds, cores=4)
    sensor.joules(0.0)
    cpu.busy = None
    assert sensor.joules(1.0) is None
    cpu.busy = 1004.0
    assert sensor.joules(2.0) == pytest.approx(2 * 30)


def share_of(cpu: Cpu, agents: int = 2) -> ProcessShare:
    inner = Utilisation(MODEL, busy=cpu.busy_seconds, cores=4)
    return ProcessShare(inner, agents, busy=cpu.busy_seconds, own=cpu.own_seconds)


def test_a_process_is_charged_its_share():
    cpu = Cpu()
    share = share_of(cpu)
    assert share.joules(0.0) == 0
    cpu.busy, cpu.own = 1002.0, 3.5
    assert share.joules(1.0) == pytest.approx(10 / 2 + 20 * 0.25)
    assert share.idle_w == 5
    assert share.flags == ("process_share",)
    assert share.name == "utilisation"


def test_agents_of_one_machine_add_up_to_the_machine():
    one, two, whole = Cpu(), Cpu(), Cpu()
    sensors = [share_of(one), share_of(two), Utilisation(MODEL, busy=whole.busy_seconds, cores=4)]
    for sensor in sensors:
        sensor.joules(0.0)
    for second in range(1, 11):
        for cpu in (one, two, whole):
            cpu.busy = 1000.0 + 3 * second
        one.own, two.own = 3 + 2.0 * second, 3 + 1.0 * second
        first, other, both = (sensor.joules(float(second)) for sensor in sensors)
        assert first is not None
        assert other is not None
        assert first + other == pytest.approx(both)


def test_a_share_is_never_more_than_all_and_a_missing_part_is_none():
    cpu = Cpu()
    share = share_of(cpu)
    share.joules(0.0)
    cpu.busy, cpu.own = 1001.0, 9.0
    assert share.joules(1.0) == pytest.approx(10 / 2 + 10)
    cpu.own = None
    assert share.joules(2.0) is None


def test_a_measured_sensor_split_by_cpu_share_is_mixed():
    inner = Utilisation(MODEL, busy=Cpu().busy_seconds, cores=4)
    inner.kind = Kind.MEASURED
    assert ProcessShare(inner, 1, busy=Cpu().busy_seconds, own=Cpu().own_seconds).kind is Kind.MIXED
    inner.idle_w = None
    assert ProcessShare(inner, 1, busy=Cpu().busy_seconds, own=Cpu().own_seconds).joules(0.0) is None


def test_the_meter_labels_a_process_share_and_states_the_larger_error_bar():
    server = DeviceProfile.load("generic-x86-server")
    with Meter(server, share="process", agents_on_host=4) as meter, meter.stage(Stage.TRAIN):
        time.sleep(0.1)
    reading = meter.take()[Stage.TRAIN]
    assert reading.flags == ("placeholder_model", "process_share")
    assert reading.joules is not None
    assert reading.idle_joules == pytest.approx(34.5 / 4 * reading.seconds)
    assert reading.uncertainty_joules == pytest.approx(0.8 * reading.joules)
    assert meter.source == "utilisation"
    # asleep: a quarter of the idle power, whatever the others on this machine do
    assert reading.joules == pytest.approx(34.5 / 4 * reading.seconds, rel=0.9)


def test_a_process_tree_counts_children_living_and_ended():
    tree = ProcessTree(every_s=0.0)
    before = tree.seconds()
    assert before is not None
    spin = (
        "import time\nend = time.process_time() + 0.15\n"
        "while time.process_time() < end: pass\nprint('x', flush=True)\ninput()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "x\n"
        living = tree.seconds()
    finally:
        child.communicate("\n", timeout=10)
    ended = tree.seconds()
    assert living is not None
    assert ended is not None
    assert living - before >= 0.1
    assert ended >= living


def test_the_machine_is_busy_at_most_as_long_as_it_is_on():
    first, began = machine_busy_seconds(), time.monotonic()
    time.sleep(0.05)
    second, seconds = machine_busy_seconds(), time.monotonic() - began
    assert first is not None
    assert second is not None
    assert 0 <= second - first <= 512 * (seconds + 0.02)
