"""Predicts a sensor's newest window as it comes, and publishes what the personal model says, retained.

The window is the model's own: as many readings as its input has steps. When windows come faster than may be
published, the newest counts and the others are skipped and counted, never queued: a prediction of what was
is of no use to a switch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from edge_agent.samples import DataSettings
from edge_agent.serving.loopback import Loopback
from edge_agent.settings import ServeStreamSettings
from edge_agent.stream import MAX_LETTER_BYTES, Reading, parse
from foundation.errors import DataError, HedgerowError, SettingsError
from foundation.messages import LivePrediction
from foundation.transport import Letter, Transport

logger = logging.getLogger(__name__)

AGAIN_S = 5.0
"""How soon a model that cannot be asked is looked at again."""


@dataclass(frozen=True, slots=True)
class Window:
    """The newest readings, (steps, fields), and when the last of them was."""

    values: list[tuple[float, ...]]
    at_s: float
    """Seconds since the epoch."""
    came: float
    """By the clock that latency is counted with."""


def followed(stream: ServeStreamSettings, data: DataSettings) -> ServeStreamSettings:
    """Return the settings with what `[data]` says where they say nothing.

    Raises `SettingsError` where neither says a topic or the fields.
    """
    if data.kind != "mqtt_stream":
        data = DataSettings()
    found = stream.model_copy(
        update={
            "topic": stream.topic or data.topic,
            "fields": stream.fields or data.fields,
            "time_field": stream.time_field or data.time_field,
            "stride": stream.stride or data.stride,
        }
    )
    for key in ("topic", "fields"):
        if getattr(found, key) is None:
            raise SettingsError(
                f'serve.mqtt.stream needs {key}, or [data] of kind = "mqtt_stream" that has it'
            )
    return found


class Windows:
    """Cuts readings into windows that overlap; a gap begins anew."""

    def __init__(self, steps: int, stride: int, max_gap_s: float) -> None:
        self._readings: deque[tuple[float, ...]] = deque(maxlen=steps)
        self._steps, self._stride, self._max_gap_s = steps, stride, max_gap_s
        self._since = 0
        self._last_s: float | None = None

    def add(self, values: tuple[float, ...], at_s: float) -> list[tuple[float, ...]] | None:
        """Take one reading; returns a window where one is full."""
        if self._last_s is not None and abs(at_s - self._last_s) > self._max_gap_s:
            self._readings.clear()
            self._since = 0
        self._last_s = at_s
        self._readings.append(values)
        self._since += 1
        if len(self._readings) < self._steps or self._since < self._stride:
            return None
        self._since = 0
        return list(self._readings)


class Live:
    """Listens to a sensor and publishes predictions, at most so many a second."""

    def __init__(
        self,
        settings: ServeStreamSettings,
        loopback: Loopback,
        *,
        predictions: str,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        again_s: float = AGAIN_S,
    ) -> None:
        """Take settings that `followed` has filled, and the topic of the predictions."""
        self._settings, self._loopback, self._topic = settings, loopback, predictions
        self._fields: Sequence[str] = settings.fields or ()
        self._clock, self._now, self._again_s = clock, now, again_s
        self._windows: Windows | None = None
        self._newest: Window | None = None
        self._there = asyncio.Event()
        self.windows = 0
        """Windows that were full."""
        self.told = 0
        """Predictions published."""
        self.malformed = 0
        """Letters that could not be read."""
        self.problem: str | None = None
        """Why there are no predictions at present."""

    async def run(self, transport: Transport) -> None:
        """Predict until cancelled or the transport closes."""
        letters = await transport.subscribe(self._settings.topic or "")
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(self._predict(transport))
            async for letter in letters:
                self.take(letter)
            asking.cancel()

    def take(self, letter: Letter) -> None:
        """Take one letter of the sensor."""
        try:
            if len(letter.body) > MAX_LETTER_BYTES:
                raise ValueError(f"{len(letter.body)} bytes are too many")
            readings = parse(letter.body, tuple(self._fields), self._settings.time_field)
        except (ValueError, RecursionError) as error:
            self.malformed += 1
            if self.malformed & (self.malformed - 1) == 0:  # 1, 2, 4, 8, ...: seen, without flooding the log
                logger.warning("malformed reading", extra={"reason": str(error), "count": self.malformed})
            return
        self._add(readings)

    def _add(self, readings: Sequence[Reading]) -> None:
        if self._windows is None:  # nobody knows yet how long a window is
            self._there.set()
            return
        arrived_s, came = self._now(), self._clock()
        for said_s, values in readings:
            at_s = arrived_s if said_s is None else said_s
            window = self._windows.add(values, at_s)
            if window is not None:
                self.windows += 1
                self._newest = Window(window, at_s, came)
                self._there.set()

    async def _predict(self, transport: Transport) -> None:
        reported = 0
        while True:
            await self._there.wait()
            self._there.clear()
            begun = self._clock()
            try:
                told = await self._one(transport, reported)
            except (HedgerowError, LookupError, TypeError, ValueError) as error:
                self._trouble(f"{type(error).__name__}: {error}")
                self._windows = None if isinstance(error, DataError) else self._windows
                await asyncio.sleep(self._again_s)
                continue
            if told is not None:
                reported, self.problem = told, None
                await asyncio.sleep(max(0.0, 1 / self._settings.per_second - (self._clock() - begun)))

    async def _one(self, transport: Transport, reported: int) -> int | None:
        """Publish what the model says to the newest window; returns how many windows there were by then."""
        if self._windows is None:
            self._windows = self._fitting(await self._loopback.model())
            return None
        window, self._newest = self._newest, None
        if window is None:
            return None
        number = self.windows
        found = await self._loopback.predict(window.values)
        (one,) = found["predictions"]
        prediction = LivePrediction(
            label=one["label"],
            probability=min(1.0, one["probability"]),
            model_version=str(found["model"]["round"]),
            model_sha256=found["model"]["sha256"],
            latency_ms=round(1e3 * (self._clock() - window.came), 3),
            time=_when(window.at_s, self._now),
            skipped=number - reported - 1,
        )
        await transport.publish(self._topic, prediction.model_dump_json().encode(), retain=True)
        self.told += 1
        return number

    def _fitting(self, manifest: dict[str, object]) -> Windows:
        shape = manifest["shape"]
        if manifest["input"] != "series" or not isinstance(shape, list) or shape[1] != len(self._fields):
            raise DataError(
                f"the model takes {manifest['input']} {shape}, not windows of {', '.join(self._fields)}"
            )
        steps = int(shape[0])
        return Windows(steps, self._settings.stride or max(1, steps // 2), self._settings.max_gap_s)

    def _trouble(self, reason: str) -> None:
        if reason != self.problem:
            logger.warning("no live predictions", extra={"reason": reason})
        self.problem = reason


def _when(at_s: float, now: Callable[[], float]) -> datetime:
    """Return a reading's time; a sensor whose seconds are no date is taken at its arrival."""
    try:
        return datetime.fromtimestamp(at_s, UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(now(), UTC)
