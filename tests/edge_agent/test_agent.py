"""One agent over the broker inside this process: its introduction, what it takes, what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from coordinator.strategies.base import load_strategy
from edge_agent.agent import OFFLINE, Agent, pause_s
from edge_agent.conditions import Conditions
from edge_agent.datasets import DataSettings, load
from edge_agent.energy.meter import Meter
from edge_agent.limits import Limits
from edge_agent.samples import LocalData
from edge_agent.settings import AgentSettings, LimitSettings
from edge_agent.training import trainer
from edge_agent.vault import Vault
from foundation.codec import frame_of, update_from
from foundation.errors import DataError
from foundation.messages import PROTOCOL, AgentCard, Assignment, Command, Presence, Refusal, Update
from foundation.profile import DeviceProfile
from foundation.topics import Topics
from foundation.transfer import Courier
from foundation.transport import MemoryBroker, MemoryTransport
from foundation.work import ThreadLimit
from tests.devices import ORIN, written
from tests.toys import LABELS, SPEC, ToyFederation, toy_data

pytestmark = pytest.mark.anyio

TOPICS = Topics("test")


@contextlib.asynccontextmanager
async def agent_on(
    broker: MemoryBroker,
    folder: Path,
    load_data: Callable[[], LocalData],
    limits: Callable[[Meter], Limits] | None = None,
    *,
    conditions: Conditions | None = None,
    threads: int = 1,
) -> AsyncIterator[Agent]:
    settings = AgentSettings(
        agent="d0", federation="test", vault=folder / "d0", data=DataSettings(kind="builtin")
    )
    will = (TOPICS.of("d0", "presence"), OFFLINE.model_dump_json().encode())
    with Meter(DeviceProfile.load("unknown-linux")) as meter:
        agent = Agent(
            settings,
            transport=MemoryTransport(broker, will=will),
            meter=meter,
            profile="unknown-linux",
            threads=threads,
            load_data=load_data,
            retry_s=0.02,
            limits=limits(meter) if limits else None,
            conditions=conditions,
        )
        life = asyncio.create_task(agent.run())
        try:
            await until(lambda: life.done() or TOPICS.of("d0", "presence") in broker.retained)
            if life.done():
                life.result()
            yield agent
        finally:
            life.cancel()
            await asyncio.wait([life])


@dataclass
class Coordinator:
    """The other end of the wire: sends assignments, keeps updates and refusals."""

    courier: Courier
    updates: list[Update] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    async def ask(self, assignment: Assignment) -> None:
        await self.courier.send(TOPICS.of("d0", "assignment"), frame_of(assignment), deadline_s=20)


@contextlib.asynccontextmanager
async def coordinator_on(broker: MemoryBroker) -> AsyncIterator[Coordinator]:
    transport = MemoryTransport(broker)
    found: list[Coordinator] = []

    async def arrived(topic: str, frame: bytes, wire_bytes: int) -> None:
        found[0].updates.append(update_from(frame))

    async def refusals() -> None:
        async for letter in await transport.subscribe(TOPICS.of("d0", "refusal")):
            found[0].refusals.append(Refusal.model_validate_json(letter.body))

    courier = Courier(
        transport,
        frames=TOPICS.of("d0", "update"),
        receipts=TOPICS.of("d0", "received"),
        receipt_topic=lambda _: TOPICS.of("d0", "receipt"),
        handle=arrived,
    )
    found.append(Coordinator(courier))
    async with transport, courier:
        listening = asyncio.create_task(refusals())
        await asyncio.sleep(0)
        yield found[0]
        listening.cancel()


def assignment(number: int = 1, *, epochs: int = 1) -> Assignment:
    federation = ToyFederation(load_strategy("fedavg", {"epochs": epochs}), agents=1)
    return federation.plan(federation.begin(), number)[0]


async def until(condition: Callable[[], bool], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


def card_on(broker: MemoryBroker) -> AgentCard:
    return AgentCard.model_validate_json(broker.retained[TOPICS.of("d0", "card")])


def presence_on(broker: MemoryBroker) -> Presence:
    return Presence.model_validate_json(broker.retained[TOPICS.of("d0", "presence")])


async def test_an_agent_introduces_itself_and_says_goodbye(tmp_path: Path) -> None:
    broker, data = MemoryBroker(), toy_data(0)
    async with agent_on(broker, tmp_path, lambda: data):
        card = card_on(broker)
        assert (card.agent, card.examples, card.shape, card.labels) == ("d0", 48, SPEC.shape, LABELS)
        assert card.problem is None
        first = presence_on(broker)
        assert first.state == "online"
    assert presence_on(broker).state == "offline"
    async with agent_on(broker, tmp_path, lambda: data):
        await until(lambda: presence_on(broker).state == "online")
        assert presence_on(broker).session != first.session, "a new process says so"


async def test_a_coordinator_that_comes_online_is_introduced_to_again(tmp_path: Path) -> None:
    """A broker that was killed has lost what it kept for those who come later."""
    broker = MemoryBroker()
    async with agent_on(broker, tmp_path, lambda: toy_data(0)):
        before = presence_on(broker)
        broker.retained.clear()
        async with MemoryTransport(broker) as transport:
            for body in (b"{", b'{"state":"offline"}'):
                await transport.publish(TOPICS.coordinator_presence, body)
            await asyncio.sleep(0.02)
            assert not broker.retained
            online = Presence(state="online", session="c").model_dump_json().encode()
            await transport.publish(TOPICS.coordinator_presence, online)
            await until(lambda: TOPICS.of("d0", "presence") in broker.retained)
        assert card_on(broker).agent == "d0"
        assert presence_on(broker) == before, "the same session: it has lost nothing"


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (None, None, "d0.npz"),
        (np.full((60, 1, 4, 4), np.nan, np.float32), np.arange(60) % 3, "nan|not finite|not a number"),
        (np.zeros((60, 1, 4, 4), np.float32), np.arange(59) % 3, "59"),
        (np.zeros((0, 1, 4, 4), np.float32), np.arange(0), "0|empty|no "),
    ],
)
async def test_wrong_data_are_said_on_the_card_until_they_are_repaired(
    tmp_path: Path, x: np.ndarray | None, y: np.ndarray | None, words: str
) -> None:
    file, broker = tmp_path / "d0.npz", MemoryBroker()
    if x is None or y is None:
        file.touch()
    else:
        np.savez(file, x=x, y=y)
    settings = DataSettings(kind="npz", path=file, labels=LABELS)
    async with agent_on(broker, tmp_path, lambda: load(settings)), coordinator_on(broker) as coordinator:
        problem = card_on(broker).problem
        assert problem is not None
        assert re.search(words, problem, re.IGNORECASE), problem
        assert problem.startswith("data: ")
        assert (card_on(broker).input, card_on(broker).examples) == (None, 0)
        await coordinator.ask(assignment())
        await until(lambda: bool(coordinator.refusals))
        assert coordinator.refusals[0].reason == problem
        good = toy_data(0).train
        np.savez(file, x=good.x, y=good.y)
        await until(lambda: card_on(broker).problem is None)
        assert card_on(broker).examples > 0
        await coordinator.ask(assignment())
        await until(lambda: bool(coordinator.updates))
        assert coordinator.updates[0].examples == card_on(broker).examples


async def test_data_of_another_shape_than_the_run_are_a_reason(tmp_path: Path) -> None:
    broker = MemoryBroker()
    other = SPEC.model_copy(update={"shape": (1, 8, 8)})
    async with agent_on(broker, tmp_path, lambda: toy_data(0, spec=other)), coordinator_on(broker) as c:
        await c.ask(assignment())
        await until(lambda: bool(c.refusals))
        assert "this device has image (1, 8, 8) with 3 classes, the run wants image (1, 4, 4)" in (
            c.refusals[0].reason
        )
        assert Vault(tmp_path / "d0", "d0").waiting() is None, "it is not tried again by itself"


async def test_an_assignment_that_comes_twice_is_worked_on_once(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with agent_on(broker, tmp_path, lambda: toy_data(0)), coordinator_on(broker) as c:
        work = assignment()
        await asyncio.gather(c.ask(work), c.ask(work))
        await until(lambda: bool(c.updates))
        await c.ask(work)
        await asyncio.sleep(0.2)
        assert len(c.updates) == 1


async def test_work_that_was_called_off_is_refused_and_can_be_offered_again(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with agent_on(broker, tmp_path, lambda: toy_data(0)) as agent, coordinator_on(broker) as c:
        long = assignment(epochs=1000)
        await c.ask(long)
        await until((tmp_path / "d0" / "work" / "checkpoint.safetensors").exists)
        command = Command(verb="cancel", run=long.run, round=long.round, reason="stopped by hand")
        await agent.transport.publish(TOPICS.of("d0", "command"), command.model_dump_json().encode())
        await until(lambda: bool(c.refusals))
        assert c.refusals[0].reason == "called off"
        assert agent.vault.waiting() is None
        await c.ask(assignment(2))
        await until(lambda: bool(c.updates))
        assert c.updates[0].round == 2


async def test_a_straggler_of_an_older_round_does_not_end_the_newer_work(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with agent_on(broker, tmp_path, lambda: toy_data(0)) as agent, coordinator_on(broker) as c:
        await c.ask(assignment(5, epochs=100))
        await until((tmp_path / "d0" / "work" / "checkpoint.safetensors").exists)
        await c.ask(assignment(4))
        await until(lambda: bool(c.updates))
        assert [u.round for u in c.updates] == [5]
        assert c.refusals == []
        assert agent.vault.waiting() is None


@pytest.mark.slow
async def test_an_agent_that_ends_in_its_work_goes_on_with_it(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with coordinator_on(broker) as c:
        checkpoint = tmp_path / "d0" / "work" / "checkpoint.safetensors"
        async with agent_on(broker, tmp_path, lambda: toy_data(0)):
            await c.ask(assignment(epochs=100))
            await until(checkpoint.exists)
        assert checkpoint.exists()
        assert c.updates == []
        async with agent_on(broker, tmp_path, lambda: toy_data(0)):
            await until(lambda: bool(c.updates))
        async with agent_on(broker, tmp_path / "other", lambda: toy_data(0)):
            await c.ask(assignment(epochs=100).model_copy(update={"deadline_s": 61.0}))
            await until(lambda: len(c.updates) == 2)
    broken, whole = c.updates
    for name, array in whole.parameters.items():
        assert array.tobytes() == broken.parameters[name].tobytes(), name


async def test_work_in_hand_that_cannot_be_read_is_dropped(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "d0", "d0")
    vault.receive(b"not a frame")
    broker = MemoryBroker()
    async with agent_on(broker, tmp_path, lambda: toy_data(0)) as agent:
        assert agent.vault.waiting() is None
        assert presence_on(broker).state == "online"


async def test_data_that_break_between_two_rounds_do_not_end_the_agent(tmp_path: Path) -> None:
    def unreadable() -> LocalData:
        raise DataError("the card was pulled out")

    broker = MemoryBroker()
    async with agent_on(broker, tmp_path, unreadable):
        assert card_on(broker).problem == "data: the card was pulled out"
        assert presence_on(broker).state == "online"


# --- limits ----------------------------------------------------------------------------------------


@dataclass
class House:
    """The surroundings of a device: the hour, and the heat of its one thermal zone."""

    root: Path
    hour: int = 12

    def heat(self, degrees: float) -> None:
        zone = self.root / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "temp").write_text(str(round(1000 * degrees)))

    def limits(self, **told: object) -> Callable[[Meter], Limits]:
        def made(meter: Meter) -> Limits:
            def clock() -> datetime:
                return datetime(2026, 3, 1, self.hour, tzinfo=UTC)

            settings = LimitSettings(**told)  # type: ignore[arg-type]
            return Limits(settings, meter, self.root / "d0", root=self.root, clock=clock)

        return made


async def test_quiet_hours_are_on_the_card_and_work_that_comes_is_refused(tmp_path: Path) -> None:
    broker, house = MemoryBroker(), House(tmp_path, hour=23)
    limits = house.limits(quiet_hours=["22:00-06:30"])
    async with agent_on(broker, tmp_path, lambda: toy_data(0), limits) as agent, coordinator_on(broker) as c:
        told = card_on(broker).unavailable
        assert str(told) == "it has quiet hours, until 2026-03-02 06:30 UTC"
        await c.ask(assignment())
        await until(lambda: bool(c.refusals))
        assert c.refusals[0].reason == str(told)
        assert agent.vault.waiting() is None
        house.hour = 7
        await until(lambda: card_on(broker).unavailable is None)
        await c.ask(assignment(2))
        await until(lambda: bool(c.updates))


async def test_work_in_hand_is_finished_in_quiet_hours_even_after_a_restart(tmp_path: Path) -> None:
    broker, house = MemoryBroker(), House(tmp_path)
    limits = house.limits(quiet_hours=["22:00-06:30"])
    checkpoint = tmp_path / "d0" / "work" / "checkpoint.safetensors"
    async with coordinator_on(broker) as c:
        async with agent_on(broker, tmp_path, lambda: toy_data(0), limits):
            await c.ask(assignment(epochs=100))
            await until(checkpoint.exists)
            house.hour = 22
            await until(lambda: card_on(broker).unavailable is not None)
        assert checkpoint.exists()
        async with agent_on(broker, tmp_path, lambda: toy_data(0), limits):
            await until(lambda: bool(c.updates))
        assert c.refusals == []


async def test_work_that_waited_and_was_not_begun_is_refused_after_a_restart(tmp_path: Path) -> None:
    broker, house = MemoryBroker(), House(tmp_path, hour=22)
    Vault(tmp_path / "d0", "d0").receive(frame_of(assignment()))
    async with coordinator_on(broker) as c:
        limits = house.limits(quiet_hours=["22:00-06:30"])
        async with agent_on(broker, tmp_path, lambda: toy_data(0), limits):
            await until(lambda: bool(c.refusals))


async def test_work_in_hand_ends_when_it_is_far_too_hot(tmp_path: Path) -> None:
    broker, house = MemoryBroker(), House(tmp_path)
    house.heat(60)
    limits = house.limits(max_temperature_c=70)
    async with agent_on(broker, tmp_path, lambda: toy_data(0), limits), coordinator_on(broker) as c:
        await c.ask(assignment(epochs=1000))
        await until((tmp_path / "d0" / "work" / "checkpoint.safetensors").exists)
        house.heat(72)
        await until(lambda: card_on(broker).unavailable is not None)
        assert c.refusals == [], "work that was begun goes on"
        house.heat(76)
        await until(lambda: bool(c.refusals))
        assert c.refusals[0].reason == "called off: 76.0 °C is more than 5 above the limit of 70 °C"
        house.heat(64)
        await until(lambda: card_on(broker).unavailable is None)


async def test_limits_that_cannot_hold_are_on_the_card(tmp_path: Path) -> None:
    broker, house = MemoryBroker(), House(tmp_path)
    async with agent_on(broker, tmp_path, lambda: toy_data(0), house.limits(joules_per_day=10)):
        assert card_on(broker).problem == (
            "limits: joules_per_day cannot hold: nobody knows this device's joules"
        )
        assert card_on(broker).unavailable is None


async def test_an_update_says_under_what_conditions_it_was_made(tmp_path: Path) -> None:
    root, broker, data = written(tmp_path / "root", ORIN), MemoryBroker(), toy_data(0)
    there = agent_on(broker, tmp_path, lambda: data, conditions=Conditions(root))
    async with there, coordinator_on(broker) as coordinator:
        await coordinator.ask(assignment())
        await until(lambda: bool(coordinator.updates))
    state = coordinator.updates[0].state
    assert state is not None
    assert (state.power_mode, state.most_c, state.throttle_events, state.threads) == ("15W", 50.0, 0, 1)


async def test_who_does_not_look_tells_nothing_of_conditions(tmp_path: Path) -> None:
    broker, data = MemoryBroker(), toy_data(0)
    async with agent_on(broker, tmp_path, lambda: data), coordinator_on(broker) as coordinator:
        await coordinator.ask(assignment())
        await until(lambda: bool(coordinator.updates))
    assert coordinator.updates[0].state is None


@pytest.fixture
def threads_used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch was told, in the thread that trains."""
    told: list[int] = []
    real = trainer.use_threads
    monkeypatch.setattr(trainer, "use_threads", lambda threads: (told.append(threads), real(threads)))
    return told


async def done_on(
    folder: Path, threads: int, *, most: int | None = None, hot: int | None = None, limit_c: float = 70
) -> Update:
    """One round of a device with so many threads, asked for at most `most`, at `hot` thousandths of °C."""
    root, broker, data = written(folder / "root", ORIN), MemoryBroker(), toy_data(0)
    if hot is not None:
        (root / "sys/class/thermal/thermal_zone0/temp").write_text(str(hot))
    asked = assignment()
    terms = () if most is None else (ThreadLimit(most=most),)
    asked = asked.model_copy(update={"work": asked.work.model_copy(update={"terms": terms})})

    def limits(meter: Meter) -> Limits:
        return Limits(LimitSettings(max_temperature_c=limit_c), meter, folder, root=root)

    there = agent_on(
        *(broker, folder, lambda: data), limits=limits, conditions=Conditions(root), threads=threads
    )
    async with there, coordinator_on(broker) as coordinator:
        await coordinator.ask(asked)
        await until(lambda: bool(coordinator.updates))
        return coordinator.updates[0]


@pytest.mark.parametrize(
    ("threads", "most", "hot", "used", "why"),
    [
        (2, None, None, 2, None),
        (2, 1, None, 1, "the coordinator asks for fewer"),
        (1, 8, None, 1, None),  # its own bound is lower
        (4, None, 66_000, 2, "it is warm: 66.0 °C, the limit is 70 °C"),
        (4, 3, 66_000, 1, "it is warm: 66.0 °C, the limit is 70 °C"),
        (1, None, 66_000, 1, None),
    ],
)
async def test_work_is_done_on_no_more_threads_than_coordinator_heat_and_owner_allow(
    tmp_path: Path,
    threads_used: list[int],
    threads: int,
    most: int | None,
    hot: int | None,
    used: int,
    why: str | None,
) -> None:
    state = (await done_on(tmp_path, threads, most=most, hot=hot)).state
    assert state is not None
    assert (state.threads, state.own_threads, state.eased) == (used, threads, why)
    assert threads_used == [used]


async def test_so_many_threads_give_the_same_bits_whoever_asked_for_them(tmp_path: Path) -> None:
    own = await done_on(tmp_path / "own", 2)
    asked = await done_on(tmp_path / "asked", 4, most=2)
    warm = await done_on(tmp_path / "warm", 4, hot=66_000)
    assert own.parameters == asked.parameters == warm.parameters


async def test_work_that_was_done_is_done_again_only_for_a_coordinator_that_wants_it(tmp_path: Path) -> None:
    """A broker that comes back with what it knew an hour ago sends old assignments again."""
    broker, data = MemoryBroker(), toy_data(0)
    async with coordinator_on(broker) as other:
        async with agent_on(broker, tmp_path, lambda: data):
            for number in (1, 2):
                await other.ask(assignment(number))
                await until(lambda: len(other.updates) == number)  # noqa: B023 - awaited in the loop
        async with agent_on(broker, tmp_path, lambda: data):  # its courier has forgotten what it took
            await until(lambda: presence_on(broker).state == "online")
            before = presence_on(broker).session
            await other.ask(assignment(1))
            await until(lambda: presence_on(broker).session != before)  # it asks
            assert [update.round for update in other.updates] == [1, 2]
            await other.ask(assignment(1))  # and is answered
            await until(lambda: len(other.updates) == 3)
            assert other.updates[2].round == 1
            assert other.updates[2].parameters == other.updates[0].parameters


async def test_another_protocol_is_named_with_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = MemoryBroker()
    async with (
        agent_on(broker, tmp_path, lambda: toy_data(0)),
        MemoryTransport(broker) as transport,
    ):
        other = Presence(state="online", session="c", protocol=PROTOCOL + 1).model_dump_json().encode()
        await transport.publish(TOPICS.coordinator_presence, other)
        await until(lambda: "install the same version on both" in caplog.text)
        assert f"the coordinator speaks protocol {PROTOCOL + 1}, this agent {PROTOCOL}" in caplog.text


def test_an_agent_that_rests_says_little() -> None:
    assert pause_s(0) == pause_s(59) == 5
    assert pause_s(61) == pause_s(1e9) == 300
