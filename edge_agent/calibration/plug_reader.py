"""A smart plug on a real broker: hears what it says, and asks a Tasmota for its readings once a second.

A thread of its own holds the connection, so that a load beside it cannot delay what arrives more than the
system does. The only thing that it ever publishes is Tasmota's question: a plug can switch the device off.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from foundation.errors import HedgerowError, SensorError
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.plug import Plug, Reading, keep_asking

JOIN_S = 10.0


class PlugReader:
    """`with PlugReader(plug, settings) as reader:` all readings since then, by the time of their arrival."""

    def __init__(
        self, plug: Plug, settings: MqttSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plug = plug
        self._settings = settings
        self._clock = clock
        self._readings: list[Reading] = []
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plug", daemon=True)

    def __enter__(self) -> Self:
        """Connect and subscribe; raises `TransportError` that says what is wrong with the broker."""
        self._thread.start()
        self._ready.wait()
        self._raise()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop, task = self._loop, self._task
        if loop is not None and task is not None and not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)
        self._thread.join(JOIN_S)

    def readings(self) -> list[Reading]:
        """Return all readings so far; raises `SensorError` once the connection was given up."""
        self._raise()
        return list(self._readings)

    def _raise(self) -> None:
        if isinstance(self._failure, HedgerowError):
            raise self._failure
        if self._failure is not None:
            raise SensorError(f"reading the plug failed: {self._failure!r}") from self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._hear())
        except asyncio.CancelledError:
            pass  # the way to end it
        except BaseException as error:  # raised again in the thread that asks for readings
            self._failure = error
        finally:
            self._ready.set()

    async def _hear(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        name = f"hedgerow-calibrate-{os.getpid()}"
        async with MqttTransport(self._settings, name, clean=True) as transport:
            letters = await transport.subscribe(*self.plug.topics)
            asking = asyncio.create_task(keep_asking(self.plug, transport))
            self._ready.set()
            try:
                async for letter in letters:
                    reading = self.plug.take(
                        letter.topic, letter.body, self._clock(), retained=letter.retained
                    )
                    if reading is not None:
                        self._readings.append(reading)
            finally:
                asking.cancel()
        raise SensorError("the connection to the broker was closed")
