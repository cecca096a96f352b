"""A sensor becomes a data set: labelled, bounded, never torn, and split by time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.datasets import DataSettings, load
from edge_agent.stream import FRAME, Record, Ring, StreamRecorder, decode, encode, records
from foundation.errors import DataError, NotConnected
from foundation.transport import Letter, MemoryBroker, MemoryTransport


class Clock:
    """A clock one can turn."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def table(**more: Any) -> DataSettings:
    return DataSettings(
        kind="mqtt_stream",
        topic="belt/imu",
        label_topic="belt/label",
        **{"window": 8, "stride": 4, "fields": ("ax", "ay"), **more},
    )


class Belt:
    """A recorder with a sensor at 50 Hz and a person who says what they do."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.settings, self.folder, self.clock = table(**more), folder, Clock()
        self.recorder = StreamRecorder(self.settings, folder, self.clock)
        self.step = 0

    def label(self, text: str | bytes) -> None:
        body = text if isinstance(text, bytes) else text.encode()
        self.recorder.take(Letter("belt/label", body))

    def send(self, said: object) -> None:
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.recorder.take(Letter("belt/imu", body))

    def read(self, count: int) -> None:
        for _ in range(count):
            self.clock.now_s += 0.02
            self.send({"ax": self.step, "ay": -self.step, "battery": 3.7})
            self.step += 1

    def kept(self) -> list[tuple[str, list[float]]]:
        self.recorder.close()
        return [(record.label, record.values[:, 0].tolist()) for record in records(self.folder)]

    def values(self) -> list[float]:
        return [value for _, values in self.kept() for value in values]


@pytest.fixture
def belt(tmp_path: Path) -> Belt:
    return Belt(tmp_path / "buffer")


# --- recording ------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_stream_over_mqtt_becomes_a_data_set(tmp_path: Path) -> None:
    broker, clock = MemoryBroker(), Clock()
    recorder = StreamRecorder(table(), tmp_path, clock)
    async with MemoryTransport(broker) as device, MemoryTransport(broker) as sensor:
        recording = asyncio.create_task(recorder.run(device))
        await sensor.publish("belt/label", b"rest", retain=True)
        await asyncio.sleep(0)
        for step in range(400):
            clock.now_s += 0.02
            if step in (100, 200, 300):
                await sensor.publish("belt/label", b'{"label": "walk"}' if step != 200 else b'"rest"')
            moving = 100 <= step < 200 or step >= 300
            reading = {"ax": float(moving), "ay": step, "t": step}
            await sensor.publish("belt/imu", json.dumps(reading).encode())
            while step + 1 > recorder.kept + len(recorder._pending) // 2 + recorder.malformed:
                await asyncio.sleep(0)
    await recording
    assert (recorder.kept, recorder.malformed, recorder.problem) == (400, 0, None)
    data = load(table(), buffer_dir=tmp_path)
    assert (data.input, data.shape, data.labels) == ("series", (8, 2), ("rest", "walk"))
    for part in (data.train, data.validation, data.test):
        # No window spans a change of label: what the person did is the same all through it.
        assert (part.x[:, :, 0] == part.y[:, None]).all()
        assert (np.diff(part.x[:, :, 1], axis=1) == 1).all()
        assert set(part.y.tolist()) == {0, 1}


@pytest.mark.anyio
async def test_a_cancelled_recorder_keeps_what_it_had(tmp_path: Path) -> None:
    broker = MemoryBroker()
    recorder = StreamRecorder(table(), tmp_path, Clock())
    async with MemoryTransport(broker) as transport:
        recording = asyncio.create_task(recorder.run(transport))
        await asyncio.sleep(0)
        await transport.publish("belt/label", b"rest")
        await transport.publish("belt/imu", b"[1, 2]")
        await asyncio.sleep(0.01)
        recording.cancel()
        await asyncio.gather(recording, return_exceptions=True)
    assert [record.values.tolist() for record in records(tmp_path)] == [[[1.0, 2.0]]]


@pytest.mark.anyio
async def test_a_closed_transport_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(NotConnected):
        await StreamRecorder(table(), tmp_path).run(MemoryTransport(MemoryBroker()))


def test_readings_without_a_label_are_not_kept(belt: Belt) -> None:
    belt.read(3)
    belt.label("rest")
    belt.read(2)
    for nothing in ("", "null", '""', '{"label": null}', "{}"):
        belt.label(nothing)
        belt.read(1)
        belt.label("rest")
    assert belt.kept() == [("rest", [3.0, 4.0])]
    assert belt.recorder.unlabelled == 8


@pytest.mark.parametrize(
    "said",
    [
        [[1, 2], [3, 4]],
        [{"ax": 1, "ay": 2}, {"ay": 4, "ax": 3}],
        {"ax": [1, 3], "ay": [2, 4], "other": "x"},
        [[1, 2.0], {"ax": 3, "ay": 4}],
    ],
)
def test_many_readings_in_one_message(belt: Belt, said: object) -> None:
    belt.label("rest")
    belt.send(said)
    belt.send([5, 6])
    belt.send({"ax": 7, "ay": 8, "tags": ["loose", "new"]})
    belt.recorder.close()
    (record,) = records(belt.folder)
    assert record.values.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\xff", ""),
        (b"{", ""),
        (b"[" * 100_000, ""),
        (b"17", "an object or a list"),
        (b'"walk"', "an object or a list"),
        (b"[]", "0 numbers without names; wanted: ax, ay"),
        (b"[1, 2, 3]", "3 numbers without names"),
        (b'{"ax": 1}', "ay missing; there are ax"),
        (b'{"ax": 1, "ay": "2"}', "ay is 2, not a finite number"),
        (b'{"ax": NaN, "ay": 1}', "ax is nan"),
        (b'{"ax": 1, "ay": 1e999}', "ay is inf"),
        (b'{"ax": 1, "ay": 1e39}', "ay is 1e+39"),
        (b'{"ax": true, "ay": 1}', "ax is True"),
        (b'{"ax": [1, 2], "ay": [1]}', "lists of one length"),
        (b'{"ax": [1, 2], "ay": 1}', "lists of one length"),
        (b'{"ax": [], "ay": []}', "lists of one length"),
        (b'[{"ax": 1, "ay": 2}, 3]', "an object or a list"),
        (b" " * (1 << 20) + b"[1, 2]", "too many"),
    ],
)
def test_a_malformed_message_is_counted_and_told(belt: Belt, body: bytes, words: str) -> None:
    belt.label("rest")
    belt.send([1, 1])
    belt.send(body)
    belt.send([2, 2])
    assert belt.recorder.malformed == 1
    assert belt.recorder.problem is not None
    assert words in belt.recorder.problem
    assert "belt/imu" in belt.recorder.problem
    assert belt.values() == [1, 2]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.binary(max_size=40) | st.sampled_from([b"[1,2]", b'{"ax":1,"ay":[]}']))
    )
)
def test_no_message_stops_the_recording(
    tmp_path_factory: pytest.TempPathFactory, letters: list[tuple[bool, bytes]]
) -> None:
    belt = Belt(tmp_path_factory.mktemp("fuzz"))
    for is_label, body in letters:
        belt.recorder.take(Letter("belt/label" if is_label else "belt/imu", body))
    belt.label("rest")
    belt.send([123, 0])
    assert belt.values()[-1] == 123


def test_an_unknown_label_is_told_and_nothing_is_kept_under_the_old_one(tmp_path: Path) -> None:
    belt = Belt(tmp_path, labels=("rest", "walk"))
    belt.label("rest")
    belt.read(1)
    belt.label("wlak")
    belt.read(1)
    assert "unknown label 'wlak'; the labels are rest, walk" in str(belt.recorder.problem)
    belt.label("walk")
    belt.read(1)
    for odd in (b"\xff", b"true" * 100, b'{"label": [1]}', b'{"label": true}', b"{"):
        belt.label(odd)
        belt.read(1)
    assert belt.kept() == [("rest", [0.0]), ("walk", [2.0])]
    assert (belt.recorder.malformed, belt.recorder.unlabelled) == (6, 6)


def test_a_number_can_be_a_label(belt: Belt) -> None:
    belt.label("3")
    belt.read(1)
    belt.label('{"label": 4}')
    belt.read(1)
    assert [label for label, _ in belt.kept()] == ["3", "4"]


def test_a_gap_ends_a_block(belt: Belt) -> None:
    belt.label("rest")
    belt.read(10)
    belt.clock.now_s += 1.5
    belt.read(10)
    belt.clock.now_s -= 60  # the clock was set back
    belt.read(10)
    belt.recorder.close()
    assert [(r.block, r.at, len(r.values)) for r in records(belt.folder)] == [
        (0, 0, 10),
        (1, 0, 10),
        (2, 0, 10),
    ]


def test_the_time_within_a_reading_counts_where_it_is_said(tmp_path: Path) -> None:
    belt = Belt(tmp_path, time_field="t", max_gap_s=0.5)
    belt.label("rest")
    for seconds in (0, 0.4, 0.8, 2.0, 2.4):
        belt.send({"ax": seconds, "ay": 0, "t": seconds})
    belt.send([1, 2])
    belt.send({"ax": [3, 4], "ay": [0, 0], "t": [2.5, 3.5]})
    belt.recorder.close()
    assert [r.block for r in records(tmp_path)] == [0, 1, 2]
    assert "the time is in t" in str(belt.recorder.problem)


def test_readings_of_one_message_lie_a_period_apart(tmp_path: Path) -> None:
    belt = Belt(tmp_path, sample_rate_hz=2.0, max_gap_s=0.6)
    belt.label("rest")
    for _ in range(3):
        belt.clock.now_s += 2.0
        belt.send([[1, 1], [2, 2], [3, 3], [4, 4]])
    belt.recorder.close()
    assert {record.block for record in records(tmp_path)} == {0}


# --- on disk --------------------------------------------------------------------------------------


def record_of(i: int, readings: int = 5) -> Record:
    values = np.arange(i, i + readings * 2, dtype=np.float32).reshape(-1, 2)
    return Record(f"label {i % 3} é", i, i * 2, float(i), ("ax", "ay"), values)


def same(a: Record, b: Record) -> bool:
    return (a.label, a.block, a.at, a.start_s, a.fields) == (
        b.label,
        b.block,
        b.at,
        b.start_s,
        b.fields,
    ) and (np.array_equal(a.values, b.values))


@given(st.integers(0, 6), st.floats(0, 1))
def test_a_torn_end_is_dropped_and_nothing_else(count: int, cut: float) -> None:
    frames = [encode(record_of(i)) for i in range(count)]
    data = b"".join(frames)
    stop = int(cut * len(data))
    whole = sum(stop >= sum(map(len, frames[: i + 1])) for i in range(count))
    got = list(decode(data[:stop]))
    assert len(got) == whole
    assert all(same(a, record_of(i)) for i, a in enumerate(got))


@given(st.binary(max_size=100))
def test_any_bytes_are_decoded_or_dropped(junk: bytes) -> None:
    head = encode(record_of(1))
    got = list(decode(head + junk))
    assert same(got[0], record_of(1))


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_a_record_with_the_right_checksum_is_still_not_believed(body: bytes) -> None:
    for record in decode(FRAME.pack(len(body), zlib.crc32(body)) + body):
        assert record.values.shape[1] == len(record.fields)


@pytest.mark.parametrize("head", ['{"fields": []}', "[]", "3", '{"fields": ["a"], "label": 1, "block": -1}'])
def test_a_head_that_makes_no_sense_ends_the_file(head: str) -> None:
    body = head.encode() + b"\n" + bytes(8)
    assert list(decode(FRAME.pack(len(body), zlib.crc32(body)) + body)) == []


def test_the_buffer_stays_within_its_bytes_and_forgets_the_oldest(tmp_path: Path) -> None:
    most = 0
    with Ring(tmp_path, 20_000) as ring:
        for i in range(600):
            ring.append(record_of(i))
            most = max(most, sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert most <= 20_000
    kept = [record.block for record in records(tmp_path)]
    assert kept == list(range(kept[0], 600))
    assert len(kept) > 0.8 * 20_000 / len(encode(record_of(500)))
    with pytest.raises(ValueError, match="too large for a buffer"), Ring(tmp_path, 200) as ring:
        ring.append(record_of(0, 100))


def test_a_new_process_goes_on_in_a_new_file_and_within_the_bytes(tmp_path: Path) -> None:
    for start in range(0, 300, 50):
        with Ring(tmp_path, 10_000) as ring:
            for i in range(start, start + 50):
                ring.append(record_of(i))
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10_000
    kept = [record.block for record in records(tmp_path)]
    assert kept == list(range(kept[0], 300))


def test_the_recorder_keeps_its_bytes(tmp_path: Path) -> None:
    belt = Belt(tmp_path, buffer_mb=0.1)
    belt.label("rest")
    belt.read(30_000)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 100_000
    assert belt.values()[-1] == 29_999
    assert belt.recorder.lost == 0


def test_a_disk_that_refuses_is_told_and_the_recording_goes_on(tmp_path: Path) -> None:
    belt = Belt(tmp_path / "buffer")
    belt.label("rest")
    belt.read(36)
    (tmp_path / "buffer").rename(tmp_path / "gone")
    belt.label("walk")
    belt.recorder.close()
    belt.label("rest")
    belt.read(36)
    belt.recorder.close()
    assert belt.recorder.lost == 36
    assert "36 readings lost" in str(belt.recorder.problem)
    (tmp_path / "gone").rename(tmp_path / "buffer")
    belt.read(1)
    assert belt.values()[-1] == 72
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot hold a recording"):
        StreamRecorder(table(), tmp_path / "file")


WRITER = """
import json, os, signal, sys
from pathlib import Path
from edge_agent.datasets import DataSettings
from edge_agent.stream import Record, StreamRecorder, encode
from foundation.transport import Letter
import numpy as np

settings = DataSettings.model_validate_json(sys.argv[1])
now = [0.0]
recorder = StreamRecorder(settings, Path(sys.argv[2]), lambda: now[0])
recorder.take(Letter("belt/label", b"rest"))
i = 0
while True:
    now[0] += 0.02
    recorder.take(Letter("belt/imu", json.dumps([i, -i]).encode()))
    i += 1
    if sys.argv[3] == "torn" and i == 5000:
        frame = encode(Record("rest", 10**6, 0, 0.0, ("ax", "ay"), np.zeros((50, 2), np.float32)))
        recorder._ring._file.write(frame[: len(frame) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    if i % 500 == 0:
        print(recorder.kept, flush=True)
"""


@pytest.mark.parametrize("how", ["torn", "any"])
def test_a_recorder_killed_in_mid_write_loses_only_the_end(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", WRITER, table().model_dump_json(exclude_unset=True), str(tmp_path), how]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=paths) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = int(line)
            if how == "any" and said > 3000:
                process.kill()
                break
        assert process.wait(timeout=60) == -signal.SIGKILL
    found = [value for record in records(tmp_path) for value in record.values[:, 0].tolist()]
    assert said > 3000
    # Everything that was said to be kept is there, in order, and nothing torn beside it.
    assert len(found) >= said
    assert found == list(range(len(found)))
    again = Belt(tmp_path)
    again.label("rest")
    again.read(3)
    assert again.values()[len(found) :] == [0, 1, 2]
    # Blocks are counted on: what is new is not taken for the rest of what was torn.
    *_, last = records(tmp_path)
    assert last.block > max(record.block for record in list(records(tmp_path))[:-1])


# --- loading --------------------------------------------------------------------------------------


def fill(belt: Belt, stretches: int = 12) -> None:
    for i in range(stretches):
        belt.label("walk" if i % 2 else "rest")
        belt.read(60 + i * 37 % 101)
    belt.recorder.close()


def parts_of(settings_: DataSettings, folder: Path) -> list[set[float]]:
    data = load(settings_, buffer_dir=folder)
    return [set(part.x[:, :, 0].ravel().tolist()) for part in (data.train, data.validation, data.test)]


def test_no_reading_is_in_two_parts(belt: Belt) -> None:
    fill(belt, 40)
    parts = parts_of(belt.settings, belt.folder)
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert [len(part) / sum(map(len, parts)) for part in parts] == pytest.approx([0.6, 0.15, 0.25], abs=0.06)
    again = parts_of(belt.settings, belt.folder)
    assert parts == again


def test_what_was_tested_on_is_never_trained_on_later(tmp_path: Path) -> None:
    belt = Belt(tmp_path, buffer_mb=0.1)
    seen: list[set[float]] = [set(), set(), set()]
    for _ in range(8):
        fill(belt, 40)
        for all_time, now in zip(seen, parts_of(belt.settings, tmp_path), strict=True):
            all_time |= now
    assert min(seen[0]) < 1000  # the beginning has been forgotten meanwhile, and has moved nothing
    assert min(set.union(*parts_of(belt.settings, tmp_path))) > 1000
    assert not seen[0] & seen[2]
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]


def test_windows_have_the_stride_and_stay_within_a_block(belt: Belt) -> None:
    belt.label("rest")
    belt.read(20)
    belt.clock.now_s += 10
    belt.read(11)
    belt.label("walk")
    belt.read(8)
    belt.recorder.close()
    data = load(table(validation=0, test=0), buffer_dir=belt.folder)
    assert sorted(data.train.x[:, 0, 0].tolist()) == [0, 4, 8, 12, 20, 31]
    data = load(table(validation=0, test=0.4, labels=("walk", "rest")), buffer_dir=belt.folder)
    assert data.labels == ("walk", "rest")


def test_a_recording_that_makes_no_data_set_says_why(belt: Belt) -> None:
    with pytest.raises(DataError, match="folder of the recording"):
        load(belt.settings)
    with pytest.raises(DataError, match="0 labelled readings of ax, ay make no window of 8"):
        load(belt.settings, buffer_dir=belt.folder)
    with pytest.raises(DataError, match="0 labelled readings"):
        load(belt.settings, buffer_dir=belt.folder / "never")
    belt.label("rest")
    belt.read(7)
    belt.recorder.close()
    with pytest.raises(DataError, match="7 labelled readings"):
        load(belt.settings, buffer_dir=belt.folder)
    belt.read(80)
    belt.recorder.close()
    with pytest.raises(DataError, match="only the label"):
        load(belt.settings, buffer_dir=belt.folder)
    with pytest.raises(DataError, match="unknown label 'rest'"):
        load(table(labels=("walk", "run")), buffer_dir=belt.folder)
    with pytest.raises(DataError, match="0 labelled readings of ax, gyro"):
        load(table(fields=("ax", "gyro")), buffer_dir=belt.folder)
    with pytest.raises(DataError, match="only kind = 'mqtt_stream'"):
        StreamRecorder(DataSettings(), belt.folder)
