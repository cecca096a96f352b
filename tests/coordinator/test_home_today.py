"""A device's joules of the day: never too many, never falling, kept across restarts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.home_today import (
    FILE,
    MIDNIGHT_GAP_S,
    Day,
    Known,
    Memory,
    counted,
    midnight,
    of_today,
    read,
    write,
)
from foundation.energy import Kind

PLUG = (Kind.MEASURED, "plug")
MODEL = (Kind.MODELLED, "utilisation")
NOON = datetime(2026, 3, 2, 12).timestamp()
MIDNIGHT = datetime(2026, 3, 3).timestamp()


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def put(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield put
    monkeypatch.undo()
    time.tzset()


def test_the_first_telling_counts_nothing() -> None:
    day = counted(None, 500.0, *PLUG, NOON)
    assert (day.joules, day.seconds, day.since) == (0.0, 0.0, NOON)


def test_what_is_told_later_is_added() -> None:
    day = counted(None, 500.0, *PLUG, NOON)
    day = counted(day, 510.0, *PLUG, NOON + 5)
    day = counted(day, 512.0, *PLUG, NOON + 7)
    assert (day.joules, day.seconds, day.since) == (12.0, 7.0, NOON)


def test_a_program_that_was_started_again_begins_at_nothing() -> None:
    day = counted(counted(None, 500.0, *PLUG, NOON), 510.0, *PLUG, NOON + 5)
    day = counted(day, 3.0, *PLUG, NOON + 100)
    assert (day.joules, day.seconds) == (13.0, 5.0)


def test_an_hour_without_the_coordinator_is_not_lost() -> None:
    day = counted(counted(None, 500.0, *PLUG, NOON), 4100.0, *PLUG, NOON + 3600)
    assert (day.joules, day.seconds) == (3600.0, 3600.0)


def test_midnight_between_two_tellings_is_crossed_at_constant_power() -> None:
    day = counted(counted(None, 0.0, *PLUG, MIDNIGHT - 100), 99.0, *PLUG, MIDNIGHT - 1)
    day = counted(day, 103.0, *PLUG, MIDNIGHT + 3)
    assert (day.joules, day.seconds, day.since) == (3.0, 3.0, MIDNIGHT)


def test_a_midnight_nobody_heard_begins_the_day_when_it_is_heard_again() -> None:
    day = counted(None, 0.0, *PLUG, MIDNIGHT - 3600)
    day = counted(day, 7200.0, *PLUG, MIDNIGHT + 3600)
    assert (day.joules, day.seconds, day.since) == (0.0, 0.0, MIDNIGHT + 3600)
    assert counted(day, 7210.0, *PLUG, MIDNIGHT + 3610).joules == 10.0


def test_another_meter_is_never_added_to() -> None:
    day = counted(counted(None, 0.0, *PLUG, NOON), 50.0, *PLUG, NOON + 5)
    other = counted(day, 60.0, *MODEL, NOON + 10)
    assert (other.joules, other.since, other.kind) == (0.0, NOON + 10, Kind.MODELLED)
    assert counted(other, 61.0, Kind.MODELLED, "another model", NOON + 11).joules == 0.0


def test_yesterdays_joules_are_not_todays() -> None:
    day = counted(None, 5.0, *PLUG, MIDNIGHT - 2)
    assert of_today(day, MIDNIGHT - 1) == day
    assert of_today(day, MIDNIGHT + 1) is None
    assert of_today(None, NOON) is None


def test_the_day_is_the_coordinators(zone: Callable[[str], None]) -> None:
    zone("CET-1CEST,M3.5.0,M10.5.0/3")
    shorter, longer = datetime(2026, 3, 29), datetime(2026, 10, 25)
    for day, hours in ((shorter, 23), (longer, 25), (datetime(2026, 7, 1), 24)):
        began, next_one = day.timestamp(), (day + timedelta(days=1)).timestamp()
        assert next_one - began == hours * 3600
        assert midnight(began) == midnight(next_one - 1) == began
        assert midnight(next_one) == next_one


STEPS = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 5, 30, 59, 61, 600, 9_000, 40_000]),  # seconds until the next thing
        st.integers(0, 20),  # watts meanwhile
        st.sampled_from(["tell", "tell", "tell", "restart"]),
    ),
    max_size=40,
)


@given(STEPS)
def test_never_more_than_was_used_and_never_falling(steps: list[tuple[int, int, str]]) -> None:
    """Against a world that knows: what was used when, to the joule."""
    now, program = NOON, 0.0
    used: list[tuple[float, float, float]] = []
    day: Day | None = None
    for seconds, watts, what in steps:
        used.append((now, now + seconds, watts))
        now, program = now + seconds, program + watts * seconds
        if what == "restart":
            program = 0.0
            continue
        before, day = day, counted(day, program, *PLUG, now)
        truth = sum(w * max(0.0, min(b, now) - max(a, day.since)) for a, b, w in used)
        # A day that began between two near tellings has its share of them at constant power.
        off = 20 * MIDNIGHT_GAP_S if day.since == midnight(day.since) else 0.0
        assert day.joules <= truth + off + 1e-6
        assert day.seconds <= now - day.since + 1e-6
        assert day.since >= midnight(now) or day.at < midnight(now)
        if before is not None and before.since == day.since:
            assert day.joules >= before.joules
            assert day.seconds >= before.seconds


# --- the file ----------------------------------------------------------------------------------------


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    day = counted(counted(None, 1.0, *PLUG, NOON), 2.5, *PLUG, NOON + 1)
    memory = Memory(
        federation="test",
        prefix="homeassistant",
        devices={"pi": Known(online=NOON, day=day), "new": Known(online=0)},
    )
    write(tmp_path, memory)
    write(tmp_path, memory)
    assert read(tmp_path) == memory
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_bytes_are_read_as_nothing_or_as_a_memory(
    tmp_path_factory: pytest.TempPathFactory, body: bytes
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    (folder / FILE).write_bytes(body)
    assert read(folder) is None


KEPT = (
    Memory(
        federation="test",
        prefix="p",
        devices={"pi": Known(online=1.0, day=counted(None, 1.0, *PLUG, NOON))},
    )
    .model_dump_json()
    .encode()
)


@given(st.integers(0, len(KEPT) - 1), st.integers(0, 255))
def test_a_file_with_a_wrong_byte_never_names_a_topic_of_others(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    body = bytearray(KEPT)
    body[place] = byte
    (folder / FILE).write_bytes(body)
    memory = read(folder)
    for name, known in memory.devices.items() if memory else ():
        assert not set(name) & set("/+#")
        assert known.day is None or known.day.joules >= 0


def test_a_name_that_is_a_topic_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(KEPT.replace(b'"pi"', b'"../#"'))
    assert read(tmp_path) is None
    assert "joules of today begin anew" in caplog.text
