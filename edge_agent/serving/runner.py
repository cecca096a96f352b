"""Runs of the model: on the event loop or in one thread, several requests in one run where that pays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from edge_agent.serving.answers import busy
from edge_agent.serving.predictor import Handle, Prediction, Predictor
from export.proof import LARGEST_BATCH
from foundation.errors import DataError
from foundation.parameters import Array

INLINE_MS = 2.0
"""A run shorter than this goes on the event loop; a thread would cost more than it saves."""
MOST_IN_FLIGHT = 64
PAYS = 0.9
"""A run of eight has to take less than this share of eight runs of one, or requests are run apart."""


@dataclass(frozen=True, slots=True)
class Ran:
    """An answer, and the seconds its run took and it waited for the run."""

    prediction: Prediction
    run_s: float
    waited_s: float


@dataclass(slots=True, eq=False)
class _Waiting:
    x: Array
    handle: Handle
    answer: asyncio.Future[Ran]
    since: float = field(default_factory=time.perf_counter)


class Runner:
    """Runs requests one after another; everything but `measure` is called on the event loop.

    `window_s` is how long a request waits for others to share a run with; 0 runs each apart. A request
    does not wait when no other is on its way, so a single client sees no delay. `ran` is told the
    version, samples, requests and seconds of every run.
    """

    def __init__(
        self,
        predictor: Predictor,
        ran: Callable[[str, int, int, float], None],
        *,
        window_s: float = 0.0,
        most_samples: int = LARGEST_BATCH,
        most_in_flight: int = MOST_IN_FLIGHT,
    ) -> None:
        self._predictor, self._ran = predictor, ran
        self._window_s, self._most, self._most_in_flight = window_s, most_samples, most_in_flight
        self._thread = ThreadPoolExecutor(1, "model")
        self._pending: list[_Waiting] = []
        self._changed = asyncio.Event()
        self._flushing: asyncio.Task[None] | None = None
        self._pays = window_s > 0
        self.in_flight = 0
        """Requests between their first byte and their answer."""

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places for requests; raises `Refused` (503) when all are taken."""
        if self.in_flight >= self._most_in_flight:
            raise busy(f"{self.in_flight} requests are being answered")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self._changed.set()

    def measure(self, handle: Handle) -> None:
        """Find out whether a run of eight is cheaper than eight runs of one; takes some 30 runs' time."""
        if self._window_s:
            self._pays = _milliseconds(handle, 8) < PAYS * 8 * _milliseconds(handle, 1)

    async def run(self, x: Array, handle: Handle) -> Ran:
        """Answer one request that was read for a model; raises `DataError` for what the model cannot take."""
        if len(x) > self._most:
            raise DataError(f"a batch has 1 to {self._most} samples, not {len(x)}")
        waiting = _Waiting(x, handle, asyncio.get_running_loop().create_future())
        if not self._pays:
            return (await self._one_run([waiting]))[0]
        self._pending.append(waiting)
        self._changed.set()
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())
        return await waiting.answer

    async def close(self) -> None:
        """End the thread, after the run it is in."""
        await asyncio.to_thread(self._thread.shutdown)

    # --- several in one run ---------------------------------------------------------------------

    async def _flush(self) -> None:
        try:
            while self._pending:
                await self._gather(self._pending[0].since + self._window_s)
                await self._answer(self._take())
        finally:
            self._flushing = None

    async def _gather(self, deadline: float) -> None:
        """Wait until the window ends, a run is full, or everybody who is on the way has arrived."""
        while not self._complete() and (left := deadline - time.perf_counter()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    def _complete(self) -> bool:
        return len(self._pending) >= self.in_flight or sum(len(one.x) for one in self._pending) >= self._most

    def _take(self) -> list[_Waiting]:
        """Take the first, and those behind it that fit into a run with it."""
        form, room = _form(self._pending[0]), self._most
        taken: list[_Waiting] = []
        for one in self._pending:
            if _form(one) == form and len(one.x) <= room:
                taken.append(one)
                room -= len(one.x)
        self._pending = [one for one in self._pending if one not in taken]
        return taken

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            answers = await self._one_run(batch)
        except DataError as error:
            if len(batch) == 1:
                _settle(batch[0], error)
                return
            for one in batch:  # one of them is at fault: each for itself
                await self._answer([one])
        except Exception as error:
            for one in batch:
                _settle(one, error)
        else:
            for one, answer in zip(batch, answers, strict=True):
                _settle(one, answer)

    # --- one run --------------------------------------------------------------------------------

    async def _one_run(self, batch: list[_Waiting]) -> list[Ran]:
        x = batch[0].x if len(batch) == 1 else np.concatenate([one.x for one in batch])
        if batch[0].handle.run_ms * max(1, len(x)) < INLINE_MS:
            start, end, prediction = self._timed(x, batch[0].handle)
        else:
            start, end, prediction = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._timed, x, batch[0].handle
            )
        self._ran(str(prediction.manifest.round), len(x), len(batch), end - start)
        answers, row = [], 0
        for one in batch:
            rows = slice(row, row := row + len(one.x))
            part = prediction if len(batch) == 1 else _rows(prediction, rows)
            answers.append(Ran(part, end - start, start - one.since))
        return answers

    def _timed(self, x: Array, handle: Handle) -> tuple[float, float, Prediction]:
        start = time.perf_counter()
        prediction = self._predictor.predict(x, handle)
        return start, time.perf_counter(), prediction


def _form(one: _Waiting) -> tuple[int, tuple[int, ...], str]:
    return id(one.handle), one.x.shape[1:], one.x.dtype.str


def _rows(prediction: Prediction, rows: slice) -> Prediction:
    return replace(
        prediction,
        logits=prediction.logits[rows],
        probabilities=prediction.probabilities[rows],
        indices=prediction.indices[rows],
    )


def _settle(waiting: _Waiting, answer: Ran | Exception) -> None:
    if waiting.answer.done():
        return  # its request was given up
    if isinstance(answer, Exception):
        waiting.answer.set_exception(answer)
    else:
        waiting.answer.set_result(answer)


def _milliseconds(handle: Handle, samples: int) -> float:
    kind = np.int64 if handle.manifest.input == "text" else np.float32
    x, name = np.zeros((samples, *handle.manifest.shape), kind), handle.session.get_inputs()[0].name
    times = []
    for _ in range(5):
        start = time.perf_counter()
        handle.session.run(None, {name: x})
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[1:])
