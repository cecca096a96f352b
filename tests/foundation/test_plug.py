"""Smart plugs: recorded messages of Tasmota and Shelly, and everything that goes wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import SettingsError
from foundation.plug import PLUGS, Plug, Shelly1, Shelly2, Tasmota, plug_of

ENERGY = {
    "TotalStartTime": "2025-11-01T08:00:00", "Total": 12.345, "Yesterday": 0.1, "Today": 0.05, "Period": 1,
    "Power": 5, "ApparentPower": 9, "ReactivePower": 7, "Factor": 0.56, "Voltage": 231, "Current": 0.038,
}  # fmt: skip
SWITCH = {
    "id": 0, "source": "mqtt", "output": True, "apower": 5.3, "voltage": 230.9, "freq": 50.0,
    "current": 0.041,
    "aenergy": {"total": 11.679, "by_minute": [88.2, 90.1, 89.4], "minute_ts": 1696000000},
    "temperature": {"tC": 38.1},
}  # fmt: skip
WHOLE, EVENTS = "shellyplusplugs-1/status/switch:0", "shellyplusplugs-1/events/rpc"


def tele(time: str = "2026-01-05T10:00:00", **energy: Any) -> bytes:
    return json.dumps({"Time": time, "ENERGY": ENERGY | energy}).encode()


def event(ts: float, method: str = "NotifyStatus", **switch: Any) -> bytes:
    return json.dumps({"method": method, "params": {"ts": ts, "switch:0": {"id": 0, **switch}}}).encode()


def test_tasmota_says_watts_and_kilowatt_hours() -> None:
    plug = Tasmota("plug3")
    reading = plug.take("tele/plug3/SENSOR", tele(), 1.0)
    assert reading is not None
    assert (reading.time_s, reading.watts) == (1.0, 5)
    assert reading.joules == pytest.approx(12.345 * 3.6e6)
    answer = json.dumps({"StatusSNS": json.loads(tele("2026-01-05T10:00:01", Power=6))}).encode()
    reading = plug.take("stat/plug3/STATUS8", answer, 2.0)
    assert reading is not None
    assert reading.watts == 6
    assert plug.question == ("cmnd/plug3/Status", b"8")


def test_nothing_is_ever_said_that_could_switch_a_device_off() -> None:
    for kind in PLUGS.values():
        question = kind("x").question
        assert question is None or (question[0].split("/")[-1], question[1]) == ("Status", b"8")


def test_a_plug_with_two_sockets_is_asked_for_one() -> None:
    plug = plug_of("mqtt:tasmota/plug3#1")
    reading = plug.take("tele/plug3/SENSOR", tele(Power=[52, 5], Total=[1.0, 2.0]), 0.0)
    assert reading is not None
    assert (reading.watts, reading.joules) == (5, pytest.approx(7.2e6))
    assert Tasmota("plug3", 2).take("tele/plug3/SENSOR", tele(Power=[52, 5], Total=[1, 2]), 0.0) is None


def test_the_first_shelly_counts_watt_minutes() -> None:
    """A reader that takes them for watt-hours is wrong by 60."""
    plug = plug_of("shelly1:shellyplug-s-1")
    assert plug.topics == ("shellies/shellyplug-s-1/relay/0/power", "shellies/shellyplug-s-1/relay/0/energy")
    plug.take(plug.topics[0], b"5.30", 0.0)
    reading = plug.take(plug.topics[1], b"18421", 1.0)
    assert reading is not None
    assert (reading.watts, reading.joules) == (5.3, 18421 * 60.0)


def test_partial_events_are_merged_into_the_state() -> None:
    """A naive reader takes the total for missing, or the watts for 0."""
    plug = Shelly2("shellyplusplugs-1")
    plug.take(WHOLE, json.dumps(SWITCH).encode(), 0.0)
    reading = plug.take(EVENTS, event(1696000012.3, apower=5.6), 1.0)
    assert reading is not None
    assert (reading.watts, reading.joules) == (5.6, pytest.approx(11.679 * 3600))
    assert plug.take(EVENTS, event(1696000013.3, temperature={"tC": 38.2}), 2.0) is None
    assert plug.take(EVENTS, event(1696000014.3, "NotifyEvent", apower=9), 3.0) is None
    reading = plug.take(EVENTS, event(1696000015.3, aenergy={"total": 11.7}), 4.0)
    assert reading is not None
    assert (reading.watts, reading.joules) == (5.6, pytest.approx(11.7 * 3600))


def test_retained_and_repeated_messages_are_no_readings() -> None:
    plug = Tasmota("plug3")
    assert plug.take("tele/plug3/SENSOR", tele(), 0.0, retained=True) is None
    assert plug.take("tele/plug3/SENSOR", tele(), 0.0) is not None
    assert plug.take("tele/plug3/SENSOR", tele(), 1.0) is None
    assert plug.last is not None
    assert plug.last.time_s == 0.0


def test_a_total_that_goes_backwards_is_a_reset() -> None:
    plug = Tasmota("plug3")
    for number, total in enumerate((12.3, 12.4, 0.0, 0.1)):
        plug.take("tele/plug3/SENSOR", tele(str(number), Total=total), float(number))
    assert plug.breaks == 1


@pytest.mark.parametrize(
    ("energy", "watts"), [({"Power": None}, None), ({"Power": "NaN"}, None), ({"Power": -3}, None)]
)
def test_what_is_no_power_is_not_0(energy: dict[str, Any], watts: float | None) -> None:
    reading = Tasmota("plug3").take("tele/plug3/SENSOR", tele(**energy), 0.0)
    assert reading is not None
    assert (reading.watts, reading.joules) == (watts, pytest.approx(12.345 * 3.6e6))
    assert Tasmota("plug3").take("tele/plug3/SENSOR", tele(**energy, Total=None), 0.0) is None


def test_a_plug_that_is_silent_for_three_periods_says_nothing() -> None:
    plug = Tasmota("plug3")
    assert plug.watts(0.0) is None
    plug.take("tele/plug3/SENSOR", tele(), 0.0)
    assert plug.watts(30.0) == 5
    assert plug.watts(30.1) is None


def test_steps_are_the_finest_that_were_ever_written_and_clocks_are_only_told() -> None:
    plug = Tasmota("plug3")
    plug.take("tele/plug3/SENSOR", tele("2031-01-01T00:00:00", Power=5, Total=12), 0.0)
    assert (plug.step_w, plug.step_j, plug.own_clock) == (1.0, 3.6e6, "2031-01-01T00:00:00")
    plug.take("tele/plug3/SENSOR", tele("1970-01-01T00:00:00", Power=5.25, Total=12.34567), 1.0)
    plug.take("tele/plug3/SENSOR", tele("1970-01-01T00:00:01", Power=6, Total=12.4), 2.0)
    assert (plug.step_w, plug.step_j) == (pytest.approx(0.01), pytest.approx(36.0))
    assert Shelly1("x").own_clock is None


def test_a_shelly_may_be_quiet_for_longer_than_a_minute_before_it_is_silent() -> None:
    """Where nothing changes it tells of its energy once a minute, and of nothing else."""
    assert Shelly2("x").silent_s > 60 >= Tasmota("x").silent_s


@pytest.mark.parametrize(
    "text", ["", "plug3", "mqtt:", "mqtt:tasmota/", "tasmota:", "sonoff:x", "shelly:a/+/b", "shelly:x#one"]
)
def test_a_plug_that_is_none_is_told_with_what_there_is(text: str) -> None:
    with pytest.raises(SettingsError, match="mqtt:tasmota/PLUG"):
        plug_of(text)


@given(kind=st.sampled_from(sorted(PLUGS)), payload=st.binary(max_size=200), which=st.integers(0, 2))
def test_no_message_is_believed_or_raises(kind: str, payload: bytes, which: int) -> None:
    plug = PLUGS[kind]("x")
    _check(plug, plug.topics[which % len(plug.topics)], payload)


@given(
    kind=st.sampled_from(sorted(PLUGS)),
    message=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["ENERGY", "Power", "Total", "apower", "aenergy", "total", "params", "method", "switch:0"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ),
    which=st.integers(0, 2),
)
def test_no_json_is_believed_or_raises(kind: str, message: Any, which: int) -> None:
    plug = PLUGS[kind]("x")
    _check(plug, plug.topics[which % len(plug.topics)], json.dumps(message).encode())


def _check(plug: Plug, topic: str, payload: bytes) -> None:
    reading = plug.take(topic, payload, 0.0)
    for value in (reading.watts, reading.joules) if reading is not None else ():
        assert value is None or 0 <= value < float("inf")


def test_a_foreign_topic_is_none_of_its_business() -> None:
    for plug in (Tasmota("a"), Shelly1("a"), Shelly2("a")):
        assert plug.take("tele/b/SENSOR", tele(), 0.0) is None
