"""The collector: quorum, deadline, grace, refusals, and what it does not take."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from coordinator.collector import Collector, expected_layout
from coordinator.strategies.base import load_strategy
from foundation.errors import FrameMismatch, QuorumMissed
from foundation.messages import Assignment, Update
from foundation.parameters import Parameters, Role, role_of
from tests.toys import SPEC, ToyFederation

pytestmark = pytest.mark.anyio


@dataclass
class Surroundings:
    """A clock one can turn, and how long each agent has been away."""

    now: float = 0.0
    silent: dict[str, float] = field(default_factory=dict)

    def collector(self, assignments: Sequence[Assignment], quorum: float = 0.5) -> Collector:
        return Collector(
            assignments,
            quorum=quorum,
            deadline=100.0,
            grace_s=10.0,
            silent_for=self.silent.get,
            clock=lambda: self.now,
        )


def asked(strategy: str = "fedavg", agents: int = 3) -> Sequence[Assignment]:
    federation = ToyFederation(load_strategy(strategy), agents=agents)
    return federation.plan(federation.begin(), 1)


def answer(assignment: Assignment, **changes: Any) -> Update:
    fields: dict[str, Any] = {
        "run": assignment.run,
        "round": assignment.round,
        "agent": assignment.agent,
        "examples": 1,
        "parameters": Parameters(
            {n: np.zeros(shape, np.float32) for n, shape in expected_layout(assignment)}
        ),
    }
    return Update(**(fields | changes))


async def test_all_answers_close_the_round_sorted_by_agent() -> None:
    assignments = asked()
    collector = Surroundings().collector(assignments)
    waiting = asyncio.create_task(collector.wait())
    for assignment in reversed(assignments):
        assert not waiting.done()
        collector.add(answer(assignment))
    assert [u.agent for u in await waiting] == ["d0", "d1", "d2"]


async def test_before_the_deadline_a_quorum_is_not_enough() -> None:
    around, assignments = Surroundings(), asked()
    collector = around.collector(assignments)
    for assignment in assignments[:2]:
        collector.add(answer(assignment))
    around.now = 99.9
    waiting = asyncio.create_task(collector.wait())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    around.now = 100.0
    assert [u.agent for u in await waiting] == ["d0", "d1"]


async def test_an_agent_that_is_away_is_waited_for_a_grace_and_one_that_is_not_until_the_deadline() -> None:
    around, assignments = Surroundings(), asked()
    collector = around.collector(assignments)
    for assignment in assignments[:2]:
        collector.add(answer(assignment))
    around.silent["d2"] = 10.0
    waiting = asyncio.create_task(collector.wait())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    around.silent["d2"] = 10.1
    assert len(await waiting) == 2


async def test_without_a_quorum_nobody_is_given_up_before_the_deadline() -> None:
    around, assignments = Surroundings(), asked()
    collector = around.collector(assignments)
    collector.add(answer(assignments[0]))
    around.silent.update(d1=1000.0, d2=1000.0)
    waiting = asyncio.create_task(collector.wait())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    around.now = 100.0
    with pytest.raises(QuorumMissed, match=r"1 of 3 updates are in, 2 are needed \(d1: no answer; d2: no"):
        await waiting


async def test_refusals_are_accounted_for_and_named() -> None:
    around, assignments = Surroundings(), asked()
    collector = around.collector(assignments)
    collector.add(answer(assignments[0]))
    collector.refuse("d1", "no data")
    collector.refuse("d2", "battery")
    collector.refuse("nobody", "was not asked")
    assert collector.outstanding == []
    with pytest.raises(QuorumMissed, match=r"\(d1: no data; d2: battery\)"):
        await collector.wait()


async def test_an_answer_after_a_refusal_counts_and_a_refusal_after_an_answer_does_not() -> None:
    assignments = asked()
    collector = Surroundings().collector(assignments, quorum=1.0)
    collector.refuse("d0", "malformed")
    for assignment in assignments:
        collector.add(answer(assignment))
    collector.refuse("d1", "too late for a no")
    assert collector.refusals == {}
    assert len(await collector.wait()) == 3


@pytest.mark.parametrize(
    ("quorum", "asked_of", "needed"), [(0.5, 3, 2), (0.5, 4, 2), (1.0, 3, 3), (0.01, 3, 1), (0.34, 3, 2)]
)
def test_a_quorum_is_rounded_up(quorum: float, asked_of: int, needed: int) -> None:
    assert Surroundings().collector(asked(agents=asked_of), quorum).needed == needed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"agent": "stranger"}, "'stranger' was not asked"),
        ({"round": 2}, "round is 2, not 1"),
        ({"run": "other"}, "run is 'other', not 'toy'"),
        ({"parameters": Parameters()}, "arrays are missing"),
        ({"masks": {"blocks.0.ffl": np.ones(3, np.bool_)}}, r"shape \(3,\), not"),
    ],
)
def test_what_does_not_answer_the_assignment_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    assignments = asked()
    collector = Surroundings().collector(assignments)
    collector.check(answer(assignments[0]))
    with pytest.raises(FrameMismatch, match=words):
        collector.check(answer(assignments[0], **changes))


def test_wrong_shapes_and_extra_arrays_are_refused_by_name() -> None:
    assignment = asked()[0]
    collector = Surroundings().collector([assignment])
    good = answer(assignment)
    head = good.parameters["head.weight"]
    wrong = good.parameters.updated({"head.weight": head.T})
    with pytest.raises(FrameMismatch, match=r"'head.weight' has shape \(8, 3\), not \(3, 8\)"):
        collector.check(good.model_copy(update={"parameters": wrong}))
    extra = Parameters(dict(good.parameters) | {"extra": head})
    with pytest.raises(FrameMismatch, match="'extra' was not asked for"):
        collector.check(good.model_copy(update={"parameters": extra}))


def test_the_layout_is_what_the_work_sends_back() -> None:
    for strategy in ("fedavg", "fedtp", "pfl_tpp"):
        assignment = asked(strategy)[0]
        names = [name for name, _ in expected_layout(assignment)]
        assert {role_of(name) for name in names} <= assignment.work.send
        changed = [n for n in names if role_of(n) in assignment.work.change]
        assert all(name in assignment.parameters for name in changed)
    assert expected_layout(asked("local")[0]) == ()
    assert SPEC.layout  # the layouts above were not empty for want of a model
    assert Role.HEAD in {role_of(n) for n, _ in expected_layout(asked("fedavg")[0])}


async def test_after_the_soft_deadline_the_quorum_suffices() -> None:
    around = Surroundings()
    assignments = asked()
    collector = Collector(
        assignments,
        quorum=0.5,
        deadline=100.0,
        grace_s=10.0,
        silent_for=around.silent.get,
        clock=lambda: around.now,
        soft=20.0,
    )
    around.now = 30.0
    waiting = asyncio.create_task(collector.wait())
    collector.add(answer(assignments[0]))
    await asyncio.sleep(0)
    assert not waiting.done(), "one of three is no quorum"
    collector.add(answer(assignments[1]))
    assert [u.agent for u in await waiting] == ["d0", "d1"]


async def test_a_full_buffer_closes_the_round_whosever_updates_fill_it() -> None:
    around, assignments = Surroundings(), asked()
    at_work = ["d9"]
    collector = Collector(
        assignments,
        quorum=1.0,
        deadline=100.0,
        grace_s=10.0,
        silent_for=around.silent.get,
        clock=lambda: around.now,
        buffer=2,
        others=lambda: at_work,
    )
    waiting = asyncio.create_task(collector.wait())
    collector.add(answer(assignments[0]))
    await asyncio.sleep(0)
    assert not waiting.done()
    collector.add_late(answer(assignments[1]).model_copy(update={"agent": "d9"}))
    assert [u.agent for u in await waiting] == ["d0"]
    assert [*collector.late] == [(1, "d9")]


async def test_a_buffer_nobody_can_fill_any_more_does_not_wait() -> None:
    around, assignments = Surroundings(), asked()
    collector = Collector(
        assignments,
        quorum=1.0,
        deadline=100.0,
        grace_s=10.0,
        silent_for=around.silent.get,
        clock=lambda: around.now,
        buffer=9,
    )
    collector.add(answer(assignments[0]))
    collector.refuse("d1", "no")
    around.silent["d2"] = 11.0
    assert [u.agent for u in await collector.wait()] == ["d0"]
