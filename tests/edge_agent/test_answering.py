"""Questions and sensors over MQTT, answered through a serving process; the broker is in this process."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.samples import DataSettings
from edge_agent.serving.answering import Answering, Rate, read
from edge_agent.serving.child import ServingChild
from edge_agent.serving.live import Live, Windows, followed
from edge_agent.serving.loopback import Loopback
from edge_agent.settings import ServeMqttSettings, ServeStreamSettings
from foundation.errors import DataError, HedgerowError, NotConnected, SettingsError
from foundation.messages import Answer, LivePrediction, Question
from foundation.transport import Letter, MemoryBroker, MemoryTransport
from tests.conftest import require_service
from tests.edge_agent.test_serving import expected, publish, softmax
from tests.export.reference import SPECS, raw_inputs

pytestmark = pytest.mark.anyio

MODEL = {"round": 3, "sha256": "a" * 64, "agent": "d0"}


class Serving(Loopback):
    """Answers in place of a serving process; `wrong` is raised instead."""

    def __init__(self, shape: tuple[int, ...] = (4, 2), kind: str = "series") -> None:
        self.asked: list[Any] = []
        self.manifest: dict[str, Any] = {"input": kind, "shape": list(shape)}
        self.wrong: Exception | None = None

    async def predict(self, inputs: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        self.asked.append(inputs)
        if self.wrong:
            raise self.wrong
        one = {"label": "up", "probability": 0.75, "probabilities": {"up": 0.75, "down": 0.25}}
        several = len(inputs) if inputs and isinstance(inputs[0], list) else 1
        return {"model": MODEL, "predictions": [one] * several}

    async def model(self) -> dict[str, Any]:
        if self.wrong:
            raise self.wrong
        return self.manifest


def answering(serving: Loopback, **more: Any) -> Answering:
    return Answering(ServeMqttSettings(enabled=True, **more), serving, questions="q", answers="a")


def letter(value: Any, *, retained: bool = False) -> Letter:
    return Letter("q", value if isinstance(value, bytes) else json.dumps(value).encode(), retained)


# --- questions ------------------------------------------------------------------------------------


async def test_a_question_is_answered_with_label_model_and_latency() -> None:
    answer = await answering(Serving()).answer(letter({"id": 7, "inputs": [1, 2]}), 0.0)
    assert (answer.id, answer.label, answer.probability) == ("7", "up", 0.75)
    assert (answer.model_version, answer.model_sha256) == ("3", "a" * 64)
    assert (answer.probabilities, answer.predictions, answer.error) == (None, None, None)
    assert answer.latency_ms is not None


async def test_probabilities_and_several_samples_come_when_asked_for() -> None:
    serving = answering(Serving())
    answer = await serving.answer(letter({"id": "p", "inputs": [1], "probabilities": True}), 0.0)
    assert answer.probabilities == {"up": 0.75, "down": 0.25}
    answer = await serving.answer(letter({"id": "s", "inputs": [[1], [2]]}), 0.0)
    assert answer.label is None
    assert answer.predictions is not None
    assert [one.label for one in answer.predictions] == ["up", "up"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"{", "Invalid JSON"),
        ({"inputs": [1]}, "id: Field required"),
        ({"id": "x"}, "inputs: Field required"),
        ({"id": "x", "inputs": [1], "input": 2}, "input: Extra inputs"),
        ({"id": "", "inputs": [1]}, "id: String should have at least 1"),
        ({"id": "x" * 129, "inputs": [1]}, "at most 128"),
        ({"id": "x", "inputs": [0] * 2000}, "at most 1024 bytes"),
    ],
)
async def test_what_cannot_be_read_is_answered_with_what_is_wrong(value: Any, says: str) -> None:
    answer = await answering(Serving(), question_bytes=1024).answer(letter(value), 0.0)
    assert answer.id is None
    assert says in str(answer.error)


async def test_a_retained_question_is_not_answered_for_ever() -> None:
    serving = Serving()
    answer = await answering(serving).answer(letter({"id": "x", "inputs": [1]}, retained=True), 0.0)
    assert "retained" in str(answer.error)
    assert serving.asked == []


async def test_what_goes_wrong_behind_a_question_is_its_answer() -> None:
    serving = Serving()
    for wrong in (
        DataError("the input has shape"),
        HedgerowError("it does not answer"),
        KeyError("surprise"),
    ):
        serving.wrong = wrong
        answer = await answering(serving).answer(letter({"id": "x", "inputs": [1]}), 0.0)
        assert answer.id == "x"
        assert str(wrong).strip("'") in str(answer.error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200) | st.builds(lambda i, x: json.dumps({"id": i, "inputs": x}).encode(), JSON, JSON)
)
def test_any_body_is_a_question_or_refused(body: bytes) -> None:
    with suppress(ValueError):
        assert isinstance(read(Letter("q", body), 1 << 16), Question)


def test_a_question_nested_beyond_reason_is_refused() -> None:
    deep = b'{"id": "x", "inputs": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    with pytest.raises(ValueError, match="inputs"):
        read(Letter("q", deep), 1 << 20)


def test_the_rate_lets_so_many_pass_and_no_more() -> None:
    now = 0.0
    rate = Rate(10, lambda: now)
    assert [rate.take() for _ in range(12)] == [True] * 10 + [False] * 2
    now = 0.25
    assert [rate.take() for _ in range(4)] == [True] * 2 + [False] * 2
    now = 100.0
    assert [rate.take() for _ in range(11)] == [True] * 10 + [False]


async def test_every_question_gets_one_answer_and_too_many_are_told_so() -> None:
    broker = MemoryBroker()
    async with MemoryTransport(broker) as device, MemoryTransport(broker) as asker:
        answers = await asker.subscribe("a")
        task = asyncio.create_task(answering(Serving(), per_second=30).run(device))
        await asyncio.sleep(0)
        for i in range(100):
            await asker.publish("q", json.dumps({"id": i, "inputs": [1]}).encode())
        found = [Answer.model_validate_json((await anext(answers)).body) for _ in range(100)]
        task.cancel()
        await asyncio.wait([task])
    assert {answer.id for answer in found} == {str(i) for i in range(100)}
    refused = [answer for answer in found if answer.error]
    assert 0 < len(refused) <= 70
    assert all("30 questions a second" in str(answer.error) for answer in refused)


# --- windows --------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 60))
def test_windows_are_the_last_readings_every_stride(steps: int, stride: int, count: int) -> None:
    windows = Windows(steps, stride, 1.0)
    found = [w for i in range(count) if (w := windows.add((float(i),), i * 0.1))]
    assert all(len(w) == steps for w in found)
    ends = [int(w[-1][0]) for w in found]
    assert ends[:1] == ([first] if (first := max(steps, stride) - 1) < count else [])
    assert all(b - a == stride for a, b in itertools.pairwise(ends))
    assert all(
        [int(v) for (v,) in w] == list(range(e - steps + 1, e + 1)) for w, e in zip(found, ends, strict=True)
    )


def test_a_gap_begins_a_new_window() -> None:
    windows = Windows(3, 1, 1.0)
    found = [windows.add((t,), t) for t in (0.0, 0.5, 2.0, 2.5, 3.0, 3.5)]
    assert found == [None, None, None, None, [(2.0,), (2.5,), (3.0,)], [(2.5,), (3.0,), (3.5,)]]


def test_what_the_stream_is_comes_from_the_data_where_nothing_is_said() -> None:
    data = DataSettings(
        kind="mqtt_stream", topic="t", fields=("x",), label_topic="l", stride=3, time_field="s"
    )
    found = followed(ServeStreamSettings(enabled=True), data)
    assert (found.topic, found.fields, found.stride, found.time_field) == ("t", ("x",), 3, "s")
    assert followed(ServeStreamSettings(topic="u"), data).topic == "u"
    with pytest.raises(SettingsError, match="needs topic"):
        followed(ServeStreamSettings(enabled=True), DataSettings())
    with pytest.raises(SettingsError, match="needs fields"):
        followed(ServeStreamSettings(enabled=True, topic="t"), DataSettings())


@asynccontextmanager
async def predicting(
    serving: Loopback, **more: Any
) -> AsyncIterator[tuple[MemoryBroker, MemoryTransport, Live]]:
    table = {"topic": "s", "fields": ("x", "y"), "stride": 2, "per_second": 100.0, **more}
    broker = MemoryBroker()
    live = Live(ServeStreamSettings(enabled=True, **table), serving, predictions="p", again_s=0.01)
    async with MemoryTransport(broker) as device, MemoryTransport(broker) as sensor:
        task = asyncio.create_task(live.run(device))
        await asyncio.sleep(0)
        yield broker, sensor, live
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def feed(sensor: MemoryTransport, live: Live, told: int) -> None:
    """Send readings until there are so many predictions."""
    async with asyncio.timeout(20):
        number = 0
        while live.told < told:
            await sensor.publish("s", json.dumps({"x": number, "y": -number}).encode())
            number += 1
            await asyncio.sleep(0.001)


async def test_the_newest_window_is_predicted_and_kept_for_who_comes_later() -> None:
    serving = Serving()
    async with predicting(serving) as (broker, sensor, live):
        await feed(sensor, live, 3)
        kept = LivePrediction.model_validate_json(broker.retained["p"])
    assert (kept.label, kept.probability, kept.model_version) == ("up", 0.75, "3")
    xs = [[x for x, _ in window] for window in serving.asked]
    assert all(np.diff(window).tolist() == [1, 1, 1] for window in xs), "four readings that follow each other"


async def test_windows_beyond_the_rate_are_skipped_and_counted() -> None:
    async with predicting(Serving(), per_second=20.0, stride=1) as (_, sensor, live):
        letters = await sensor.subscribe("p")
        await feed(sensor, live, 4)
        found = [LivePrediction.model_validate_json((await anext(letters)).body) for _ in range(4)]
        windows = live.windows
    assert sum(one.skipped for one in found) > 4
    assert sum(one.skipped + 1 for one in found) <= windows
    times = [one.time.timestamp() for one in found]
    # The time is of the reading, which may have waited for its turn since the slot before.
    assert times == sorted(times)


async def test_malformed_readings_are_counted_and_the_others_predicted() -> None:
    async with predicting(Serving()) as (_, sensor, live):
        await sensor.publish("s", b"{")
        await sensor.publish("s", b'{"x": 1}')
        await feed(sensor, live, 1)
        assert live.malformed == 2


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_of_a_sensor_is_a_reading_or_counted(body: bytes) -> None:
    stream = ServeStreamSettings(enabled=True, topic="s", fields=("x", "y"))
    live = Live(stream, Serving(), predictions="p")
    live.take(Letter("s", body))
    assert live.malformed in (0, 1)


async def test_a_model_of_another_input_is_said_and_the_next_one_taken() -> None:
    serving = Serving(shape=(1, 4, 4), kind="image")
    async with predicting(serving) as (_, sensor, live):
        async with asyncio.timeout(20):
            while live.problem is None:
                await sensor.publish("s", b'{"x": 1, "y": 2}')
                await asyncio.sleep(0.001)
        assert "the model takes image" in live.problem
        serving.manifest = {"input": "series", "shape": [4, 2]}
        await feed(sensor, live, 1)
        assert live.problem is None


async def test_a_serving_process_that_is_away_is_asked_again() -> None:
    serving = Serving()
    async with predicting(serving) as (_, sensor, live):
        await feed(sensor, live, 1)
        for wrong in (HedgerowError("away"), NotConnected("no broker"), DataError("the input has shape")):
            serving.wrong = wrong
            async with asyncio.timeout(20):
                while str(wrong) not in str(live.problem):
                    await sensor.publish("s", b'{"x": 1, "y": 2}')
                    await asyncio.sleep(0.001)
            serving.wrong = None
            await feed(sensor, live, live.told + 1)


# --- a real serving process -------------------------------------------------------------------------


@asynccontextmanager
async def real(folder: Path) -> AsyncIterator[tuple[Loopback, ServingChild]]:
    child = ServingChild("127.0.0.1", 0, folder)

    async def address() -> str:
        return child.address or await asyncio.to_thread(child.start)

    loopback = Loopback(address)
    try:
        yield loopback, child
    finally:
        await loopback.close()
        child.stop()


async def test_a_killed_serving_process_is_started_again_for_the_next_question(tmp_path: Path) -> None:
    publish(tmp_path / "artifacts")
    x = raw_inputs(SPECS["image-mean"], 1)
    logits = expected("image-mean", x)[0]
    async with real(tmp_path / "artifacts") as (loopback, child):
        for _ in range(4):
            found = await loopback.predict(x[0].tolist())
            assert found["predictions"][0]["label"] == "abcde"[logits.argmax()]
            assert found["predictions"][0]["probability"] == pytest.approx(softmax(logits).max(), abs=1e-5)
            (pid,) = (p.pid for p in psutil.Process().children() if "edge_agent.serving" in p.cmdline())
            assert child.address
            os.kill(pid, signal.SIGKILL)
        assert (await loopback.model())["shape"] == [2, 8, 12]


async def test_what_the_model_cannot_take_is_told_in_its_words(tmp_path: Path) -> None:
    publish(tmp_path / "artifacts")
    async with real(tmp_path / "artifacts") as (loopback, _):
        for inputs, says in (([1, 2], "has shape"), (["a"], "other than numbers"), ("text", "valid array")):
            with pytest.raises(DataError, match=says):
                await loopback.predict(inputs)
        assert len((await loopback.predict(raw_inputs(SPECS["image-mean"], 3).tolist()))["predictions"]) == 3


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"x" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    ],
)
async def test_whatever_else_listens_there_is_no_answer(said: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def address() -> str:
        return f"http://127.0.0.1:{port}"

    loopback = Loopback(address)
    with pytest.raises(HedgerowError, match="does not answer"):
        await loopback.predict([1])
    await loopback.close()
    server.close()
    await server.wait_closed()


def own_certificate(folder: Path) -> ssl.SSLContext:
    """A certificate that no authority has signed, as a device has one."""
    tool = shutil.which("openssl")
    require_service(tool is not None, "openssl")
    cert, key = folder / "cert.pem", folder / "key.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=device"]
    command = [str(tool), "req", "-x509", *kind, "-days", "2", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_key_is_sent_and_the_name_is_one_of_this_device(tmp_path: Path, scheme: str) -> None:
    heard: list[bytes] = []
    hung_up = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        said = b'{"input": "text"}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))
        writer.close()
        with suppress(OSError):  # the client may be gone first
            await writer.wait_closed()
        hung_up.set()

    context = own_certificate(tmp_path) if scheme == "https" else None
    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]

    async def address() -> str:
        return f"{scheme}://0.0.0.0:{port}"

    (tmp_path / "key").write_text("secret of this device\n")
    loopback = Loopback(address, tmp_path / "key")
    assert await loopback.model() == {"input": "text"}
    assert b"\r\nAuthorization: Bearer secret of this device\r\n" in heard[0]
    assert b"\r\nHost: localhost\r\n" in heard[0]
    await loopback.close()
    async with asyncio.timeout(20):
        await hung_up.wait()
    server.close()
    await server.wait_closed()
