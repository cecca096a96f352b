"""A device answers over a real broker: questions, a sensor, and a serving process that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from foundation.messages import Answer, LivePrediction
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.topics import Topics
from hedgerow.broker import EmbeddedBroker
from hedgerow.children import Child, spawn, stop_all
from tests.broker.conftest import ONE
from tests.edge_agent.test_serving import expected, labels_of, publish
from tests.export.reference import SPECS, raw_inputs
from tests.processes import sets, write_data

pytestmark = [pytest.mark.anyio, pytest.mark.broker, pytest.mark.slow]

TOPICS = Topics("test")
NAME = "series-mean"
SPEC = SPECS[NAME]
X = raw_inputs(SPEC, 40)
LABELS = [labels_of(SPEC)[i] for i in expected(NAME, X).argmax(-1)]


@pytest.fixture
def agent(tmp_path: Path, broker: EmbeddedBroker) -> Iterator[Child]:
    """An agent of its own process, whose vault has a model of an earlier run."""
    publish(tmp_path / "vault" / "artifacts", NAME, agent="d0")
    stream = {
        "enabled": True,
        "topic": "plant/imu",
        "fields": ["ax", "ay", "az"],
        "stride": 4,
        "per_second": 50,
    }
    table = {
        "agent": "d0",
        "federation": "test",
        "vault": str(tmp_path / "vault"),
        "profile": "unknown-linux",
        "mqtt": {"port": broker.port},
        "data": write_data(tmp_path, 0).model_dump(mode="json", exclude_unset=True),
        "serve": {"mqtt": {"enabled": True, "per_second": 1000, "stream": stream}},
    }
    command = [sys.executable, "-m", "edge_agent", *sets(table)]
    child = spawn("d0", command, tmp_path / "d0.log", dict(os.environ))
    yield child
    stop_all([child])


def kill(agent: Child) -> None:
    """Kill whatever serves, as the kernel does when memory is short."""
    for child in psutil.Process(agent.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGKILL)


@contextlib.asynccontextmanager
async def asker(settings: MqttSettings, client: str) -> AsyncIterator[MqttTransport]:
    """Someone else at the broker, once the agent is there."""
    async with MqttTransport(settings, client, clean=True) as transport:
        async for letter in await transport.subscribe(TOPICS.of("d0", "card")):
            if letter.body:
                break
        yield transport


async def ask(transport: MqttTransport, value: Any) -> None:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    await transport.publish(TOPICS.of("d0", "predict"), body)


async def answered(letters: AsyncIterator[Any], count: int) -> list[Answer]:
    """Return so many answers to what was asked beside `until_answered`."""
    found: list[Answer] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            answer = Answer.model_validate_json((await anext(letters)).body)
            if not (answer.id or "").startswith("hello"):
                found.append(answer)
    return found


async def until_answered(transport: MqttTransport, letters: AsyncIterator[Any]) -> Answer:
    """Ask until the agent listens and its model answers."""
    async with asyncio.timeout(60):
        while True:
            await ask(transport, {"id": "hello", "inputs": X[0].tolist()})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    answer = Answer.model_validate_json((await anext(letters)).body)
                if answer.id == "hello" and not answer.error:
                    return answer


@ONE
async def test_questions_are_answered_through_a_killed_serving_process(
    agent: Child, settings: MqttSettings
) -> None:
    async with asker(settings, "asker") as transport:
        letters = await transport.subscribe(TOPICS.of("d0", "answer"))
        assert (await until_answered(transport, letters)).label == LABELS[0]
        for batch in range(4):
            asked = range(10 * batch, 10 * batch + 10)
            for i in asked:
                if i % 10 in (5, 6):  # the second comes while the first one's successor starts, or before
                    kill(agent)
                await ask(transport, {"id": i, "inputs": X[i].tolist(), "probabilities": i % 2 == 0})
            found = await answered(letters, 10)
            assert {a.id for a in found} == {str(i) for i in asked}
            right = [a for a in found if a.error is None]
            assert all(a.label == LABELS[int(str(a.id))] for a in right)
            assert all("serving" in str(a.error) for a in found if a not in right)
            assert all((a.probabilities is not None) == (int(str(a.id)) % 2 == 0) for a in right)
            assert (await until_answered(transport, letters)).label == LABELS[0]
    assert agent.process.poll() is None


@ONE
async def test_malformed_questions_are_answered_with_errors_and_the_agent_goes_on(
    agent: Child, settings: MqttSettings
) -> None:
    rng = np.random.default_rng(0)
    good = json.dumps({"id": "x", "inputs": X[1].tolist()}).encode()
    bodies: list[Any] = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"id": null, "inputs": []}',
        b"\xff\xfe",
        b"[" * 100_000,
    ]
    bodies += [{"id": "w", "inputs": [[1, 2], [3]]}, {"id": "w", "inputs": []}, {"id": "w", "inputs": ["a"]}]
    bodies += [
        {"id": "w", "inputs": X[1][:3].tolist()},
        {"id": "w", "inputs": "text"},
        {"id": "w" * 500, "inputs": 1},
    ]
    bodies += [json.dumps({"id": "w", "inputs": [0.5] * 60_000}).encode()]
    for _ in range(30):
        torn = bytearray(good)
        torn[rng.integers(0, 30)] = rng.integers(0, 256)
        bodies.append(bytes(torn[: rng.integers(1, len(torn))]))
    large = settings.model_copy(update={"max_part_bytes": 1_000_000})
    async with asker(large, "asker") as transport:
        letters = await transport.subscribe(TOPICS.of("d0", "answer"))
        await until_answered(transport, letters)
        for body in bodies:
            await ask(transport, body)
        found = await answered(letters, len(bodies))
        assert all(a.error and a.label is None for a in found)
        await ask(transport, good)
        (last,) = await answered(letters, 1)
    assert (last.id, last.label) == ("x", LABELS[1])


@ONE
async def test_a_sensor_is_predicted_and_who_comes_later_sees_the_last(
    agent: Child, settings: MqttSettings
) -> None:
    topic = TOPICS.of("d0", "prediction")
    async with asker(settings, "sensor") as transport:
        letters = await transport.subscribe(topic)

        async def readings() -> None:
            while True:
                for reading in X[3].tolist():
                    body = json.dumps(dict(zip(("ax", "ay", "az"), reading, strict=True)))
                    await transport.publish("plant/imu", body.encode())

        sensor = asyncio.create_task(readings())
        async with asyncio.timeout(90):
            before = LivePrediction.model_validate_json((await anext(letters)).body)
            kill(agent)
            after = [LivePrediction.model_validate_json((await anext(letters)).body) for _ in range(20)]
        sensor.cancel()
        await asyncio.wait([sensor])
    assert before.model_version == after[-1].model_version == "1"
    assert before.time <= after[-1].time
    async with asker(settings, "later") as transport:
        async with asyncio.timeout(30):
            kept = await anext(await transport.subscribe(topic))
    assert kept.retained
    assert LivePrediction.model_validate_json(kept.body).label in labels_of(SPEC)


@ONE
async def test_an_agent_that_only_waits_and_answers_stays_small(agent: Child, settings: MqttSettings) -> None:
    async with asker(settings, "asker") as transport:
        letters = await transport.subscribe(TOPICS.of("d0", "answer"))
        await until_answered(transport, letters)
    process = psutil.Process(agent.process.pid)
    mapped = {Path(entry.path).name for entry in process.memory_maps()}
    assert not any("torch" in name or "onnx" in name for name in mapped)
    assert process.memory_info().rss < 80_000_000
