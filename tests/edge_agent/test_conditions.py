"""What a round's conditions are, on made-up file trees of a Jetson, a Raspberry Pi and a PC, and on none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edge_agent.conditions import Conditions, in_words
from edge_agent.energy.clocks import Clocks, governor, range_mhz
from edge_agent.energy.power_mode import power_mode
from edge_agent.energy.throttling import Throttling
from foundation.messages import DeviceState
from tests.devices import ORIN, written

PI_BITS = "sys/devices/platform/soc/soc:firmware/get_throttled"
OVER_CURRENT = "sys/class/hwmon/hwmon3/oc3_event_cnt"
PACKAGE = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    return written(tmp_path, ORIN)


def test_a_power_mode_is_known_by_its_name_not_by_its_number(orin: Path) -> None:
    assert power_mode(orin) == "15W"
    (orin / "var/lib/nvpmodel/status").write_text("pmode:0002 fmode:quiet\n")
    assert power_mode(orin) == "MAXN_SUPER"
    (orin / "var/lib/nvpmodel/status").write_text("pmode:0007\n")
    assert power_mode(orin) is None, "a number without a name says nothing"


def test_a_machine_that_says_nothing_is_unknown_not_zero(tmp_path: Path) -> None:
    assert Conditions(tmp_path).end() == DeviceState()
    assert (power_mode(tmp_path), governor(tmp_path), range_mhz(tmp_path)) == (None, None, None)
    assert (Clocks(tmp_path).mhz(), Throttling(tmp_path).look()) == (None, None)
    assert in_words(DeviceState()) == ""


def test_a_round_says_under_what_conditions_it_was_done(orin: Path) -> None:
    conditions = Conditions(orin)
    hot, cool = (orin / f"sys/class/thermal/thermal_zone{i}/temp" for i in (0, 1))
    conditions.begin(3, 6, "it was warm")
    hot.write_text("81500\n")
    conditions.look()
    hot.write_text("62000\n")
    (orin / OVER_CURRENT).write_text("29\n")
    state = conditions.end()
    assert state == DeviceState(
        power_mode="15W",
        governor="schedutil",
        least_mhz=115.2,
        most_mhz=1510.4,
        start_c=50.0,
        end_c=62.0,
        most_c=81.5,
        throttle_events=2,
        threads=3,
        own_threads=6,
        eased="it was warm",
    )
    assert "15W" in in_words(state)
    assert "at most 82" in in_words(state)
    conditions.begin(3)
    cool.unlink()
    again = conditions.end()
    assert (again.start_c, again.most_c, again.throttle_events, again.eased) == (62.0, 62.0, 0, None)


def test_a_zone_with_nothing_behind_it_is_no_temperature(orin: Path) -> None:
    (orin / "sys/class/thermal/thermal_zone1/temp").write_text("-256000\n")
    (orin / "sys/class/thermal/thermal_zone0/temp").write_text("2147483647\n")
    assert Conditions(orin).end().most_c is None


def test_the_clock_is_the_mean_over_all_cores(tmp_path: Path) -> None:
    clock = "sys/devices/system/cpu/cpufreq/policy{}/{}"
    files = {
        clock.format(0, "scaling_cur_freq"): "600000",
        clock.format(0, "affected_cpus"): "0 1 2 3",
        clock.format(4, "scaling_cur_freq"): "1800000",
        clock.format(4, "affected_cpus"): "4 5",
    }
    assert Clocks(written(tmp_path, files)).mhz() == pytest.approx(1000)
    (tmp_path / clock.format(4, "scaling_cur_freq")).write_text("<unknown>")
    assert Clocks(tmp_path).mhz() is None, "the mean of the others would be another processor's"


def test_counted_events_are_those_since_and_a_counter_that_began_anew_is_no_harm(tmp_path: Path) -> None:
    written(tmp_path, {PACKAGE: "1000"})
    throttling = Throttling(tmp_path)
    assert throttling.look() == 0
    (tmp_path / PACKAGE).write_text("1004")
    assert throttling.look() == 4
    (tmp_path / PACKAGE).write_text("3")
    assert throttling.look() == 7


@pytest.mark.parametrize(
    ("bits", "events"),
    [
        (["0", "0", "0"], 0),
        (["50000", "50000"], 0),  # it was before this
        (["0", "50000"], 2),  # between two looks: under-voltage and throttling, and it is over
        (["0", "1", "10001", "10000"], 1),  # seen while it holds, then as having happened: one
        (["0", "10001"], 1),
        (["0", "4", "0", "4"], 2),
    ],
)
def test_a_raspberry_pi_counts_what_was_not_and_then_is(tmp_path: Path, bits: list[str], events: int) -> None:
    written(tmp_path, {PI_BITS: bits[0]})
    throttling = Throttling(tmp_path)
    for text in bits[1:]:
        (tmp_path / PI_BITS).write_text(text)
        throttling.look()
    assert throttling.look() == events


@given(status=st.binary(max_size=60), modes=st.binary(max_size=200))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_the_files_a_mode_is_a_name_or_unknown(
    tmp_path: Path, status: bytes, modes: bytes
) -> None:
    for place, text in (("var/lib/nvpmodel/status", status), ("etc/nvpmodel.conf", modes)):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(text)
    name = power_mode(tmp_path)
    assert name is None or 0 < len(name) <= 100
