"""Budgets and limits in whole federations: who is asked for less or not at all, and after a kill again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from coordinator.settings import Budget, BudgetSettings
from coordinator.store.records import RunRecord
from coordinator.web.models import StartRun
from edge_agent.conditions import Conditions
from edge_agent.energy.meter import Meter
from edge_agent.limits import Limits
from edge_agent.settings import LimitSettings
from foundation.transport import MemoryBroker
from tests.conftest import LONG
from tests.devices import written
from tests.fleet import Fleet, fleet, memory, run_settings
from tests.metered import STEP_J, Metered

pytestmark = pytest.mark.anyio

EPOCHS, STEPS = 4, 2
"""Local epochs of the run, and optimizer steps of one: 48 examples in batches of 32."""
FULL_J = EPOCHS * STEPS * STEP_J
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()


def run(**changes: object) -> object:
    return run_settings(strategy="fedavg", settings={"epochs": EPOCHS}, **changes)


def all_metered() -> dict[str, Metered]:
    return {name: Metered() for name in ("d0", "d1", "d2")}


async def until(condition: Callable[[], bool], within_s: float = 30) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


async def texts(whole: Fleet, kind: str) -> list[str]:
    assert whole.engine is not None
    assert whole.store is not None
    await whole.engine.live.flush()
    return [e.text for e in reversed(whole.store.latest_events(200)) if e.kind == kind]


def steps(whole: Fleet, number: int) -> dict[str, float]:
    assert whole.store is not None
    return {u.agent: u.summary["metrics"]["steps"] for u in whole.store.updates("r", number)}


async def test_a_budget_of_joules_eases_from_the_second_round_on(tmp_path: Path) -> None:
    budgets = BudgetSettings(devices={"d1": Budget(joules=0.6 * FULL_J)})
    more = {"budgets": budgets, "metered": all_metered()}
    warm = written(tmp_path / "root", {"sys/class/thermal/thermal_zone0/temp": "61500\n"})
    async with fleet(tmp_path, memory(MemoryBroker()), run(), **more) as whole:
        await until(lambda: "d1" in whole.agents)
        whole.agents["d1"]._conditions = Conditions(warm)
        assert await whole.finished() == "finished"
        assert steps(whole, 1) == {"d0": 8, "d1": 8, "d2": 8}, "nothing is known yet"
        assert steps(whole, 2) == {"d0": 8, "d1": 4, "d2": 8}
        assert steps(whole, 3) == {"d0": 8, "d1": 4, "d2": 8}
        assert await texts(whole, "budget_unknown") == [
            "d1: it is asked in full: nothing is known yet of what a round costs it"
        ]
        why = "2 of 4 local epochs: the whole round needs about 40 J (modelled), the budget is 24 J a round"
        assert await texts(whole, "agent_eased") == [f"d1 eased: {why}"] * 2
        assert whole.store is not None
        assert whole.store.round_record("r", 1).eased == {}
        assert whole.store.round_record("r", 2).eased["d1"]["reason"] == why
        status = whole.engine.live.agent("d1")
        assert (status.eased, status.skipped) == (why, None)
        assert status.temperature_c == 61.5
        assert whole.engine.live.agent("d0").temperature_c is None, "it does not tell"


async def test_what_not_even_one_epoch_fits_is_skipped_with_the_reason(tmp_path: Path) -> None:
    budgets = BudgetSettings(deadline_s=100, devices={"d1": Budget(joules=4, deadline_s=0.5)})
    more = {"budgets": budgets, "metered": all_metered()}
    async with fleet(tmp_path, memory(MemoryBroker()), run(), **more) as whole:
        assert await whole.finished() == "finished"
        assert steps(whole, 2) == steps(whole, 3) == {"d0": 8, "d2": 8}
        why = "it needs about 10 J (modelled) for 1 of 4 local epochs, the budget is 4 J a round"
        assert await texts(whole, "agent_skipped") == [f"d1 skipped: {why}"] * 2
        assert whole.store is not None
        assert whole.store.round_record("r", 3).skipped == {"d1": why}
        assert whole.engine.live.agent("d1").skipped == why


@pytest.mark.parametrize(("one_thread_s", "asked"), [(0.25, [8, 4, 8, 8]), (0.75, [8, 4, 4, 4])])
async def test_fewer_threads_are_tried_and_kept_where_they_make_more_epochs_fit(
    tmp_path: Path, one_thread_s: float, asked: list[int]
) -> None:
    """In the second round one thread is tried; what that cost decides about the third and fourth."""
    metered = all_metered() | {"d1": Metered(one_thread_s=one_thread_s)}
    more = {
        "budgets": BudgetSettings(devices={"d1": Budget(joules=0.6 * FULL_J)}),
        "metered": metered,
        "conditions": tmp_path / "root",
        "threads": 2,
    }
    async with fleet(tmp_path, memory(MemoryBroker()), run(rounds=4), **more) as whole:
        assert await whole.finished() == "finished"
        assert [steps(whole, number)["d1"] for number in (1, 2, 3, 4)] == asked
        assert whole.store is not None
        updates = [whole.store.updates("r", number) for number in (1, 2, 3, 4)]
        used = [{u.agent: u.summary["state"]["threads"] for u in each}["d1"] for each in updates]
        saves = one_thread_s < 0.5
        assert used == ([2, 1, 1, 1] if saves else [2, 1, 2, 2])
        told = await texts(whole, "agent_eased")
        assert "1 of 2 threads: to learn what that saves" in told[0]
        assert ("1 of 2 threads: with 2 the whole round needs about 40 J (modelled)" in told[1]) is saves


async def test_joules_that_nobody_knows_cannot_be_budgeted_and_that_is_said(tmp_path: Path) -> None:
    budgets = BudgetSettings(joules=1, joules_per_day=1)
    async with fleet(tmp_path, memory(MemoryBroker()), run(), budgets=budgets) as whole:
        assert await whole.finished() == "finished"
        assert steps(whole, 3) == {"d0": 8, "d1": 8, "d2": 8}
        told = await texts(whole, "budget_unknown")
        assert "d1: its budget of joules cannot hold: nobody knows its joules" in told
        assert len(told) == 6, "of every agent once that nothing is known, and once that it never will be"
        assert await texts(whole, "agent_skipped") == []


async def test_a_day_that_is_spent_ends_at_midnight(tmp_path: Path) -> None:
    """All have spent their day after a round: the run waits for the next one and goes on."""
    now = [NOON]
    more = {
        "budgets": BudgetSettings(joules_per_day=FULL_J),
        "metered": all_metered(),
        "clock": lambda: now[0],
    }
    async with fleet(tmp_path, memory(MemoryBroker()), run(rounds=2), **more) as whole:
        await until(lambda: whole.engine is not None)
        live = whole.engine.live
        await until(lambda: live.snapshot().phase == "waiting for agents" and live.snapshot().round == 2)
        why = "today's 40 J are spent (40.0 J modelled), until 00:00 UTC"
        assert live.agent("d0").skipped == why
        now[0] += 86_400
        assert await whole.finished() == "finished"
        assert steps(whole, 2) == {"d0": 8, "d1": 8, "d2": 8}
        assert await texts(whole, "agent_skipped") == [f"d{i} skipped: {why}" for i in range(3)]


async def test_a_run_that_nobody_can_afford_fails_and_says_why(tmp_path: Path) -> None:
    more = {"budgets": BudgetSettings(joules=1), "metered": all_metered()}
    async with fleet(tmp_path, memory(MemoryBroker()), run(), **more) as whole:
        assert await whole.finished() == "failed"
        reason = whole.store.run("r").reason
        assert reason.startswith("nobody can afford this round: raise [budgets] (d0: it needs about 10 J")


async def _eased(folder: Path, *, kill: bool) -> bytes:
    budgets = BudgetSettings(devices={"d1": Budget(joules=0.6 * FULL_J)})
    more = {"budgets": budgets, "metered": all_metered()}
    async with fleet(folder, memory(MemoryBroker()), run(), **more) as whole:
        if kill:
            await until(lambda: whole.store is not None and whole.store.has_run("r"))
            await until(lambda: len(whole.store.rounds("r")) == 2)
            await whole.cut("coordinator")
            # Another budget now: the open round keeps what it was opened with.
            whole.engine, whole.budgets = None, BudgetSettings()
            whole.start("coordinator")
            await until(lambda: len(whole.store.rounds("r")) == 3)
        assert await whole.finished() == "finished"
        assert steps(whole, 2)["d1"] == 4
        return (json.dumps(whole.store.round_record("r", 2).eased) + str(steps(whole, 2))).encode()


async def test_the_open_round_keeps_its_decisions_after_a_kill(tmp_path: Path) -> None:
    assert await _eased(tmp_path / "a", kill=False) == await _eased(tmp_path / "b", kill=True)


@pytest.mark.parametrize("when", [2, pytest.param(3, marks=LONG)])
async def test_after_a_kill_an_eased_run_ends_in_the_same_bits(tmp_path: Path, when: int) -> None:
    budgets = BudgetSettings(joules=0.6 * FULL_J)
    ends = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        more = {"budgets": budgets, "metered": all_metered()}
        async with fleet(folder, memory(MemoryBroker()), run(), **more) as whole:
            if folder.name == "b":
                await until(lambda: whole.store is not None and whole.store.has_run("r"))
                await until(lambda: len(whole.store.rounds("r")) == when)
                await whole.cut("coordinator")
                whole.engine = None
                whole.start("coordinator")
            assert await whole.finished() == "finished"
            assert steps(whole, 3) == {"d0": 4, "d1": 4, "d2": 4}
            ends.append(whole.state().to_bytes())
    assert ends[0] == ends[1]


async def test_pruning_strategies_are_asked_for_a_larger_share_to_go(tmp_path: Path) -> None:
    settings = {"epochs": EPOCHS, "target": 0.3, "warm_up": 0, "every": 2}
    more = {"budgets": BudgetSettings(joules=0.9 * FULL_J), "metered": all_metered()}
    pruned = run_settings(strategy="pfl_tpp", settings=settings, rounds=2)
    async with fleet(tmp_path, memory(MemoryBroker()), pruned, **more) as whole:
        assert await whole.finished() == "finished"
        (ease,) = [e for a, e in whole.store.round_record("r", 2).eased.items() if a == "d0"]
        assert ease["epochs"] == 3
        assert 0.3 < ease["gone"] <= 0.9
        assert "of the FFL units are to go and not 30%" in ease["reason"]


async def test_a_device_outside_its_limits_is_not_asked_and_comes_back(tmp_path: Path) -> None:
    hour = [23]

    def limits(meter: Meter, vault: Path) -> Limits:
        settings = LimitSettings(quiet_hours=("22:00-06:30",))
        return Limits(settings, meter, vault, clock=lambda: datetime(2026, 3, 1, hour[0], tzinfo=UTC))

    unhurried = run(min_agents=2, rounds=400)
    async with fleet(tmp_path, memory(MemoryBroker()), unhurried, limits={"d2": limits}) as whole:
        await until(lambda: whole.store is not None and whole.store.has_run("r"))
        await until(lambda: len(whole.store.updates("r", 1)) == 2)
        quiet = "it has quiet hours, until 2026-03-02 06:30 UTC"
        assert whole.engine.live.agent("d2").unavailable == quiet
        assert f"d2 skipped: {quiet}" in await texts(whole, "agent_skipped")
        hour[0] = 12
        await until(lambda: any("d2" in r.agents for r in whole.store.latest_rounds("r", 2)))
        assert whole.engine.live.agent("d2").unavailable is None
        hour[0] = 22
        await until(lambda: whole.engine.live.agent("d2").unavailable is not None)
        await until(lambda: whole.store.latest_rounds("r", 1)[0].agents == ("d0", "d1"))


async def test_a_run_waits_for_a_fleet_that_sleeps(tmp_path: Path) -> None:
    hour = [23]

    def limits(meter: Meter, vault: Path) -> Limits:
        settings = LimitSettings(quiet_hours=("22:00-06:30",))
        return Limits(settings, meter, vault, clock=lambda: datetime(2026, 3, 1, hour[0], tzinfo=UTC))

    asleep = dict.fromkeys(("d0", "d1", "d2"), limits)
    async with fleet(tmp_path, memory(MemoryBroker()), run(wait_s=0.05), limits=asleep) as whole:
        await until(lambda: whole.engine is not None)
        live = whole.engine.live
        await until(lambda: live.snapshot().detail.get("unavailable") == 3)
        await asyncio.sleep(0.3)
        assert live.snapshot().phase == "waiting for agents", "they are here: it does not give up"
        (waits,) = await texts(whole, "run_waits")
        assert waits.startswith("run r waits for agents at their limits (d0: it has quiet hours, until")
        hour[0] = 12
        assert await whole.finished() == "finished"


async def test_a_second_run_knows_from_the_first_what_a_round_costs(tmp_path: Path) -> None:
    """Same model, strategy and batches: eased from its first round on. Another batch size: asked in full."""
    budgets = BudgetSettings(devices={"d1": Budget(joules=0.6 * FULL_J)})
    more = {"budgets": budgets, "metered": all_metered()}
    async with fleet(tmp_path, memory(MemoryBroker()), run(rounds=1), **more) as whole:
        assert await whole.finished() == "finished"
        whole.store.open_run(RunRecord("of-another-version", "fedavg", "{}", "{}", 1, 0))
        for name, batch, expected in (("second", {}, 4.0), ("third", {"batch_size": 16}, 12.0)):
            settings = {"epochs": EPOCHS} | batch
            await whole.engine.start(StartRun(name=name, strategy="fedavg", settings=settings, rounds=1))
            await until(whole.engine.finished.is_set)
            (update,) = [u for u in whole.store.updates(name, 1) if u.agent == "d1"]
            assert update.summary["metrics"]["steps"] == expected
