"""A live sensor as a data set: readings from MQTT, labelled as they come, in a bounded buffer on disk.

The buffer is a folder of files `000000001.log`, `000000002.log`, ... Only the last is written to, and the
first is removed when there are too many bytes. A file is a sequence of records:

    length u32 | crc32 u32 | json "\\n" float32 values (readings x fields)         little-endian

One record holds about a second of readings under one label. What a process killed in mid-write leaves behind
fails its length or its checksum and is dropped at reading; the next process begins a new file.

Readings under one label come in blocks of a few windows. A block ends when the label changes or time leaps,
no window spans two blocks, and the block's number under its label decides for good which part it belongs to:
what was tested on is never trained on later, however long the recording goes on.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np

from edge_agent.samples import DataSettings, Source, as_classes, deal
from foundation.errors import DataError
from foundation.parameters import Array
from foundation.transport import Letter, Transport

logger = logging.getLogger(__name__)

FRAME = struct.Struct("<II")
MAX_RECORD_BYTES = 1 << 20
BATCH_BYTES = 16 * 1024
FLUSH_S = 1.0
"""A killed recorder loses about as many seconds of readings as this."""
FILES = 8
"""Files that a full buffer consists of: it forgets an eighth at a time."""
MAX_LETTER_BYTES = 1 << 20
WINDOW = 128
WINDOWS_PER_BLOCK = 8
PATTERN = 1000
"""Blocks of a label after which their order of parts repeats."""

Reading: TypeAlias = tuple[float | None, tuple[float, ...]]
"""Seconds, if the sensor says them, and the values of the fields."""


@dataclass(frozen=True, slots=True)
class Record:
    """Readings (n, fields) under one label, from number `at` on of that label's block number `block`."""

    label: str
    block: int
    at: int
    start_s: float
    fields: tuple[str, ...]
    values: Array


def encode(record: Record) -> bytes:
    """Return a record as it stands in a file."""
    about = {"label": record.label, "block": record.block, "at": record.at, "start_s": record.start_s}
    head = json.dumps(about | {"fields": record.fields}).encode()
    body = head + b"\n" + np.ascontiguousarray(record.values, "<f4").tobytes()
    return FRAME.pack(len(body), zlib.crc32(body)) + body


def decode(data: bytes) -> Iterator[Record]:
    """Yield the records at the start of a file's bytes, up to the first that is torn or damaged."""
    start = 0
    while start + FRAME.size <= len(data):
        length, checksum = FRAME.unpack_from(data, start)
        body = data[start + FRAME.size : start + FRAME.size + length]
        record = _record(body) if len(body) == length and zlib.crc32(body) == checksum else None
        if record is None:
            break
        yield record
        start += FRAME.size + length
    if start < len(data):
        logger.warning("recording: a torn end was dropped", extra={"bytes": len(data) - start})


def _record(body: bytes) -> Record | None:
    head, line_end, values = body.partition(b"\n")
    try:
        about = json.loads(head)
        fields = tuple(map(str, about["fields"]))
        numbers = np.frombuffer(values, "<f4").reshape(-1, len(fields))
        label, block, at = str(about["label"]), int(about["block"]), int(about["at"])
        start_s = float(about["start_s"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    if not line_end or not 0 <= block < 2**40 or not 0 <= at < 2**40:
        return None
    return Record(label, block, at, start_s, fields, numbers)


def records(folder: Path) -> Iterator[Record]:
    """Yield what a buffer holds, oldest first; a file that goes away meanwhile is passed over."""
    for file in _files(folder):
        try:
            data = file.read_bytes()
        except FileNotFoundError:  # the recorder made room
            continue
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        yield from decode(data)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.log") if re.fullmatch(r"\d{9}\.log", file.name))


class Ring:
    """The writing side of a buffer: append-only files whose bytes together stay within a limit."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._file: FileIO | None = None
        self._written = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._old = [(file, file.stat().st_size) for file in _files(folder)]
        self._number = int(self._old[-1][0].stem) if self._old else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, record: Record) -> None:
        """Write one record, removing the oldest files first where it would be too much; raises `OSError`."""
        data = encode(record)
        if len(data) > min(MAX_RECORD_BYTES, self._limit // 2):
            raise ValueError(f"a record of {len(data)} bytes is too large for a buffer of {self._limit}")
        if self._file is not None and self._written + len(data) > max(self._limit // FILES, len(data)):
            self.close()
        self._make_room(len(data))
        if self._file is None:
            self._number += 1
            self._file = (self._folder / f"{self._number:09}.log").open("xb", buffering=0)
        self._written += len(data)
        try:
            if self._file.write(data) != len(data):
                raise OSError(f"{self._file.name}: no space for a whole record")
        except OSError:
            # Nothing behind a torn record would be read: the next one begins a new file.
            self._file.close()
            self._retire(self._file)
            raise

    def _retire(self, file: FileIO) -> None:
        self._old.append((Path(str(file.name)), self._written))
        self._file, self._written = None, 0

    def _make_room(self, more: int) -> None:
        while self._old and sum(size for _, size in self._old) + self._written + more > self._limit:
            file, _ = self._old.pop(0)
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Bring the current file safely to disk; the next record begins a new one."""
        file = self._file
        if file is None:
            return
        self._retire(file)
        with file:
            # Only here: a sync every second would wear out an SD card for a second of readings.
            os.fsync(file.fileno())


class StreamRecorder:
    """Listens to a sensor and to the label of the moment, and records labelled readings.

    A reading is a JSON object with the fields, a list of numbers in their order, a list of either, or an
    object of lists. The label is text, a JSON string, or an object with `label`; nothing, or `null`, is no
    label, and readings without one are not kept. Whatever cannot be read is counted and told in `problem`; it
    never stops the recording. `clock` gives seconds.
    """

    def __init__(
        self, settings: DataSettings, buffer_dir: Path, clock: Callable[[], float] = time.time
    ) -> None:
        if settings.kind != "mqtt_stream":
            raise DataError(f"only kind = 'mqtt_stream' is recorded, not {settings.kind!r}")
        self._settings = settings
        self._topic, self._label_topic = settings.topic or "", settings.label_topic or ""
        self._fields = settings.fields or ()
        self._clock = clock
        try:
            self._ring = Ring(buffer_dir, int(settings.buffer_mb * 1_000_000))
        except OSError as error:
            raise DataError(f"{buffer_dir} cannot hold a recording: {error}") from error
        self._next: dict[str, int] = {}
        for record in records(buffer_dir):
            self._next[record.label] = max(self._next.get(record.label, 0), record.block + 1)
        self._block_readings = _block_readings(settings)
        self._batch = max(1, min(BATCH_BYTES // (4 * len(self._fields)), self._block_readings))
        self._label: str | None = None
        self._block: int | None = None
        self._at = 0
        self._last_s: float | None = None
        self._pending = array("f")
        self._pending_since_s = 0.0
        self.kept = 0
        """Readings recorded under a label."""
        self.unlabelled = 0
        """Readings that came while there was no label."""
        self.malformed = 0
        """Letters that could not be read."""
        self.lost = 0
        """Readings that could not be written."""
        self.problem: str | None = None
        """What was wrong last, in words."""

    async def run(self, transport: Transport) -> None:
        """Record until the transport closes or the task is cancelled; raises `NotConnected` at the start."""
        letters = await transport.subscribe(self._topic, self._label_topic)
        try:
            async for letter in letters:
                self.take(letter)
        finally:
            self.close()

    def take(self, letter: Letter) -> None:
        """Take one letter of either topic."""
        try:
            if len(letter.body) > MAX_LETTER_BYTES:
                raise ValueError(f"{len(letter.body)} bytes are too many")
            if letter.topic == self._label_topic:
                self._relabel(_label(letter.body, self._settings.labels))
            elif letter.topic == self._topic:
                self._readings(parse(letter.body, self._fields, self._settings.time_field))
        except (ValueError, RecursionError) as error:
            self._malformed(letter, str(error))

    def close(self) -> None:
        """Write what is pending; recording can go on afterwards."""
        self._end_block()
        try:
            self._ring.close()
        except OSError as error:
            self._cannot_write(error)

    def _malformed(self, letter: Letter, reason: str) -> None:
        self.malformed += 1
        self.problem = f"{self.malformed} malformed messages, the last on {letter.topic}: {reason}"
        if letter.topic == self._label_topic:
            # Better no label than the one before: nobody knows what is being done now.
            self._relabel(None)
        if self.malformed in (1, 10) or self.malformed % 100 == 0:
            logger.warning("malformed sensor message", extra={"reason": self.problem})

    def _relabel(self, label: str | None) -> None:
        if label != self._label:
            self._end_block()
            self._label = label

    def _readings(self, readings: Sequence[Reading]) -> None:
        if self._label is None:
            self.unlabelled += len(readings)
            return
        now_s, period_s = self._clock(), 1 / (self._settings.sample_rate_hz or math.inf)
        for i, (said_s, values) in enumerate(readings):
            at_s = said_s if said_s is not None else now_s - (len(readings) - 1 - i) * period_s
            if self._last_s is not None and abs(at_s - self._last_s) > self._settings.max_gap_s:
                self._end_block()
            self._last_s = at_s
            self._add(self._label, values, at_s)

    def _add(self, label: str, values: tuple[float, ...], at_s: float) -> None:
        if self._block is None:
            self._block = self._next.get(label, 0)
            self._next[label] = self._block + 1
            self._at = 0
        if not self._pending:
            self._pending_since_s = at_s
        self._pending.extend(values)
        count = len(self._pending) // len(self._fields)
        if self._at + count >= self._block_readings:
            self._end_block()
        elif count >= self._batch or abs(at_s - self._pending_since_s) >= FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        if not self._pending or self._label is None or self._block is None:
            return
        values = np.frombuffer(self._pending, np.float32).reshape(-1, len(self._fields))
        self._pending = array("f")
        record = Record(self._label, self._block, self._at, self._pending_since_s, self._fields, values)
        self._at += len(values)
        try:
            self._ring.append(record)
        except (OSError, ValueError) as error:
            self.lost += len(values)
            self._cannot_write(error)
        else:
            self.kept += len(values)

    def _end_block(self) -> None:
        self._flush()
        self._block, self._last_s = None, None

    def _cannot_write(self, error: Exception) -> None:
        self.problem = f"the recording cannot be written ({self.lost} readings lost): {error}"
        logger.error("recording cannot be written", extra={"reason": self.problem})


def _block_readings(settings: DataSettings) -> int:
    """Readings in a full block: a few windows, so that a label held for long is still in every part."""
    window = settings.window or WINDOW
    return window + (WINDOWS_PER_BLOCK - 1) * _stride(settings)


def _stride(settings: DataSettings) -> int:
    return settings.stride or max(1, (settings.window or WINDOW) // 2)


def _label(body: bytes, labels: tuple[str, ...] | None) -> str | None:
    """Read a label; raises `ValueError` for one that is none, or not among `labels`."""
    text = body.decode().strip()
    said: Any = text
    if text[:1] in ('"', "{") or text == "null":
        said = json.loads(text)
    if isinstance(said, dict):
        said = said.get("label")
    if said is None or said == "":
        return None
    if isinstance(said, bool) or not isinstance(said, str | int) or len(str(said)) > 200:
        raise ValueError(f"{text[:60]!r} is not a label")
    if labels is not None and str(said) not in labels:
        raise ValueError(f"unknown label {str(said)!r}; the labels are {', '.join(labels)}")
    return str(said)


def parse(body: bytes, fields: tuple[str, ...], time_field: str | None) -> list[Reading]:
    """Read one reading or several; raises `ValueError` saying what is wrong with them."""
    said: Any = json.loads(body)
    names = (*fields, time_field) if time_field else fields
    if isinstance(said, dict) and any(isinstance(said.get(name), list) for name in names):
        said = _rows(said, names)
    if not isinstance(said, list) or not said or not isinstance(said[0], list | dict):
        said = [said]
    return [_reading(one, fields, time_field) for one in said]


def _rows(said: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    columns = {name: said[name] for name in names if isinstance(said.get(name), list)}
    lengths = {len(column) for column in columns.values()}
    if len(columns) != len(names) or len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"lists of one length are needed for each of {', '.join(names)}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _reading(said: Any, fields: tuple[str, ...], time_field: str | None) -> Reading:
    if isinstance(said, list):
        if len(said) != len(fields) or time_field:
            wanted = ", ".join(fields) if time_field is None else f"an object, as the time is in {time_field}"
            raise ValueError(f"{len(said)} numbers without names; wanted: {wanted}")
        return None, tuple(_number(value, name) for value, name in zip(said, fields, strict=True))
    if not isinstance(said, dict):
        raise ValueError(f"a reading is an object or a list, not {str(said)[:60]!r}")
    missing = [name for name in (*fields, time_field) if name is not None and name not in said]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; there are {', '.join(map(str, said))[:200]}")
    seconds = None if time_field is None else _number(said[time_field], time_field)
    return seconds, tuple(_number(said[name], name) for name in fields)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3e38:
        raise ValueError(f"{name} is {str(value)[:40]}, not a finite number")
    return float(value)


def recorded(settings: DataSettings, buffer_dir: Path | None) -> Source:
    """Return the windows of a recording, (window, fields), split by blocks; `DataError` if there are none."""
    if buffer_dir is None:
        raise DataError("kind = 'mqtt_stream' needs the folder of the recording")
    window = settings.window or WINDOW
    windows: list[Array] = []
    labels: list[str] = []
    blocks: list[int] = []
    readings = 0
    for stretch in _stretches(buffer_dir, settings.fields or ()):
        values = np.concatenate([record.values for record in stretch])
        readings += len(values)
        for start in range(0, len(values) - window + 1, _stride(settings)):
            windows.append(values[start : start + window])
            labels.append(stretch[0].label)
            blocks.append(stretch[0].block)
    if not windows:
        raise DataError(
            f"{buffer_dir}: {readings} labelled readings of {', '.join(settings.fields or ())} make no window"
            f" of {window}; record for longer, or set a smaller window"
        )
    classes, names = as_classes(labels, settings.labels, lambda i: f"{buffer_dir}")
    fractions = (1 - settings.validation - settings.test, settings.validation, settings.test)
    pattern = np.array(deal(itertools.repeat(1, PATTERN), fractions))
    parts = pattern[np.array(blocks) % PATTERN]

    def read(rows: Array) -> tuple[Array, Array]:
        return np.stack([windows[row] for row in rows.tolist()]).astype(np.float32), classes[rows]

    shape = (window, len(settings.fields or ()))
    return Source(f"recording {buffer_dir}", "series", shape, names, classes, read, parts=parts)


def _stretches(folder: Path, fields: tuple[str, ...]) -> Iterator[list[Record]]:
    """Yield the records that follow each other without a break, within one block."""
    stretch: list[Record] = []
    for record in records(folder):
        if record.fields != fields:
            logger.warning("recording: other fields passed over", extra={"fields": list(record.fields)})
            continue
        last = stretch[-1] if stretch else None
        follows = last is not None and (last.label, last.block, last.at + len(last.values)) == (
            (record.label, record.block, record.at)
        )
        if stretch and not follows:
            yield stretch
            stretch = []
        stretch.append(record)
    if stretch:
        yield stretch
