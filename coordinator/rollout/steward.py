"""Lets new personal models serve ring by ring, stops where they do harm, and takes pins and rollbacks.

What is decided is in the store before a device hears of it, and what a device does is read from its card, so
both may be killed at any instant. Devices hold a new model back by themselves until they hear otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from coordinator.fleet.records import FleetRecords
from coordinator.live import Live
from coordinator.planning import Course
from coordinator.rollout.choice import chosen
from coordinator.rollout.orders import Orders, Send
from coordinator.rollout.rings import evidence, holds_up, rings_of
from coordinator.roster import Roster
from coordinator.settings import RolloutSettings
from coordinator.store.rollouts import Member, MemberState, Order, Rollout, Verb
from coordinator.store.sql import Store
from foundation.artifact import Manifest
from foundation.errors import HedgerowError, RoundError
from foundation.messages import AgentCard, Assignment

logger = logging.getLogger(__name__)

TICK_S = 0.5
MYSELF = "coordinator"
"""By whom, in the audit, where nobody asked for it."""


class Steward:
    """The engine's hand on devices' models; all methods belong to the event loop's thread."""

    def __init__(
        self,
        settings: RolloutSettings,
        *,
        store: Store,
        live: Live,
        roster: Roster,
        send: Send,
        clock: Callable[[], float] = time.time,
        tick_s: float = TICK_S,
    ) -> None:
        """`clock` gives UTC seconds, by which rings soak."""
        self._settings, self._store, self._live, self._roster = settings, store, live, roster
        self._clock, self._tick_s = clock, tick_s
        self._orders = Orders(store, live, roster, send)
        self._records = FleetRecords(store, clock=clock)
        self._rollout: Rollout | None = None
        self._members: dict[str, Member] = {}
        self._figures: dict[str, Manifest | None] = {}
        self._changing = asyncio.Lock()
        self.waits: str | None = None
        """What the rollout under way waits for, in words."""

    async def run(self) -> None:
        """Say orders and let rings go, until cancelled."""
        async with self._changing:
            await self._orders.remember()
            await self._remember()
            if self._rollout is not None and self._rollout.state == "stopped":
                await self._orders.withdraw(self._models(), "release")  # killed while it was stopped
        await self._catch_up()
        while True:
            try:
                await self._orders.say()
                async with self._changing:
                    await self._judge()
            except HedgerowError as error:  # a busy or full disk: tried again
                logger.error("models not looked at", extra={"reason": str(error)})
            await asyncio.sleep(self._tick_s)

    # --- what the engine says --------------------------------------------------------------------

    def held(self, assignment: Assignment) -> Assignment:
        """Return an assignment whose exported model waits to be let go, where rollouts are on.

        As it is for a device that does not know how: its model serves at once, as if there were no rings.
        """
        card = self._roster.entry(assignment.agent).card
        if not (self._settings.enabled and assignment.export) or card is None or card.models is None:
            return assignment
        return assignment.model_copy(update={"hold": True})

    async def closed(self, run: str, number: int, agents: Collection[str]) -> None:
        """A round that exports is closed, which `agents` were asked in: its models go out ring by ring."""
        if not self._settings.enabled:
            return
        async with self._changing:
            await self._begin(run, number, agents)

    async def heard(self, agent: str, card: AgentCard) -> None:
        """A device has told of its models."""
        async with self._changing:
            await self._orders.heard(agent, card)
            await self._look_at(agent, card)

    # --- what people say -------------------------------------------------------------------------

    async def order(
        self, verb: Verb, devices: Sequence[str] | None, model: str | None, *, reason: str, who: str
    ) -> tuple[list[Order], dict[str, str]]:
        """Pin, unpin or roll back on these devices, or all; returns the orders, and for whom there is none.

        `model` is a round or the beginning of a SHA-256; not given, what serves. Raises `SettingsError` for a
        device that is not known, `RoundError` where nobody could be ordered anything.
        """
        cards = await asyncio.to_thread(self._store.cards)
        wanted, problems = chosen(verb, devices, model, cards)
        if not wanted:
            told = "; ".join(f"{agent}: {why}" for agent, why in sorted(problems.items()))
            raise RoundError(told or "no device has introduced itself yet")
        async with self._changing:
            return await self._orders.add(wanted, reason=reason, who=who), problems

    async def stop(self, reason: str, *, who: str) -> Rollout:
        """End the rollout under way and roll its devices back; raises `RoundError` where there is none."""
        async with self._changing:
            rollout = self._under_way()
            await self._stop(rollout, reason, who)
            return rollout

    async def go(self, *, who: str) -> Rollout:
        """Let the next ring go now, whatever it waits for; raises `RoundError` where none is under way."""
        async with self._changing:
            rollout = self._under_way()
            await self._next_ring(rollout, who, f"{who} did not wait")
            return rollout

    def _under_way(self) -> Rollout:
        if self._rollout is None or self._rollout.state != "open":
            raise RoundError("no rollout is under way")
        return self._rollout

    # --- beginning -------------------------------------------------------------------------------

    async def _remember(self) -> None:
        found = await asyncio.to_thread(self._store.rollouts, 1)
        self._rollout, self._members = (found[0] if found else None), {}
        if self._rollout is not None:
            members = await asyncio.to_thread(self._store.members, self._rollout.run, self._rollout.round)
            self._members = {member.agent: member for member in members}

    async def _catch_up(self) -> None:
        """Begin what a kill between closing a round and beginning its rollout has left out."""
        runs = await asyncio.to_thread(self._store.runs)
        if not (self._settings.enabled and runs):
            return
        course = Course.model_validate_json(runs[0].settings_json)
        rounds = await asyncio.to_thread(self._store.rounds, runs[0].run)
        due = [r for r in rounds if r.state == "closed" and course.settings.exports(r.round)]
        if due:
            await self.closed(due[-1].run, due[-1].round, due[-1].agents)

    async def _begin(self, run: str, number: int, agents: Collection[str]) -> None:
        made = {m.agent for m in await asyncio.to_thread(self._store.artifacts, run) if m.round == number}
        cards = await asyncio.to_thread(self._store.cards)
        told = {
            agent: card.models
            for agent, card in cards.items()
            if card is not None and card.models is not None and agent in agents
        }
        able = {a for a, m in told.items() if m.serves and (a in made or m.of(run, number) is not None)}
        rings = rings_of(self._settings, run, agents, able)
        if not await asyncio.to_thread(self._store.begin_rollout, run, number, rings):
            return
        await self._orders.withdraw(self._models(), "release")
        await self._remember()
        first = ", ".join(rings[0][:3]) + (", …" if len(rings[0]) > 3 else "")
        text = f"the models of round {number} go out in {len(rings)} rings; first: {first}"
        self._live.emit("rollout_started", text, run=run, round=number, rings=[list(ring) for ring in rings])
        await self._look_at_all(cards)

    def _models(self) -> list[str]:
        return [member.model for member in self._members.values() if member.model is not None]

    async def _look_at_all(self, cards: Mapping[str, AgentCard | None]) -> None:
        for agent in list(self._members):
            card = cards.get(agent)
            if card is not None:
                await self._look_at(agent, card)

    # --- one device ------------------------------------------------------------------------------

    async def _look_at(self, agent: str, card: AgentCard) -> None:
        """Take what a card says of the rollout's model, and let it go where it is its turn."""
        member, rollout = self._members.get(agent), self._rollout
        if member is None or rollout is None or card.models is None:
            return
        kept = card.models.of(rollout.run, rollout.round)
        if member.model is None and kept is not None:
            member = replace(member, model=kept.sha256)
        state, reason = _state(member, card)
        if state != member.state:
            member = replace(member, state=state, reason=reason, since=self._clock())
        turn = rollout.state in ("open", "done") and member.ring <= rollout.ring
        if turn and member.state == "waiting" and member.model is not None:
            serving = card.models.linked("serving")
            before = None if serving is None else serving.sha256
            # First the order: killed in between, it is made again, which does no harm.
            await self._orders.add([(agent, "release", member.model)], reason="", who=MYSELF)
            member = replace(member, state="released", before=before, since=self._clock())
        await self._keep(member)
        if rollout.state == "stopped":
            await self._take_back([member], rollout.reason, MYSELF)

    async def _keep(self, member: Member) -> None:
        if member != self._members[member.agent]:
            await asyncio.to_thread(self._store.change_member, member)
            self._members[member.agent] = member

    async def _take_back(self, members: Sequence[Member], reason: str, who: str) -> None:
        """Roll back who serves a model that was stopped, or may be about to; each is told once."""
        wanted: list[tuple[str, Verb, str]] = []
        for member in members:
            # Its first model at all has nothing before it to go back to.
            if member.state not in ("serving", "released") or member.model is None or member.before is None:
                continue
            known = await asyncio.to_thread(self._store.orders, agent=member.agent)
            if not any((order.verb, order.model) == ("rollback", member.model) for order in known):
                wanted.append((member.agent, "rollback", member.model))
        await self._orders.add(wanted, reason=reason, who=who)

    # --- all of them -----------------------------------------------------------------------------

    async def _judge(self) -> None:
        """Stop the rollout under way, or let its next ring go, where it is time."""
        rollout, s = self._rollout, self._settings
        if rollout is None or rollout.state != "open":
            self.waits = None
            return
        members = [member for member in self._members.values() if member.ring <= rollout.ring]
        reason = evidence(members, await self._manifests(members)).breach(s)
        if reason is not None:
            await self._stop(rollout, reason, MYSELF)
            return
        online = {
            agent
            for agent, entry in self._roster.entries.items()
            if entry.online and entry.card is not None and entry.card.models and entry.card.models.serves
        }
        self.waits = holds_up(members, rollout.ring, online) or self._unsettled(members, online)
        if self.waits is not None:
            return
        since = [m.since for m in members if m.state == "serving" and m.ring == rollout.ring]
        left = s.soak_s - (self._clock() - max([*since, rollout.changed]))
        if left > 0:
            self.waits = f"{left:.0f} s more"
            return
        await self._next_ring(rollout, MYSELF, "held")

    def _unsettled(self, members: Sequence[Member], online: Collection[str]) -> str | None:
        """Return whose own trial is not over yet, where that is asked for."""
        for member in members if self._settings.settled else ():
            card = self._roster.entry(member.agent).card
            good = None if card is None or card.models is None else card.models.linked("good")
            here = member.state == "serving" and member.agent in online
            if here and (good is None or good.sha256 != member.model):
                return f"the trial on {member.agent}"
        return None

    async def _manifests(self, members: Sequence[Member]) -> dict[str, Manifest]:
        """Return what is known of members' models, the new ones and those before."""
        wanted = {sha for member in members for sha in (member.model, member.before) if sha is not None}
        if missing := sorted(wanted - self._figures.keys()):
            found = await asyncio.to_thread(self._store.manifests, missing)
            self._figures = {sha: self._figures.get(sha) for sha in wanted if sha in self._figures}
            self._figures |= {sha: found.get(sha) for sha in missing}
        return {sha: manifest for sha in wanted if (manifest := self._figures[sha]) is not None}

    async def _next_ring(self, rollout: Rollout, who: str, why: str) -> None:
        last = max(member.ring for member in self._members.values())
        ended = rollout.ring >= last
        ring = rollout.ring if ended else rollout.ring + 1
        after = replace(rollout, state="done" if ended else "open", ring=ring, changed=self._clock())
        if not await asyncio.to_thread(self._store.change_rollout, after):
            await self._remember()
            return
        self._rollout, self.waits = after, None
        place = f"{rollout.run}/{rollout.round}"
        if ended:
            text, kind = f"the models of round {rollout.round} serve everywhere they can", "rollout_done"
        else:
            text, kind = f"ring {ring + 1} of {last + 1} is let go: the rings before it {why}", "rollout_ring"
        self._live.emit(kind, text, run=rollout.run, round=rollout.round, ring=ring + 1)
        await asyncio.to_thread(self._records.note, who, kind.replace("_", " "), place, text)
        await self._look_at_all(await asyncio.to_thread(self._store.cards))

    async def _stop(self, rollout: Rollout, reason: str, who: str) -> None:
        after = replace(rollout, state="stopped", reason=reason, changed=self._clock())
        if not await asyncio.to_thread(self._store.change_rollout, after):
            await self._remember()
            return
        self._rollout, self.waits = after, None
        await self._orders.withdraw(self._models(), "release")
        text = f"the rollout of round {rollout.round} was stopped in ring {rollout.ring + 1}: {reason}"
        self._live.emit("rollout_stopped", text, run=rollout.run, round=rollout.round, reason=reason)
        await asyncio.to_thread(
            self._records.note, who, "rollout stopped", f"{rollout.run}/{rollout.round}", reason
        )
        await self._take_back(list(self._members.values()), reason, who)


def _state(member: Member, card: AgentCard) -> tuple[MemberState, str]:
    """Return how a device stands, as its card says, and why."""
    assert card.models is not None
    for verdict in reversed(card.verdicts):
        if verdict.sha256 == member.model:
            return verdict.kind, verdict.reason
    serving = card.models.linked("serving")
    if serving is not None and serving.sha256 == member.model:
        return "serving", ""
    for link, whose in (("pinned", "its owner"), ("ordered", "an operator")):
        pinned = card.models.linked(link)  # type: ignore[arg-type]
        if pinned is not None and pinned.sha256 != member.model:
            return "pinned", f"{whose} has pinned round {pinned.round}"
    if member.state in ("serving", "pinned"):
        return "waiting", ""  # what is its turn is let go anew
    return member.state, member.reason
