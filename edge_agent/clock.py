"""How far this device's clock is from the coordinator's: asked over MQTT, the best of several pairs is kept.

Pairs compare the coordinator's UTC with a clock here that nobody sets (`steady_s`), so a
device whose UTC jumps in mid-round is still joined right. An answer is late by at most the round trip: half
of it is the error, however uneven the ways are.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from edge_agent.energy.timeline import Stretch
from foundation.errors import NotConnected, TransportError
from foundation.messages import ClockAnswer, ClockQuestion
from foundation.timing import MOST_S, ClockOffset, Span, Timing, steady_s
from foundation.transport import Transport

logger = logging.getLogger(__name__)

PAIRS = 8
"""Questions in a row."""
ANSWER_S = 2.0
"""A coordinator that has not answered by then does not compare clocks, or is away."""
KEPT = 64
DRIFT = 1e-4
"""How much two clocks may go apart: twice what a cheap crystal does."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One question and its answer."""

    at_s: float
    """When, on the steady clock."""
    ahead_s: float
    """The coordinator's UTC minus the steady clock."""
    half_trip_s: float

    def error_s(self, *times_s: float) -> float:
        """Return how far `ahead_s` may be off at all of these times."""
        return self.half_trip_s + DRIFT * max(abs(time_s - self.at_s) for time_s in times_s)


def pair_of(asked_s: float, answer: ClockAnswer, heard_s: float) -> Pair | None:
    """Return what four times tell; `None` where they cannot be, as after the coordinator's clock was set."""
    trip_s = (heard_s - asked_s) - (answer.answered_s - answer.received_s)
    if answer.answered_s < answer.received_s or trip_s < 0:
        return None
    ahead_s = ((answer.received_s - asked_s) + (answer.answered_s - heard_s)) / 2
    return Pair((asked_s + heard_s) / 2, ahead_s, trip_s / 2)


class ClockComparison:
    """Asks when it is woken; `timing` may be called from any thread."""

    def __init__(
        self,
        questions: str,
        answers: str,
        *,
        utc: Callable[[], float] = time.time,
        clock: Callable[[], float] = steady_s,
    ) -> None:
        """Ask on the topic `questions` and hear on `answers`; `utc` is the clock that is compared."""
        self._questions, self._answers = questions, answers
        self._utc, self._clock = utc, clock
        self._pairs: tuple[Pair, ...] = ()
        self._due = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[ClockAnswer]] = {}

    def wake(self, *, anew: bool = False) -> None:
        """Ask again: work has come, or a coordinator, whose clock may be another than before (`anew`)."""
        if anew:
            self._pairs = ()
        self._due.set()

    async def run(self, transport: Transport) -> None:
        """Ask and hear until cancelled; a broker that does not let this agent hear is told of once."""
        try:
            letters = await transport.subscribe(self._answers)
        except TransportError as error:
            logger.warning("the clock is not compared with the coordinator's", extra={"reason": str(error)})
            return
        asking = asyncio.create_task(self._ask_when_due(transport))
        try:
            async for letter in letters:
                if not letter.retained:
                    self._heard(letter.body)
        finally:
            asking.cancel()
            await asyncio.wait([asking])

    def timing(self, stretches: Sequence[Stretch]) -> Timing | None:
        """Return when these stretches were in this device's UTC; `None` where no clock was compared."""
        pairs = self._pairs
        if not stretches or not pairs:
            return None
        ends = (stretches[0].start_s, stretches[-1].end_s)
        best = min(pairs, key=lambda pair: pair.error_s(*ends))
        ahead_s = self._utc() - self._clock()  # one number for all edges: a clock that is set moves none
        spans = [
            Span(
                stage=stretch.stage,
                also=stretch.also,
                start_s=_bounded(stretch.start_s + ahead_s),
                end_s=_bounded(stretch.end_s + ahead_s),
            )
            for stretch in stretches
        ]
        offset = ClockOffset(
            offset_s=best.ahead_s - ahead_s, uncertainty_s=best.error_s(*ends), pairs=len(pairs)
        )
        return Timing(spans=tuple(spans), clock=offset)

    async def _ask_when_due(self, transport: Transport) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            for _ in range(PAIRS):
                if not await self._ask(transport):
                    break  # nobody answers: the next work asks again

    async def _ask(self, transport: Transport) -> bool:
        """Ask once; returns whether the answer came."""
        number = random.getrandbits(52)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        asked_s = self._clock()
        try:
            await transport.publish(
                self._questions, ClockQuestion(id=number).model_dump_json().encode(), qos=0
            )
            async with asyncio.timeout(ANSWER_S):
                told = await answer
        except (TimeoutError, NotConnected):
            return False
        finally:
            del self._waiting[number]
        pair = pair_of(asked_s, told, self._clock())
        if pair is not None:
            self._pairs = (*self._pairs, pair)[-KEPT:]
        return True

    def _heard(self, body: bytes) -> None:
        try:
            answer = ClockAnswer.model_validate_json(body)
        except ValidationError as error:
            logger.warning("the coordinator's time not understood", extra={"reason": str(error)})
            return
        waiting = self._waiting.get(answer.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)


def _bounded(utc_s: float) -> float:
    """Return a time to the millisecond; a clock that is beyond all bounds is at one."""
    return min(MOST_S, max(0.0, round(utc_s, 3)))
