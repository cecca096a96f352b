"""Virtual agents for bench/thousand.py: many real MQTT connections in one process, empty work.

Nothing of the protocol is left out: every agent has a connection of its own with a last will, subscribes as
an agent does, introduces itself with presence and card (again when a coordinator comes), takes assignments in
parts with receipts, answers with an update frame of our own codec and waits until it is stored, asks for the
time, tells telemetry. Left out is what costs a device and not the federation: the vault on disk, data,
training, the meter. The client below speaks as much MQTT 3.1.1 as that takes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from coordinator.collector import expected_layout
from coordinator.robust.changes import is_change
from edge_agent.agent import OFFLINE, RARE_TELEMETRY_S
from foundation.codec import assignment_from, frame_of
from foundation.energy import Stage
from foundation.errors import DeliveryFailed, NotConnected
from foundation.messages import AgentCard, Assignment, ClockQuestion, Presence, Telemetry, Update
from foundation.parameters import Parameters
from foundation.spec import ModelSpec, initial_parameters
from foundation.topics import Topics, client_id
from foundation.transfer import Courier
from foundation.transport import Letter, matches
from foundation.work import ABILITIES

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PING, DISCONNECT = 1, 2, 3, 4, 8, 9, 12, 14
KEEPALIVE_S = 30
AT_ONCE = 50
"""Connections that one process opens at a time."""
PATIENCE_S = 60.0
AGAIN_S = 5.0
STATUS_S = 0.5


def packet(kind: int, flags: int, body: bytes) -> bytes:
    """One MQTT control packet."""
    length, left = bytearray(), len(body)
    while True:
        left, low = divmod(left, 128)
        length.append(low | (0x80 if left else 0))
        if not left:
            return bytes([kind << 4 | flags]) + bytes(length) + body


def text(words: str | bytes) -> bytes:
    data = words.encode() if isinstance(words, str) else words
    return len(data).to_bytes(2, "big") + data


class Line(asyncio.Protocol):
    """One MQTT 3.1.1 connection; a `Transport`."""

    def __init__(self, port: int, client: str, will: tuple[str, bytes], counts: Counts) -> None:
        self._port, self._client, self._will, self._counts = port, client, will, counts
        self._buffer = bytearray()
        self._ids = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._inboxes: list[tuple[tuple[str, ...], asyncio.Queue[Letter | None]]] = []
        self._socket: asyncio.Transport | None = None
        self.lost = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._waiting[0] = loop.create_future()
        await loop.create_connection(lambda: self, "127.0.0.1", self._port)
        # Clean session, last will with QoS 1 and retained.
        head = text("MQTT") + bytes([4, 0b0010_1110]) + KEEPALIVE_S.to_bytes(2, "big")
        self._send(packet(CONNECT, 0, head + text(self._client) + text(self._will[0]) + text(self._will[1])))
        await self._answered(0)
        task = asyncio.create_task(self._stay())
        self._tasks.add(task)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        if self._socket is not None and not self.lost.is_set():
            self._send(packet(DISCONNECT, 0, b""))
            self._socket.close()

    async def publish(self, topic: str, body: bytes, *, retain: bool = False, qos: int = 1) -> None:
        if not qos:
            self._send(packet(PUBLISH, int(retain), text(topic) + body))
            return
        number = self._number()
        self._send(packet(PUBLISH, 2 | int(retain), text(topic) + number.to_bytes(2, "big") + body))
        await self._answered(number)

    async def subscribe(self, *patterns: str) -> AsyncIterator[Letter]:
        queue: asyncio.Queue[Letter | None] = asyncio.Queue()
        self._inboxes.append((patterns, queue))
        number = self._number()
        wanted = b"".join(text(pattern) + b"\x01" for pattern in patterns)
        self._send(packet(SUBSCRIBE, 2, number.to_bytes(2, "big") + wanted))
        await self._answered(number)
        return _letters(queue)

    def _number(self) -> int:
        self._ids = self._ids % 65_535 + 1
        self._waiting[self._ids] = asyncio.get_running_loop().create_future()
        return self._ids

    async def _answered(self, number: int) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._waiting[number]
        except TimeoutError:
            raise NotConnected(f"the broker has not answered for {PATIENCE_S:g} s") from None
        finally:
            self._waiting.pop(number, None)

    async def _stay(self) -> None:
        await asyncio.sleep(random.uniform(0, KEEPALIVE_S))  # not all at once
        while True:
            self._send(packet(PING, 0, b""))
            await asyncio.sleep(KEEPALIVE_S)

    def _send(self, data: bytes) -> None:
        if self._socket is None or self.lost.is_set():
            raise NotConnected("the connection is lost")
        self._counts.sent_bytes += len(data)
        self._socket.write(data)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._socket = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(NotConnected("the connection is lost"))
                waiting.exception()  # looked at, where nobody waits any more
        for _, queue in self._inboxes:
            queue.put_nowait(None)

    def data_received(self, data: bytes) -> None:
        self._counts.received_bytes += len(data)
        self._buffer += data
        while (found := _length(self._buffer)) is not None:
            start, stop = found
            head, body = self._buffer[0], bytes(self._buffer[start:stop])
            del self._buffer[:stop]
            self._take(head >> 4, head & 15, body)

    def _take(self, kind: int, flags: int, body: bytes) -> None:
        if kind == PUBLISH:
            self._letter(flags, body)
        elif kind in (PUBACK, SUBACK, CONNACK):
            number = 0 if kind == CONNACK else int.from_bytes(body[:2], "big")
            waiting = self._waiting.get(number)
            refused = body[1] if kind == CONNACK else (kind == SUBACK and 0x80 in body[2:])
            if waiting is not None and not waiting.done():
                if refused:
                    waiting.set_exception(NotConnected(f"the broker refuses: {body.hex()}"))
                else:
                    waiting.set_result(None)

    def _letter(self, flags: int, body: bytes) -> None:
        stop = 2 + int.from_bytes(body[:2], "big")
        topic = body[2:stop].decode()
        if flags >> 1 & 3:
            self._send(packet(PUBACK, 0, body[stop : stop + 2]))
            stop += 2
        for patterns, queue in self._inboxes:
            if any(matches(pattern, topic) for pattern in patterns):
                queue.put_nowait(Letter(topic, body[stop:], retained=bool(flags & 1)))
                return


def _length(buffer: bytearray) -> tuple[int, int] | None:
    """Where the body of the first packet begins and ends; `None` until all of it is here."""
    length = 0
    for place in range(1, min(5, len(buffer))):
        length |= (buffer[place] & 127) << 7 * (place - 1)
        if not buffer[place] & 128:
            stop = place + 1 + length
            return (place + 1, stop) if stop <= len(buffer) else None
    return None


async def _letters(queue: asyncio.Queue[Letter | None]) -> AsyncIterator[Letter]:
    while (letter := await queue.get()) is not None:
        yield letter


@dataclass
class Counts:
    """What the agents of one process have done so far."""

    connected: int = 0
    lost: int = 0
    """Connections that ended by themselves; each is made anew."""
    assignments: int = 0
    stored: int = 0
    """Updates that the coordinator has confirmed."""
    refused: int = 0
    cancelled: int = 0
    update_bytes: int = 0
    """Frame of the last update."""
    sent_bytes: int = 0
    received_bytes: int = 0
    """MQTT packets of all agents, TCP and IP headers not included."""
    reasons: list[str] = field(default_factory=list)
    """The first few refusals."""


@cache
def _initial(spec: ModelSpec, seed: int) -> Parameters:
    return initial_parameters(spec, seed)


def answer(assignment: Assignment) -> Update:
    """What an agent would send that learnt a little noise; the same again for the same assignment."""
    work = assignment.work
    base = _initial(assignment.spec, assignment.model_seed) if work.initial else assignment.parameters
    rng = np.random.default_rng(assignment.seed)
    arrays = {}
    for name, shape in expected_layout(assignment):
        step = rng.standard_normal(shape, np.float32) * np.float32(1e-3)
        arrays[name] = step if is_change(name, assignment) or name not in base else base[name] + step
    return Update(
        run=assignment.run,
        round=assignment.round,
        agent=assignment.agent,
        examples=int(rng.integers(50, 500)),
        metrics={"accuracy": 0.5, "accuracy_sent": 0.5, "loss": 1.0, "loss_sent": 1.0},
        kept_units=(assignment.spec.hidden,) * assignment.spec.depth,
        parameters=Parameters(arrays),
    )


class VirtualAgent:
    """One agent; `live` ends when it is cancelled."""

    def __init__(
        self, name: str, federation: str, port: int, counts: Counts, doors: asyncio.Semaphore
    ) -> None:
        self.name, self.port, self.counts, self._doors = name, port, counts, doors
        self.topics, self.federation = Topics(federation), federation
        self._session = f"{random.getrandbits(48):012x}"
        self._work: set[asyncio.Task[None]] = set()
        self._line: Line | None = None
        self._courier: Courier | None = None

    def _topic(self, what: str) -> str:
        return self.topics.of(self.name, what)

    async def live(self) -> None:
        while True:
            will = (self._topic("presence"), OFFLINE.model_dump_json().encode())
            line = Line(self.port, client_id(self.federation, self.name), will, self.counts)
            try:
                await self._connected(line)
            except (NotConnected, OSError):
                self.counts.lost += 1
                await asyncio.sleep(random.uniform(0.5, 4.0))

    async def _connected(self, line: Line) -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with self._doors:
                self._line = await stack.enter_async_context(line)
                self._courier = await stack.enter_async_context(self._new_courier(line))
                commands = await line.subscribe(self._topic("command"))
                coordinators = await line.subscribe(self.topics.coordinator_presence)
                await self._introduce()
            self.counts.connected += 1
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._greet(coordinators))
                    tasks.create_task(self._heed(commands))
                    tasks.create_task(self._report())
                    await line.lost.wait()
                    raise NotConnected("the connection is lost")
            except* NotConnected:
                pass
            finally:
                self.counts.connected -= 1
                for task in self._work:
                    task.cancel()
        raise NotConnected("the connection is lost")

    def _new_courier(self, line: Line) -> Courier:
        return Courier(
            line,
            frames=self._topic("assignment"),
            receipts=self._topic("receipt"),
            receipt_topic=lambda _: self._topic("received"),
            handle=self._arrived,
        )

    async def _introduce(self) -> None:
        assert self._line is not None
        presence = Presence(state="online", session=self._session)
        await self._line.publish(self._topic("card"), self.card().model_dump_json().encode(), retain=True)
        await self._line.publish(self._topic("presence"), presence.model_dump_json().encode(), retain=True)

    def card(self) -> AgentCard:
        return AgentCard(
            agent=self.name,
            version="virtual",
            profile="unknown-linux",
            examples=200,
            input="image",
            shape=(1, 8, 8),
            labels=tuple("0123456789"),
            terms=ABILITIES,
            size=1,
        )

    async def _greet(self, letters: AsyncIterator[Letter]) -> None:
        async for letter in letters:
            if Presence.model_validate_json(letter.body).state == "online":
                await self._introduce()
                await self._ask_time()

    async def _heed(self, letters: AsyncIterator[Letter]) -> None:
        async for _ in letters:
            self.counts.cancelled += 1

    async def _ask_time(self) -> None:
        """One question, as from an agent whose coordinator has no plug and does not answer."""
        assert self._line is not None
        question = ClockQuestion(id=random.getrandbits(52)).model_dump_json().encode()
        await self._line.publish(self._topic("clock"), question, qos=0)

    async def _report(self) -> None:
        await asyncio.sleep(random.uniform(0, RARE_TELEMETRY_S))
        while True:
            await self._tell(Stage.WAIT)
            await asyncio.sleep(RARE_TELEMETRY_S)

    async def _tell(self, stage: Stage, assignment: Assignment | None = None) -> None:
        assert self._line is not None
        told = Telemetry(
            agent=self.name,
            stage=stage,
            run=assignment.run if assignment else None,
            round=assignment.round if assignment else None,
            progress=0.0 if assignment else None,
        )
        await self._line.publish(self._topic("telemetry"), told.model_dump_json().encode(), qos=0)

    async def _arrived(self, topic: str, frame: bytes, wire_bytes: int) -> None:
        assignment = assignment_from(frame)
        self.counts.assignments += 1
        self._spawn(self._do(assignment))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _do(self, assignment: Assignment) -> None:
        assert self._courier is not None
        await self._ask_time()
        await self._tell(Stage.TRAIN, assignment)
        frame = frame_of(answer(assignment), assignment.work.encoding)
        self.counts.update_bytes = len(frame)
        while True:
            try:
                await self._courier.send(self._topic("update"), frame, deadline_s=4 * PATIENCE_S)
            except DeliveryFailed as error:
                if error.refused:
                    self.counts.refused += 1
                    self.counts.reasons = [*self.counts.reasons, str(error)][:5]
                    return
                await asyncio.sleep(AGAIN_S)
            else:
                self.counts.stored += 1
                await self._tell(Stage.WAIT)
                return


async def crowd(
    names: list[str], federation: str, port: int, counts: Counts, watch: Callable[[], None]
) -> None:
    """Let agents live until cancelled; `watch` is called twice a second."""
    doors = asyncio.Semaphore(AT_ONCE)
    async with asyncio.TaskGroup() as tasks:
        for name in names:
            tasks.create_task(VirtualAgent(name, federation, port, counts, doors).live())
        while True:
            watch()
            await asyncio.sleep(STATUS_S)


def more_files() -> int:
    """Let this process, and those it starts, hold as many sockets as the system allows; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--federation", default="bench")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--status", type=Path, required=True, help="file that says how they do")
    a = parser.parse_args()
    more_files()
    counts = Counts()

    def told() -> None:
        state = {**vars(counts), "at": time.time(), "cpu_s": time.process_time()}
        beside = a.status.with_suffix(".new")
        beside.write_text(json.dumps(state))
        beside.replace(a.status)

    async def live() -> None:
        names = [f"v{i:05d}" for i in range(a.first, a.first + a.count)]
        task = asyncio.ensure_future(crowd(names, a.federation, a.port, counts, told))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(live())
    return 0


if __name__ == "__main__":
    sys.exit(main())
