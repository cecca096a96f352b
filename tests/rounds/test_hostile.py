"""Letters that nobody should have sent: named, refused, and without any effect on the others' run."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from coordinator.collector import expected_layout
from coordinator.settings import RunSettings
from edge_agent.datasets import DataSettings, load
from foundation.codec import assignment_from, frame_of
from foundation.errors import DeliveryFailed
from foundation.messages import Assignment, Presence, Update
from foundation.parameters import Parameters
from foundation.transfer import Courier, Part, part_size
from foundation.transport import MemoryBroker, MemoryTransport
from tests.doubles import FaultyTransport
from tests.fleet import TOPICS, Fleet, fleet, memory, run_settings
from tests.toys import toy_card, toy_data

pytestmark = pytest.mark.anyio

Answer = Callable[[Assignment, Update], bytes]
"""Makes a hostile frame from an assignment and the update that would have been right."""


def fedavg(**changes: object) -> RunSettings:
    """A strategy whose state knows nothing about who is there, so that runs can be compared."""
    settings = {"learning_rate": 5e-3, "epochs": 1}
    return run_settings(strategy="fedavg", settings=settings, **changes)


async def expected_state(folder: Path) -> bytes:
    async with fleet(folder, memory(MemoryBroker()), fedavg()) as whole:
        assert await whole.finished() == "finished"
        return whole.state().to_bytes()


async def events(whole: Fleet) -> list[str]:
    assert whole.engine is not None
    assert whole.store is not None
    await whole.engine.live.flush()
    return [f"{e.kind}: {e.text}" for e in whole.store.latest_events(500)]


async def until(condition: Callable[[], bool], within_s: float = 30) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


# --- an agent that answers wrongly ---------------------------------------------------------------


def right_answer(assignment: Assignment) -> Update:
    rng = np.random.default_rng(assignment.round)
    return Update(
        run=assignment.run,
        round=assignment.round,
        agent=assignment.agent,
        examples=1000,
        metrics={"accuracy": 1.0},
        parameters=Parameters(
            {n: rng.normal(size=s).astype(np.float32) for n, s in expected_layout(assignment)}
        ),
    )


def with_nan(assignment: Assignment, update: Update) -> bytes:
    """A frame that says what no honest encoder writes: one value is not a number."""
    frame = frame_of(update)
    body = zstandard.ZstdDecompressor().decompress(frame[13:]) if frame[4] else frame[13:]
    value = struct.pack("<f", update.parameters["head.weight"][0, 0])
    assert body.count(value) == 1
    return frame[:4] + b"\0" + frame[5:13] + body.replace(value, struct.pack("<f", float("nan")))


def with_a_transposed_head(assignment: Assignment, update: Update) -> bytes:
    head = np.ascontiguousarray(update.parameters["head.weight"].T)
    return frame_of(
        update.model_copy(update={"parameters": update.parameters.updated({"head.weight": head})})
    )


def with_a_claim_of_terabytes(assignment: Assignment, update: Update) -> bytes:
    frame = frame_of(update)
    return frame[:5] + struct.pack("<Q", 1 << 40) + frame[13:]


def changed(**changes: object) -> Answer:
    return lambda _, update: frame_of(update.model_copy(update=changes))


ANSWERS: dict[str, tuple[tuple[Answer, str], ...]] = {
    "m0": (
        (lambda _, u: frame_of(u)[:-10], "malformed: m0: "),
        (with_a_transposed_head, "malformed: m0: array 'head.weight' has shape (8, 3), not (3, 8)"),
        (with_nan, "malformed: m0: array 'head.weight' holds values that are not finite"),
    ),
    "m1": (
        (changed(run="other"), "malformed: m1: round 1 of run 'other' was never opened"),
        (changed(round=99), "malformed: m1: round 99 of run 'r' was never opened"),
        (changed(agent="d0"), "malformed: m1: an update of 'd0' came on the topic of 'm1'"),
    ),
    "m2": (
        (changed(round=10**40), "malformed: m2: "),
        (with_a_claim_of_terabytes, "malformed: m2: "),
        (lambda a, _: frame_of(a), "malformed: m2: the frame does not hold an update"),
    ),
}


@contextlib.asynccontextmanager
async def mallory(broker: MemoryBroker, name: str, refused: list[str]) -> AsyncIterator[None]:
    """An agent with a fine card that answers every round with a frame of `ANSWERS`."""
    transport = MemoryTransport(broker)
    answers = iter(ANSWERS[name])
    work: set[asyncio.Task[None]] = set()

    async def send(frame: bytes) -> None:
        try:
            await courier.send(TOPICS.of(name, "update"), frame, deadline_s=20)
        except DeliveryFailed as error:
            refused.append(str(error) if error.refused else f"not refused: {error}")

    async def arrived(topic: str, frame: bytes, wire_bytes: int) -> None:
        assignment = assignment_from(frame)
        make, _ = next(answers)
        work.add(asyncio.create_task(send(make(assignment, right_answer(assignment)))))

    courier = Courier(
        transport,
        frames=TOPICS.of(name, "assignment"),
        receipts=TOPICS.of(name, "receipt"),
        receipt_topic=lambda _: TOPICS.of(name, "received"),
        handle=arrived,
    )
    async with transport, courier:
        card = toy_card(name, toy_data(0))
        await transport.publish(TOPICS.of(name, "card"), card.model_dump_json().encode(), retain=True)
        online = Presence(state="online", session="1")
        await transport.publish(TOPICS.of(name, "presence"), online.model_dump_json().encode(), retain=True)
        yield
        await asyncio.gather(*work)


@pytest.mark.slow
async def test_wrong_updates_are_refused_by_name_and_change_nothing(tmp_path: Path) -> None:
    expected = await expected_state(tmp_path / "without")
    broker, refused = MemoryBroker(), list[str]()
    async with contextlib.AsyncExitStack() as stack:
        for name in ANSWERS:
            await stack.enter_async_context(mallory(broker, name, refused))
        # Four rounds: in the fourth all three are set aside, and nobody waits for them.
        run = fedavg(min_agents=6, rounds=4)
        whole = await stack.enter_async_context(fleet(tmp_path / "with", memory(broker), run))
        assert await whole.finished() == "finished"
        said = await events(whole)
        assert whole.store is not None
        rounds = whole.store.rounds("r")
        assert [len(r.agents) for r in rounds] == [6, 6, 6, 3]
        assert [len(whole.store.updates("r", n)) for n in (1, 2, 3, 4)] == [3, 3, 3, 3]
        assert whole.engine is not None
        for name in ANSWERS:
            aside = whole.engine.roster.entry(name).set_aside
            assert aside is not None
            assert aside.startswith("set aside after 3 malformed frames; the last: ")
    for name, answers in ANSWERS.items():
        assert f"set_aside: {name} set aside after 3" in " ".join(said)
        for _, words in answers:
            assert any(text.startswith(words) for text in said), (words, said)
    assert len(refused) == 9
    assert not [reason for reason in refused if reason.startswith("not refused")]
    assert not [text for text in said if text.startswith("malformed: d")]
    # Three rounds with them are three rounds without them.
    async with fleet(tmp_path / "again", memory(MemoryBroker()), fedavg(rounds=4)) as alone:
        assert await alone.finished() == "finished"
        assert alone.state().to_bytes() == whole.state().to_bytes() != expected


async def test_a_second_update_of_the_same_round_does_not_replace_the_first(tmp_path: Path) -> None:
    """What counts in memory must be what a restart would find in the store."""
    expected = await expected_state(tmp_path / "without")
    broker = MemoryBroker()
    async with fleet(tmp_path / "with", memory(broker), fedavg()) as whole:
        await until(lambda: whole.engine is not None and whole.engine._open is not None)
        attacker = MemoryTransport(broker)
        async with attacker, hostile_courier(attacker, "d0", down=False) as courier:
            assert whole.engine is not None
            here = whole.engine._open
            assert here is not None
            await until(lambda: "d0" in here.collector.updates)
            other = right_answer(here.collector.assignments["d0"])
            with contextlib.suppress(DeliveryFailed):  # too late is as good as ignored
                await courier.send(TOPICS.of("d0", "update"), frame_of(other), deadline_s=20)
        assert await whole.finished() == "finished"
        assert whole.state().to_bytes() == expected


@contextlib.asynccontextmanager
async def hostile_courier(transport: MemoryTransport, agent: str, *, down: bool) -> AsyncIterator[Courier]:
    """A courier that sends in another's name: assignments (`down`) or updates."""

    async def handle(topic: str, frame: bytes, wire_bytes: int) -> None:
        raise AssertionError("nothing comes in here")

    courier = Courier(
        transport,
        frames="nothing/comes/in",
        receipts=TOPICS.of(agent, "received" if down else "receipt"),
        receipt_topic=lambda _: "nobody/hears",
        handle=handle,
    )
    async with courier:
        yield courier


async def test_a_frame_over_the_bound_is_refused_with_its_first_part(tmp_path: Path) -> None:
    broker = MemoryBroker()
    async with fleet(tmp_path, memory(broker), fedavg()) as whole:
        await until(lambda: whole.engine is not None and whole.engine._open is not None)
        listener = MemoryTransport(broker)
        async with listener:
            receipts = await listener.subscribe(TOPICS.of("d0", "receipt"))
            total, count = 300 << 20, 51_200
            part = Part(bytes(32), 1, 0, count, total, bytes(part_size(total, count)), ask=True)
            await listener.publish(TOPICS.of("d0", "update"), part.letter())
            async with asyncio.timeout(10):
                async for letter in receipts:
                    if b"refused" in letter.body:
                        break
            assert b"a frame of 314,572,800 bytes is over 268,435,456" in letter.body
        assert await whole.finished() == "finished"


# --- small letters -------------------------------------------------------------------------------

LETTERS: tuple[tuple[str, str, bytes], ...] = (
    ("e-json", "card", b"{"),
    ("e-bytes", "presence", b"\xff\xfe\x00"),
    ("e-empty", "telemetry", b""),
    ("e-deep", "refusal", b"[" * 100_000),
    ("e-nan", "telemetry", b'{"agent":"e-nan","stage":"train","joules":NaN}'),
    ("e-field", "presence", b'{"state":"online","extra":1}'),
    ("e-other", "card", toy_card("d0", toy_data(0)).model_dump_json().encode()),
    ("e-run", "refusal", b'{"run":"none","round":1,"agent":"e-run","reason":"no"}'),
    ("e-big", "refusal", b'{"run":"r","round":1' + b"0" * 40 + b',"agent":"e-big","reason":"no"}'),
    ("e-forged", "refusal", b'{"run":"r","round":1,"agent":"d0","reason":"no"}'),
)


async def test_letters_that_make_no_sense_are_named_and_survived(tmp_path: Path) -> None:
    expected = await expected_state(tmp_path / "without")
    broker = MemoryBroker()
    async with fleet(tmp_path / "with", memory(broker), fedavg()) as whole:
        await until(lambda: whole.engine is not None and whole.engine._open is not None)
        async with MemoryTransport(broker) as attacker:
            for agent, what, body in LETTERS:
                for _ in range(3):
                    await attacker.publish(TOPICS.of(agent, what), body)
            for odd in ("", "x y", "-", "a" * 65):
                await attacker.publish(TOPICS.of(odd, "card"), b"{}")
            huge = toy_card("e-card", toy_data(0)).model_copy(update={"examples": 10**40})
            await attacker.publish(TOPICS.of("e-card", "card"), huge.model_dump_json().encode())
            await attacker.publish(TOPICS.of("e-none", "update"), b"not a part")
        assert await whole.finished() == "finished"
        assert whole.state().to_bytes() == expected
        assert whole.engine is not None
        said, entries = await events(whole), whole.engine.roster.entries
        for agent, what, _ in LETTERS:
            own = [text for text in said if text.startswith(f"malformed: {agent}: ")]
            assert len(own) == 3, (agent, said)
            assert agent == "e-other" or all(f"{agent}: {what}: " in text for text in own)
            assert entries[agent].set_aside is not None
        assert all(entries[agent].set_aside is None for agent in ("d0", "d1", "d2"))
        assert {"", "x y", "-", "a" * 65}.isdisjoint(entries)


async def test_an_agent_refuses_assignments_that_make_no_sense_and_lives_on(tmp_path: Path) -> None:
    expected = await expected_state(tmp_path / "without")
    broker = MemoryBroker()
    run = fedavg()
    async with contextlib.AsyncExitStack() as stack:
        whole = Fleet(tmp_path / "with", memory(broker), run)
        for name in ("d0", "d1", "d2"):
            whole.start(name)
            stack.push_async_callback(whole.cut, name)
        await until(lambda: len([t for t in broker.retained if t.endswith("/card")]) == 3)
        attacker = await stack.enter_async_context(MemoryTransport(broker))
        async with hostile_courier(attacker, "d0", down=True) as courier:
            other = frame_of(right_answer_of_nobody())
            for frame in (b"x", bytes(4000), other, other[:-1]):
                with pytest.raises(DeliveryFailed) as caught:
                    await courier.send(TOPICS.of("d0", "assignment"), frame, deadline_s=20)
                assert caught.value.refused
                assert str(caught.value)
            await attacker.publish(TOPICS.of("d0", "assignment"), b"not a part")
            for body in (b"", b"{", b'{"verb":"stop","run":"r","round":1}', b"\xff"):
                await attacker.publish(TOPICS.of("d0", "command"), body)
        whole.start("coordinator")
        stack.push_async_callback(whole.cut, "coordinator")
        assert await whole.finished() == "finished"
        assert whole.state().to_bytes() == expected


def right_answer_of_nobody() -> Update:
    return Update(run="r", round=1, agent="d0", examples=1)


# --- faults of the line --------------------------------------------------------------------------


@pytest.mark.slow
async def test_lost_doubled_and_late_letters_cost_time_and_nothing_else(tmp_path: Path) -> None:
    expected = await expected_state(tmp_path / "without")
    broker, lines = MemoryBroker(), list[FaultyTransport]()

    def dial(client: str, will: tuple[str, bytes]) -> FaultyTransport:
        inner = MemoryTransport(broker, will=will)
        # Small letters are QoS 1 and have nobody who asks for them again: only parts and receipts get lost.
        line = FaultyTransport(inner, seed=len(lines), double=0.2, delay=0.2, edit=lossy(len(lines)))
        lines.append(line)
        return line

    async with fleet(tmp_path / "with", dial, fedavg()) as whole:
        assert await whole.finished(120) == "finished"
        assert whole.state().to_bytes() == expected
        assert whole.store is not None
        assert [len(whole.store.updates("r", n)) for n in (1, 2, 3)] == [3, 3, 3]
    assert sum(len(line.log) for line in lines) > 60


def lossy(seed: int) -> Callable[[str, bytes], list[bytes]]:
    draw = np.random.default_rng(seed)
    parts = ("assignment", "received", "update", "receipt")

    def edit(topic: str, body: bytes) -> list[bytes]:
        if topic.rpartition("/")[2] not in parts or draw.random() > 0.15:
            return [body]
        return [] if draw.random() < 0.6 else [body[:-1]]  # gone, or not whole

    return edit


# --- wrong data ----------------------------------------------------------------------------------


async def test_a_device_whose_data_are_repaired_joins(tmp_path: Path) -> None:
    """Its file is empty at first: it says so on its card, and takes part once there is something in it."""
    broker, run = MemoryBroker(), fedavg()
    file = tmp_path / "d2.npz"
    file.touch()

    def load_data(seed: int) -> object:
        if seed != 2:
            return toy_data(seed)
        return load(DataSettings(kind="npz", path=file, labels=("a", "b", "c")))

    async with fleet(tmp_path / "fleet", memory(broker), run, load_data) as whole:  # type: ignore[arg-type]
        card = TOPICS.of("d2", "card")
        await until(lambda: b"d2.npz" in broker.retained.get(card, b""))
        await asyncio.sleep(0.2)
        assert whole.engine is not None
        assert whole.engine._open is None, "two of three are here: the run has not begun"
        data = toy_data(2)
        with file.open("wb") as opened:
            np.savez(opened, x=data.train.x, y=data.train.y)
        assert await whole.finished() == "finished"
        assert whole.store is not None
        assert [u.agent for u in whole.store.updates("r", 1)] == ["d0", "d1", "d2"]
        assert b'"problem":null' in broker.retained[card]
