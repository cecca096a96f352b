"""Quarantine: kept apart within bounds, told apart, survived when somebody meddles; and strikes."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.roster import Roster
from coordinator.store import quarantine
from coordinator.store.quarantine import Quarantine
from coordinator.store.sql import Store
from foundation.errors import StoreError
from tests.coordinator.test_store import Clock, a_run


def keep(place: Quarantine, agent: str, frame: bytes, round: int = 1, cause: str = "outside") -> str:
    return place.keep(agent, frame, cause=cause, reason="too large", run="r", round=round).id


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def place(tmp_path: Path, clock: Clock) -> Quarantine:
    return Quarantine(tmp_path / "q", clock)


def test_a_case_has_its_reason_and_its_frame(place: Quarantine, clock: Clock) -> None:
    assert place.cases() == []
    first = keep(place, "d0", b"bad")
    clock.now += 1
    second = keep(place, "d1", b"bad", round=2)
    assert [c.id for c in place.cases()] == [second, first], "newest first"
    case = place.cases("r")[1]
    assert (case.agent, case.round, case.reason, case.frame_bytes, case.kept) == (
        "d0",
        1,
        "too large",
        3,
        True,
    )
    assert place.frame(first) == b"bad"
    assert place.cases("other") == []
    for unknown in ("none", "../../etc/passwd"):
        with pytest.raises(StoreError, match="there is no quarantined update"):
            place.frame(unknown)


def test_the_same_thing_told_twice_is_kept_once(place: Quarantine) -> None:
    assert keep(place, "d0", b"bad") == keep(place, "d0", b"bad") != keep(place, "d0", b"bad", round=2)
    assert len(place.cases()) == 2


def test_old_frames_and_then_old_cases_go(
    place: Quarantine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "FRAMES", 3)
    monkeypatch.setattr(quarantine, "FRAME_BYTES", 10)
    monkeypatch.setattr(quarantine, "CASES", 4)
    ids = []
    for size in (1, 1, 1, 1, 6, 4):
        clock.now += 1
        ids.append(keep(place, "d0", bytes(size), round=len(ids) + 1))
    found = place.cases()
    assert [c.id for c in found] == ids[:1:-1], "four cases"
    assert [c.kept for c in found] == [True, True, False, False], "ten bytes of frames"
    with pytest.raises(StoreError, match="no longer kept"):
        place.frame(found[-1].id)


def test_what_is_judged_again_is_forgotten_first(place: Quarantine) -> None:
    keep(place, "d0", b"bad")
    keep(place, "d1", b"torn", cause="malformed")
    keep(place, "d2", b"bad", round=2)
    place.forget("r", 1)
    assert sorted(c.agent for c in place.cases()) == ["d1", "d2"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"id": 1}', b"\xff\xfe", b"[" * 10_000])
def test_a_broken_file_costs_its_own_case_only(place: Quarantine, tmp_path: Path, body: bytes) -> None:
    keep(place, "d0", b"bad")
    (tmp_path / "q" / "broken.json").write_bytes(body)
    assert [c.agent for c in place.cases()] == ["d0"]


def test_three_strikes_of_any_kind_set_an_agent_aside() -> None:
    roster = Roster()
    assert roster.strike("a", "malformed", "torn") is None
    assert roster.strike("a", "outside", "huge") is None
    said = roster.strike("a", "outside", "huge again")
    assert said == "set aside after 3 bad answers (2 far from the others, 1 malformed); the last: huge again"
    assert roster.entry("a").set_aside == said
    assert roster.strike("a", "malformed", "more") is None, "it is said once"
    roster.forgive()
    assert (roster.entry("a").set_aside, roster.entry("a").outside) == (None, 0), "another run begins"
    for _ in range(2):
        roster.strike("b", "malformed", "torn")
    assert roster.strike("b", "malformed", "torn") == "set aside after 3 malformed frames; the last: torn"


# --- late updates in the store -------------------------------------------------------------------


def closed(store: Store, number: int, agents: list[str], late: list[tuple[int, str]] | None = None) -> None:
    store.open_round("r1", number, ["a", "b"], 0.0)
    for agent in agents:
        store.add_update("r1", number, agent, f"{number}{agent}".encode(), {})
    store.close_round("r1", number, None, {}, absorbed=agents, late=late or [])


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    store = Store.open(tmp_path / "store", clock=clock)
    store.open_run(a_run())
    store.save_initial_state("r1", b"0")
    return store


def test_a_late_update_waits_until_a_round_was_made_of_it(store: Store) -> None:
    closed(store, 1, ["a"])
    assert store.late_updates("r1", 0) == []
    store.add_update("r1", 1, "b", b"1b", {})
    assert store.late_updates("r1", 0) == [(1, "b")]
    assert store.late_updates("r1", 1) == [], "that would be too late"
    closed(store, 2, ["a"], late=[(1, "b")])
    assert store.late_updates("r1", 0) == []
    record = store.round_record("r1", 2)
    assert record is not None
    assert (record.absorbed, record.late) == (("a",), ((1, "b"),))
    store.close()


def test_frames_that_no_snapshot_has_yet_survive_it(store: Store) -> None:
    closed(store, 1, ["a"])
    store.add_update("r1", 1, "b", b"1b", {})
    closed(store, 2, ["a", "b"])
    assert store.drop_frames("r1", 2, late_after=0) == 1, "that of a in round 1"
    assert store.update_frame("r1", 1, "b") == b"1b"
    closed(store, 3, ["a"], late=[(1, "b")])
    assert store.drop_frames("r1", 2, late_after=0) == 0, "round 3 can be made again"
    assert store.update_frame("r1", 1, "b") == b"1b"
    assert store.drop_frames("r1", 3, late_after=0) == 3
    with pytest.raises(StoreError, match="has been released"):
        store.update_frame("r1", 1, "b")
    store.add_update("r1", 2, "c", b"2c", {})
    assert store.drop_frames("r1", 3, late_after=2) == 1, "too late for any round"
    store.close()


def test_a_late_update_that_was_refused_is_let_go(store: Store) -> None:
    closed(store, 1, ["a"])
    store.add_update("r1", 1, "b", b"1b", {})
    store.open_round("r1", 2, ["a"], 0.0)
    store.close_round("r1", 2, None, {}, absorbed=[], refused=[(1, "b")])
    assert store.late_updates("r1", 0) == []
    with pytest.raises(StoreError, match="has been released"):
        store.update_frame("r1", 1, "b")
    store.close()
