"""New models go out ring by ring; what does harm is stopped; pins and rollbacks reach one device or all.

Predictors follow the folders in this process. Real servers, over a real broker and HTTP, are in
tests/broker/test_rollout.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.fleet.records import FleetRecords
from coordinator.settings import RolloutSettings
from coordinator.store.rollouts import Member, Rollout
from edge_agent.serving import owner, predictor, record
from export.folder import CURRENT, PINNED, SERVING, linked
from foundation.errors import RoundError, SettingsError
from foundation.messages import AgentCard
from foundation.topics import Topics
from foundation.transport import MemoryBroker
from tests.fleet import Fleet, fleet, memory, run_settings

pytestmark = pytest.mark.anyio
NAMES = ("d0", "d1", "d2")
RINGS = RolloutSettings(enabled=True, canary=("d1",), rings=(0.6, 1.0), soak_s=0, errors=0.5, accuracy=100)


async def until(condition: Callable[[], bool], within_s: float = 60) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


class Server:
    """Follows a folder as the serving process does, where the test says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._predictor: predictor.Predictor | None = None

    def look(self) -> str | None:
        """Look once; returns what serves."""
        if not (self.folder / CURRENT).is_symlink():
            return None
        if self._predictor is None:
            self._predictor = predictor.Predictor(self.folder)
        else:
            self._predictor.reload()
        return linked(self.folder, SERVING)


class House:
    """A fleet whose devices serve, as far as anybody can tell."""

    def __init__(self, whole: Fleet, folder: Path) -> None:
        self.whole = whole
        self.servers = {name: Server(folder / name / "artifacts") for name in NAMES}
        self.away: set[str] = set()

    async def serve(self) -> None:
        while True:
            for name in NAMES:
                if name not in self.away:
                    self.servers[name].look()
            await asyncio.sleep(0.05)

    def root(self, name: str) -> Path:
        return self.servers[name].folder

    @property
    def newest(self) -> Rollout:
        assert self.whole.store is not None
        return self.whole.store.rollouts(1)[0]

    def members(self) -> dict[str, Member]:
        assert self.whole.store is not None
        newest = self.newest
        return {m.agent: m for m in self.whole.store.members(newest.run, newest.round)}

    def is_at(self, round: int, state: str, ring: int) -> bool:
        assert self.whole.store is not None
        found = self.whole.store.rollouts(1)
        return bool(found) and (found[0].round, found[0].state, found[0].ring) == (round, state, ring)

    def told(self, kind: str) -> list[str]:
        assert self.whole.store is not None
        return [event.text for event in self.whole.store.latest_events(500) if event.kind == kind]

    def card(self, name: str) -> AgentCard:
        return self.whole.agents[name].card()


@asynccontextmanager
async def house(folder: Path, rollout: RolloutSettings, **changes: Any) -> AsyncIterator[House]:
    run = run_settings(rounds=2, export_every=1, **changes)
    async with fleet(folder, memory(MemoryBroker()), run, rollout=rollout) as whole:
        found = House(whole, folder)
        serving = asyncio.create_task(found.serve())
        try:
            yield found
        finally:
            serving.cancel()
            await asyncio.wait([serving])
        if not serving.cancelled():
            serving.result()


def round_of(root: Path, link: str) -> int | None:
    name = linked(root, link)
    return next((one.manifest.round for one in owner.known(root)[0] if one.manifest.sha256 == name), None)


async def both_rounds(found: House) -> None:
    """Wait until the run is over and its first models serve, while the second round's may be held."""
    assert await found.whole.finished() == "finished"
    await until(lambda: all(round_of(found.root(name), CURRENT) == 2 for name in NAMES))


async def test_without_rings_every_model_serves_at_once(tmp_path: Path) -> None:
    async with house(tmp_path, RolloutSettings()) as found:
        await both_rounds(found)
        await until(lambda: all(round_of(found.root(name), SERVING) == 2 for name in NAMES))
        assert found.whole.store is not None
        assert found.whole.store.rollouts() == []
        assert not record.read(found.root("d0")).hold


async def test_rings_open_one_after_another_and_end(tmp_path: Path) -> None:
    async with house(tmp_path, RINGS) as found:
        await both_rounds(found)
        await until(lambda: found.is_at(2, "done", 2))
        assert all(round_of(found.root(name), SERVING) == 2 for name in NAMES)
        members = found.members()
        assert [members["d1"].ring] == [0]
        assert {m.ring for m in members.values()} == {0, 1, 2}
        assert all(m.state == "serving" and m.before is not None for m in members.values())
        await until(lambda: len(found.told("rollout_done")) >= 1)
        assert any(deed.what == "rollout ring" for deed in FleetRecords(found.whole.store).deeds())  # type: ignore[arg-type]


async def test_a_ring_waits_while_its_devices_soak_and_a_person_can_go_on(tmp_path: Path) -> None:
    async with house(tmp_path, RINGS.model_copy(update={"soak_s": 3600.0})) as found:
        await both_rounds(found)
        await until(lambda: found.is_at(2, "open", 0) and found.members()["d1"].state == "serving")
        steward = found.whole.engine.models  # type: ignore[union-attr]
        await until(lambda: steward.waits is not None and "s more" in steward.waits)
        assert round_of(found.root("d1"), SERVING) == 2
        for name in ("d0", "d2"):
            assert round_of(found.root(name), SERVING) == 1
            kept = found.card(name).models.of("r", 2)  # type: ignore[union-attr]
            assert kept is not None
            assert kept.waits
        await steward.go(who="anna")
        await steward.go(who="anna")
        await until(lambda: all(round_of(found.root(name), SERVING) == 2 for name in NAMES))
        assert ("anna", "rollout ring") in [
            (d.who, d.what)
            for d in FleetRecords(found.whole.store).deeds()  # type: ignore[arg-type]
        ]


async def test_a_ring_can_wait_for_the_trials_of_its_devices(tmp_path: Path) -> None:
    async with house(tmp_path, RINGS.model_copy(update={"settled": True})) as found:
        await both_rounds(found)
        steward = found.whole.engine.models  # type: ignore[union-attr]
        await until(lambda: found.is_at(2, "open", 0) and steward.waits == "the trial on d1")
        owner.pin(found.root("d1"))  # which ends its trial
        await until(lambda: found.is_at(2, "open", 1))


async def test_a_breach_stops_the_rollout_and_its_ring_goes_back(tmp_path: Path) -> None:
    async with house(tmp_path, RINGS.model_copy(update={"soak_s": 3600.0, "errors": 0.0})) as found:
        await both_rounds(found)
        await until(lambda: found.is_at(2, "open", 0) and found.members()["d1"].state == "serving")
        steward = found.whole.engine.models  # type: ignore[union-attr]
        await steward.go(who="anna")
        await until(lambda: sum(m.state == "serving" for m in found.members().values()) == 2)
        second = next(m.agent for m in found.members().values() if m.ring == 1)
        last = next(m.agent for m in found.members().values() if m.ring == 2)

        owner.roll_back(found.root("d1"), "wrong at night")
        await until(lambda: found.is_at(2, "stopped", 1))
        await until(lambda: len(found.told("rollout_stopped")) == 1)
        (text,) = found.told("rollout_stopped")
        assert "1 of 2 devices refused the new model or rolled it back; 0% is allowed" in text
        await until(lambda: round_of(found.root(second), SERVING) == 1)
        assert round_of(found.root(last), SERVING) == 1
        await until(lambda: found.members()[second].state == "rolled_back")
        assert round_of(found.root(last), CURRENT) == 2, "kept, and not let go"


async def test_an_accuracy_below_what_served_before_stops_it(tmp_path: Path) -> None:
    async with house(tmp_path, RINGS.model_copy(update={"soak_s": 3600.0})) as found:
        await both_rounds(found)
        await until(lambda: found.is_at(2, "open", 0) and found.members()["d1"].state == "serving")
        steward = found.whole.engine.models  # type: ignore[union-attr]
        member = found.members()["d1"]
        figures = found.whole.store.manifests([member.model, member.before])  # type: ignore[union-attr,list-item]
        low = figures[str(member.model)].model_copy(update={"validation": 0.25})
        high = figures[str(member.before)].model_copy(update={"validation": 0.75})
        steward._settings = steward._settings.model_copy(update={"accuracy": 2.0})
        steward._figures = {low.sha256: low, high.sha256: high}
        await until(lambda: found.is_at(2, "stopped", 0))
        assert "50.0 points below those before them (mean of 1 devices" in found.newest.reason
        await until(lambda: round_of(found.root("d1"), SERVING) == 1)


async def test_both_sides_may_be_killed_while_a_ring_is_open(tmp_path: Path) -> None:
    async with house(tmp_path, RINGS.model_copy(update={"soak_s": 3600.0})) as found:
        await both_rounds(found)
        await until(lambda: found.is_at(2, "open", 0) and found.members()["d1"].state == "serving")
        rings = {m.agent: m.ring for m in found.members().values()}
        second = next(agent for agent, ring in rings.items() if ring == 1)
        await found.whole.cut(second)
        await found.whole.cut("coordinator")
        before = found.whole.engine
        found.whole.start("coordinator")
        await until(lambda: found.whole.engine is not before)
        engine = found.whole.engine
        assert engine is not None
        await until(lambda: engine.models._rollout is not None)
        await engine.models.go(who="anna")  # the second ring's only device is away
        await until(lambda: (engine.models.waits or "").startswith(second))
        assert round_of(found.root(second), SERVING) == 1
        assert {m.agent: m.ring for m in found.members().values()} == rings
        found.whole.start(second)
        await until(lambda: round_of(found.root(second), SERVING) == 2)
        await until(lambda: found.members()[second].state == "serving")


async def test_pins_and_rollbacks_reach_one_device_or_all_and_owners_have_precedence(
    tmp_path: Path,
) -> None:
    async with house(tmp_path, RolloutSettings()) as found:
        await both_rounds(found)
        await until(lambda: all(round_of(found.root(name), SERVING) == 2 for name in NAMES))
        await until(lambda: all(_serves(found.card(name), 2) for name in NAMES))
        store, engine = found.whole.store, found.whole.engine
        assert store is not None
        assert engine is not None
        await until(lambda: all(_serves(card, 2) for card in store.cards().values()))
        owner.pin(found.root("d2"), "2")

        made, problems = await engine.models.order("pin", None, "1", reason="", who="anna")
        assert problems == {}
        await until(lambda: not store.orders(only_open=True))
        states = {order.agent: (order.state, order.said) for order in store.orders()}
        assert [states[name][0] for name in NAMES] == ["done", "done", "refused"]
        assert "this device's owner has pinned" in states["d2"][1]
        await until(lambda: [round_of(found.root(name), SERVING) for name in NAMES] == [1, 1, 2])
        deeds = [(deed.who, deed.what, deed.of) for deed in FleetRecords(store).deeds()]
        assert [deed for deed in deeds if deed[1] == "model pin"] == [("anna", "model pin", n) for n in NAMES]

        await engine.models.order("unpin", ["d0"], None, reason="", who="anna")
        await until(lambda: round_of(found.root("d0"), SERVING) == 2)
        assert round_of(found.root("d1"), SERVING) == 1
        assert round_of(found.root("d2"), PINNED) == 2, "its owner's stays"

        await until(lambda: _serves(store.cards()["d0"], 2))
        await found.whole.cut("d0")
        made, _ = await engine.models.order("rollback", ["d0"], None, reason="odd", who="anna")
        assert [order.state for order in store.orders(ids=[made[0].id])] == ["open"], "d0 is away"
        found.whole.start("d0")
        await until(lambda: round_of(found.root("d0"), SERVING) == 1)
        await until(lambda: store.orders(ids=[made[0].id])[0].state == "done")

        with pytest.raises(SettingsError, match="there is no device 'd9'"):
            await engine.models.order("pin", ["d9"], None, reason="", who="anna")
        with pytest.raises(RoundError, match="it has no model '77'; there are rounds 1 "):
            await engine.models.order("pin", ["d0"], "77", reason="", who="anna")
        with pytest.raises(RoundError, match="no rollout is under way"):
            await engine.models.stop("x", who="anna")


async def test_a_verb_of_a_newer_version_is_refused_politely(tmp_path: Path) -> None:
    async with house(tmp_path, RolloutSettings()) as found:
        await both_rounds(found)
        engine = found.whole.engine
        assert engine is not None
        topic = Topics("test").of("d0", "command")
        for body in (b'{"verb": "dance", "id": "x1", "tempo": 3}', b"{", b'{"verb": "pin"}', b"\xff" * 9000):
            await engine.transport.publish(topic, body)
        await until(lambda: any(done.id == "x1" for done in found.card("d0").models.done))  # type: ignore[union-attr]
        (done,) = [done for done in found.card("d0").models.done if done.id == "x1"]  # type: ignore[union-attr]
        assert not done.done
        assert done.said == "this agent does not know the command 'dance': install a newer version on it"


def _serves(card: AgentCard | None, round: int) -> bool:
    serving = card.models.linked("serving") if card is not None and card.models is not None else None
    return serving is not None and serving.round == round
