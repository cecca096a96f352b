"""Gathers the updates of one round until all are in, or quorum and deadline; refuses what does not fit."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence

from foundation.codec import Expected, check_update
from foundation.errors import FrameMismatch, QuorumMissed
from foundation.messages import Assignment, Update
from foundation.parameters import Layout

TICK_S = 0.5


class Collector:
    """The answers to one round's assignments."""

    def __init__(
        self,
        assignments: Sequence[Assignment],
        *,
        quorum: float,
        deadline: float,
        grace_s: float,
        silent_for: Callable[[str], float | None],
        clock: Callable[[], float],
        soft: float | None = None,
        buffer: int | None = None,
        others: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """Wait until `deadline` (on `clock`); `silent_for` gives an agent's seconds offline, or None.

        From `soft` on (on `clock`) the quorum suffices. With `buffer`, so many updates of any round suffice
        at once, and `others` says who is still at work on earlier ones.
        """
        self.assignments: Mapping[str, Assignment] = {a.agent: a for a in assignments}
        self.updates: dict[str, Update] = {}
        self.refusals: dict[str, str] = {}
        self.late: dict[tuple[int, str], Update] = {}
        """Updates of earlier rounds, by round and agent."""
        self.needed = 1 if buffer is not None else max(1, math.ceil(quorum * len(assignments)))
        self._deadline, self._grace_s = deadline, grace_s
        self._soft, self._buffer, self._others = soft, buffer, others
        self._silent_for, self._clock = silent_for, clock
        self._changed = asyncio.Event()
        self._outstanding = dict.fromkeys(self.assignments)  # in order, so that sending has one

    def check(self, update: Update) -> None:
        """Raise `FrameMismatch` when the update does not answer its agent's assignment."""
        assignment = self.assignments.get(update.agent)
        if assignment is None:
            raise FrameMismatch(f"agent {update.agent!r} was not asked in round {update.round}")
        check_answer(update, assignment)

    def add(self, update: Update) -> None:
        """Count an update that was checked and stored."""
        self.updates[update.agent] = update
        self.refusals.pop(update.agent, None)
        self._outstanding.pop(update.agent, None)
        self._changed.set()

    def add_late(self, update: Update) -> None:
        """Count an update of an earlier round that was checked and stored."""
        self.late[update.round, update.agent] = update
        self._changed.set()

    def refuse(self, agent: str, reason: str) -> None:
        """Note that an agent will not answer."""
        if agent in self.assignments and agent not in self.updates:
            self.refusals[agent] = reason
            self._outstanding.pop(agent, None)
            self._changed.set()

    @property
    def outstanding(self) -> list[str]:
        """Agents that have neither answered nor refused."""
        return list(self._outstanding)

    def is_outstanding(self, agent: str) -> bool:
        """Whether an agent has neither answered nor refused."""
        return agent in self._outstanding

    async def wait(self) -> list[Update]:
        """Return the updates, sorted by agent, when the round may close.

        Raises `QuorumMissed` when the deadline passed, or everyone is accounted for, with too few.
        """
        while not self._may_close():
            self._changed.clear()
            try:
                # Not `wait_for`: before Python 3.12 it loses a cancellation that meets the event.
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()
            except TimeoutError:
                continue
        if len(self.updates) < self.needed and not self._filled:
            missing = dict.fromkeys(self.outstanding, "no answer") | self.refusals
            reasons = "; ".join(f"{agent}: {reason}" for agent, reason in sorted(missing.items()))
            raise QuorumMissed(
                f"{len(self.updates)} of {len(self.assignments)} updates are in, {self.needed} are needed"
                f" ({reasons})"
            )
        return [self.updates[agent] for agent in sorted(self.updates)]

    @property
    def _filled(self) -> bool:
        """Whether updates of any round make up for the quorum."""
        return self._buffer is not None and bool(self.updates or self.late)

    def _may_close(self) -> bool:
        # Looked at after every update: who is waited for is listed only where it matters.
        count, others = len(self.updates), tuple[str, ...]()
        if self._buffer is not None:
            others, count = tuple(self._others()), count + len(self.late)
            if count >= self._buffer:
                return True
        if not (self._outstanding or others) or self._clock() >= self._deadline:
            return True
        if count < self.needed:
            return False
        if self._buffer is None and self._soft is not None and self._clock() >= self._soft:
            return True
        silent = (self._silent_for(agent) for agent in (*self._outstanding, *others))
        return all(s is not None and s > self._grace_s for s in silent)


def check_answer(update: Update, assignment: Assignment) -> None:
    """Raise `FrameMismatch` when an update does not answer this assignment."""
    layout = expected_layout(assignment)
    check_update(update, Expected(assignment.run, assignment.round, assignment.agent, layout))
    if update.masks and assignment.work.layout == "flat":
        raise FrameMismatch("masks came with a model whose layout is the device's own")
    hidden = assignment.spec.hidden
    for block, mask in update.masks.items():
        if mask.shape != (hidden,):
            raise FrameMismatch(f"mask of {block} has shape {mask.shape}, not ({hidden},)")
    made = update.artifact
    if made is not None and (made.run, made.round, made.agent) != (
        update.run,
        update.round,
        update.agent,
    ):
        raise FrameMismatch(f"its artifact is of {made.agent!r} in round {made.round} of run {made.run!r}")


def expected_layout(assignment: Assignment) -> Layout:
    """Return names and shapes of what an assignment asks back."""
    work, sent = assignment.work, assignment.parameters
    if work.embedding_fit() is not None:
        return (("embedding", sent["embedding"].shape),)
    teacher = sent.prefixed_only("teacher/").layout if work.distillation() is not None else ()
    if work.layout == "flat":
        return (("flat", sent["flat"].shape), *teacher)
    return (*((name, shape) for name, shape in assignment.spec.layout if work.sends(name, sent)), *teacher)
