"""One round after another: plan, send, collect, absorb, close.

Everything that counts is in the store before it counts: a round's assignments are open before they are
sent, an update is kept before its agent is told so, snapshot and `closed` are one transaction. A
coordinator that was killed finds its run, plans the open round again (planning is pure, so the frames are
the same to the bit), takes the updates it already has, and goes on collecting.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import ValidationError

from coordinator.collector import Collector, check_answer
from coordinator.easing import Ease
from coordinator.ingest.taker import Taker
from coordinator.live import Live
from coordinator.outgoing import Outgoing
from coordinator.pace import ROUNDS, Busy, age_s, answer_s, late_reason
from coordinator.planning import Course, context_of, planned
from coordinator.report import round_metrics, update_summary, update_words
from coordinator.robust.guard import Guard
from coordinator.robust.settle import Round, settled
from coordinator.rollout.steward import Steward
from coordinator.roster import Roster
from coordinator.selection import Choice, Selection
from coordinator.settings import CoordinatorSettings, RunSettings
from coordinator.shelf import Shelf
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.strategies.base import State, Strategy, load_strategy
from coordinator.web.models import StartRun
from foundation import halt
from foundation.codec import frame_of, update_from
from foundation.errors import (
    DeliveryFailed,
    FrameMismatch,
    HedgerowError,
    NotConnected,
    PublishRefused,
    RoundError,
    SettingsError,
    StoreError,
    WireError,
    WorkRefused,
)
from foundation.memory import give_back
from foundation.messages import (
    AgentCard,
    Assignment,
    Command,
    Presence,
    Refusal,
    Telemetry,
    Update,
)
from foundation.seal import OVERHEAD
from foundation.spec import initial_parameters
from foundation.topics import Topics, checked_name
from foundation.transfer import INTERNAL, Courier
from foundation.transport import Letter, Transport

logger = logging.getLogger(__name__)

GOODBYE_S = 3.0
"""How long stopping waits for the broker."""
OFFERS, OFFER_AGAIN_S = 4, 2.0
"""How often an assignment is offered to a device that fails to take it, and seconds between."""
HANDLED_BYTES = 8 * 2**20
"""Updates that are checked and stored at the same time; more of them wait unread."""
MAX_ROUNDS = 100_000
"""The bound of `RunSettings.rounds`."""
UNFINISHED = ("waiting", "running", "paused")
Asks: TypeAlias = Callable[[Sequence[str]], Awaitable[list[Assignment]]]
"""Returns what agents would be asked in a round."""


@dataclass
class _Open:
    """The round that is open."""

    run: str
    round: int
    rounds: int
    collector: Collector
    outgoing: Outgoing
    deadline: float
    sending: dict[str, asyncio.Task[None]]
    asks: Asks
    taken: set[str] = field(default_factory=set)
    """Who has its assignment."""


class Engine:
    """The federation's motor; implements `coordinator.web.models.Control`."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        transport: Transport,
        store: Store,
        live: Live,
        roster: Roster | None = None,
        clock: Callable[[], float] = time.time,
        beside: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    ) -> None:
        """Run federations over `transport`; `clock` (UTC seconds) says which day budgets are for.

        Each of `beside` runs as a task while it is connected.
        """
        self.settings, self.transport, self.store, self.live = settings, transport, store, live
        self.roster = roster or Roster()
        self.topics = Topics(settings.federation)
        self.finished = asyncio.Event()
        """Set whenever no run is in progress any more."""
        self.outcome: str | None = None
        """How the last run ended."""
        self._beside = beside
        self._selection = Selection(self.roster, store, live, settings.budgets, clock)
        self._guard = Guard(store, self.roster, live)
        self._busy = Busy(time.monotonic)
        self._shelf = Shelf(store.update_frame)
        self.models = Steward(
            settings.rollout,
            store=store,
            live=live,
            roster=self.roster,
            send=lambda agent, body: self._publish(agent, "command", body),
            clock=clock,
        )
        self._session = uuid.uuid4().hex[:12]
        self._run: asyncio.Task[None] | None = None
        self._open: _Open | None = None
        self._opened = asyncio.Condition()
        self._active: str | None = None
        self._going = asyncio.Event()
        """Not set while the run is paused."""
        self._standing = asyncio.Lock()
        """Held while it is written down how a run stands."""
        self._begun = asyncio.Event()
        self._saving: asyncio.Task[None] | None = None
        self._courier = Courier(
            transport,
            frames=None if settings.workers else self.topics.every("update"),
            receipts=self.topics.every("received"),
            receipt_topic=lambda topic: self.topics.of(self.topics.agent_of(topic), "receipt"),
            handle=self._arrived,
            part_bytes=settings.mqtt.max_part_bytes - OVERHEAD,
            handled_bytes=HANDLED_BYTES,
        )

    async def serve(self) -> None:
        """Listen and run until cancelled; resumes an unfinished run, or starts the settings' own."""
        async with self.transport, self._courier:
            listeners = [
                (await self.transport.subscribe(self.topics.every(what)), read)
                for what, read in (
                    ("card", self._on_card),
                    ("presence", self._on_presence),
                    ("telemetry", self._on_telemetry),
                    ("refusal", self._on_refusal),
                )
            ]
            if self.settings.workers:
                await self._leave_to_workers()
            await self._say("online")
            try:
                async with asyncio.TaskGroup() as tasks:
                    for letters, read in listeners:
                        tasks.create_task(self._listen(letters, read))
                    if self.settings.workers:
                        tasks.create_task(Taker(self.store, self._handed, self._malformed_frame).run())
                    for life in (self.models.run, *self._beside):
                        tasks.create_task(life())
                    await self._begin()
                    self._begun.set()
            finally:
                if self._run is not None:
                    self._run.cancel()  # the run itself goes on at the next start
                    await asyncio.wait([self._run])
                if self._saving is not None:
                    await asyncio.wait([self._saving])
                await self._say_goodbye()

    async def _leave_to_workers(self) -> None:
        """Give up what the broker may keep for us of a life without workers."""
        close = getattr(await self.transport.subscribe(self.topics.every("update")), "aclose", None)
        if close is not None:
            await close()

    async def _say(self, state: Literal["online", "offline"]) -> None:
        presence = Presence(state=state, session=self._session)
        body = presence.model_dump_json().encode()
        await self.transport.publish(self.topics.coordinator_presence, body, retain=True)

    async def _say_goodbye(self) -> None:
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._say("offline")
        except (TimeoutError, NotConnected):
            logger.warning("the broker did not hear the goodbye; it has the last will")

    # --- control -------------------------------------------------------------------------------

    async def start(self, request: StartRun) -> None:
        """Start a run, or go on with one that failed or was stopped.

        Raises `RoundError` while one is in progress, `SettingsError` for what does not fit.
        """
        if self._run is not None and not self._run.done():
            raise RoundError(f"run {self._active!r} is in progress: stop it first")
        given = {k: v for k, v in request.model_dump().items() if v is not None and v != ""}
        if "strategy" in given and given["strategy"] != self.settings.run.strategy:
            given = {"settings": {}} | given  # the settings of one strategy are not another's
        try:
            run = RunSettings.model_validate({**self.settings.run.model_dump(), **given})
        except ValidationError as error:
            raise SettingsError(f"the run cannot be: {error}") from error
        if await self._is_finished(run.name):
            raise SettingsError(f"run {run.name!r} is finished: choose another name")
        self._launch(run)

    async def stop(self, reason: str) -> None:
        """Stop the run in progress; its agents are told, its state stays."""
        if self._run is None or self._run.done() or self._active is None:
            raise RoundError("no run is in progress")
        run = self._active
        if self._open is not None:
            for agent in self._open.collector.outstanding:
                command = Command(verb="cancel", run=run, round=self._open.round, reason=reason)
                await self._publish(agent, "command", command.body())
        self._run.cancel()
        await asyncio.wait([self._run])
        await self._ended(run, "stopped", reason)

    async def pause(self, run: str, reason: str) -> None:
        """Open no further round until `resume`; the one under way ends by its usual rules.

        Raises `RoundError` unless `run` is in progress, among the runs, and not paused yet.
        """
        async with self._standing:
            await self._check_stands(run, "running")
            await asyncio.to_thread(self.store.set_run_state, run, "paused", reason)
            self._going.clear()
        self.live.emit("run_paused", f"run {run} paused: {reason}", run=run)

    async def resume(self, run: str) -> None:
        """Go on with a paused run; raises `RoundError` for one that is not."""
        async with self._standing:
            await self._check_stands(run, "paused")
            await asyncio.to_thread(self.store.set_run_state, run, "running")
            self._going.set()
        self.live.emit("run_resumed", f"run {run} resumed", run=run)

    async def _check_stands(self, run: str, wanted: Literal["running", "paused"]) -> None:
        if self._run is None or self._run.done() or self._active != run:
            raise RoundError(f"run {run!r} is not the one in progress")
        if not await asyncio.to_thread(self.store.has_run, run):
            raise RoundError(f"run {run!r} still waits for its agents: stop it instead")
        state = (await asyncio.to_thread(self.store.run, run)).state
        if state != wanted:
            raise RoundError(f"run {run!r} is {state}, not {wanted}")

    async def _held(self, run: RunSettings, number: int) -> bool:
        """Wait while the run is paused, and return whether it was."""
        if self._going.is_set():
            return False
        self.live.phase(run.name, number, run.rounds, "paused", {})
        await self._going.wait()
        self.live.phase(run.name, number, run.rounds, "planning", {})
        return True

    async def _begin(self) -> None:
        for record in await asyncio.to_thread(self.store.runs):
            if record.state in UNFINISHED:
                course = Course.model_validate_json(record.settings_json)
                if record.state == "paused":
                    self.live.emit("run_paused", f"run {record.run} is still paused", run=record.run)
                else:
                    self.live.emit("run_resumed", f"run {record.run} resumed", run=record.run)
                self._launch(course.settings, course, paused=record.state == "paused")
                return
        if not self.settings.autostart:
            return
        run = self.settings.run
        if await self._is_finished(run.name):
            text = f"run {run.name} is finished: give run.name another value to start a new one"
            logger.info(text)
            self.live.emit("run_known", text, run=run.name)
            self.outcome = "finished"
            self.finished.set()
            return
        self._launch(run)

    async def _is_finished(self, run: str) -> bool:
        records = await asyncio.to_thread(self.store.runs)
        return any(record.run == run and record.state == "finished" for record in records)

    def _launch(self, run: RunSettings, course: Course | None = None, *, paused: bool = False) -> None:
        checked_name(run.name, "run")
        strategy = load_strategy(
            run.strategy, run.settings
        )  # a wrong setting is said at once, not in the task
        if run.mode == "async" and not strategy.mergeable:
            raise SettingsError(f'{run.strategy} cannot merge late updates: give run.mode = "rounds"')
        self._active = run.name
        if paused:
            self._going.clear()
        else:
            self._going.set()
        self._busy = Busy(time.monotonic)
        self.finished.clear()
        self._run = asyncio.create_task(self._whole_run(run, course))

    # --- a run ---------------------------------------------------------------------------------

    async def _whole_run(self, run: RunSettings, course: Course | None) -> None:
        try:
            if course is None:
                course = await self._decide(run)
            run = course.settings
            strategy = load_strategy(run.strategy, run.settings)
            await self._guard.remember(run.name)
            state = await self._state(course, strategy)
            for number in range(state.round + 1, run.rounds + 1):
                state = await self._round(course, strategy, state, number)
            await self._saved()
            await self._ended(run.name, "finished", "")
        except HedgerowError as error:
            await self._ended(run.name, "failed", str(error))
        except Exception as error:  # one of the house's three: logged and answered
            logger.exception("run failed")
            await self._ended(run.name, "failed", f"{type(error).__name__}: {error}")

    async def _decide(self, run: RunSettings) -> Course:
        """Wait for the agents and settle what the model is; a run that failed or was stopped goes on."""
        if await asyncio.to_thread(self.store.has_run, run.name):
            known = await asyncio.to_thread(self.store.run, run.name)
            await asyncio.to_thread(self.store.set_run_state, run.name, "running")
            self.live.emit("run_resumed", f"run {run.name} resumed", run=run.name)
            return Course.model_validate_json(known.settings_json)
        await self._gather(run)
        kind, shape, labels = self.roster.agreed()
        spec = run.model.spec(kind, shape, len(labels))
        course = Course(settings=run, spec=spec, labels=labels)
        record = RunRecord(
            run=run.name,
            strategy=run.strategy,
            settings_json=course.model_dump_json(),
            spec_json=spec.model_dump_json(),
            rounds=run.rounds,
            seed=run.seed,
        )
        await asyncio.to_thread(self.store.open_run, record)
        await asyncio.to_thread(self.store.set_run_state, run.name, "running")
        self.live.emit(
            "run_started",
            f"run {run.name}: {run.strategy}, {run.rounds} rounds, {len(self.roster.present())} agents",
            run=run.name,
        )
        return course

    async def _gather_again(self, run: RunSettings) -> None:
        """Give those who are away a moment; after it, the quorum of `min_agents` is enough to go on.

        Nobody waits for those who are at their limits, unless the quorum needs them.
        """
        set_aside = sum(entry.set_aside is not None for entry in self.roster.entries.values())
        wanted = max(1, run.min_agents - set_aside)
        needed = max(1, math.ceil(run.quorum * run.min_agents))
        wanted = max(min(wanted, needed), wanted - len(self.roster.resting()))
        deadline = time.monotonic() + run.grace_s
        while self._are_away(wanted) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        if len(self.roster.present()) < wanted:
            await self._gather(run.model_copy(update={"min_agents": needed}))

    def _are_away(self, wanted: int) -> bool:
        """Whether some of `wanted` agents are missing; who is here and rests is not."""
        return len(self.roster.present()) + len(self.roster.resting()) < wanted

    async def _gather(self, run: RunSettings) -> None:
        deadline, told = time.monotonic() + run.wait_s, False
        while len(present := self.roster.present()) < run.min_agents:
            resting = len(self.roster.resting())
            counts = {"present": len(present), "needed": run.min_agents}
            if resting:
                counts["unavailable"] = resting
            if len(present) + resting >= run.min_agents:
                # They are here, and say on their cards why they do not work yet: no reason to give up.
                deadline, told = time.monotonic() + run.wait_s, told or self._tell_waiting(run.name)
            self.live.phase(run.name, 0, run.rounds, "waiting for agents", counts)
            if time.monotonic() > deadline:
                raise RoundError(
                    f"{len(present)} of {run.min_agents} agents came within {run.wait_s:.0f} s: start more"
                    " agents, or lower min_agents"
                )
            await asyncio.sleep(0.1)

    def _tell_waiting(self, run: str) -> bool:
        resting = self.roster.resting()
        why = "; ".join(f"{agent}: {self.roster.reason_against(agent, None, ())}" for agent in resting)
        self.live.emit("run_waits", f"run {run} waits for agents at their limits ({why})", run=run)
        return True

    async def _state(self, course: Course, strategy: Strategy) -> State:
        run = course.settings
        for record in await asyncio.to_thread(self.store.rounds, run.name):
            if record.state == "closed":
                self.live.round_closed(run.name, record.round, record.seconds)
        latest = await asyncio.to_thread(self.store.latest_state, run.name)
        if latest is not None:
            state = await asyncio.to_thread(State.from_bytes, latest[1])
            return await self._replayed(course, strategy, state)
        model = initial_parameters(course.spec, run.seed)
        state = await asyncio.to_thread(strategy.begin, model, run.seed)
        await asyncio.to_thread(self.store.save_initial_state, run.name, state.to_bytes())
        return state

    async def _replayed(self, course: Course, strategy: Strategy, state: State) -> State:
        """Return the state after the last closed round: a snapshot, and the updates of the rounds since."""
        run = course.settings
        known = {r.card.agent: r.card for r in await asyncio.to_thread(self.store.agents)}
        while True:
            number = state.round + 1
            record = await asyncio.to_thread(self.store.round_record, run.name, number)
            if record is None or record.state != "closed":
                return state
            for agent in record.agents:
                state = strategy.enroll(state, known[agent], run.seed)
            updates: list[Update] = []
            for update in await asyncio.to_thread(self.store.updates, run.name, number):
                absorbed = record.absorbed is None or update.agent in record.absorbed
                if absorbed and update.frame_sha256 is not None:
                    updates.append(await self._update(run.name, number, update.agent))
            updates += [await self._update(run.name, *late) for late in record.late]
            if (run.robust.combines or record.late) and updates:
                # What a change is depends on what was sent; planning is pure, so it is planned again.
                eases = {agent: Ease.model_validate(ease) for agent, ease in record.eased.items()}
                context = context_of(course, [known[agent] for agent in record.agents], number)
                assignments, _ = await asyncio.to_thread(planned, strategy, state, context, eases)
                more = await self._asks(course, strategy, state, number, [a for _, a in record.late])
                answers = Round.of([*more, *assignments], updates, number, run.staleness)
                updates = await asyncio.to_thread(settled, run.robust, strategy, state, answers)
            state = await asyncio.to_thread(strategy.absorb, state, updates)

    async def _update(self, run: str, number: int, agent: str) -> Update:
        return await asyncio.to_thread(self._shelf.take, run, number, agent)

    async def _asks(
        self, course: Course, strategy: Strategy, state: State, number: int, agents: Sequence[str]
    ) -> list[Assignment]:
        """Return what these agents would be asked in a round, whether they are or not."""
        if not agents:
            return []
        known = {r.card.agent: r.card for r in await asyncio.to_thread(self.store.agents)}
        cards = [known[agent] for agent in sorted(set(agents)) if agent in known]
        if not cards:
            return []
        for card in cards:
            state = strategy.enroll(state, card, course.settings.seed)
        context = context_of(course, cards, number)
        return (await asyncio.to_thread(planned, strategy, state, context))[0]

    async def _snapshot(self, run: RunSettings, state: State) -> None:
        """Keep the state and let go of what it was made of; a round goes on meanwhile."""
        halt.at("snapshot", state.round)
        data = await asyncio.to_thread(state.to_bytes)
        await asyncio.to_thread(self.store.save_state, run.name, state.round, data)
        late_after = None if run.staleness is None else state.round - run.stale_rounds - 1
        await asyncio.to_thread(self.store.drop_frames, run.name, state.round, late_after=late_after)

    async def _saved(self) -> None:
        """Wait for the snapshot that is being written; raises what it failed of."""
        saving, self._saving = self._saving, None
        if saving is not None:
            await asyncio.wait([saving])
            saving.result()

    # --- a round -------------------------------------------------------------------------------

    async def _round(self, course: Course, strategy: Strategy, state: State, number: int) -> State:
        run, started = course.settings, time.monotonic()
        self.live.phase(run.name, number, run.rounds, "planning", {})
        cards, opened, eases = await self._asked(course, strategy, state, number)
        for card in cards:
            state = strategy.enroll(state, card, run.seed)
        context = context_of(course, cards, number)
        assignments, left_out = await asyncio.to_thread(planned, strategy, state, context, eases)
        self._tell_asked(run.name, number, [a.agent for a in assignments], eases)
        for agent, reason in sorted(left_out.items()):
            self._skipped(run.name, number, agent, reason)
        if not assignments:
            told = "; ".join(f"{agent}: {reason}" for agent, reason in sorted(left_out.items()))
            raise RoundError(f"nobody can do the work of {run.strategy} ({told})")
        asks = partial(self._asks, course, strategy, state, number)
        collected, late = await self._collect(run, number, assignments, opened, strategy, asks)
        self.live.phase(run.name, number, run.rounds, "absorbing", {"updates": len(collected) + len(late)})
        halt.at("absorb", number)
        more = await asks([update.agent for update in late])
        answers = Round.of([*more, *assignments], [*collected, *late], number, run.staleness)
        answers, found = await self._guard.screened(run, number, strategy, answers)
        updates = [update for update in answers.updates if update.round == number]
        merged = [(u.round, u.agent) for u in answers.updates if u.round != number]
        ready = await asyncio.to_thread(settled, run.robust, strategy, state, answers)
        state = await asyncio.to_thread(strategy.absorb, state, ready)
        self._shelf.clear()
        await asyncio.to_thread(give_back)
        metrics = round_metrics(updates, asked=len(assignments), seconds=time.monotonic() - started) | found
        if merged:
            metrics["late"] = float(len(merged))
        close = partial(
            self.store.close_round,
            *(run.name, number, None, metrics),
            absorbed=[update.agent for update in updates],
            late=merged,
            refused=[(u.round, u.agent) for u in late if (u.round, u.agent) not in merged],
        )
        await asyncio.to_thread(close)
        if run.exports(number):
            await self.models.closed(run.name, number, [a.agent for a in assignments])
        if number % run.snapshot_every == 0 or number == run.rounds:
            await self._saved()
            self._saving = asyncio.create_task(self._snapshot(run, state))
        self.live.emit(
            "round_closed",
            f"round {number} closed with {len(updates)} of {len(assignments)} updates",
            run=run.name,
            round=number,
            metrics=metrics,
        )
        self.live.round_closed(run.name, number, metrics["seconds"])
        return state

    async def _asked(
        self, course: Course, strategy: Strategy, state: State, number: int
    ) -> tuple[list[AgentCard], float, dict[str, Ease]]:
        """Return whom the round asks, when it opened (UTC epoch) and who is asked for less.

        From the store if it is open already: who can afford what was decided when it was opened.
        """
        run = course.settings
        record = await asyncio.to_thread(self.store.round_record, run.name, number)
        if record is not None:
            known = {r.card.agent: r.card for r in await asyncio.to_thread(self.store.agents)}
            eases = {agent: Ease.model_validate(ease) for agent, ease in record.eased.items()}
            return [known[agent] for agent in record.agents], record.opened.timestamp(), eases
        await self._held(run, number)
        choice = await self._choice(course, strategy, state, number)
        while await self._held(run, number):  # paused while it waited for agents
            choice = await self._choice(course, strategy, state, number)
        count = max(1, round(run.fraction * len(choice.allowed)))
        rng = np.random.default_rng([run.seed, number, 0xA5])
        chosen = sorted(rng.choice(len(choice.allowed), size=count, replace=False))
        cards = [choice.allowed[i] for i in chosen]
        names = [card.agent for card in cards]
        found = {name: choice.verdicts[name].ease for name in names if name in choice.verdicts}
        eases = {name: ease for name, ease in found.items() if ease is not None}
        open_round = partial(
            self.store.open_round,
            eased={name: ease.model_dump(mode="json") for name, ease in eases.items()},
            skipped=dict(choice.skipped),
        )
        now = time.time()
        await asyncio.to_thread(open_round, run.name, number, names, now + run.deadline_s)
        return cards, now, eases

    async def _choice(self, course: Course, strategy: Strategy, state: State, number: int) -> Choice:
        """Return who may be asked; waits while nobody may, but somebody will at some time.

        Raises `RoundError` when nobody will.
        """
        run, told = course.settings, dict[str, str]()
        while True:
            await self._gather_again(run)
            choice = await self._selection.choice(course, strategy, state, number)
            choice = choice.without(self._busy.rounds(number - run.stale_rounds))
            for agent, reason in sorted(choice.skipped.items()):
                if told.get(agent) != reason:
                    self._skipped(run.name, number, agent, reason)
            told = dict(choice.skipped)
            if choice.allowed:
                for card in choice.allowed:
                    self.live.asked(card.agent)  # what was said of the round before is over
                self._selection.tell_unknown(run.name, number, choice.verdicts)
                return choice
            if not choice.passing:
                why = "; ".join(f"{agent}: {reason}" for agent, reason in sorted(told.items()))
                raise RoundError(f"nobody can afford this round: raise [budgets] ({why})")
            self.live.phase(run.name, number, run.rounds, "waiting for agents", {"skipped": len(told)})
            if self._busy.rounds():
                await asyncio.sleep(0.1)  # who is at work will be free, which no card says
            else:
                await self._selection.changed(choice)

    def _tell_asked(self, run: str, number: int, asked: Sequence[str], eases: Mapping[str, Ease]) -> None:
        for agent in asked:
            ease = eases.get(agent)
            self.live.asked(agent, eased=None if ease is None else ease.reason)
            if ease is not None:
                text = f"{agent} eased: {ease.reason}"
                self.live.emit("agent_eased", text, run=run, round=number, agent=agent)

    def _skipped(self, run: str, number: int, agent: str, reason: str) -> None:
        self.live.asked(agent, skipped=reason)
        self.live.emit("agent_skipped", f"{agent} skipped: {reason}", run=run, round=number, agent=agent)

    async def _collect(
        self,
        run: RunSettings,
        number: int,
        assignments: Sequence[Assignment],
        opened: float,
        strategy: Strategy,
        asks: Asks,
    ) -> tuple[list[Update], list[Update]]:
        """Return the round's updates, and those of earlier rounds that came meanwhile."""
        # Away for longer than a round, or with a clock that was set: its time starts anew.
        left = run.deadline_s - age_s(opened, time.time(), run.deadline_s)
        collector = Collector(
            assignments,
            quorum=run.quorum,
            deadline=time.monotonic() + left,
            grace_s=run.grace_s,
            silent_for=self._silent_for,
            clock=time.monotonic,
            soft=await self._soft(run, number, opened),
            buffer=run.buffer if run.mode == "async" else None,
            others=lambda: tuple(self._busy.rounds()),
        )
        await self._stored_before(run, number, collector, asks)
        self.live.phase(run.name, number, run.rounds, "sending", {"agents": len(assignments)})
        encoding = run.encoding or strategy.encoding_down
        held = [self.models.held(a) for a in assignments]  # now: a card may change, a frame may not
        outgoing = Outgoing(held, partial(frame_of, encoding=encoding), busy=lambda: self._courier.is_full)
        here = _Open(run.name, number, run.rounds, collector, outgoing, time.monotonic() + left, {}, asks)
        async with self._opened:
            self._open = here
            self._opened.notify_all()
        halt.at("offer", number)
        try:
            for agent in collector.outstanding:
                self._send(agent)
            self._tell_collected(here)
            updates = await collector.wait()
            if run.staleness is not None and strategy.mergeable:
                for agent in here.taken.intersection(collector.outstanding):
                    self._busy.add(agent, number, time.monotonic() + run.deadline_s)
            return updates, [collector.late[key] for key in sorted(collector.late)]
        finally:
            self._open = None
            for task in here.sending.values():
                task.cancel()

    async def _stored_before(
        self,
        run: RunSettings,
        number: int,
        collector: Collector,
        asks: Asks,
    ) -> None:
        """Count what is in the store: of a round that is opened again, and late ones nobody has merged."""
        for record in await asyncio.to_thread(self.store.updates, run.name, number):
            collector.add(await self._update(run.name, number, record.agent))
        if run.staleness is None:
            return
        after = number - run.stale_rounds - 1
        for round, agent in await asyncio.to_thread(self.store.late_updates, run.name, after):
            if round < number:
                update = await self._update(run.name, round, agent)
                try:
                    await _check_late(update, asks)
                except WorkRefused as error:
                    self.live.emit("late", f"{agent}: {error}", run=run.name, round=number, agent=agent)
                else:
                    collector.add_late(update)

    async def _soft(self, run: RunSettings, number: int, opened: float) -> float | None:
        """Return when the quorum suffices, on the monotonic clock, by what devices took lately."""
        if run.patience is None:
            return None
        past = await asyncio.to_thread(self.store.latest_rounds, run.name, ROUNDS + 1)
        past = [record for record in past if record.round < number]
        updates = [u for r in past for u in await asyncio.to_thread(self.store.updates, run.name, r.round)]
        took = answer_s(past, updates)
        return (
            None
            if took is None
            else time.monotonic() + run.patience * took - age_s(opened, time.time(), run.deadline_s)
        )

    def _tell_collected(self, here: _Open) -> None:
        counts = {"updates": len(here.collector.updates), "expected": len(here.collector.assignments)}
        self.live.phase(here.run, here.round, here.rounds, "collecting", counts)

    def _silent_for(self, agent: str) -> float | None:
        return None if self.roster.entry(agent).online else self.roster.silent_for(agent)

    def _send(self, agent: str) -> None:
        """(Re)send an agent its assignment of the open round."""
        here = self._open
        if here is None or agent not in here.outgoing or not here.collector.is_outstanding(agent):
            return
        old = here.sending.pop(agent, None)
        if old is not None:
            old.cancel()
        here.sending[agent] = asyncio.create_task(self._deliver(here, agent))

    async def _deliver(self, here: _Open, agent: str) -> None:
        topic = self.topics.of(agent, "assignment")
        for last in (*[False] * (OFFERS - 1), True):
            try:
                async with here.outgoing.turn():
                    left = max(1.0, here.deadline - time.monotonic())
                    frame = await asyncio.to_thread(here.outgoing.frame, agent)
                    delivery = await self._courier.send(topic, frame, deadline_s=left)
            except DeliveryFailed as error:
                logger.warning("assignment not taken", extra={"agent": agent, "reason": str(error)})
                if error.refused or (last and str(error) == INTERNAL):
                    await self._refused(here.run, here.round, agent, str(error))
                if error.refused or time.monotonic() >= here.deadline:
                    return
                await asyncio.sleep(OFFER_AGAIN_S)
            else:
                here.taken.add(agent)
                logger.debug("assignment delivered", extra={"agent": agent, "bytes": delivery.wire_bytes})
                return

    def shut_out(self, agent: str, reason: str) -> None:
        """Give a device no more work, and wait for it no more."""
        entry = self.roster.entry(agent)
        entry.set_aside, entry.online = reason, False
        self.live.presence(agent, False)
        self.live.emit("revoked", f"{agent}: {reason}", agent=agent)
        self._not_waited_for(agent, reason)

    def let_in(self, agent: str) -> None:
        """Take a device's work again."""
        entry = self.roster.entry(agent)
        entry.set_aside, entry.malformed = None, 0
        self.live.emit("let_in", f"{agent} may take part again", agent=agent)

    # --- what arrives --------------------------------------------------------------------------

    async def _arrived(self, topic: str, frame: bytes, wire_bytes: int) -> None:
        """Take an update: checked, stored, counted; the agent is told `stored` when this returns."""
        agent = self.topics.agent_of(topic)
        self.roster.heard(agent)
        self._busy.done(agent)
        await self._begun.wait()  # before that, every run would seem to be over
        try:
            update, here = await self._checked(agent, frame)
        except WireError as error:
            await self._malformed_frame(agent, frame, str(error))
            raise
        except WorkRefused as error:
            self.live.emit("late", f"{agent}: {error}", agent=agent)
            raise
        if here is None:
            return  # known already: the agent may forget it
        if update.artifact is not None:
            await asyncio.to_thread(self.store.add_artifact, update.artifact)
        down = await asyncio.to_thread(here.outgoing.roles, agent)
        summary = update_summary(update, wire_bytes, up=frame, down=down)
        new = await asyncio.to_thread(self.store.add_update, update.run, update.round, agent, frame, summary)
        self._busy.done(agent, update.round)  # once more: its round may have closed while it was stored
        if not new:
            return  # the first one stays: what counts here is what a restart would find in the store
        if update.round == here.round:
            here.collector.add(self._shelf.put(update))
        else:
            here.collector.add_late(self._shelf.put(update))
            text = f"{agent}: its update of round {update.round} came late, and counts less"
            self.live.emit("late_merged", text, run=update.run, round=here.round, agent=agent)
        if self._open is here:
            self._tell_collected(here)
        self._tell_update(update, wire_bytes)

    async def _handed(self, agent: str, frame: bytes, wire_bytes: int) -> None:
        """Take an update that a worker has kept."""
        await self._arrived(self.topics.of(agent, "update"), frame, wire_bytes)

    async def _malformed_frame(self, agent: str, frame: bytes, reason: str) -> None:
        """Quarantine what was no answer, count it, and wait for its agent no more."""
        here = self._open
        place = (here.run, here.round) if here is not None else (None, None)
        await self._guard.malformed(agent, reason, frame, *place)
        self._malformed(agent, reason)
        self._not_waited_for(agent, reason)

    def _tell_update(self, update: Update, wire_bytes: int) -> None:
        agent = update.agent
        self.live.privacy(agent, update.metrics.get("epsilon"), update.metrics.get("delta"))
        self.live.temperature(agent, None if update.state is None else update.state.end_c)
        if update.problem:
            self.live.emit(
                "problem", f"{agent}: {update.problem}", run=update.run, round=update.round, agent=agent
            )
        self.live.emit(
            "update",
            f"{agent}: {update_words(update)}",
            run=update.run,
            round=update.round,
            agent=agent,
            up_bytes=wire_bytes,
        )

    async def _checked(self, agent: str, frame: bytes) -> tuple[Update, _Open | None]:
        """Return an agent's update and the round it answers, `None` when it is stored already."""
        update = await asyncio.to_thread(update_from, frame)
        if update.agent != agent:
            raise FrameMismatch(f"an update of {update.agent!r} came on the topic of {agent!r}")
        here = await self._round_of(update)
        if here is not None and update.round == here.round:
            here.collector.check(update)
        elif here is not None:
            await _check_late(update, here.asks)
        return update, here

    async def _round_of(self, update: Update) -> _Open | None:
        """Return the open round of an update, or `None` when it is stored already.

        Waits while the coordinator is still opening that round. Raises `FrameMismatch` for a round that never
        was, and `WorkRefused`, which is nobody's fault, for one that is over.
        """
        if not await self._was_opened(update.run, update.round):
            raise FrameMismatch(f"round {update.round} of run {update.run!r} was never opened")
        if await self._is_stored(update):
            return None
        if update.run != self._active:
            raise WorkRefused(f"run {update.run!r} is not in progress")
        here = await self._opened_for(update)
        if here.round == update.round:
            return here
        course = Course.model_validate_json(
            (await asyncio.to_thread(self.store.run, update.run)).settings_json
        )
        late = late_reason(course.settings, here.round - update.round)
        if late is None:
            return here
        raise WorkRefused(f"round {update.round} is closed; round {here.round} is open{late}")

    async def _opened_for(self, update: Update) -> _Open:
        """Wait until the open round is an update's, or a later one; raises `WorkRefused` if none comes."""
        async with self._opened:
            while self._open is None or self._open.round < update.round:
                if self._run is None or self._run.done():
                    raise WorkRefused(f"run {update.run!r} is over")
                try:
                    async with asyncio.timeout(1.0):  # not `wait_for`: it can lose a cancellation
                        await self._opened.wait()
                except TimeoutError:
                    continue
            return self._open

    async def _was_opened(self, run: str, number: int) -> bool:
        # The bound first: a number of any size fits into JSON, but not into the store.
        if not 1 <= number <= MAX_ROUNDS:
            return False
        return await asyncio.to_thread(self.store.round_record, run, number) is not None

    async def _is_stored(self, update: Update) -> bool:
        return await asyncio.to_thread(self.store.has_update, update.run, update.round, update.agent)

    def _malformed(self, agent: str, reason: str) -> None:
        self.live.emit("malformed", f"{agent}: {reason}", agent=agent)
        aside = self.roster.strike(agent, "malformed", reason)
        if aside is not None:
            self.live.emit("set_aside", f"{agent} {aside}", agent=agent)
            self._not_waited_for(agent, aside)

    def _not_waited_for(self, agent: str, reason: str) -> None:
        """Let the open round close without an agent whose answer was no answer; a good one still counts."""
        if self._open is not None:
            self._open.collector.refuse(agent, reason)

    async def _listen(
        self, letters: AsyncIterator[Letter], read: Callable[[str, bytes], Awaitable[None]]
    ) -> None:
        async for letter in letters:
            agent = self.topics.agent_of(letter.topic)
            what = letter.topic.rpartition("/")[2]
            try:
                await read(checked_name(agent, "agent"), letter.body)
            except ValidationError as error:
                self._malformed(agent, f"{what}: {error.errors()[0]['msg']}")
            except HedgerowError as error:  # one letter that cannot be kept must not end the listening
                logger.error("letter not taken", extra={"agent": agent, "what": what, "reason": str(error)})

    async def _on_card(self, agent: str, body: bytes) -> None:
        card = AgentCard.model_validate_json(body)
        if card.agent != agent:
            self._malformed(agent, f"it introduces itself as {card.agent!r}")
            return
        self.roster.heard(agent)
        await self._tell_verdicts(agent, card)
        self.roster.entry(agent).card = card
        self.live.card(card)
        await asyncio.to_thread(self.store.upsert_agent, card, datetime.now(UTC))
        await self.models.heard(agent, card)

    async def _tell_verdicts(self, agent: str, card: AgentCard) -> None:
        """Say once what a device decided about its personal models."""
        before = self.roster.entry(agent).card
        if card.verdicts and before is None:  # this coordinator has just started
            before = (await asyncio.to_thread(self.store.cards, agent)).get(agent)
        known = before.verdicts if before is not None else ()
        for verdict in card.verdicts:
            if verdict not in known:
                self.live.emit(
                    f"model_{verdict.kind}",
                    f"{agent}: {verdict}",
                    agent=agent,
                    # Of another coordinator's run, perhaps: not of this event.
                    of={"run": verdict.run, "round": verdict.round, "sha256": verdict.sha256},
                    reason=verdict.reason,
                )

    async def _on_presence(self, agent: str, body: bytes) -> None:
        presence = Presence.model_validate_json(body)
        entry = self.roster.entry(agent)
        was = (entry.online, entry.session)
        entry.online = presence.state == "online"
        self.roster.heard(agent)
        self.live.presence(agent, entry.online)
        if was[0] != entry.online:
            self.live.emit(presence.state, f"{agent} is {presence.state}", agent=agent)
        if entry.online and self.roster.begun(agent, presence.session):
            text = (
                f"two devices call themselves {agent!r} and push each other off the broker: give one of them"
                " another name (agent = ... in its agent.toml) and a vault of its own"
            )
            logger.error(text)
            self.live.emit("twins", text, agent=agent)
        if entry.online and (presence.session != was[1] or not was[0]):
            self._send(agent)  # a new process, or a new connection: something may have been lost

    async def _on_telemetry(self, agent: str, body: bytes) -> None:
        telemetry = Telemetry.model_validate_json(body)
        self.roster.heard(agent)
        if telemetry.agent == agent:
            self.live.telemetry(telemetry)

    async def _on_refusal(self, agent: str, body: bytes) -> None:
        refusal = Refusal.model_validate_json(body)
        self.roster.heard(agent)
        if refusal.agent != agent or not await self._was_opened(refusal.run, refusal.round):
            self._malformed(
                agent, f"refusal: of {refusal.agent!r}, for round {refusal.round} of run {refusal.run!r}"
            )
            return
        await self._refused(refusal.run, refusal.round, agent, refusal.reason)

    async def _refused(self, run: str, number: int, agent: str, reason: str) -> None:
        self._busy.done(agent, number)
        self.live.emit("refusal", f"{agent}: {reason}", run=run, round=number, agent=agent)
        await asyncio.to_thread(self.store.add_refusal, run, number, agent, reason, datetime.now(UTC))
        here = self._open
        if here is not None and (here.run, here.round) == (run, number):
            here.collector.refuse(agent, reason)

    # --- the end -------------------------------------------------------------------------------

    async def _ended(self, run: str, state: Literal["finished", "failed", "stopped"], reason: str) -> None:
        rounds = reached = 0
        try:
            if await asyncio.to_thread(self.store.has_run, run):
                rounds = (await asyncio.to_thread(self.store.run, run)).rounds
                reached = await asyncio.to_thread(self._closed_rounds, run)
                async with self._standing:
                    await asyncio.to_thread(self.store.set_run_state, run, state, reason)
        except (
            StoreError
        ) as error:  # a full disk, most likely: the run is still open, and goes on at a restart
            reason = f"{reason}; that cannot be written down either ({error}): make room, and start again"
        text = f"run {run} {state}" + (f": {reason}" if reason else "")
        if state == "failed":
            logger.error(text)
        self.live.phase(run, reached, rounds, state, {"reason": reason} if reason else {})
        self.live.emit(f"run_{state}", text, run=run)
        self.outcome = state
        self.finished.set()

    def _closed_rounds(self, run: str) -> int:
        """Return the number of the last round that is closed; at most one after it is open."""
        latest = self.store.latest_rounds(run, 2)
        return max((record.round for record in latest if record.state == "closed"), default=0)

    async def _publish(self, agent: str, what: str, body: bytes) -> None:
        try:
            await self.transport.publish(self.topics.of(agent, what), body)
        except (NotConnected, PublishRefused) as error:
            logger.warning("not published", extra={"what": what, "reason": str(error)})


async def _check_late(update: Update, asks: Asks) -> None:
    """Raise `WorkRefused` unless an update of a closed round is what would be asked for now."""
    asked = await asks([update.agent])
    if not asked:
        raise WorkRefused(f"round {update.round} is closed, and nothing would be asked now")
    try:
        check_answer(update, asked[0].model_copy(update={"round": update.round}))
    except FrameMismatch as error:
        raise WorkRefused(f"round {update.round} is closed, and another answer is due: {error}") from error
