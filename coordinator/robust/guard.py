"""Quarantine as the engine sees it: judges a round, keeps apart what is far outside, and counts strikes."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from coordinator.live import Live
from coordinator.robust.settle import Round, judged
from coordinator.roster import Roster
from coordinator.settings import RunSettings
from coordinator.store.sql import Store
from coordinator.strategies.base import Strategy
from foundation.errors import StoreError

logger = logging.getLogger(__name__)

HISTORY = 5
"""Earlier rounds whose sizes stand in where too few devices answered."""
SIZE = "change_rms"
"""The median size of a round's changes, among its metrics."""


@dataclass
class Guard:
    """Keeps store, roster and the live picture in step about what was quarantined."""

    store: Store
    roster: Roster
    live: Live

    async def remember(self, run: str) -> None:
        """Take up the strikes of a run that goes on: whom it asks must not depend on a restart.

        Those of another run are over.
        """
        self.roster.forgive()
        cases = await asyncio.to_thread(self.store.quarantine.cases, run)
        for case in reversed(cases):
            if case.cause == "outside":
                self.roster.strike(case.agent, "outside", case.reason)

    async def malformed(
        self, agent: str, reason: str, frame: bytes, run: str | None, round: int | None
    ) -> None:
        """Keep a frame that could not be taken, unless its sender is set aside already.

        A disk that refuses is told in the log: the frame is refused all the same.
        """
        if self.roster.entry(agent).set_aside is not None:
            return
        self.live.quarantined(agent, reason)
        keep = self.store.quarantine.keep
        try:
            await asyncio.to_thread(
                keep, agent, frame, cause="malformed", reason=reason, run=run, round=round
            )
        except StoreError as error:
            logger.error("a refused update is not kept", extra={"agent": agent, "reason": str(error)})

    async def screened(
        self, run: RunSettings, number: int, strategy: Strategy, round: Round
    ) -> tuple[Round, dict[str, float]]:
        """Return the round without what is far outside, which is quarantined, and what the metrics say."""
        if not run.robust.screens:
            return round, {}
        past = await asyncio.to_thread(self.store.latest_rounds, run.name, HISTORY + 1)
        sizes = [float(r.metrics[SIZE]) for r in past if r.state == "closed" and r.metrics.get(SIZE)]
        found = await asyncio.to_thread(judged, run.robust, strategy, round, sizes)
        await asyncio.to_thread(self.store.quarantine.forget, run.name, number)
        for update in round.updates:
            if (reason := found.quarantined.get(update.agent)) is not None:
                await self._outside(run.name, update.round, update.agent, reason)
        told = {SIZE: found.size} if found.size is not None else {}
        if found.quarantined:
            told["quarantined"] = float(len(found.quarantined))
        return round.without(found.quarantined), told

    async def _outside(self, run: str, number: int, agent: str, reason: str) -> None:
        frame = await asyncio.to_thread(self.store.update_frame, run, number, agent)
        keep = self.store.quarantine.keep
        await asyncio.to_thread(keep, agent, frame, cause="outside", reason=reason, run=run, round=number)
        self.live.quarantined(agent, reason)
        text = f"{agent} quarantined: {reason}"
        self.live.emit("quarantined", text, run=run, round=number, agent=agent, reason=reason)
        aside = self.roster.strike(agent, "outside", reason)
        if aside is not None:
            self.live.emit("set_aside", f"{agent} {aside}", agent=agent)
