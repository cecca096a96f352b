"""Meters to calibrate against: counters and means, logs, a person, and the loads beside them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.calibration.load import main as load_main
from edge_agent.calibration.loads import CORES, IDLE, Load, Running, commands, duties_of, plan
from edge_agent.calibration.logged import parse_log
from edge_agent.calibration.meters import (
    CsvMeter,
    ManualMeter,
    PlugMeter,
    Span,
    SysfsMeter,
    averaged,
    counted,
    least_hold_s,
    meter_of,
)
from edge_agent.calibration.session import Session, Timeline, Timing
from edge_agent.energy.sensor import PowerSensor
from foundation.energy import Scope
from foundation.errors import DataError, HedgerowError, SensorError, SettingsError
from foundation.mqtt import MqttSettings
from foundation.plug import Reading, Shelly1, Shelly2, Tasmota

BROKER = MqttSettings()


# --- plugs -----------------------------------------------------------------------------------------


def readings(watts: float, step_j: float, every_s: float = 1.0, seconds: int = 60) -> list[Reading]:
    """A counter that shows whole steps only, as plugs do, and watts that are not quite right."""
    times = [every_s * number for number in range(round(seconds / every_s) + 1)]
    return [Reading(t, 1.1 * watts, step_j * int(watts * t / step_j)) for t in times]


def test_a_fine_counter_is_believed_before_the_watts() -> None:
    seen = counted(readings(5.0, 0.36), Span(2.5, 57.5), 0.36)
    assert seen is not None
    assert seen.how == "counter"
    assert seen.watts == pytest.approx(5.0, rel=0.005)
    assert (seen.span.start_s, seen.span.end_s) == (3.0, 57.0)


def test_a_coarse_counter_is_not() -> None:
    """300 J in a hold, in steps of 36 J or of a kilowatt-hour's thousandth."""
    for step_j in (36.0, 3600.0):
        assert counted(readings(5.0, step_j), Span(0, 60), step_j) is None
    seen = averaged(readings(5.0, 3600.0), Span(0, 60), 30)
    assert (seen.how, seen.watts) == ("mean", pytest.approx(5.5))


def test_a_total_that_is_only_repeated_is_no_step_of_the_counter() -> None:
    """A Shelly that says new watts says its old total with them: not one joule went through since."""
    told = readings(5.0, 0.36)
    told.append(Reading(61.0, 5.0, told[-1].joules))
    seen = counted(told, Span(0, 61), 0.36)
    assert seen is not None
    assert seen.span.end_s == 60
    assert seen.watts == pytest.approx(5.0, rel=0.005)


def test_a_counter_that_falls_is_not_believed() -> None:
    told = readings(5.0, 0.36)
    told[30] = Reading(30.0, 5.5, 0.0)
    assert counted(told, Span(0, 60), 0.36) is None
    assert counted(told, Span(40, 60), 0.36) is not None


def test_watts_hold_until_the_next_message_but_not_for_ever() -> None:
    told = [Reading(0, 2.0, None), Reading(10, 4.0, None)]
    assert averaged(told, Span(5, 15), 30).watts == pytest.approx(3.0)
    assert averaged(told, Span(12, 20), 30).watts == pytest.approx(4.0)
    with pytest.raises(SensorError, match="silent for more than 30 s"):
        averaged(told, Span(41, 50), 30)
    with pytest.raises(SensorError, match="silent"):
        averaged([], Span(0, 10), 30)


def test_plugs_tell_the_step_of_their_total() -> None:
    tasmota, shelly, first = Tasmota("a"), Shelly2("a"), Shelly1("a")
    assert tasmota.step_j is None
    for number, total in enumerate((12.3, 12.345, 12.35)):
        message = f'{{"Time": "{number}", "ENERGY": {{"Total": {total}, "Power": 5}}}}'
        tasmota.take("tele/a/SENSOR", message.encode(), 0.0)
    assert tasmota.step_j == pytest.approx(3600)
    shelly.take("a/status/switch:0", b'{"apower": 5, "aenergy": {"total": 11.679}}', 0.0)
    assert shelly.step_j == pytest.approx(3.6)
    first.take("shellies/a/relay/0/energy", b"18421", 0.0)
    assert first.step_j == 60


def test_a_plug_is_held_for_fifty_pulses() -> None:
    plug = PlugMeter("shelly:a", Shelly2("a"), BROKER)
    assert [least_hold_s(plug, watts) for watts in (None, 0.0, 3.0, 5.0, 50.0, 0.1)] == [
        60,
        60,
        200,
        120,
        60,
        600,
    ]
    assert least_hold_s(SysfsMeter("sysfs:x", Path("x")), 3.0) == 20


# --- files -----------------------------------------------------------------------------------------


def test_the_kernels_meter_gives_its_counter_or_the_mean_of_its_watts(tmp_path: Path) -> None:
    meter = SysfsMeter("sysfs:x", tmp_path)
    with pytest.raises(SensorError, match="neither energy1_input nor power1_input"):
        meter.check()
    (tmp_path / "in1_input").write_text("5000\n")
    (tmp_path / "curr1_input").write_text("800\n")
    meter.check()
    for number in range(101):
        meter.sample(0.1 * number)
    assert meter.watts() == 4.0
    assert (meter.over(Span(0, 10)).how, meter.over(Span(0, 10)).watts) == ("mean", pytest.approx(4.0))
    (tmp_path / "power1_input").write_text("5250000\n")
    for number in range(101, 201):
        (tmp_path / "energy1_input").write_text(f"{525_000 * number + number % 7 * 125}\n")
        meter.sample(0.1 * number)
    seen = meter.over(Span(10.2, 20))
    assert (seen.how, seen.watts) == ("counter", pytest.approx(5.25, rel=1e-3))
    with pytest.raises(SensorError, match="none missing"):
        meter.over(Span(19, 29))


def test_a_log_that_comes_afterwards_is_waited_for(tmp_path: Path) -> None:
    file, said = tmp_path / "log.csv", threading.Event()
    offset = 1_700_000_000.0
    meter = CsvMeter(f"csv:{file}", file, wait_s=60, say=lambda _: said.set())
    meter.check()  # not there yet

    def write() -> None:
        said.wait(30)
        rows = [f"{offset + 0.5 * n:.2f},x,{3.0 if n < 40 else 7.0}\n" for n in range(121)]
        file.write_text("time_s,remark,watts\n" + "".join(rows[:-1]) + rows[-1].rstrip("\n"))
        with file.open("a") as opened:
            opened.write("\n")

    writer = threading.Thread(target=write)
    writer.start()
    seen = meter.over(Span(30.0, 59.0, offset))
    writer.join()
    assert (seen.how, seen.watts, seen.samples) == ("mean", 7.0, 59)
    assert meter.over(Span(0.0, 19.0, offset)).watts == pytest.approx(3.0)
    with pytest.raises(SensorError, match="0 samples in a hold"):
        meter.over(Span(-100.0, -50.0, offset))


def test_a_log_that_never_comes_is_an_error_that_says_which_clock(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text("time_s,watts\n1,2\n2,2\n3,2\n")
    meter = CsvMeter(f"csv:{file}", file, wait_s=0.0)
    with pytest.raises(SensorError, match=r"does not reach \d\d:\d\d:\d\d UTC.*since 1970"):
        meter.over(Span(0, 10, 1.7e9))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("watts\n1\n", "line 1: .*time_s and watts"),
        ("time_s,watts,watts\n1,2,3\n", "line 1"),
        ("time_s,watts\n1,2\n1,2\n", "line 3: its time is not after"),
        ("time_s,watts\n1,two\n", "line 2: .*numbers"),
        ("time_s,watts\n1\n", "line 2"),
        ("time_s,watts\n1,-2\n", "line 2: watts must be between"),
        ("time_s,watts\n1,nan\n", "line 2: watts must be between"),
        ("time_s,watts\ninf,1\n", "line 2"),
    ],
)
def test_a_log_that_is_wrong_is_told_by_its_line(text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        parse_log(text.encode(), "log.csv")


def test_a_line_that_is_still_being_written_is_left_out() -> None:
    log = parse_log(b"time_s,watts\r\n1,2\r\n\r\n2,3\r\n3,4", "log.csv")
    assert (log.times_s, log.watts) == ([1, 2], [2, 3])
    assert parse_log(b"time_s,wat", "log.csv").times_s == []


@given(
    data=st.binary(max_size=200) | st.text(',.0123456789e+-\n"\r;ntime_swatts ', max_size=80).map(str.encode)
)
def test_no_log_is_believed_or_raises_anything_else(data: bytes) -> None:
    for text in (data, b"time_s,watts\n" + data):
        try:
            log = parse_log(text, "log.csv")
        except DataError:
            continue
        assert log.times_s == sorted(set(log.times_s))
        assert all(0 <= watts <= 1e5 for watts in log.watts)


# --- a person --------------------------------------------------------------------------------------


def test_a_person_is_asked_until_a_number_comes() -> None:
    asked: list[str] = []
    answers: Iterator[str] = iter(["", "five", "-3", "nan", " 5,25 W"])

    def ask(question: str) -> str:
        asked.append(question)
        return next(answers)

    seen = ManualMeter(ask=ask).over(Span(0, 60))
    assert (seen.watts, seen.how, seen.u_w) == (5.25, "read", pytest.approx(0.005))
    assert "60 s" in asked[0]
    assert "'five' is no number of watts" in asked[2]

    def gone(_: str) -> str:
        raise EOFError

    with pytest.raises(SensorError, match="input has ended"):
        ManualMeter(ask=gone).over(Span(0, 60))


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "scope"),
    [
        ("mqtt:tasmota/plug3", "plug", "wall_ac"),
        ("shelly:plug", "plug", "wall_ac"),
        ("shelly1:plug", "plug", "wall_ac"),
        ("sysfs:hwmon2", "sysfs", "board_dc"),
        ("csv:log.csv", "csv", "wall_ac"),
        ("manual", "manual", "wall_ac"),
    ],
)
def test_meters_have_names_scopes_and_accuracies(text: str, kind: str, scope: str) -> None:
    meter = meter_of(text, BROKER)
    assert (meter.kind, meter.scope, meter.accuracy) == (kind, scope, 0.02)
    told = meter_of(text, BROKER, scope=Scope.MODULE, accuracy=0.005)
    assert (told.scope, told.accuracy) == ("module", 0.005)


@pytest.mark.parametrize("text", ["", "plug3", "csv:", "sysfs:", "manual:", "mqtt:plug3"])
def test_a_meter_that_is_none_is_told_with_what_there_is(text: str) -> None:
    with pytest.raises(SettingsError, match="mqtt:tasmota/PLUG"):
        meter_of(text, BROKER)


# --- loads and sessions ----------------------------------------------------------------------------


def test_idle_is_first_in_the_middle_and_last_the_rest_is_drawn() -> None:
    full, quick = plan(0), plan(0, quick=True)
    assert [load.block == "idle" for load in (full[0], full[5], full[-1])] == [True] * 3
    assert (len(full), len(quick)) == (11, 8)
    assert sum(load.block == "idle" for load in full) == 3
    assert plan(0) == full
    assert len({plan(seed) for seed in range(5)}) > 1
    assert {load.name for load in quick if load.hold_out} == {"training", "cores-75"}


def test_a_share_of_the_cores_is_whole_ones_and_a_part_of_one() -> None:
    assert duties_of(0.75, 4) == [1, 1, 1]
    assert duties_of(0.25, 2) == [0.5]
    assert duties_of(0.75, 2) == [1, 0.5]
    assert duties_of(1.0, 1) == [1]
    assert [line[-3:] for line in commands(CORES[2], [4, 5], 1)] == [
        ["4", "--duty", "1"],
        ["5", "--duty", "0.5"],
    ]


def test_a_load_that_ends_by_itself_is_an_error_with_its_last_words() -> None:
    (command,) = commands(Load("x", "cores", 1.0), [0], 1)
    with pytest.raises(HedgerowError, match="invalid float value"), Running([[*command[:-1], "much"]]):
        pass
    with pytest.raises(SystemExit):
        load_main(["swim"])


def test_a_rate_is_only_told_between_two_counts() -> None:
    line = Timeline()
    for time_s, count in ((0.0, 0.0), (1.0, None), (2.0, 4.0), (4.0, 4.0)):
        line.add(time_s, count)
    assert line.rate(0.5, 3.0) == pytest.approx(3.0 / 2.5)
    assert line.rate(0.0, 2.0) == 2.0
    assert (line.rate(-1, 2), line.rate(0, 5), line.rate(2, 2)) == (None, None, None)


class Steady(PowerSensor):
    name = "steady"

    def watts(self) -> float | None:
        return 3.5


def test_a_session_writes_down_what_all_saw_over_the_same_time(tmp_path: Path) -> None:
    (tmp_path / "power1_input").write_text("4000000\n")
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("61300\n")
    place = tmp_path / "sys/devices/platform/soc/soc:firmware"
    place.mkdir(parents=True)
    (place / "get_throttled").write_text("50000\n")
    told: list[str] = []
    meter = SysfsMeter("sysfs:x", tmp_path)
    session = Session(
        meter,
        Steady(Scope.MODULE),
        timing=Timing(settle_s=0.1, hold_s=0.6, exact=True),
        threads=1,
        root=tmp_path,
        tell=lambda load, what, *_: told.append(f"{load.name} {what}"),
    )
    before = time.monotonic()
    idle, busy = session.run([IDLE, CORES[3]])
    assert time.monotonic() - before >= 1.4
    assert busy.utilisation > 0.7
    for step in (idle, busy):
        assert step.watts == pytest.approx(4.0)
        assert step.sensor_w == pytest.approx(3.5)
        assert 0.3 < step.seconds <= step.hold_s
        assert (step.least_hold_s, step.temperature_c, step.throttled) == (20, 61.3, False)
    assert {"idle settle", "idle hold", "cores-100 hold"} <= set(told)
    # Bits that were set before are history; a new one is not.
    (place / "get_throttled").write_text("50005\n")
    (step,) = session.run([IDLE])
    assert step.throttled is True


def test_an_interrupt_while_a_load_is_started_stays_one_and_ends_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def interrupted(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        if started:
            raise KeyboardInterrupt
        started.append(real(*arguments, **more))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    command = [sys.executable, "-m", "edge_agent.calibration.load", "matmul", "--core", "0", "--duty", "0.1"]
    with pytest.raises(KeyboardInterrupt), Running([command, command]):
        pass
    assert started[0].poll() is not None
