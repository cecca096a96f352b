"""Answers questions that come over MQTT, on the device's own topics.

Every question gets an answer, or an error that says why not: also one that cannot be read, one too many, and
one under which the serving process dies. Only what the broker itself does not hand over is not answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import ValidationError

from edge_agent.serving.loopback import Loopback
from edge_agent.settings import ServeMqttSettings
from foundation.errors import FrameTooLarge, HedgerowError, TransportError
from foundation.messages import Answer, Predicted, Question
from foundation.transport import Letter, Transport

logger = logging.getLogger(__name__)

AT_ONCE = 16
"""Questions in hand at once; the others wait in the subscription's inbox."""

LONGEST_ERROR = 500


class Rate:
    """Lets so many pass a second; what was not used is saved up for a second."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._clock = per_second, clock
        self._most = max(1.0, per_second)
        self._left, self._then = self._most, clock()

    def take(self) -> bool:
        """Whether one more may pass now."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._then) * self._per_second)
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Answering:
    """Takes questions from one topic and publishes answers to another."""

    def __init__(
        self,
        settings: ServeMqttSettings,
        loopback: Loopback,
        *,
        questions: str,
        answers: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._loopback = settings, loopback
        self._questions, self._answers = questions, answers
        self._clock = clock
        self._rate = Rate(settings.per_second, clock)
        self._free = asyncio.Semaphore(AT_ONCE)

    async def run(self, transport: Transport) -> None:
        """Answer until cancelled or the transport closes."""
        letters = await transport.subscribe(self._questions)
        async with asyncio.TaskGroup() as tasks:
            await self._take(letters, tasks, transport)

    async def _take(
        self, letters: AsyncIterator[Letter], tasks: asyncio.TaskGroup, transport: Transport
    ) -> None:
        async for letter in letters:
            begun = self._clock()
            await self._free.acquire()
            tasks.create_task(self._one(letter, begun, transport))

    async def _one(self, letter: Letter, begun: float, transport: Transport) -> None:
        try:
            answer = await self.answer(letter, begun)
            try:
                await self._tell(transport, answer)
            except FrameTooLarge as error:
                await self._tell(transport, Answer(id=answer.id, error=str(error)[:LONGEST_ERROR]))
        except TransportError as error:
            # The asker's patience is over by then: it asks again.
            logger.warning("an answer was not published", extra={"reason": str(error)})
        finally:
            self._free.release()

    async def _tell(self, transport: Transport, answer: Answer) -> None:
        said = answer.model_dump(mode="json", exclude_none=True) | {"id": answer.id}
        await transport.publish(self._answers, json.dumps(said).encode())

    async def answer(self, letter: Letter, begun: float) -> Answer:
        """Return the answer to a letter that came at `begun`, whatever it says."""
        try:
            question = read(letter, self._settings.question_bytes)
        except ValueError as error:
            return Answer(id=None, error=str(error)[:LONGEST_ERROR])
        if not self._rate.take():
            most = f"more than {self._settings.per_second:g} questions a second; ask again later"
            return Answer(id=question.id, error=most)
        try:
            inputs = [question.inputs] if isinstance(question.inputs, str) else question.inputs
            found = await self._loopback.predict(inputs)
            return told(question, found, 1e3 * (self._clock() - begun))
        except HedgerowError as error:
            return Answer(id=question.id, error=str(error)[:LONGEST_ERROR])
        except Exception as error:  # answered, and logged: a question is never lost in silence
            logger.exception("a question failed")
            return Answer(id=question.id, error=f"{type(error).__name__}: {error}"[:LONGEST_ERROR])


def read(letter: Letter, most_bytes: int) -> Question:
    """Read a question; raises `ValueError` that says what is wrong with it."""
    if letter.retained:
        raise ValueError("a retained question would be answered again and again: publish it without")
    if len(letter.body) > most_bytes:
        raise ValueError(f"a question has at most {most_bytes} bytes, not {len(letter.body)}")
    try:
        return Question.model_validate_json(letter.body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f'send {{"id": ..., "inputs": [...]}}: {where}: {first["msg"]}') from error


def told(question: Question, found: dict[str, Any], latency_ms: float) -> Answer:
    """Return the answer to a question from what `/predict` said."""
    each = [
        Predicted(
            label=one["label"],
            probability=min(1.0, one["probability"]),
            probabilities=one["probabilities"] if question.probabilities else None,
        )
        for one in found["predictions"]
    ]
    about = {
        "id": question.id,
        "model_version": str(found["model"]["round"]),
        "model_sha256": found["model"]["sha256"],
        "latency_ms": round(latency_ms, 3),
    }
    if len(each) != 1:
        return Answer(predictions=tuple(each), **about)
    (one,) = each
    return Answer(label=one.label, probability=one.probability, probabilities=one.probabilities, **about)
