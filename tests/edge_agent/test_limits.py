"""A device's own limits: quiet hours, joules of the day, mains, heat; on fake files and clocks."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.limits import Limits
from edge_agent.quiet import DAY_MIN, QuietHours, stretch
from edge_agent.settings import AgentSettings, LimitSettings
from edge_agent.surroundings import hottest_c, on_mains
from edge_agent.tally import DAYS_KEPT, Tally
from foundation import settings
from foundation.energy import Kind, Stage
from foundation.errors import SettingsError
from foundation.messages import Unavailable
from tests.metered import WATTS, Metered

CET = timezone(timedelta(hours=1))
NOON = datetime(2026, 3, 1, 12, tzinfo=CET)


class Clock:
    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


# --- quiet hours -----------------------------------------------------------------------------------


@given(st.one_of(st.text(max_size=20), st.from_regex(r"\d{1,3}:\d{1,3}\s?-\s?\d{1,3}:\d{1,3}")))
def test_any_text_is_a_stretch_or_an_error_in_words(text: str) -> None:
    said, found = "", (0, 0)
    try:
        found = stretch(text)
    except ValueError as error:
        said = str(error)
    start, end = found
    assert repr(text) in said if said else 0 <= start < DAY_MIN >= end >= 0 and start != end


minutes = st.integers(0, DAY_MIN - 1)


@given(start=minutes, end=st.integers(0, DAY_MIN), at=minutes, other=st.tuples(minutes, minutes))
def test_it_is_quiet_from_the_start_to_before_the_end(
    start: int, end: int, at: int, other: tuple[int, int]
) -> None:
    def written(a: int, b: int) -> str:
        return f"{a // 60:02d}:{a % 60:02d}-{b // 60:02d}:{b % 60:02d}"

    def within(a: int, b: int) -> bool:
        return a <= at < b if a < b else at >= a or at < b

    if start == end or other[0] == other[1]:
        return
    now = datetime(2026, 3, 1, at // 60, at % 60, 59, tzinfo=CET)
    assert QuietHours([written(start, end)]).holds(now) == within(start, end)
    both = QuietHours([written(start, end), written(*other)])
    assert both.holds(now) == (within(start, end) or within(*other))
    ends = both.ends(now)
    if both.holds(now) and ends is not None:
        assert now < ends <= now + timedelta(days=1)
        assert not both.holds(ends)
        assert both.holds(ends - timedelta(minutes=1))


def test_quiet_hours_that_meet_are_one_and_the_whole_day_never_ends() -> None:
    late = datetime(2026, 3, 1, 23, 30, tzinfo=CET)
    meeting = QuietHours(["22:00-24:00", "0:00-06:30"])
    assert meeting.ends(late) == datetime(2026, 3, 2, 6, 30, tzinfo=CET)
    always = QuietHours(["00:00-24:00"])
    assert always.holds(late)
    assert always.ends(late) is None
    assert QuietHours().ends(late) is None


@pytest.mark.parametrize(
    "text", ["22-6", "22:00", "24:00-06:00", "22:60-23:00", "08:00-08:00", "22:00-24:01"]
)
def test_wrong_quiet_hours_are_said_at_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "agent.toml").write_text(f'[data]\nkind = "builtin"\n[limits]\nquiet_hours = ["{text}"]\n')
    with pytest.raises(SettingsError, match=r"limits\.quiet_hours.*" + text):
        settings.load(AgentSettings, tmp_path / "agent.toml")


def test_one_stretch_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('[data]\nkind = "builtin"\n')
    loaded, _ = settings.load(
        AgentSettings, tmp_path / "agent.toml", None, ["limits.quiet_hours=22:00-06:30"]
    )
    assert loaded.limits.quiet_hours == ("22:00-06:30",)


# --- joules of the day -----------------------------------------------------------------------------


def work(metered: Metered, seconds: float, stage: Stage = Stage.TRAIN) -> None:
    with metered.meter.stage(stage):
        metered.clock.now_s += seconds


def test_work_is_counted_by_day_through_restarts_and_takes(tmp_path: Path) -> None:
    file, clock, metered = tmp_path / "joules.json", Clock(), Metered()
    with metered.meter:
        tally = Tally(metered.meter, file, clock)
        work(metered, 2.0)
        work(metered, 50.0, Stage.WAIT)
        assert tally.today() == {Kind.MODELLED: pytest.approx(2 * WATTS)}
        work(metered, 1.0, Stage.SEND)
        ledger = tally.take()
        assert ledger[Stage.SEND].joules == pytest.approx(WATTS)
        work(metered, 3.5)
        assert tally.today() == {Kind.MODELLED: pytest.approx(6.5 * WATTS)}, "more than the window before"
        tally.save()
        again = Tally(metered.meter, file, clock)
        metered.meter.take()
        assert again.today() == {Kind.MODELLED: pytest.approx(6.5 * WATTS)}
        clock.now += timedelta(days=1)
        assert again.today() == {}
        work(metered, 1.0)
        assert again.today() == {Kind.MODELLED: pytest.approx(WATTS)}
        clock.now -= timedelta(days=1)
        assert again.today() == {Kind.MODELLED: pytest.approx(6.5 * WATTS)}, "a clock that was set back"


def test_a_board_whose_clock_begins_in_1970_finds_today_again(tmp_path: Path) -> None:
    file, clock, metered = tmp_path / "joules.json", Clock(), Metered()
    with metered.meter:
        for day in range(8):
            clock.now = NOON + timedelta(days=day)
            tally = Tally(metered.meter, file, clock)
            work(metered, 1.0)
            tally.take()
            clock.now = datetime(1970, 1, 1, tzinfo=CET)
            tally = Tally(metered.meter, file, clock)
            work(metered, 0.1)
            tally.take()
            clock.now = NOON + timedelta(days=day)
            assert Tally(metered.meter, file, clock).today() == {Kind.MODELLED: pytest.approx(WATTS)}
    assert len(json.loads(file.read_text())) <= DAYS_KEPT


@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.dictionaries(st.text(max_size=12), inner, max_size=3) | st.lists(inner, max_size=3)
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_file_is_a_count_or_begun_anew(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file, metered = tmp_path_factory.mktemp("tally") / "joules.json", Metered()
    file.write_bytes(data)
    with metered.meter:
        tally = Tally(metered.meter, file, Clock())
        assert all(joules >= 0 for joules in tally.today().values())
        work(metered, 1.0)
        tally.take()
    assert date.fromisoformat("2026-03-01").isoformat() in json.loads(file.read_text())


# --- surroundings ----------------------------------------------------------------------------------


def supply(root: Path, name: str, **files: str) -> None:
    folder = root / "sys/class/power_supply" / name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text + "\n")


BATTERY = {"type": "Battery", "status": "Discharging"}


@pytest.mark.parametrize(
    ("supplies", "mains"),
    [
        ({}, True),
        ({"AC": {"type": "Mains", "online": "0"}}, True),
        ({"BAT0": BATTERY}, False),
        ({"BAT0": BATTERY | {"status": "Charging"}}, True),
        ({"BAT0": BATTERY, "AC": {"type": "Mains", "online": "1"}}, True),
        ({"BAT0": BATTERY | {"status": "Unknown"}, "AC": {"type": "Mains", "online": "0"}}, False),
        ({"BAT0": BATTERY, "a": {"type": "USB", "online": "0"}, "b": {"type": "USB", "online": "1"}}, True),
        ({"hidpp_battery_0": BATTERY | {"scope": "Device"}}, True),
        ({"BAT0": BATTERY, "odd": {"type": "Mains"}}, False),
    ],
)
def test_mains_or_battery(tmp_path: Path, supplies: dict[str, dict[str, str]], mains: bool) -> None:
    for name, files in supplies.items():
        supply(tmp_path, name, **files)
    assert on_mains(tmp_path) is mains


def heat(root: Path, *texts: str) -> None:
    for index, text in enumerate(texts):
        zone = root / f"sys/class/thermal/thermal_zone{index}"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "temp").write_text(text)


def test_the_hottest_zone_counts_and_what_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    assert hottest_c(tmp_path) is None
    heat(tmp_path, "41500\n", "-3000\n", "", "invalid")
    assert hottest_c(tmp_path) == 41.5


# --- all together ----------------------------------------------------------------------------------


def limits(root: Path, clock: Clock, metered: Metered | None = None, **told: object) -> Limits:
    metered = metered or Metered()
    return Limits(LimitSettings(**told), metered.meter, root / "vault", root=root, clock=clock)  # type: ignore[arg-type]


def test_a_device_without_limits_is_always_there(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", **BATTERY)
    heat(tmp_path, "150000")
    mine = limits(tmp_path, Clock())
    assert (mine.look(), mine.too_hot(), mine.problem(), mine.tally) == (None, None, None, None)


def test_each_limit_says_its_reason_and_its_end(tmp_path: Path) -> None:
    clock = Clock(NOON.replace(hour=23))
    quiet = limits(tmp_path, clock, quiet_hours=["22:00-06:30"]).look()
    assert str(quiet) == "it has quiet hours, until 2026-03-02 05:30 UTC"
    supply(tmp_path, "BAT0", **BATTERY)
    assert str(limits(tmp_path, clock, only_on_mains=True).look()) == (
        "it runs on battery, and works on mains only"
    )
    metered = Metered()
    with metered.meter:
        mine = limits(tmp_path, clock, metered, joules_per_day=25)
        work(metered, 2.0)
        assert mine.look() is None
        work(metered, 0.6)
        spent = mine.look()
        assert str(spent) == "today's 25 J are spent (26.0 J modelled), until 2026-03-01 23:00 UTC"
        work(metered, 5)
        assert mine.look() is spent, "the card does not change with every joule"
        clock.now += timedelta(hours=2)
        assert mine.look() is None


def test_heat_has_a_margin_on_both_sides(tmp_path: Path) -> None:
    mine = limits(tmp_path, Clock(), max_temperature_c=70)

    def at(degrees: float) -> tuple[Unavailable | None, str | None]:
        heat(tmp_path, str(round(1000 * degrees)))
        return mine.look(), mine.too_hot()

    assert at(70) == (None, None)
    hot, work_in_hand = at(71)
    assert str(hot) == "it is too hot: 71.0 °C, the limit is 70 °C"
    assert work_in_hand is None, "work that was begun goes on"
    assert at(75.1)[1] == "75.1 °C is more than 5 above the limit of 70 °C"
    assert at(66)[0] is hot, "not yet cool enough"
    assert at(65)[0] is None


def test_limits_that_cannot_hold_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = limits(tmp_path, Clock(), Metered(known=False), joules_per_day=1, max_temperature_c=70)
    told = mine.problem()
    assert told == (
        "limits: joules_per_day cannot hold: nobody knows this device's joules;"
        " max_temperature_c cannot hold: no thermal zone can be read"
    )
    assert mine.problem() == told
    assert len([r for r in caplog.records if "cannot hold" in r.message]) == 2, "each once"
    assert mine.look() is None


def test_joules_that_were_lost_are_said(tmp_path: Path) -> None:
    metered = Metered()
    with metered.meter:
        mine = limits(tmp_path, Clock(), metered, joules_per_day=100)
        assert mine.tally is not None
        sensor = metered.meter._main.sensor
        sensor.watts = lambda: None
        work(metered, 3)
        mine.tally.take()
    assert "holds in part" in (mine.problem() or "")


def test_a_reason_travels_with_its_end_in_any_zone() -> None:
    told = Unavailable(cause="quiet", reason="it has quiet hours", until=NOON)
    again = Unavailable.model_validate_json(told.model_dump_json())
    assert again == told
    assert str(again).endswith("until 2026-03-01 11:00 UTC")
    assert again.until is not None
    assert again.until.astimezone(UTC).hour == 11
