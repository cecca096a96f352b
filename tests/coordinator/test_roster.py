"""The roster: who can take part, why not, and who has been silent for how long."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

from coordinator.roster import Roster
from foundation.errors import RoundError
from foundation.messages import AgentCard, Unavailable
from tests.toys import LABELS, SPEC, toy_card, toy_data


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def with_card(roster: Roster, agent: str, **changes: Any) -> AgentCard:
    card = toy_card(agent, toy_data(0)).model_copy(update=changes)
    entry = roster.entry(agent)
    entry.card, entry.online = card, True
    return card


def test_only_those_who_are_online_and_known_are_present_sorted_by_name() -> None:
    roster = Roster()
    b, a = with_card(roster, "b"), with_card(roster, "a")
    with_card(roster, "c")
    roster.entry("c").online = False
    roster.entry("d").online = True
    assert roster.present(SPEC, LABELS) == [a, b]
    assert roster.reason_against("c", SPEC, LABELS) == "it is offline"
    assert roster.reason_against("d", SPEC, LABELS) == "it has not introduced itself yet"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": None, "problem": "data: d.npz is empty"}, "data: d.npz is empty"),
        ({"input": None}, "it has no data"),
        ({"protocol": 99}, "install the same version on both"),
        ({"shape": (1, 9, 9)}, r"its data \(image \(1, 9, 9\), 3 classes\) is not the run's"),
        ({"labels": ("a", "b")}, "2 classes"),
    ],
)
def test_who_cannot_take_part_is_told_why(changes: dict[str, Any], words: str) -> None:
    roster = Roster()
    with_card(roster, "a", **changes)
    reason = roster.reason_against("a", SPEC, LABELS)
    assert reason is not None
    assert re.search(words, reason), reason
    assert roster.present(SPEC, LABELS) == []


def test_an_agent_with_data_and_a_problem_beside_them_still_trains() -> None:
    roster = Roster()
    with_card(roster, "a", problem="serving: port taken")
    assert roster.reason_against("a", SPEC, LABELS) is None


def test_an_agent_that_was_set_aside_stays_out() -> None:
    roster = Roster()
    with_card(roster, "a")
    roster.entry("a").set_aside = "set aside after 3 malformed frames"
    assert roster.reason_against("a", SPEC, LABELS) == "set aside after 3 malformed frames"


def test_the_description_of_most_agents_is_agreed_and_a_tie_does_not_depend_on_the_order() -> None:
    names = ["a", "b", "c", "d"]
    for order in (names, names[::-1]):
        roster = Roster()
        for name in order:
            with_card(roster, name, shape=(1, 4, 4) if name in "ab" else (1, 8, 8))
        assert roster.agreed() == ("image", (1, 4, 4), LABELS)
        with_card(roster, "e", shape=(1, 8, 8))
        assert roster.agreed() == ("image", (1, 8, 8), LABELS)
    with pytest.raises(RoundError, match="no agent with usable data is online"):
        Roster().agreed()


def test_silence_is_counted_from_the_first_mention_not_from_the_beginning_of_time() -> None:
    clock = Clock()
    roster = Roster(clock)
    assert roster.silent_for("a") == 0.0  # a coordinator that has just started has heard nobody yet
    clock.now += 5
    assert roster.silent_for("a") == 5.0
    roster.heard("a")
    clock.now += 2
    assert roster.silent_for("a") == 2.0


def test_who_is_at_a_limit_is_not_present_but_rests_and_says_until_when() -> None:
    roster = Roster()
    until = datetime(2026, 3, 2, 6, 30, tzinfo=UTC)
    quiet = Unavailable(cause="quiet", reason="it has quiet hours", until=until)
    a = with_card(roster, "a")
    with_card(roster, "b", unavailable=quiet)
    with_card(roster, "c", unavailable=quiet, shape=(1, 9, 9))
    with_card(roster, "d", unavailable=quiet)
    roster.entry("d").online = False
    assert roster.present(SPEC, LABELS) == [a]
    assert roster.resting(SPEC, LABELS) == ["b"], "the others could not work anyway"
    assert roster.reason_against("b", SPEC, LABELS) == "it has quiet hours, until 2026-03-02 06:30 UTC"
    reason = roster.reason_against("c", SPEC, LABELS)
    assert reason is not None
    assert reason.startswith("its data")


def test_a_session_that_comes_back_again_and_again_is_a_second_device_of_the_same_name() -> None:
    roster = Roster()
    restarts = [roster.begun("a", f"life {n}") for n in range(40)]
    assert not any(restarts), "processes that come one after another are one device"
    assert [roster.begun("b", session) for session in "xyxyxyzz"] == [
        False, False, False, True, False, False, False, False,
    ]  # fmt: skip
    assert not any(roster.begun("c", session) for session in "xyx"), "an old letter of the broker's"
    assert roster.entry("c").session == "x"
