"""A frame in parts over any transport: windowed, resumed where the receiver stands, confirmed once durable.

One big publish dies on a slow link, and a broker may acknowledge what it then drops (a full queue, a rule of
its access list). So a frame goes in parts, each acknowledged by the application at the other end:

    sender      part, part, part*, ...  at most `window` of them not yet acknowledged; * asks for a receipt
    receiver    receipt "parts"         which parts are here, of those up to the highest seen
    receiver    receipt "stored"        the frame was whole, and whoever handles it has made it durable
    receiver    receipt "refused"       it will not be taken, with the reason

When nothing moves for `resend_s` the sender sends a probe: a part without payload that asks where the
receiver stands. As letters of one topic keep their order, what was sent before the probe and is missing in
its answer is lost, and only that is sent again, however slow the link. Everything is idempotent by frame
digest and index: lost, doubled or reordered letters cost time and nothing else, and so do restarts of either
side.

A receipt needs no topic of the frame in it: the two share all levels but the last (`.../agents/a/update` and
`.../agents/a/receipt`), which is also what the broker's access list can enforce.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
import logging
import math
import secrets
import struct
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field

from foundation.errors import (
    DeliveryFailed,
    FrameCorrupt,
    FrameTooLarge,
    HedgerowError,
    NotConnected,
    TransportError,
    WireError,
    WorkRefused,
)
from foundation.frozen import Frozen
from foundation.transport import Bounded, Letter, Transport, matches

logger = logging.getLogger(__name__)

MAGIC = b"HGP"
VERSION = 1
INTERNAL = "internal error"
"""The reason of a receiver that failed, as on a full disk; the frame is none the worse for it."""
PART_HEADER = struct.Struct("<3sBB32sIIIQI")
"""Magic, version, flags, frame digest (SHA-256), attempt, index, count, frame bytes, CRC-32 of the rest."""
MAX_PARTS = 65_536
RECEIPT_BYTES = 16_384
REASON_CHARACTERS = 2_000
MAX_RANGES = 64
"""Gaps that one receipt lists; the next tells the rest."""
REORDER = 3
"""Parts that overtake a missing one before it is taken for lost without asking."""
_ASK, _PROBE = 1, 2
_IN_A_THREAD_BYTES = 1 << 20
"""Frames from here on are joined and hashed beside the event loop."""

Handle: TypeAlias = Callable[[str, bytes, int], Awaitable[None]]
"""Called with topic, frame, and the bytes it took on the wire; returns when the frame is durable."""
Number = Annotated[int, Field(ge=0, le=2**32)]


@dataclass(frozen=True, slots=True)
class Delivery:
    """What sending one frame took: bytes of parts and probes, parts in it, parts sent again, seconds."""

    wire_bytes: int
    parts: int
    resent: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a frame, or (`probe`) the question how much of it is here, numbered by `index`."""

    digest: bytes
    attempt: int
    index: int
    count: int
    total: int
    payload: bytes = b""
    ask: bool = False
    probe: bool = False

    @classmethod
    def of(cls, body: bytes) -> Self:
        """Read a letter; raises `FrameCorrupt` unless every field and the checksum are right."""
        if len(body) < PART_HEADER.size:
            raise FrameCorrupt(f"{len(body)} bytes are too few for a part")
        magic, version, flags, digest, attempt, index, count, total, crc = PART_HEADER.unpack_from(body)
        if magic != MAGIC or version != VERSION:
            raise FrameCorrupt(f"{magic!r} and version {version} do not begin a part")
        payload, probe = body[PART_HEADER.size :], bool(flags & _PROBE)
        if not (1 <= count <= min(total, MAX_PARTS) and parts_of(total, part_size(total, count)) == count):
            raise FrameCorrupt(f"{total:,} bytes do not make {count} parts")
        if not probe and index >= count:
            raise FrameCorrupt(f"there is no part {index} of {count}")
        span = span_of(index, count, total)
        expected = 0 if probe else span.stop - span.start
        if len(payload) != expected or _checksum(body[: PART_HEADER.size], payload) != crc:
            raise FrameCorrupt(f"part {index} of {count} is not whole")
        return cls(digest, attempt, index, count, total, payload, bool(flags & _ASK), probe)

    def letter(self) -> bytes:
        """Return the body of the letter."""
        flags = (_ASK if self.ask else 0) | (_PROBE if self.probe else 0)
        fields = (MAGIC, VERSION, flags, self.digest, self.attempt, self.index, self.count, self.total)
        crc = _checksum(PART_HEADER.pack(*fields, 0), self.payload)
        return PART_HEADER.pack(*fields, crc) + self.payload


def _checksum(header: bytes, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(header[:-4]))


def parts_of(total: int, part_bytes: int) -> int:
    """Return how many parts of at most `part_bytes` a frame of `total` bytes makes."""
    return -(-total // part_bytes)


def part_size(total: int, count: int) -> int:
    """Return the bytes of every part but the last, which has what is left: parts are as equal as can be."""
    return -(-total // count)


def span_of(index: int, count: int, total: int) -> range:
    """Return which bytes of the frame a part holds."""
    size = part_size(total, count)
    return range(index * size, min(total, (index + 1) * size))


class Receipt(Frozen):
    """Where the receiver stands with one frame."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    attempt: Number
    """The sending that is answered: a refusal counts for that one only."""
    state: Literal["parts", "stored", "refused"]
    upto: Number = 0
    """All parts below this one are here, but for those in `missing`."""
    missing: tuple[tuple[Number, Number], ...] = Field((), max_length=MAX_RANGES)
    """Ranges, the end not included."""
    probe: Number | None = None
    """The number of the probe that is answered."""
    reason: str = Field("", max_length=REASON_CHARACTERS)


# ---- sending ----


class _Outgoing:
    """One frame on its way out: what waits, is in flight, has arrived. Knows no transport and no time."""

    def __init__(self, topic: str, frame: bytes, digest: bytes, payload_bytes: int, attempt: int) -> None:
        self.topic, self.frame, self.digest, self.attempt = topic, frame, digest, attempt
        self.count = parts_of(len(frame), payload_bytes)
        self.acked: set[int] = set()
        self.in_flight: dict[int, int] = {}
        """Part to the number of probes that had been sent before it."""
        self.publishing: set[int] = set()
        """Parts that the transport still has in hand: to send them again would only double them."""
        self.probes = self.answered = 0
        self.wants_probe = self.probing = self.offline = self.stored = False
        self.too_large = False
        """The transport does not take a part: it has learnt that the broker takes less."""
        self.failure: DeliveryFailed | None = None
        self.moved = False
        self.changed = asyncio.Event()
        self.done = asyncio.Event()
        self.wire_bytes = self.resent = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self._waiting = list(range(self.count))  # sorted, so already a heap
        self._sent_once: set[int] = set()
        self._hurried: set[int] = set()
        self._since_asked = 0

    def next_part(self, window: int) -> Part | None:
        """Take the next part to send; `None` when the window is full or nothing waits."""
        if self.offline or len(self.in_flight) >= window or not self._anything_waits():
            return None
        index = heapq.heappop(self._waiting)
        self.in_flight[index] = self.probes
        self.resent += index in self._sent_once
        self._sent_once.add(index)
        self._since_asked += 1
        # A receipt every half window keeps it moving; the last part before a stop must ask, or both wait.
        ask = 2 * self._since_asked >= window or len(self.in_flight) >= window or not self._anything_waits()
        if ask:
            self._since_asked = 0
        span = span_of(index, self.count, len(self.frame))
        return self._part(index, self.frame[span.start : span.stop], ask=ask)

    def _anything_waits(self) -> bool:
        while self._waiting and (self._waiting[0] in self.acked or self._waiting[0] in self.in_flight):
            heapq.heappop(self._waiting)
        return bool(self._waiting)

    def next_probe(self) -> Part:
        """Make the next probe."""
        self.probes += 1
        self.wants_probe = False
        return self._part(self.probes, b"", ask=True, probe=True)

    def _part(self, index: int, payload: bytes, *, ask: bool, probe: bool = False) -> Part:
        return Part(self.digest, self.attempt, index, self.count, len(self.frame), payload, ask, probe)

    def not_sent(self, part: Part) -> None:
        """Put a part back that could not be handed to the transport."""
        if not part.probe and self.in_flight.pop(part.index, None) is not None:
            heapq.heappush(self._waiting, part.index)

    def learn(self, receipt: Receipt) -> None:
        """Take in a receipt."""
        if receipt.state == "stored":
            self.stored = True
        elif receipt.state == "refused":
            if receipt.attempt == self.attempt:
                # An error over there says nothing about the frame: whoever sent it keeps it.
                reason = receipt.reason or "refused without a reason"
                self.failure = DeliveryFailed(reason, refused=reason != INTERNAL)
        else:
            self._learn_parts(receipt)
        self.changed.set()

    def _learn_parts(self, receipt: Receipt) -> None:
        upto = min(receipt.upto, self.count)
        missing = {i for a, b in receipt.missing for i in range(a, min(b, upto))}
        for i in range(upto):
            if i not in missing and i not in self.acked:
                self.acked.add(i)
                self.in_flight.pop(i, None)
                self.moved = True
        probe = receipt.probe if receipt.attempt == self.attempt else None
        if probe is not None and self.answered < probe <= self.probes:
            self.answered, self.moved = probe, True
            self._send_again(i for i in missing if i in self.acked or self.in_flight.get(i, probe) < probe)
        elif not missing.isdisjoint(self.acked):
            self.wants_probe = True  # the receiver has forgotten parts, or this receipt is an old one
        else:
            overtaken = {i for i in missing - self._hurried if i in self.in_flight and upto - i > REORDER}
            self._hurried |= overtaken
            self._send_again(overtaken)

    def _send_again(self, lost: Iterable[int]) -> None:
        for i in list(lost):
            if i not in self.publishing:
                self.acked.discard(i)
                self.in_flight.pop(i, None)
                heapq.heappush(self._waiting, i)


# ---- receiving ----


@dataclass(slots=True)
class _Incoming:
    """One frame on its way in."""

    count: int
    total: int
    attempt: int
    touched_s: float
    parts: dict[int, bytes] = field(default_factory=dict)
    upto: int = 0
    wire_bytes: int = 0
    handling: bool = False

    def add(self, part: Part, wire_bytes: int) -> bool:
        """Take a part in; true when it was the last one, and the frame is to be handled."""
        if self.handling:
            return False
        self.wire_bytes += wire_bytes
        self.parts[part.index] = part.payload
        self.upto = max(self.upto, part.index + 1)
        self.handling = len(self.parts) == self.count
        return self.handling

    def missing(self, upto: int) -> tuple[list[tuple[int, int]], int]:
        """Return the gaps below `upto` as ranges, and up to where they are all of them."""
        gaps: list[tuple[int, int]] = []
        if self.handling:
            return gaps, self.count
        for i in range(upto):
            if i in self.parts:
                continue
            if gaps and gaps[-1][1] == i:
                gaps[-1] = (gaps[-1][0], i + 1)
            elif len(gaps) == MAX_RANGES:
                return gaps, i
            else:
                gaps.append((i, i + 1))
        return gaps, upto


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a frame ended here; `refused` is the reason, for the attempt it was given to."""

    attempt: int
    refused: str | None = None


class _Inbox:
    """The frames that are arriving, and how the last ones ended. Knows no transport."""

    def __init__(self, max_frame_bytes: int, frames_per_topic: int, remembered: int, stale_s: float) -> None:
        self._max_frame_bytes, self._frames_per_topic = max_frame_bytes, frames_per_topic
        self._remembered, self._stale_s = remembered, stale_s
        self._frames: dict[str, dict[bytes, _Incoming]] = {}
        self._outcomes: dict[str, OrderedDict[bytes, _Outcome]] = {}
        self._looked_s = -math.inf

    def outcome(self, topic: str, part: Part) -> _Outcome | None:
        """Return how this frame ended; a refusal is forgotten as soon as the frame is offered anew."""
        ended = self._outcomes.get(topic)
        outcome = ended.get(part.digest) if ended else None
        if outcome is not None and (outcome.refused is None or outcome.attempt == part.attempt):
            return outcome
        return None

    def settle(self, topic: str, digest: bytes, outcome: _Outcome) -> None:
        """Remember how a frame ended, and drop its parts."""
        self._frames.get(topic, {}).pop(digest, None)
        ended = self._outcomes.setdefault(topic, OrderedDict())
        ended[digest] = outcome
        ended.move_to_end(digest)
        while len(ended) > self._remembered:
            ended.popitem(last=False)

    def forget(self, topic: str) -> None:
        """Forget how frames of a topic ended."""
        self._outcomes.pop(topic, None)

    def get(self, topic: str, part: Part) -> _Incoming | None:
        """Return the frame a part belongs to, if some of it is here."""
        here: dict[bytes, _Incoming] = self._frames.get(topic, {})
        frame = here.get(part.digest)
        return frame if frame and (frame.count, frame.total) == (part.count, part.total) else None

    def open(self, topic: str, part: Part, now_s: float) -> _Incoming | None:
        """Return the frame a part belongs to, newly opened if need be; `None` when this topic has no room."""
        if part.total > self._max_frame_bytes:
            reason = f"a frame of {part.total:,} bytes is over {self._max_frame_bytes:,}"
            self.settle(topic, part.digest, _Outcome(part.attempt, reason))
            return None
        frame = self.get(topic, part)
        if frame is None:
            self._forget_stale(now_s)
            frame = self._make_room(topic, part, now_s)
        if frame is not None:
            frame.attempt, frame.touched_s = part.attempt, now_s
        return frame

    def _make_room(self, topic: str, part: Part, now_s: float) -> _Incoming | None:
        here = self._frames.setdefault(topic, {})
        before = here.get(part.digest)
        if before is not None and before.handling:
            return None  # the same frame in other pieces, while it is being stored
        here.pop(part.digest, None)
        if len(here) >= self._frames_per_topic:
            assembling = [digest for digest, frame in here.items() if not frame.handling]
            if not assembling:
                return None
            oldest = min(assembling, key=lambda digest: here[digest].touched_s)
            logger.warning("too many frames at once, one is dropped", extra={"topic": topic})
            del here[oldest]
        here[part.digest] = frame = _Incoming(part.count, part.total, part.attempt, now_s)
        return frame

    def _forget_stale(self, now_s: float) -> None:
        if now_s - self._looked_s < self._stale_s / 8:
            return  # with every new frame it would cost the more, the more senders there are
        self._looked_s = now_s
        for topic, frames in list(self._frames.items()):
            for digest, frame in list(frames.items()):
                if not frame.handling and now_s - frame.touched_s > self._stale_s:
                    logger.info("frame given up, its sender is gone", extra={"topic": topic})
                    del frames[digest]
            if not frames:
                del self._frames[topic]

    def standing(self, topic: str, part: Part) -> Receipt:
        """Return what the sender of a part should know now; `part` is the one that asked."""
        facts: dict[str, Any] = {"digest": part.digest.hex(), "attempt": part.attempt}
        probe = part.index if part.probe else None
        outcome = self.outcome(topic, part)
        if outcome is not None:
            state = "stored" if outcome.refused is None else "refused"
            return Receipt(state=state, probe=probe, reason=outcome.refused or "", **facts)
        frame = self.get(topic, part)
        if frame is None:
            upto = part.count if part.probe else 0
            return Receipt(state="parts", upto=upto, missing=((0, upto),), probe=probe, **facts)
        gaps, upto = frame.missing(frame.count if part.probe else frame.upto)
        return Receipt(state="parts", upto=upto, missing=tuple(gaps), probe=probe, **facts)


# ---- both ----


class Courier:
    """Sends frames to and takes frames from the other side of a transport; an async context manager.

    `frames` is the topic pattern of parts that come in (`None`: others take them), `receipts` that of
    receipts for what goes out; `receipt_topic` gives the topic for our receipts from a frame's topic.
    `handle(topic, frame, wire_bytes)` runs in a task of its own for every whole frame; when it returns, the
    sender is told "stored"; when it raises `WireError` or `WorkRefused`, the sender is told the reason, and
    after any other error only that it was one. It must be idempotent: a frame comes again when we restarted
    after handling it. `part_bytes` bounds one publish, header included, and so does the transport where it is
    `Bounded`: a frame whose parts turn out too large is sent again in smaller ones. With `handled_bytes`,
    letters stay unread while whole frames of that size together are being handled: a handler must not wait
    for a letter then. The transport is opened before and closed after the courier.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        frames: str | None,
        receipts: str,
        receipt_topic: Callable[[str], str],
        handle: Handle,
        part_bytes: int = 120_000,
        window: int = 8,
        resend_s: float = 3.0,
        retry_s: float = 1.0,
        max_frame_bytes: int = 256 * 1024 * 1024,
        handled_bytes: int | None = None,
        frames_per_topic: int = 4,
        remembered: int = 32,
        stale_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if part_bytes <= PART_HEADER.size or window < 1:
            raise ValueError(f"parts need more than {PART_HEADER.size} bytes and a window of at least 1")
        self._transport = transport
        self._frames, self._receipts, self._receipt_topic = frames, receipts, receipt_topic
        self._patterns = (receipts,) if frames is None else (frames, receipts)
        self._handle = handle
        self._part_bytes = part_bytes
        self._window, self._resend_s, self._retry_s = window, resend_s, retry_s
        self._max_frame_bytes = max_frame_bytes
        self._clock = clock
        self._inbox = _Inbox(max_frame_bytes, frames_per_topic, remembered, stale_s)
        self._outgoing: dict[tuple[str, str], _Outgoing] = {}
        self._due: dict[tuple[str, bytes], Part] = {}
        self._answering: set[tuple[str, bytes]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = False
        self._handled_bytes = handled_bytes
        self._room = asyncio.Event()
        self._room.set()
        self.handling_bytes = self.handling_peak_bytes = 0
        """Bytes of whole frames that are being handled, now and at most."""
        self.sent_bytes = 0
        """Bytes of parts, probes and receipts handed to the transport."""
        self.received_bytes = 0
        """Bytes of parts, probes and receipts that came in."""

    async def __aenter__(self) -> Self:
        """Subscribe; raises as the transport does."""
        letters = await self._transport.subscribe(*self._patterns)
        self._open = True
        self._spawn(self._read(letters), self._tasks)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        for out in self._outgoing.values():
            out.failure = out.failure or DeliveryFailed("the courier was closed before the frame was taken")
            out.changed.set()
        await _cancel(self._tasks)

    async def send(self, topic: str, frame: bytes, *, deadline_s: float) -> Delivery:
        """Deliver a frame; returns once the other side has stored it.

        Raises `DeliveryFailed` when the deadline passes or (with `refused`) when the other side says no,
        and `FrameTooLarge` when the frame is over our own bound. The same frame on the same topic is sent
        once at a time; the second caller waits.
        """
        if not frame:
            raise ValueError("an empty frame cannot be sent")
        self._check_sendable(frame)
        started, digest = self._clock(), await _digest(frame)
        out = _Outgoing(topic, frame, digest, self._payload_bytes, secrets.randbits(32))
        key = (_branch(topic), digest.hex())
        try:
            async with asyncio.timeout(deadline_s):
                while (other := self._outgoing.get(key)) is not None:
                    await other.done.wait()
                self._outgoing[key] = out
                while not await self._drive(out):
                    out = self._outgoing[key] = await self._in_smaller_parts(out)
        except TimeoutError as error:
            raise DeliveryFailed(
                f"not taken within {deadline_s:g} s: {len(out.acked)} of {out.count} parts have arrived"
            ) from error
        finally:
            if self._outgoing.get(key) is out:
                del self._outgoing[key]
                out.done.set()
            await _cancel(out.tasks)
        return Delivery(out.wire_bytes, out.count, out.resent, self._clock() - started)

    def forget(self, topic: str) -> None:
        """Forget which frames of a topic were stored: the next, even of the same bytes, is handled again.

        For who took a frame and then could not do what it asks, and wants to be asked again.
        """
        self._inbox.forget(topic)

    def bytes_of(self, frame: bytes) -> int:
        """Return the bytes of a frame's parts, each sent once: what it took when nobody counted any more."""
        return len(frame) + parts_of(len(frame), self._payload_bytes) * PART_HEADER.size

    def _check_sendable(self, frame: bytes) -> None:
        if not self._open:
            raise DeliveryFailed("the courier is not open")
        if len(frame) > self._max_frame_bytes:
            raise FrameTooLarge(f"a frame of {len(frame):,} bytes is over {self._max_frame_bytes:,}")
        if parts_of(len(frame), self._payload_bytes) > MAX_PARTS:
            raise FrameTooLarge(f"a frame of {len(frame):,} bytes needs more than {MAX_PARTS:,} parts")

    @property
    def _payload_bytes(self) -> int:
        """Bytes of a frame that one part holds at most."""
        bound, transport = self._part_bytes, self._transport
        if isinstance(transport, Bounded):
            bound = min(bound, transport.max_body_bytes)
        return max(1, bound - PART_HEADER.size)

    async def _in_smaller_parts(self, out: _Outgoing) -> _Outgoing:
        """Begin a frame anew whose parts the transport does not take."""
        size = self._payload_bytes
        if parts_of(len(out.frame), size) <= out.count:
            raise DeliveryFailed(f"the transport does not take parts of {size:,} bytes")
        self._check_sendable(out.frame)
        await _cancel(out.tasks)
        again = _Outgoing(out.topic, out.frame, out.digest, size, secrets.randbits(32))
        again.done, again.wire_bytes, again.resent = out.done, out.wire_bytes, out.resent + out.count
        logger.info(
            "a frame in smaller parts", extra={"topic": out.topic, "bytes": size, "parts": again.count}
        )
        return again

    async def _drive(self, out: _Outgoing) -> bool:
        """Send parts and probes until the other side has said yes or no; false where parts are too large."""
        probe_at, silent = self._clock() + self._resend_s, 0
        while not out.stored:
            if out.failure is not None:
                raise out.failure
            if out.too_large:
                return False
            out.changed.clear()
            if out.offline:
                await asyncio.sleep(self._retry_s)
                out.offline, probe_at = False, self._clock()
            if out.moved:
                out.moved, silent, probe_at = False, 0, self._clock() + self._resend_s
            while (part := out.next_part(self._window)) is not None:
                out.publishing.add(part.index)
                self._spawn(self._publish_part(out, part), out.tasks)
            if self._clock() >= probe_at or (out.wants_probe and out.answered == out.probes):
                # Rarer while nobody answers: a link that is away or slow is not helped by questions.
                probe_at, silent = self._clock() + self._resend_s * 2**silent, min(silent + 1, 3)
                self._probe(out)
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`: before Python 3.12 it loses a cancellation that meets the event.
                async with asyncio.timeout(max(0.0, probe_at - self._clock())):
                    await out.changed.wait()
        return True

    def _probe(self, out: _Outgoing) -> None:
        if not out.probing:
            out.probing = True
            self._spawn(self._publish_part(out, out.next_probe()), out.tasks)

    async def _publish_part(self, out: _Outgoing, part: Part) -> None:
        body = part.letter()
        self.sent_bytes += len(body)
        out.wire_bytes += len(body)
        try:
            await self._transport.publish(out.topic, body)
        except NotConnected as error:
            self.sent_bytes -= len(body)
            out.wire_bytes -= len(body)
            if not out.offline:
                logger.info("no connection, a frame waits", extra={"topic": out.topic, "reason": str(error)})
            out.not_sent(part)
            out.offline = True
            out.changed.set()
        except FrameTooLarge:
            out.too_large = True
            out.changed.set()
        except HedgerowError as error:
            out.failure = DeliveryFailed(f"the transport does not take it: {error}")
            out.changed.set()
        finally:
            if part.probe:
                out.probing = False
            else:
                out.publishing.discard(part.index)

    async def _read(self, letters: AsyncIterator[Letter]) -> None:
        while True:
            async for letter in letters:
                await self._room.wait()
                self.received_bytes += len(letter.body)
                try:
                    self._take(letter)
                except WireError as error:
                    logger.warning("letter dropped", extra={"topic": letter.topic, "reason": str(error)})
            letters = await self._subscribe_again()

    async def _subscribe_again(self) -> AsyncIterator[Letter]:
        """Wait for a transport that has ended our subscription to take it again."""
        logger.info("the subscription ended, subscribing again", extra={"topic": self._receipts})
        while True:
            await asyncio.sleep(self._retry_s)
            try:
                letters = await self._transport.subscribe(*self._patterns)
            except TransportError as error:
                logger.debug("not subscribed yet", extra={"topic": self._receipts, "reason": str(error)})
                continue
            for out in self._outgoing.values():
                out.wants_probe = True
                out.changed.set()
            return letters

    def _take(self, letter: Letter) -> None:
        if matches(self._receipts, letter.topic):
            receipt = _receipt(letter.body)
            out = self._outgoing.get((_branch(letter.topic), receipt.digest))
            if out is not None:
                out.learn(receipt)
        elif self._frames is not None and matches(self._frames, letter.topic):
            self._take_part(letter.topic, Part.of(letter.body), len(letter.body))

    def _take_part(self, topic: str, part: Part, wire_bytes: int) -> None:
        if part.probe or self._inbox.outcome(topic, part) is not None:
            if part.ask:
                self._answer(topic, part)
            return
        frame = self._inbox.open(topic, part, self._clock())
        if frame is None:
            if self._inbox.outcome(topic, part) is not None:
                self._answer(topic, part)
            return
        gap = part.index > frame.upto
        if frame.add(part, wire_bytes):
            self._handling(frame.total)
            self._spawn(self._finish(topic, part.digest, frame), self._tasks)
        elif part.ask or gap:
            self._answer(topic, part)

    async def _finish(self, topic: str, digest: bytes, frame: _Incoming) -> None:
        """Have a whole frame handled, and tell its sender how that ended."""
        try:
            refused = await self._refusal(topic, digest, frame)
        finally:
            self._handling(-frame.total)
        self._inbox.settle(topic, digest, _Outcome(frame.attempt, refused))
        self._answer(topic, Part(digest, frame.attempt, 0, frame.count, frame.total))

    @property
    def is_full(self) -> bool:
        """Whether letters stay unread at present, as much is being handled."""
        return not self._room.is_set()

    def _handling(self, more_bytes: int) -> None:
        self.handling_bytes += more_bytes
        self.handling_peak_bytes = max(self.handling_peak_bytes, self.handling_bytes)
        if self._handled_bytes is None or self.handling_bytes < self._handled_bytes:
            self._room.set()
        else:
            self._room.clear()

    async def _refusal(self, topic: str, digest: bytes, frame: _Incoming) -> str | None:
        whole = b"".join(frame.parts.pop(i) for i in range(frame.count))
        if await _digest(whole) != digest:
            return "the parts do not make the frame of that digest"
        try:
            await self._handle(topic, whole, frame.wire_bytes)
        except (WireError, WorkRefused) as error:
            return str(error)[:REASON_CHARACTERS] or type(error).__name__
        except Exception:
            logger.exception("a frame could not be handled", extra={"topic": topic})
            return INTERNAL
        return None

    def _answer(self, topic: str, part: Part) -> None:
        """Tell a sender where its frame stands; what is asked meanwhile is answered once."""
        key = (topic, part.digest)
        before = self._due.get(key)
        if before is None or part.probe or not before.probe or before.attempt != part.attempt:
            self._due[key] = part
        if key not in self._answering:
            self._answering.add(key)
            self._spawn(self._tell(key), self._tasks)

    async def _tell(self, key: tuple[str, bytes]) -> None:
        topic = key[0]
        try:
            while (part := self._due.pop(key, None)) is not None:
                receipt = self._inbox.standing(topic, part)
                body = receipt.model_dump_json(exclude_defaults=True).encode()
                await self._transport.publish(self._receipt_topic(topic), body)
                self.sent_bytes += len(body)
        except TransportError as error:  # the sender will ask again
            logger.info("receipt not sent", extra={"topic": topic, "reason": str(error)})
        finally:
            self._answering.discard(key)

    def _spawn(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(_log_failure)


def _branch(topic: str) -> str:
    """Return what a frame's topic shares with that of its receipts."""
    return topic.rpartition("/")[0]


def _receipt(body: bytes) -> Receipt:
    if len(body) > RECEIPT_BYTES:
        raise FrameTooLarge(f"a receipt of {len(body):,} bytes is over {RECEIPT_BYTES:,}")
    try:
        return Receipt.model_validate_json(body)
    except ValueError as error:
        raise FrameCorrupt("a receipt cannot be read") from error


async def _digest(frame: bytes) -> bytes:
    if len(frame) < _IN_A_THREAD_BYTES:
        return hashlib.sha256(frame).digest()
    return await asyncio.to_thread(lambda: hashlib.sha256(frame).digest())


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    pending = list(tasks)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a task of the courier failed", exc_info=error)
