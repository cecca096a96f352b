"""Updates that come after their round: merged with less weight where that can be, refused elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coordinator.settings import RunSettings
from edge_agent.training import trainer
from foundation.transport import MemoryBroker
from tests.fleet import Fleet, memory, run_settings
from tests.toys import toy_data

pytestmark = pytest.mark.anyio

FEDAVG = {"strategy": "fedavg", "settings": {"learning_rate": 5e-3, "epochs": 1}}


@dataclass
class Gates:
    """Devices that train when they are let."""

    shut: dict[str, list[threading.Event]] = field(default_factory=dict)
    """By agent: the gate of its first, second, ... piece of work; those beyond are open."""
    begun: dict[str, int] = field(default_factory=dict)

    def work(self, name: str) -> Callable[[trainer.Task, trainer.Hooks], trainer.Outcome]:
        def carry_out(task: trainer.Task, hooks: trainer.Hooks) -> trainer.Outcome:
            count = self.begun[name] = self.begun.get(name, 0) + 1
            gates = self.shut.get(name, [])
            while count <= len(gates) and not gates[count - 1].wait(0.01):
                if hooks.cancelled():
                    raise trainer.Cancelled
            return trainer.carry_out(task, hooks)

        return carry_out

    def open(self) -> None:
        for gates in self.shut.values():
            for gate in gates:
                gate.set()


@contextlib.asynccontextmanager
async def three(folder: Path, gates: Gates, run: RunSettings) -> AsyncIterator[Fleet]:
    names = ("d0", "d1", "d2")
    whole = Fleet(folder, memory(MemoryBroker()), run, toy_data, carry_out={n: gates.work(n) for n in names})
    try:
        for name in ("coordinator", *names):
            whole.start(name)
        yield whole
    finally:
        gates.open()
        for name in list(whole.tasks):
            await whole.cut(name)


async def until(condition: Callable[[], bool], within_s: float = 60) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def is_open(whole: Fleet, number: int) -> bool:
    here = None if whole.engine is None else whole.engine._open
    return here is not None and here.round == number


def stored(whole: Fleet, number: int) -> list[str]:
    assert whole.store is not None
    return [u.agent for u in whole.store.updates("r", number)]


def gate(count: int) -> list[threading.Event]:
    return [threading.Event() for _ in range(count)]


def late_run(**more: object) -> RunSettings:
    """Rounds that close without the slowest: two of three are a quorum, and the deadline is near."""
    return run_settings(**(FEDAVG | {"quorum": 0.6, "deadline_s": 5.0, "rounds": 3, "stale": 0.5} | more))


async def test_a_late_update_is_merged_once_with_less_weight(tmp_path: Path) -> None:
    gates = Gates({"d2": gate(1), "d1": [threading.Event(), threading.Event()]})
    slow, (first, second) = gates.shut["d2"][0], gates.shut["d1"]
    first.set()
    async with three(tmp_path, gates, late_run()) as whole:
        await until(lambda: is_open(whole, 2))
        assert stored(whole, 1) == ["d0", "d1"]
        assert whole.store is not None
        record = whole.store.round_record("r", 2)
        assert record is not None
        assert record.agents == ("d0", "d1"), "who is at work is not asked"
        assert record.skipped["d2"] == "it is still at work on round 1"
        slow.set()
        await until(lambda: stored(whole, 1) == ["d0", "d1", "d2"])
        second.set()
        assert await whole.finished() == "finished"
        rounds = whole.store.rounds("r")
        assert [r.late for r in rounds] == [(), ((1, "d2"),), ()]
        assert rounds[1].metrics["late"] == 1
        assert rounds[2].agents == ("d0", "d1", "d2")
        assert gates.begun["d2"] == 2


async def test_without_the_setting_a_late_update_is_refused_by_name(tmp_path: Path) -> None:
    gates = Gates({"d2": gate(1), "d1": gate(2)})
    gates.shut["d1"][0].set()
    async with three(tmp_path, gates, late_run(stale=None)) as whole:
        await until(lambda: is_open(whole, 2))
        gates.open()
        assert await whole.finished() == "finished"
        assert whole.store is not None
        record = whole.store.round_record("r", 2)
        assert record is not None
        assert record.agents == ("d0", "d1", "d2"), "it is asked again, and drops its work"
        assert stored(whole, 1) == ["d0", "d1"]
        assert all(r.late == () for r in whole.store.rounds("r"))


async def test_a_coordinator_killed_with_a_late_update_in_hand_merges_it_once(tmp_path: Path) -> None:
    gates = Gates({"d2": gate(1), "d1": gate(3)})
    gates.shut["d1"][0].set()
    run = late_run(rounds=4, snapshot_every=4, deadline_s=6.0)
    async with three(tmp_path, gates, run) as whole:
        await until(lambda: is_open(whole, 2))
        gates.shut["d2"][0].set()
        await until(lambda: "d2" in stored(whole, 1))
        await whole.cut("coordinator")  # stored, and in no round yet
        whole.engine = None
        whole.start("coordinator")
        await until(lambda: is_open(whole, 2))
        gates.shut["d1"][1].set()
        await until(lambda: is_open(whole, 3))
        assert whole.store is not None
        record = whole.store.round_record("r", 2)
        assert record is not None
        assert record.late == ((1, "d2"),)
        await whole.cut("coordinator")  # merged, and in no snapshot yet
        whole.engine = None
        whole.start("coordinator")
        await until(lambda: is_open(whole, 3))
        gates.open()
        assert await whole.finished() == "finished"
        assert whole.store is not None
        merged = [one for r in whole.store.rounds("r") for one in r.late]
        assert merged.count((1, "d2")) == 1
        assert whole.store.late_updates("r", 0) == []


async def test_async_rounds_close_on_a_full_buffer_and_lose_nothing(tmp_path: Path) -> None:
    gates = Gates({"d2": gate(1)})
    run = run_settings(**(FEDAVG | {"mode": "async", "buffer": 2, "rounds": 5, "deadline_s": 60}))
    async with three(tmp_path, gates, run) as whole:
        await until(lambda: is_open(whole, 3))
        gates.open()
        assert await whole.finished() == "finished"
        assert whole.store is not None
        rounds = whole.store.rounds("r")
        counted = [(r.round, a) for r in rounds for a in r.absorbed or ()]
        counted += [one for r in rounds for one in r.late]
        assert len(counted) == len(set(counted)), "nothing counts twice"
        assert all(len(r.absorbed or ()) + len(r.late) >= 2 for r in rounds)
        assert "d2" not in (rounds[0].absorbed or ())


async def test_async_needs_an_average(tmp_path: Path) -> None:
    run = run_settings(mode="async")
    whole = Fleet(tmp_path, memory(MemoryBroker()), run, toy_data)
    whole.start("coordinator")
    try:
        with pytest.raises(ExceptionGroup) as caught:
            await whole.finished()
        assert "pfl_tpp cannot merge late updates" in str(caught.value.exceptions[0])
    finally:
        await whole.cut("coordinator")
