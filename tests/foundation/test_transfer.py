"""Frames in parts: what is lost, doubled, reordered, restarted, refused or too large."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import DeliveryFailed, FrameCorrupt, FrameMismatch, FrameTooLarge, WorkRefused
from foundation.topics import Topics
from foundation.transfer import MAX_PARTS, PART_HEADER, Courier, Part, Receipt, part_size, parts_of, span_of
from foundation.transport import MemoryBroker, MemoryTransport
from tests.doubles import FaultyTransport

pytestmark = pytest.mark.anyio

TOPICS = Topics("garden")
UP = TOPICS.of("a", "update")
RECEIPT = TOPICS.of("a", "receipt")
FAST: dict[str, Any] = {"part_bytes": 1024 + PART_HEADER.size, "resend_s": 0.05, "retry_s": 0.02}


class Shelf:
    """A handler that keeps what comes, or says what it is told to."""

    def __init__(self, answer: Callable[[], Awaitable[None]] | None = None) -> None:
        self.frames: list[tuple[str, bytes, int]] = []
        self.answer = answer

    async def __call__(self, topic: str, frame: bytes, wire_bytes: int) -> None:
        self.frames.append((topic, frame, wire_bytes))
        if self.answer is not None:
            await self.answer()


def frame_of(kib: float, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(int(kib * 1024))


def agent(transport: Any, name: str = "a", handle: Any = None, **settings: Any) -> Courier:
    return Courier(
        transport,
        frames=TOPICS.of(name, "assignment"),
        receipts=TOPICS.of(name, "receipt"),
        receipt_topic=lambda _: TOPICS.of(name, "received"),
        handle=handle or Shelf(),
        **{**FAST, **settings},
    )


def coordinator(transport: Any, handle: Any = None, **settings: Any) -> Courier:
    return Courier(
        transport,
        frames=TOPICS.every("update"),
        receipts=TOPICS.every("received"),
        receipt_topic=lambda topic: TOPICS.of(TOPICS.agent_of(topic), "receipt"),
        handle=handle or Shelf(),
        **{**FAST, **settings},
    )


@dataclass
class Line:
    """An agent and a coordinator on one broker; `up` and `down` are what each publishes through."""

    broker: MemoryBroker
    up: FaultyTransport
    down: FaultyTransport
    edge: Courier
    middle: Courier

    def up_parts(self) -> list[Part]:
        return [part for part in map(Part.of, self.up.bodies(UP)) if not part.probe]


class First:
    """An edit that does something to the first part that fits, by default loses it."""

    def __init__(
        self, fits: Callable[[Part], bool], instead: Callable[[bytes], list[bytes]] = lambda _: []
    ) -> None:
        self.fits, self.instead, self.met = fits, instead, 0

    def __call__(self, _: str, body: bytes) -> list[bytes]:
        part = Part.of(body)
        if part.probe or not self.fits(part):
            return [body]
        self.met += 1
        return self.instead(body) if self.met == 1 else [body]


@asynccontextmanager
async def line(
    handle: Any,
    *,
    up: dict[str, Any] | None = None,
    down: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Line]:
    broker = MemoryBroker()
    async with AsyncExitStack() as stack:
        t1 = await stack.enter_async_context(FaultyTransport(MemoryTransport(broker), **(up or {})))
        t2 = await stack.enter_async_context(FaultyTransport(MemoryTransport(broker), **(down or {})))
        middle = await stack.enter_async_context(coordinator(t2, handle))
        edge = await stack.enter_async_context(agent(t1, **settings))
        yield Line(broker, t1, t2, edge, middle)


def is_probe(body: bytes) -> bool:
    return Part.of(body).probe


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


# ---- on a whole line ----


async def test_a_small_frame_is_one_publish_and_one_receipt() -> None:
    shelf, size = Shelf(), PART_HEADER.size + 5
    async with line(shelf) as ends:
        delivery = await ends.edge.send(UP, b"small", deadline_s=5)
        assert ends.broker.published == 2
        assert shelf.frames == [(UP, b"small", size)]
        assert (delivery.wire_bytes, delivery.parts, delivery.resent) == (size, 1, 0)
        assert ends.edge.sent_bytes == ends.middle.received_bytes == size
        await until(lambda: ends.middle.sent_bytes > 0)
        assert ends.middle.sent_bytes == ends.edge.received_bytes < 200


async def test_receipts_are_sparse() -> None:
    shelf, frame = Shelf(), frame_of(63.5)
    async with line(shelf, resend_s=5) as ends:
        delivery = await ends.edge.send(UP, frame, deadline_s=5)
    assert shelf.frames == [(UP, frame, len(frame) + 64 * PART_HEADER.size)]
    assert (delivery.parts, delivery.resent, delivery.wire_bytes) == (64, 0, shelf.frames[0][2])
    receipts = [Receipt.model_validate_json(body) for body in ends.down.bodies(RECEIPT)]
    assert [r.state for r in receipts].count("stored") == 1
    assert len(receipts) <= 64 / 4 + 1


async def test_no_more_than_the_window_is_in_flight() -> None:
    async with FaultyTransport(MemoryTransport(MemoryBroker())) as alone, agent(alone, window=5) as edge:
        with pytest.raises(DeliveryFailed, match=r"within 0.2 s: 0 of 20 parts"):
            await edge.send(UP, frame_of(20), deadline_s=0.2)
    parts = [Part.of(body) for body in alone.bodies(UP)]
    assert sorted(p.index for p in parts if not p.probe) == [0, 1, 2, 3, 4]
    assert 1 <= sum(p.probe for p in parts) <= 3
    assert [p.ask for p in parts if not p.probe][-1]


@pytest.mark.parametrize("window", [1, 2, 3, 8, 100])
async def test_every_window_moves_without_a_timer(window: int) -> None:
    shelf = Shelf()
    async with line(shelf, window=window, resend_s=60) as ends:
        await ends.edge.send(UP, frame_of(21.3), deadline_s=2)
    assert shelf.frames[0][1] == frame_of(21.3)


async def test_twenty_frames_at_once_each_to_its_agent() -> None:
    broker = MemoryBroker()
    shelves = {f"agent-{i}": Shelf() for i in range(20)}
    async with MemoryTransport(broker) as middle_transport:
        middle = coordinator(middle_transport)
        edges = [agent(middle_transport, name, shelf) for name, shelf in shelves.items()]
        async with middle:
            for edge in edges:
                await edge.__aenter__()
            frames = {name: frame_of(30, seed) for seed, name in enumerate(shelves)}
            await asyncio.gather(
                *(middle.send(TOPICS.of(n, "assignment"), f, deadline_s=10) for n, f in frames.items())
            )
            for edge in edges:
                await edge.__aexit__(None, None, None)
    assert {name: [f for _, f, _ in shelf.frames] for name, shelf in shelves.items()} == {
        name: [frame] for name, frame in frames.items()
    }


async def test_the_same_frame_to_two_agents_is_two_deliveries() -> None:
    one, two, t = Shelf(), Shelf(), MemoryTransport(MemoryBroker())
    async with t, coordinator(t) as middle, agent(t, "a", one), agent(t, "b", two):
        topics = [TOPICS.of(name, "assignment") for name in ("a", "b")]
        await asyncio.gather(*(middle.send(topic, b"same", deadline_s=5) for topic in topics))
    assert [len(s.frames) for s in (one, two)] == [1, 1]


async def test_a_second_caller_with_the_same_frame_waits_and_is_told_stored() -> None:
    broker, shelf = MemoryBroker(), Shelf()
    async with MemoryTransport(broker) as t, coordinator(t, shelf), agent(t) as edge:
        await asyncio.gather(*(edge.send(UP, frame_of(9), deadline_s=5) for _ in range(3)))
    assert len(shelf.frames) == 1


# ---- on a broken one ----


async def test_a_lost_part_is_sent_again_and_nothing_else() -> None:
    shelf, losing = Shelf(), First(lambda part: part.index == 5)
    # No timer can help here: the gap in a receipt is what brings part 5 again.
    async with line(shelf, up={"edit": losing}, resend_s=60) as ends:
        delivery = await ends.edge.send(UP, frame_of(20), deadline_s=5)
    assert (losing.met, delivery.resent, shelf.frames[0][1]) == (2, 1, frame_of(20))


async def test_a_lost_last_part_is_found_by_a_probe() -> None:
    shelf, losing = Shelf(), First(lambda part: part.index == 19)
    async with line(shelf, up={"edit": losing}) as ends:
        delivery = await ends.edge.send(UP, frame_of(20), deadline_s=5)
    assert (losing.met, delivery.resent, shelf.frames[0][1]) == (2, 1, frame_of(20))


async def test_the_receipt_stored_may_be_lost() -> None:
    shelf, stored = Shelf(), list[bytes]()

    def lose_the_first_stored(_: str, body: bytes) -> list[bytes]:
        if b"stored" in body:
            stored.append(body)
            return [] if len(stored) == 1 else [body]
        return [body]

    async with line(shelf, down={"edit": lose_the_first_stored}) as ends:
        delivery = await ends.edge.send(UP, frame_of(5), deadline_s=5)
    assert (len(shelf.frames), len(stored), delivery.resent) == (1, 2, 0)


@pytest.mark.parametrize("seed", range(6))
async def test_lost_doubled_and_reordered_letters_both_ways(seed: int) -> None:
    shelf, frame = Shelf(), frame_of(100, seed)
    faults: dict[str, Any] = {"lose": 0.15, "double": 0.2, "delay": 0.3}
    async with line(shelf, up={"seed": seed, **faults}, down={"seed": seed + 99, **faults}) as ends:
        delivery = await ends.edge.send(UP, frame, deadline_s=20)
    assert [f for _, f, _ in shelf.frames] == [frame]
    assert delivery.wire_bytes < 2 * len(frame)


async def test_reordering_alone_sends_little_twice() -> None:
    shelf, frame = Shelf(), frame_of(100)
    async with line(shelf, up={"seed": 1, "delay": 0.2, "delay_s": 0.001}, resend_s=1) as ends:
        delivery = await ends.edge.send(UP, frame, deadline_s=10)
    assert shelf.frames[0][1] == frame
    assert delivery.resent <= 40  # a fifth of the parts is late; chance may make it more


async def test_a_frame_waits_out_an_outage() -> None:
    shelf = Shelf()
    async with line(shelf) as ends:
        ends.up.offline = True
        sending = asyncio.create_task(ends.edge.send(UP, frame_of(20), deadline_s=5))
        await asyncio.sleep(0.1)
        assert not shelf.frames
        assert ends.edge.sent_bytes == 0
        ends.up.offline = False
        await sending
    assert shelf.frames[0][1] == frame_of(20)
    assert sorted(p.index for p in ends.up_parts()) == list(range(20))


async def test_an_outage_in_the_middle_costs_no_part_that_is_there() -> None:
    shelf, frame = Shelf(), frame_of(40)
    async with line(shelf) as ends:

        def break_at_20(_: str, body: bytes) -> list[bytes]:
            ends.up.offline = ends.up.offline or Part.of(body).index == 20
            return [body]

        ends.up.edit = break_at_20
        sending = asyncio.create_task(ends.edge.send(UP, frame, deadline_s=5))
        await until(lambda: ends.up.offline)
        await asyncio.sleep(0.05)
        ends.up.edit, ends.up.offline = None, False
        await sending
    assert shelf.frames[0][1] == frame
    assert sorted(p.index for p in ends.up_parts()) == list(range(40))


async def test_a_subscription_that_ended_is_taken_again() -> None:
    shelf, broker = Shelf(), MemoryBroker()
    t1, t2 = MemoryTransport(broker), MemoryTransport(broker)
    async with t1, t2, coordinator(t2, shelf), agent(t1) as edge:
        await edge.send(UP, b"before", deadline_s=5)
        t2.drop()
        sending = asyncio.create_task(edge.send(UP, b"after", deadline_s=5))
        await asyncio.sleep(0.1)
        await t2.__aenter__()
        await sending
    assert [f for _, f, _ in shelf.frames] == [b"before", b"after"]


async def test_a_restarted_sender_goes_on_where_the_receiver_stands() -> None:
    shelf, frame = Shelf(), frame_of(40)
    async with line(shelf) as ends:
        ends.up.edit = lambda _, body: [] if Part.of(body).index >= 20 else [body]
        with pytest.raises(DeliveryFailed, match="20 of 40 parts have arrived"):
            await ends.edge.send(UP, frame, deadline_s=0.2)
        await ends.edge.__aexit__(None, None, None)
        ends.up.edit = None
        ends.up.log.clear()
        async with agent(ends.up) as edge:
            await edge.send(UP, frame, deadline_s=5)
    assert [f for _, f, _ in shelf.frames] == [frame]
    assert sorted(p.index for p in ends.up_parts()) == [*range(8), *range(20, 40)]


async def test_a_restarted_receiver_is_sent_what_it_forgot() -> None:
    shelf, frame = Shelf(), frame_of(40)
    async with line(shelf) as ends:
        half_way = asyncio.Event()

        def hold_from_20(_: str, body: bytes) -> list[bytes]:
            if Part.of(body).index >= 20:
                half_way.set()
                return []
            return [body]

        ends.up.edit = hold_from_20
        sending = asyncio.create_task(ends.edge.send(UP, frame, deadline_s=10))
        await half_way.wait()
        await ends.middle.__aexit__(None, None, None)
        await asyncio.sleep(0.02)
        ends.up.edit = None
        async with coordinator(ends.down, shelf):
            await sending
    assert [f for _, f, _ in shelf.frames] == [frame]


async def test_a_receiver_that_restarted_after_storing_handles_it_again() -> None:
    broker, shelf = MemoryBroker(), Shelf()
    async with MemoryTransport(broker) as t, agent(t) as edge:
        for _ in range(2):
            async with coordinator(t, shelf):
                await edge.send(UP, b"frame", deadline_s=5)
    assert len(shelf.frames) == 2


async def test_a_frame_already_stored_is_not_handled_again() -> None:
    broker, shelf = MemoryBroker(), Shelf()
    async with MemoryTransport(broker) as t, coordinator(t, shelf, remembered=2):
        for frame in (b"1", b"1", b"2", b"3", b"3", b"1"):
            async with agent(t) as edge:
                await edge.send(UP, frame, deadline_s=5)
    assert [f for _, f, _ in shelf.frames] == [b"1", b"2", b"3", b"1"]


async def test_a_frame_that_was_forgotten_is_handled_again() -> None:
    shelf = Shelf()
    async with line(shelf) as ends:
        for _ in range(2):
            await ends.edge.send(UP, frame_of(5), deadline_s=5)
        ends.middle.forget(UP)
        await ends.edge.send(UP, frame_of(5), deadline_s=5)
    assert len(shelf.frames) == 2


async def test_a_corrupt_part_is_dropped_and_sent_again(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf()
    breaking = First(lambda part: part.index == 3, lambda body: [body[:-1] + bytes([body[-1] ^ 1])])
    async with line(shelf, up={"edit": breaking}) as ends:
        await ends.edge.send(UP, frame_of(10), deadline_s=5)
    assert shelf.frames[0][1] == frame_of(10)
    assert "letter dropped" in caplog.text


async def test_rubbish_on_either_topic_is_dropped() -> None:
    broker, shelf = MemoryBroker(), Shelf()
    async with MemoryTransport(broker) as t, coordinator(t, shelf), agent(t) as edge:
        digest = hashlib.sha256(b"frame").hexdigest()
        for body in (
            b"",
            b"{",
            b"\xff" * 80,
            json.dumps({"digest": digest, "state": "stored"}).encode(),
            b"x" * 20_000,
        ):
            await t.publish(UP, body)
            await t.publish(RECEIPT, body)
        await edge.send(UP, b"frame", deadline_s=5)
    assert len(shelf.frames) == 1


# ---- refused ----


async def test_a_frame_over_the_receivers_bound_is_refused() -> None:
    broker, shelf = MemoryBroker(), Shelf()
    async with MemoryTransport(broker) as t, coordinator(t, shelf, max_frame_bytes=9_999), agent(t) as edge:
        with pytest.raises(DeliveryFailed, match=r"10,240 bytes is over 9,999") as caught:
            await edge.send(UP, frame_of(10), deadline_s=5)
    assert caught.value.refused
    assert not shelf.frames


async def test_a_frame_over_the_senders_bounds_is_not_begun() -> None:
    async with FaultyTransport(MemoryTransport(MemoryBroker())) as t, agent(t, max_frame_bytes=100) as edge:
        with pytest.raises(FrameTooLarge, match="101 bytes is over 100"):
            await edge.send(UP, bytes(101), deadline_s=5)
        with pytest.raises(ValueError, match="empty"):
            await edge.send(UP, b"", deadline_s=5)
    async with (
        FaultyTransport(MemoryTransport(MemoryBroker())) as t,
        agent(t, part_bytes=PART_HEADER.size + 1) as edge,
    ):
        with pytest.raises(FrameTooLarge, match="65,536 parts"):
            await edge.send(UP, bytes(MAX_PARTS + 1), deadline_s=5)
    assert t.log == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FrameMismatch("array 'x' was not asked for"), "array 'x' was not asked for"),
        (WorkRefused("the lid is open"), "the lid is open"),
        (FrameCorrupt(""), "FrameCorrupt"),
        (KeyError("secret"), "internal error"),
    ],
)
async def test_a_handlers_no_is_the_senders_error(error: Exception, reason: str) -> None:
    async def refuse() -> None:
        raise error

    broker, shelf = MemoryBroker(), Shelf(refuse)
    async with MemoryTransport(broker) as t, coordinator(t, shelf), agent(t) as edge:
        with pytest.raises(DeliveryFailed, match=f"^{reason}$") as caught:
            await edge.send(UP, frame_of(3), deadline_s=5)
        # What fails over there is no verdict on the frame: its sender must not forget it.
        assert caught.value.refused is not isinstance(error, KeyError)
        # A refusal holds for that sending; the frame may be offered anew.
        shelf.answer = None
        await edge.send(UP, frame_of(3), deadline_s=5)
    assert len(shelf.frames) == 2


async def test_a_frame_that_does_not_have_its_digest_is_refused() -> None:
    broker, shelf = MemoryBroker(), Shelf()
    async with MemoryTransport(broker) as t, coordinator(t, shelf):
        receipts = await t.subscribe(RECEIPT)
        await t.publish(UP, Part(bytes(32), 7, 0, 1, 5, b"frame", ask=True).letter())
        receipt = Receipt.model_validate_json((await anext(receipts)).body)
    assert (receipt.state, receipt.attempt, receipt.reason) == (
        "refused",
        7,
        "the parts do not make the frame of that digest",
    )
    assert not shelf.frames


async def test_a_slow_handler_is_waited_for_with_probes_only() -> None:
    shelf = Shelf(lambda: asyncio.sleep(0.3))
    async with line(shelf) as ends:
        slow = asyncio.create_task(ends.edge.send(UP, frame_of(4), deadline_s=5))
        await until(lambda: len(shelf.frames) == 1)
        shelf.answer = None
        await ends.edge.send(UP, b"meanwhile another", deadline_s=0.2)
        assert not slow.done()
        delivery = await slow
    assert [f for _, f, _ in shelf.frames] == [frame_of(4), b"meanwhile another"]
    assert delivery.resent == 0
    assert 3 <= sum(is_probe(body) for body in ends.up.bodies(UP)) <= 8


async def test_deadline_and_closing_end_a_send() -> None:
    async with MemoryTransport(MemoryBroker()) as t:
        edge = agent(t)
        with pytest.raises(DeliveryFailed, match="not open"):
            await edge.send(UP, b"frame", deadline_s=5)
        async with edge:
            with pytest.raises(DeliveryFailed, match=r"within 0.1 s: 0 of 1") as caught:
                await edge.send(UP, b"frame", deadline_s=0.1)
            assert not caught.value.refused
            sending = asyncio.create_task(edge.send(UP, b"frame", deadline_s=60))
            await asyncio.sleep(0.01)
        with pytest.raises(DeliveryFailed, match="closed"):
            await sending


# ---- bounds ----


async def test_frames_begun_and_left_are_bounded_and_given_up() -> None:
    now = 0.0
    broker, shelf = MemoryBroker(), Shelf()

    async def begin(transport: MemoryTransport, frame: bytes, index: int) -> None:
        span = span_of(index, 2, len(frame))
        digest = hashlib.sha256(frame).digest()
        part = Part(digest, 1, index, 2, len(frame), frame[span.start : span.stop], ask=True)
        await transport.publish(UP, part.letter())
        await asyncio.sleep(0.01)

    t = MemoryTransport(broker)
    async with t, coordinator(t, shelf, frames_per_topic=2, stale_s=10, clock=lambda: now):
        frames = [frame_of(2, seed) for seed in range(4)]
        for now, frame in enumerate(frames[:3]):  # noqa: B007 - the clock reads it
            await begin(t, frame, 0)
        await begin(t, frames[0], 1)  # its first half was dropped for the third frame
        assert not shelf.frames
        await begin(t, frames[2], 1)
        assert [f for _, f, _ in shelf.frames] == [frames[2]]
        now = 100
        await begin(t, frames[3], 0)  # a new frame sweeps out what is stale
        await begin(t, frames[0], 0)
        assert [f for _, f, _ in shelf.frames] == [frames[2]]


@pytest.mark.parametrize("senders", [8, 64])
async def test_frames_that_are_handled_at_once_are_bounded_however_many_come(senders: int) -> None:
    broker, frame = MemoryBroker(), frame_of(1)
    begun: asyncio.Queue[None] = asyncio.Queue()
    go_on = asyncio.Semaphore(0)

    async def answer() -> None:
        begun.put_nowait(None)
        await go_on.acquire()

    shelf = Shelf(answer)
    names = [f"a{i}" for i in range(senders)]
    async with AsyncExitStack() as stack:
        taker = MemoryTransport(broker)
        await stack.enter_async_context(taker)
        courier = await stack.enter_async_context(coordinator(taker, shelf, handled_bytes=3 * len(frame)))
        edges = []
        for name in names:
            transport = await stack.enter_async_context(MemoryTransport(broker))
            edges.append(await stack.enter_async_context(agent(transport, name)))
        sending = asyncio.gather(
            *(
                edge.send(TOPICS.of(name, "update"), frame, deadline_s=60)
                for edge, name in zip(edges, names, strict=True)
            )
        )
        for _ in range(senders):
            await begun.get()
            assert courier.handling_bytes <= 3 * len(frame)
            go_on.release()
        await sending
        assert courier.handling_peak_bytes == 3 * len(frame)
        assert courier.handling_bytes == 0
    assert len(shelf.frames) == senders


@given(st.integers(1, 10**7), st.integers(1, 200_000))
def test_parts_cover_the_frame_and_both_sides_cut_alike(total: int, part_bytes: int) -> None:
    count = parts_of(total, part_bytes)
    size = part_size(total, count)
    assert size <= part_bytes
    assert parts_of(total, size) == count
    assert span_of(0, count, total).start == 0
    assert span_of(count - 1, count, total).stop == total
    assert len(span_of(count - 1, count, total)) >= 1


@given(st.binary(max_size=200) | st.binary(min_size=60, max_size=70).map(lambda b: b"HGP\x01\x01" + b))
def test_any_bytes_are_corrupt(body: bytes) -> None:
    with pytest.raises(FrameCorrupt):
        Part.of(body)


_U32, _U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@given(_U32 | st.integers(0, 5), _U32 | st.integers(0, 5), _U64 | st.integers(0, 50), st.booleans())
def test_no_geometry_breaks_the_reader(index: int, count: int, total: int, probe: bool) -> None:
    letter = Part(bytes(32), 1, index, count, total, b"payload", probe=probe).letter()
    try:
        part = Part.of(letter)
    except FrameCorrupt:
        return
    assert part.letter() == letter
    assert index < count <= total


@given(st.integers(0, 8 * (PART_HEADER.size + 20) - 1))
def test_every_flipped_bit_of_a_part_is_seen(bit: int) -> None:
    body = bytearray(Part(bytes(32), 1, 0, 1, 20, bytes(20)).letter())
    body[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameCorrupt):
        Part.of(bytes(body))
