"""Whole federations on MemoryTransport: rounds, kills, losses, late and hostile letters."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from coordinator.strategies.base import available
from edge_agent.samples import LocalData
from foundation.errors import RoundError
from foundation.transport import MemoryBroker
from tests.fleet import fleet, memory, run_settings
from tests.toys import SPEC, same, toy_data

pytestmark = pytest.mark.anyio


async def _unbroken(folder: Path, **changes: object) -> bytes:
    async with fleet(folder, memory(MemoryBroker()), run_settings(**changes)) as whole:
        assert await whole.finished() == "finished"
        return whole.state().to_bytes()


@pytest.mark.parametrize("strategy", available())
async def test_a_run_of_every_strategy_ends_with_personal_models(tmp_path: Path, strategy: str) -> None:
    run = run_settings(strategy=strategy, settings={"learning_rate": 5e-3})
    async with fleet(tmp_path, memory(MemoryBroker()), run) as whole:
        assert await whole.finished() == "finished"
        assert whole.store is not None
        rounds = whole.store.rounds("r")
        assert [(r.round, r.state) for r in rounds] == [(1, "closed"), (2, "closed"), (3, "closed")]
        assert all(r.metrics["updates"] == 3 for r in rounds)
        assert rounds[-1].metrics["accuracy"] > 0.6
        artifacts = whole.store.artifacts("r")
        assert sorted(a.agent for a in artifacts) == ["d0", "d1", "d2"]
        for agent in ("d0", "d1", "d2"):
            assert (tmp_path / agent / "artifacts" / "current" / "model.onnx").exists()
            assert not whole.agents[agent].vault.outbox()


async def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    assert await _unbroken(tmp_path / "a") == await _unbroken(tmp_path / "b")


async def test_an_agent_cut_off_in_training_comes_back_to_the_same_end(tmp_path: Path) -> None:
    settings = {"warm_up": 0, "target": 0.5, "every": 2, "learning_rate": 5e-3, "epochs": 40}
    expected = await _unbroken(tmp_path / "a", settings=settings)
    run = run_settings(settings=settings)
    async with fleet(tmp_path / "b", memory(MemoryBroker()), run) as whole:
        async with asyncio.timeout(30):
            checkpoint = tmp_path / "b" / "d1" / "work" / "checkpoint.safetensors"
            while not checkpoint.exists():
                await asyncio.sleep(0.002)
        await whole.cut("d1")
        assert checkpoint.exists(), "it was cut off in the middle of its work"
        await asyncio.sleep(0.2)
        whole.start("d1")
        assert await whole.finished() == "finished"
        assert whole.state().to_bytes() == expected


async def test_a_coordinator_cut_off_in_a_round_resumes_it(tmp_path: Path) -> None:
    expected = await _unbroken(tmp_path / "a")
    async with fleet(tmp_path / "b", memory(MemoryBroker())) as whole:
        async with asyncio.timeout(30):
            while whole.store is None or len(whole.store.rounds("r") if whole.store.has_run("r") else []) < 2:
                await asyncio.sleep(0.002)
        await whole.cut("coordinator")
        whole.engine = None
        await asyncio.sleep(0.3)
        whole.start("coordinator")
        assert await whole.finished() == "finished"
        assert whole.state().to_bytes() == expected
        assert whole.store is not None
        assert [len(whole.store.updates("r", n)) for n in (1, 2, 3)] == [3, 3, 3]


async def test_a_paused_run_ends_its_round_and_stays_paused_over_a_restart(tmp_path: Path) -> None:
    expected = await _unbroken(tmp_path / "a")
    async with fleet(tmp_path / "b", memory(MemoryBroker())) as whole, asyncio.timeout(30):

        def states() -> list[tuple[int, str]]:
            assert whole.store is not None
            return [(r.round, r.state) for r in whole.store.rounds("r")]

        async def rests() -> None:
            while whole.engine is None or whole.engine.live.snapshot().phase != "paused":
                await asyncio.sleep(0.002)

        while whole.store is None or not whole.store.has_run("r") or not states():
            await asyncio.sleep(0.002)
        assert whole.engine is not None
        await whole.engine.pause("r", "a storm")
        with pytest.raises(RoundError, match="is paused, not running"):
            await whole.engine.pause("r", "again")
        await rests()
        before = states()
        assert {state for _, state in before} == {"closed"}
        assert len(before) < 3
        assert (whole.store.run("r").state, whole.store.run("r").reason) == ("paused", "a storm")
        await whole.cut("coordinator")
        whole.engine = None
        whole.start("coordinator")
        await rests()
        assert states() == before
        assert whole.store.run("r").state == "paused"
        await whole.engine.resume("r")
        assert await whole.finished() == "finished"
        assert whole.state().to_bytes() == expected
        with pytest.raises(RoundError, match="is not the one in progress"):
            await whole.engine.pause("r", "too late")


async def test_without_a_snapshot_the_updates_since_make_the_state_again(tmp_path: Path) -> None:
    expected = await _unbroken(tmp_path / "a")
    run = run_settings(snapshot_every=3)
    async with fleet(tmp_path / "b", memory(MemoryBroker()), run) as whole:
        async with asyncio.timeout(30):
            while whole.store is None or len(whole.store.rounds("r") if whole.store.has_run("r") else []) < 3:
                await asyncio.sleep(0.002)
        assert whole.store.latest_state("r")[0] == 0, "rounds 1 and 2 closed without a snapshot"
        await whole.cut("coordinator")
        whole.engine = None
        whole.start("coordinator")
        assert await whole.finished() == "finished"
        assert whole.state().to_bytes() == expected
        assert whole.store.latest_state("r")[0] == 3


async def test_an_agent_that_does_not_know_a_term_is_left_out_by_name(tmp_path: Path) -> None:
    async with fleet(tmp_path, memory(MemoryBroker()), run_settings(min_agents=3)) as whole:
        old = whole.agents
        async with asyncio.timeout(30):
            while "d2" not in old:
                await asyncio.sleep(0.001)
        card = old["d2"].card
        old["d2"].card = lambda: card().model_copy(update={"terms": frozenset({"proximal"})})
        assert await whole.finished() == "finished"
        assert whole.engine is not None
        assert whole.store is not None
        await whole.engine.live.flush()
        assert [u.agent for u in whole.store.updates("r", 1)] == ["d0", "d1"]
        texts = [e.text for e in whole.store.latest_events(100)]
        assert any("d2 skipped: it does not know threshold_pruning" in text for text in texts), texts


async def test_another_seed_is_another_run(tmp_path: Path) -> None:
    assert await _unbroken(tmp_path / "a", seed=1) != await _unbroken(tmp_path / "b", seed=0)


async def test_an_agent_with_other_data_is_skipped_with_a_reason(tmp_path: Path) -> None:
    wide = SPEC.model_copy(update={"shape": (1, 4, 6)})

    def load(seed: int) -> LocalData:
        return toy_data(seed, spec=wide if seed == 2 else SPEC)

    async with fleet(tmp_path, memory(MemoryBroker()), run_settings(), load) as whole:
        assert await whole.finished() == "finished"
        assert whole.engine is not None
        assert whole.store is not None
        await whole.engine.live.flush()
        assert [u.agent for u in whole.store.updates("r", 1)] == ["d0", "d1"]
        texts = [e.text for e in whole.store.latest_events(100)]
        assert any("d2 skipped: its data (image (1, 4, 6)" in text for text in texts), texts


async def test_too_few_agents_is_a_failed_run_with_a_reason(tmp_path: Path) -> None:
    run = run_settings(min_agents=9, wait_s=3)
    async with fleet(tmp_path, memory(MemoryBroker()), run) as whole:
        assert await whole.finished() == "failed"
        assert whole.engine is not None
        texts = [e.text for e in whole.store.latest_events(50)] if whole.store else []
        await whole.engine.live.flush()
        texts = [e.text for e in whole.store.latest_events(50)] if whole.store else []
        assert any("3 of 9 agents came" in text for text in texts), texts


async def test_states_are_finite_and_differ_per_agent(tmp_path: Path) -> None:
    async with fleet(tmp_path, memory(MemoryBroker())) as whole:
        assert await whole.finished() == "finished"
        state = whole.state()
        assert all(np.isfinite(a).all() for a in state.shared.values())
        assert not same(state.private["d0"], state.private["d1"])
