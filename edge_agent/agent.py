"""The life of an agent: connect, introduce itself, take work, answer, again.

Everything with a round in it is idempotent by (run, round): an assignment that comes twice is worked on
once, an update that the coordinator has not confirmed is sent again, and what was in hand when the
process died is finished by the next one. torch is loaded with the first assignment and stays.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import logging
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import psutil
from pydantic import ValidationError

from edge_agent import orders
from edge_agent.answer import arrived, kept, to_send, weights_of
from edge_agent.clock import ClockComparison
from edge_agent.conditions import Conditions
from edge_agent.energy.meter import Meter
from edge_agent.last_model import Facts, LastModel
from edge_agent.last_model import save as save_last
from edge_agent.limits import Limits
from edge_agent.privacy import Draw, Privacy, secret_noise
from edge_agent.samples import LocalData
from edge_agent.serving import canary, record
from edge_agent.serving.child import ServingChild
from edge_agent.serving.loopback import Loopback
from edge_agent.settings import AgentSettings, LimitSettings
from edge_agent.traffic import InterfaceMeter
from edge_agent.vault import Outgoing, Personal, Vault, full
from edge_agent.yielding import Yielding
from export.folder import CURRENT, linked
from foundation import halt
from foundation.artifact import Manifest
from foundation.codec import assignment_from, frame_of
from foundation.energy import EnergyReading, Kind, Stage, total
from foundation.errors import (
    DataError,
    DeliveryFailed,
    ExportError,
    FrameMismatch,
    HedgerowError,
    NotConnected,
    PublishRefused,
    UnknownVerb,
    WireError,
    WorkRefused,
)
from foundation.memory import give_back
from foundation.messages import (
    PROTOCOL,
    AgentCard,
    Assignment,
    Done,
    Models,
    Presence,
    Refusal,
    Telemetry,
    Unavailable,
    Update,
    Verdict,
    command_of,
)
from foundation.parameters import Parameters, layout_size
from foundation.seal import OVERHEAD
from foundation.spec import ModelSettings, ModelSpec, initial_parameters
from foundation.topics import Topics, checked_name
from foundation.transfer import Courier
from foundation.transport import Letter, Transport
from foundation.work import ABILITIES

if TYPE_CHECKING:
    from edge_agent.serving.answering import Answering
    from edge_agent.serving.live import Live
    from edge_agent.training import trainer as trainer_module

logger = logging.getLogger(__name__)

TELEMETRY_S = 0.5
IDLE_TELEMETRY_S = 5.0
RARE_TELEMETRY_S = 300.0
"""The same once it has had nothing to do for `RESTING_S`: many devices share one poor uplink."""
RESTING_S = 60.0
RETRY_S = 30.0
LIMITS_S = 5.0
"""How often limits are looked at."""
AGAIN_S = 1.0
"""How long it takes a receipt to go out, and the first pause after an update that was not taken."""
SERVING_S = 1.0
"""How often it is looked at what the server decided."""
GOODBYE_S = 3.0
"""How long stopping waits for the broker."""
OFFLINE = Presence(state="offline")


@dataclass
class Standing:
    """Where the work in hand stands; written by the worker's thread, read by the telemetry."""

    stage: Stage = Stage.IDLE
    run: str | None = None
    round: int | None = None
    fraction: float | None = None
    eta_s: float | None = None
    accuracy: float | None = None
    kept_units: tuple[int, ...] = ()
    hidden_units: int = 0


@dataclass
class _Hooks:
    """What the trainer asks of this agent."""

    meter: Meter
    vault: Vault
    standing: Standing
    called_off: threading.Event
    yielding: Yielding

    def stage(self, stage: Stage) -> AbstractContextManager[None]:
        """Open a stage of the meter."""
        if stage is Stage.PRUNE:
            halt.at("prune", self.standing.round)
        self.standing.stage = stage if stage is not Stage.PRUNE else self.standing.stage
        return self.meter.stage(stage)

    def progress(self, progress: trainer_module.Progress) -> None:
        """Note how far the work is."""
        self.standing.fraction = progress.fraction
        self.standing.eta_s = progress.eta_s
        self.standing.kept_units = progress.kept_units
        self.standing.accuracy = progress.accuracy

    def cancelled(self) -> bool:
        """Whether the work was called off."""
        return self.called_off.is_set()

    def pause(self) -> float:
        """Stand still while answers take too long."""
        return self.yielding.pause(self.called_off)

    def save(self, checkpoint: trainer_module.Checkpoint) -> None:
        """Keep a checkpoint."""
        self.vault.save_checkpoint(checkpoint.arrays, checkpoint.counters)
        halt.at("train", self.standing.round)

    def load(self) -> trainer_module.Checkpoint | None:
        """Return the checkpoint of the work in hand."""
        found = self.vault.checkpoint()
        if found is None:
            return None
        checkpoint: trainer_module.Checkpoint = _trainer().Checkpoint(*found)
        return checkpoint


@dataclass
class _Job:
    assignment: Assignment
    frame: bytes
    wire_bytes: int
    begun: bool = False
    """Whether an earlier life of this agent was at it: it is finished, whatever the limits say."""
    called_off: threading.Event = field(default_factory=threading.Event)
    why: str = ""
    """Why it was called off, where it was this agent's own doing."""

    @property
    def key(self) -> tuple[str, int]:
        return self.assignment.run, self.assignment.round


CarryOut: TypeAlias = Callable[["trainer_module.Task", "trainer_module.Hooks"], "trainer_module.Outcome"]
"""How work is done: `edge_agent.training.trainer.carry_out`, or what has the same result."""


class Recorder(Protocol):
    """Records a live stream of readings while the agent lives (edge_agent/stream.py)."""

    @property
    def problem(self) -> str | None:
        """What is wrong with the stream, if anything."""
        ...

    async def run(self, transport: Transport) -> None:
        """Record until cancelled."""
        ...


class Agent:
    """One agent over one transport; `run` returns when it is cancelled."""

    def __init__(
        self,
        settings: AgentSettings,
        *,
        transport: Transport,
        meter: Meter,
        profile: str,
        threads: int,
        load_data: Callable[[], LocalData],
        recorder: Recorder | None = None,
        retry_s: float = RETRY_S,
        training: Executor | None = None,
        carry_out: CarryOut | None = None,
        interface: InterfaceMeter | None = None,
        limits: Limits | None = None,
        conditions: Conditions | None = None,
        int8: Literal["auto", "on", "off"] = "off",
        utc: Callable[[], float] = time.time,
        noise: Draw = secret_noise,
    ) -> None:
        """Live in `settings.vault`; `training` is where work is done, and stays its owner's to end.

        Without it the agent has one thread for all training, at low priority: everything else on the
        device goes first. `carry_out` trains in place of the trainer's own, such as on another machine.
        `interface` counts the bytes of the way to the broker.
        `limits` are those of the settings, looked at elsewhere than in this machine's files and clock.
        `conditions` watches heat, clock and power mode of each round; without it updates do not tell.
        `noise` is what privacy draws from.
        `int8` says whether exported weights become 8-bit integers (export/quantise.py).
        `utc` is the device's clock, which is compared with the coordinator's.
        """
        self.name = checked_name(settings.agent, "agent")
        self.settings, self.transport, self.meter = settings, transport, meter
        self.profile, self.threads = profile, threads
        self.topics = Topics(settings.federation)
        self.vault = Vault(settings.vault, self.name)
        self.privacy = Privacy(settings.privacy, settings.vault, noise)
        self.limits = limits or Limits(settings.limits, meter, settings.vault)
        self.standing = Standing()
        self._load_data, self._recorder, self._retry_s = load_data, recorder, retry_s
        self._owned = (
            ThreadPoolExecutor(1, "training", initializer=_lower_priority) if training is None else None
        )
        self._training = training or self._owned
        self._carry_out = carry_out
        self._interface = interface
        self._conditions = conditions
        self._int8: Literal["auto", "on", "off"] = int8
        self._seen_run: str | None = None
        self._data: LocalData | None = None
        self._problem: str | None = None
        self._session = uuid.uuid4().hex[:12]
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._current: _Job | None = None
        self._asked_again: bytes | None = None
        self._old = asyncio.Event()
        self._outbox = asyncio.Event()
        self._delivered_bytes = 0
        self._pause_s = AGAIN_S
        self._verdicts: tuple[Verdict, ...] = ()
        self._models: Models | None = None
        self._models_seen: int | None = None
        self._serving_problem: str | None = None
        self._starting = asyncio.Lock()
        serve = settings.serve
        self._serving = ServingChild(
            serve.host, serve.port, self.vault.artifacts, [*serve.options(), f"--agent={self.name}"]
        )
        self._yielding = Yielding(serve.p95_ms, self._serving.load, meter)
        self._loopback = Loopback(self._address, serve.api_key_file)
        self._answering, self._predicting = self._over_mqtt()
        self._clock = ClockComparison(self._topic("clock"), self._topic("time"), utc=utc)
        self._courier = Courier(
            transport,
            frames=self._topic("assignment"),
            receipts=self._topic("receipt"),
            receipt_topic=lambda _: self._topic("received"),
            handle=self._arrived,
            part_bytes=settings.mqtt.max_part_bytes - OVERHEAD,
        )

    async def run(self) -> None:
        """Live until cancelled; the presence says offline on every way out."""
        self.meter.switch(Stage.IDLE)
        try:
            async with self.transport, self._courier:
                try:
                    await self._live()
                finally:
                    await self._say_goodbye()
        finally:
            self._call_off()
            if self.limits.tally is not None:
                self.limits.tally.save()
            if self._owned is not None:
                self._owned.shutdown(wait=False)
            await self._loopback.close()
            self._serving.stop()

    async def _say_goodbye(self) -> None:
        """Say offline, if the broker is there to hear it: a service stops in seconds, not in a minute."""
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._publish("presence", OFFLINE.model_dump_json(), retain=True)
        except TimeoutError:
            logger.warning("the broker did not hear the goodbye; it has the last will")

    def _over_mqtt(self) -> tuple[Answering | None, Live | None]:
        """Return what answers over MQTT with the personal model, as far as it is asked for."""
        s, answering, live = self.settings.serve.mqtt, None, None
        if s.enabled:
            from edge_agent.serving.answering import Answering  # most agents need neither

            questions, answers = self._topic("predict"), self._topic("answer")
            answering = Answering(s, self._loopback, questions=questions, answers=answers)
        if s.stream.enabled:
            from edge_agent.serving.live import Live, followed

            stream = followed(s.stream, self.settings.data)
            live = Live(stream, self._loopback, predictions=self._topic("prediction"))
        return answering, live

    async def _live(self) -> None:
        commands = await self.transport.subscribe(self._topic("command"))
        coordinators = await self.transport.subscribe(self.topics.coordinator_presence)
        await self._look_at_data()
        await self._look_at_models()  # before the card: nothing is told twice
        self._resume()
        await self._introduce()
        give_back()  # what reading data and settings took on the way
        async with asyncio.TaskGroup() as tasks:
            for life in (
                self._work_on,
                self._deliver,
                self._report,
                self._watch_data,
                self._watch_limits,
                self._watch_serving,
                self._ask_again,
            ):
                tasks.create_task(life())
            tasks.create_task(self._greet(coordinators))
            for more in (self._clock, self._recorder, self._answering, self._predicting):
                if more is not None:
                    tasks.create_task(more.run(self.transport))
            async for letter in commands:
                await self._command(letter.body)

    # --- introduction --------------------------------------------------------------------------

    async def _introduce(self) -> None:
        presence = Presence(state="online", session=self._session)
        await self._publish("card", self.card().model_dump_json(), retain=True)
        await self._publish("presence", presence.model_dump_json(), retain=True)

    async def _greet(self, letters: AsyncIterator[Letter]) -> None:
        """Introduce this agent to a coordinator that comes online: what the broker kept for it may be lost.

        A broker that was killed has lost it, and NATS now and then drops what is published while somebody
        is just subscribing.
        """
        async for letter in letters:
            try:
                presence = Presence.model_validate_json(letter.body)
            except ValidationError as error:
                logger.warning("coordinator's presence not understood", extra={"reason": str(error)})
                continue
            if presence.protocol != PROTOCOL:
                text = "the coordinator speaks protocol %d, this agent %d: install the same version on both"
                logger.error(text, presence.protocol, PROTOCOL)
            if presence.state == "online":
                await self._introduce()
                self._clock.wake(anew=True)

    @property
    def paused_s(self) -> float:
        """Seconds in which training gave way to answering, since the program started."""
        return self._yielding.paused_s

    def card(self) -> AgentCard:
        """Return who this agent is at present."""
        data = self._data
        return AgentCard(
            agent=self.name,
            version=version("hedgerow"),
            profile=self.profile,
            examples=data.examples if data else 0,
            input=data.input if data else None,
            shape=data.shape if data else (),
            labels=data.labels if data else (),
            terms=ABILITIES,
            size=layout_size(weights_of(self._own_spec(data))) if data else 0,
            energy_kind=self.meter.kind,
            energy_source=self.meter.source,
            serving=self._serving.address,
            problem=self._problem
            or (self._recorder.problem if self._recorder else None)
            or self._serving_problem
            or self.limits.problem(),
            unavailable=self.limits.look(),
            verdicts=self._verdicts,
            models=self._models,
        )

    def _own_spec(self, data: LocalData) -> ModelSpec:
        """Return the model that this device chooses for itself, where a strategy lets it."""
        settings = self.settings.model or ModelSettings()
        return settings.spec(data.input, data.shape, len(data.labels))

    async def _look_at_data(self) -> None:
        try:
            self._data = await asyncio.to_thread(self._load_data)
            self._problem = None
        except DataError as error:
            self._data, self._problem = None, f"data: {error}"
            logger.error("data unusable", extra={"reason": str(error)})

    async def _watch_data(self) -> None:
        """Look again while the data are unusable: a person may mend them, a stream may fill."""
        while True:
            await asyncio.sleep(self._retry_s)
            if self._data is None:
                await self._look_at_data()
                await self._publish("card", self.card().model_dump_json(), retain=True)

    async def _watch_limits(self) -> None:
        """Say on the card when this device comes to its limits and back, and end work that is too hot."""
        if self.limits.settings == LimitSettings():
            return
        told: tuple[Unavailable | None, str | None] = (None, None)
        while True:
            if (hot := self.limits.too_hot()) is not None:
                self._call_off(hot)
            now = (self.limits.look(), self.limits.problem())
            if now != told:
                told = now
                logger.info("limits", extra={"unavailable": str(now[0]) if now[0] else "no"})
                await self._publish("card", self.card().model_dump_json(), retain=True)
            await asyncio.sleep(min(LIMITS_S, self._retry_s))

    async def _watch_serving(self) -> None:
        """Serve what is there already, start the server again when it died, and tell what it decided."""
        wanted = self.settings.serve.wanted  # if not, `hedgerow serve` may follow the folder all the same
        if wanted and linked(self.vault.artifacts, CURRENT) is not None:
            await self._serve()
        again_s, pause_s = 0.0, 0.0
        while True:
            await asyncio.sleep(min(SERVING_S if wanted else RETRY_S, self._retry_s))
            now = time.monotonic()
            if self._serving.died and now >= again_s:
                # At once the first time; one that dies again and again is started less and less often.
                steady = now - again_s > self._retry_s
                pause_s = SERVING_S if steady else min(2 * pause_s, self._retry_s)
                again_s = now + pause_s
                logger.error("the server ended by itself, it is started again")
                await self._serve()
            await self._tell_models()

    async def _look_at_models(self) -> bool:
        """Read which models are here and what was decided about them; returns whether that has changed."""
        folder, before = self.vault.artifacts, (self._verdicts, self._models)
        seen = await asyncio.to_thread(orders.seen, folder)
        if seen is not None and seen == self._models_seen:
            return False
        self._models_seen = seen
        self._verdicts = (await asyncio.to_thread(record.read, folder)).verdicts
        self._models = await asyncio.to_thread(orders.told, folder, serves=self.settings.serve.wanted)
        return before != (self._verdicts, self._models)

    async def _tell_models(self) -> None:
        if await self._look_at_models():
            await self._publish("card", self.card().model_dump_json(), retain=True)

    # --- taking work ---------------------------------------------------------------------------

    def _resume(self) -> None:
        frame = self.vault.waiting()
        if frame is None:
            return
        try:
            wire_bytes, begun = self._courier.bytes_of(frame), self.vault.begun(frame)
            job = _Job(assignment_from(frame), frame, wire_bytes, begun)
        except HedgerowError as error:
            logger.warning("work in hand unreadable, dropped", extra={"reason": str(error)})
            self.vault.drop(frame)
            return
        if any((out.run, out.round) == job.key for out in self.vault.outbox()):
            self.vault.drop(frame)  # killed between finishing it and putting it down
            return
        logger.info("resuming", extra={"run": job.key[0], "round": job.key[1]})
        self._enqueue(job)

    async def _arrived(self, topic: str, frame: bytes, wire_bytes: int) -> None:
        """Take an assignment; the coordinator is told `stored` when this returns."""
        with self.meter.stage(Stage.RECEIVE):
            assignment = await asyncio.to_thread(assignment_from, frame)
        if assignment.agent != self.name:
            raise FrameMismatch(f"an assignment for {assignment.agent!r} came to {self.name!r}")
        job = _Job(assignment, frame, wire_bytes)
        if any((out.run, out.round) == job.key for out in self.vault.outbox()):
            self._outbox.set()  # it is done already: the update is what is missing over there
            return
        now = self._current.key if self._current is not None else None
        if now is not None and now[0] == job.key[0] and now[1] >= job.key[1]:
            return  # in hand already, or a straggler of a round that is over
        if self._is_old(frame):
            return
        halt.at("download", assignment.round)
        try:
            await asyncio.to_thread(self.vault.receive, frame)
        except OSError as error:
            if (why := full(error, self.vault.folder)) is None:
                raise
            raise WorkRefused(why) from error
        self._clock.wake()
        self._call_off()
        self._enqueue(job)

    def _is_old(self, frame: bytes) -> bool:
        """Whether this assignment was done before, and nobody has asked for it again since.

        A broker that comes back with what it knew an hour ago sends again what it had not seen confirmed
        then. Done anew, it would put an old model in the place of the current one. So the coordinator is
        asked: it sends what it still wants to an agent that introduces itself with another session.
        """
        if not self.vault.is_done(frame):
            return False
        digest = hashlib.sha256(frame).digest()
        if digest == self._asked_again:
            self._asked_again = None
            return False
        logger.warning("an assignment that was done came again; the coordinator is asked whether it wants it")
        self._asked_again = digest
        self._old.set()
        return True

    async def _ask_again(self) -> None:
        """Ask the coordinator whether it wants work that was done, once its receipt has gone out."""
        while True:
            await self._old.wait()
            self._old.clear()
            await asyncio.sleep(min(AGAIN_S, self._retry_s))
            self._courier.forget(self._topic("assignment"))
            self._session = uuid.uuid4().hex[:12]
            await self._introduce()

    def _enqueue(self, job: _Job) -> None:
        while not self._jobs.empty():
            self._jobs.get_nowait()  # only the newest counts
        self._jobs.put_nowait(job)

    async def _command(self, body: bytes) -> None:
        try:
            command = command_of(body)
        except WireError as error:
            logger.warning("command not understood", extra={"reason": str(error)})
            if isinstance(error, UnknownVerb):
                await self._ordered(partial(orders.unknown, self.vault.artifacts, error))
            return
        if command.verb != "cancel":
            await self._ordered(partial(orders.carry_out, self.vault.artifacts, command))
        elif self._current is not None and self._current.key == (command.run, command.round):
            logger.info("work called off", extra={"reason": command.reason})
            self._call_off()

    async def _ordered(self, order: Callable[[], Done]) -> None:
        """Do what the coordinator says about models, and answer on the card."""
        try:
            done = await asyncio.to_thread(order)
        except ExportError as error:  # not answered: the coordinator says it again
            logger.error("command not carried out", extra={"reason": str(error)})
            return
        logger.info("command", extra={"verb": done.verb, "done": done.done, "reason": done.said})
        await self._tell_models()

    def _call_off(self, why: str = "") -> None:
        if self._current is not None:
            self._current.why = self._current.why or why
            self._current.called_off.set()

    # --- working -------------------------------------------------------------------------------

    async def _work_on(self) -> None:
        while True:
            self.meter.switch(Stage.WAIT)
            self.standing.stage = Stage.WAIT
            await self._work_once()  # whose end lets go of frame and parameters: an idle agent is small

    async def _work_once(self) -> None:
        job = self._current = await self._jobs.get()
        try:
            await self._attempt(job)
        finally:
            job.called_off.set()  # if this task was cancelled, the worker's thread stops too
            self._current = None

    async def _attempt(self, job: _Job) -> None:
        reason = None
        try:
            await self._refresh_data(job.assignment.run)
            if not job.begun:
                self._allow()
            self._accept(job.assignment)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._training, self._work, job)
            self._outbox.set()
            if job.assignment.export and self.settings.serve.wanted:
                await self._serve()
            await self._tell_models()
        except (WorkRefused, DataError) as error:
            reason = str(error)
        except Exception as error:  # the one door of the house: logged and answered
            if type(error).__name__ == "Cancelled":
                reason = f"called off: {job.why}" if job.why else "called off"
            else:
                logger.exception("work failed")
                why = full(error, self.vault.folder) if isinstance(error, OSError) else None
                reason = why or f"{type(error).__name__}: {error}"
        if reason is not None:
            self.vault.drop(job.frame)
            await self._refuse(job.assignment, reason)
            # Offered again, it is looked at again. Forgotten before the receipt has gone out, it would be
            # offered again at once, for ever.
            self._courier.forget(self._topic("assignment"))

    async def _refresh_data(self, run: str) -> None:
        """Look at the data anew when a run begins: a recorded stream has grown since."""
        if self._recorder is not None and run != self._seen_run:
            await self._look_at_data()
        self._seen_run = run

    async def _address(self) -> str:
        """Return where the personal model is served, after starting the process where it does not run.

        Raises `HedgerowError` where there is no model yet, or the process does not start.
        """
        async with self._starting:
            if (address := self._serving.address) is not None:
                return address
            if not (self.vault.artifacts / CURRENT).is_symlink():
                raise HedgerowError("there is no personal model on this device yet: train a round first")
            address = await asyncio.to_thread(self._serving.start)
        await self._publish("card", self.card().model_dump_json(), retain=True)
        return address

    async def _serve(self) -> None:
        try:
            await self._address()
            self._serving_problem = None
        except HedgerowError as error:
            self._serving_problem = f"serving: {error}"
            logger.error("serving did not start", extra={"reason": str(error)})
        await self._publish("card", self.card().model_dump_json(), retain=True)

    def _allow(self) -> None:
        if (why := self.limits.look()) is not None:
            raise WorkRefused(str(why))

    def _accept(self, assignment: Assignment) -> None:
        self.privacy.allow(assignment.work)
        if self._data is None:
            raise WorkRefused(self._problem or "no data loaded yet")
        spec, data = assignment.spec, self._data
        if assignment.work.layout == "flat":
            spec = self._own_spec(data)
        if (spec.input, spec.shape, spec.classes) != (data.input, data.shape, len(data.labels)):
            raise WorkRefused(
                f"this device has {data.input} {data.shape} with {len(data.labels)} classes, the run wants"
                f" {spec.input} {spec.shape} with {spec.classes}"
            )
        if assignment.work.train and not data.examples:
            raise WorkRefused("this device has no training examples")

    def _work(self, job: _Job) -> None:
        """Train, keep what is personal, export if asked, and put the update into the outbox."""
        a, data = job.assignment, self._data
        assert data is not None
        self.vault.take_in_hand(job.frame)
        flat = a.work.layout == "flat"
        spec = self._own_spec(data) if flat else a.spec
        self.standing = Standing(run=a.run, round=a.round, hidden_units=spec.hidden)
        threads, eased = self._threads_for(a)
        if self._conditions is not None:
            self._conditions.begin(threads, self.threads, eased)
        with self.meter.stage(Stage.TRAIN):
            trainer = _trainer()
            trainer.use_threads(threads)
            personal = self.vault.personal(a.run, before=a.round)
            own = initial_parameters(spec, a.model_seed)
            own = own.updated(personal.parameters if personal else {})
            sent = arrived(a, spec, own)
        task = trainer.Task(
            spec,
            a.work,
            own.updated(sent),
            sent,
            data,
            a.seed,
            teacher=a.spec if a.work.distillation() else None,
            pruning_steps=personal.pruning_steps if personal else 0,
            own=personal.parameters if personal else Parameters(),
            offered=a.masks,
        )
        carry_out = self._carry_out or trainer.carry_out
        outcome = carry_out(task, self._hooks(job))
        spent = so_far(personal, self.meter.peek().get(Stage.TRAIN))
        own = kept(outcome.parameters, outcome.extra, a.work)
        self.vault.save_personal(a.run, Personal(a.round, own, outcome.pruning_steps, spent))
        give_back()  # exporting starts from a smaller peak
        artifact, problem = self._exported(a, spec, data, outcome, spent)
        parameters = to_send(outcome.parameters, outcome.extra, sent, a.work)
        parameters = self.privacy.released(parameters, sent, a.work)
        silent, spent_privacy = self.privacy.silent, self.privacy.told()
        delivered, self._delivered_bytes = self._delivered_bytes, 0
        traffic = self._interface.take() if self._interface else None
        ledger = dict(self.meter.take() if self.limits.tally is None else self.limits.tally.take())
        update = Update(
            run=a.run,
            round=a.round,
            agent=self.name,
            examples=data.examples,
            metrics=({} if silent else outcome.metrics) | spent_privacy,
            kept_units=outcome.kept_units,
            ledger=ledger,
            timing=self._clock.timing(self.meter.taken),
            received_bytes=job.wire_bytes,
            sent_bytes=delivered,
            interface=traffic.interface if traffic else None,
            interface_received_bytes=traffic.received if traffic else None,
            interface_sent_bytes=traffic.sent if traffic else None,
            state=self._conditions.end() if self._conditions else None,
            artifact=None if silent else artifact,
            problem="; ".join([*([problem] if problem else []), *self.vault.said()])[:2000] or None,
            parameters=parameters,
            masks=outcome.masks,
        )
        self.vault.finish(Outgoing(a.run, a.round, frame_of(update, a.work.encoding)))
        self.standing.accuracy = outcome.metrics["accuracy"]
        if spent_privacy:
            logger.info("privacy spent", extra={"round": a.round, **spent_privacy})
        give_back()

    def _threads_for(self, a: Assignment) -> tuple[int, str | None]:
        """Return how many threads this work is done on, and why they are fewer than this device's own."""
        limit, threads, eased = a.work.thread_limit(), self.threads, None
        if limit is not None and limit.most < threads:
            threads, eased = limit.most, "the coordinator asks for fewer"
        threads, warm = self.limits.threads(threads)
        if (eased := warm or eased) is not None:
            told = {"run": a.run, "round": a.round, "threads": threads, "own": self.threads, "reason": eased}
            logger.info("fewer threads", extra=told)
        return threads, eased

    def _hooks(self, job: _Job) -> _Hooks:
        return _Hooks(self.meter, self.vault, self.standing, job.called_off, self._yielding)

    def _exported(
        self,
        a: Assignment,
        spec: ModelSpec,
        data: LocalData,
        outcome: trainer_module.Outcome,
        spent: EnergyReading,
    ) -> tuple[Manifest | None, str | None]:
        """Export if asked; a failure is told with the update, which is worth sending all the same."""
        if not (a.export or a.last):
            return None, None
        model = self._whole(a, spec, data, outcome, spent)
        save_last(self.vault.folder, model)
        if not a.export:
            return None, None
        try:
            orders.hold(self.vault.artifacts, a.hold)  # before there is a new model: it may not slip through
            manifest = self._export(model, data)
        except HedgerowError as error:
            logger.error("export failed", extra={"round": a.round, "reason": str(error)})
            return None, f"export: {error}"[:2000]
        return manifest, None

    def _whole(
        self,
        a: Assignment,
        spec: ModelSpec,
        data: LocalData,
        outcome: trainer_module.Outcome,
        spent: EnergyReading,
    ) -> LastModel:
        facts = Facts(
            agent=self.name,
            run=a.run,
            round=a.round,
            strategy=a.strategy,
            spec=spec,
            normalisation=data.normalisation,
            labels=data.labels,
            accuracy_sent=outcome.metrics["accuracy_sent"],
            accuracy=outcome.metrics["accuracy"],
            trained=spent,
        )
        return LastModel(facts, outcome.parameters, outcome.masks, outcome.probe)

    def _export(self, model: LastModel, data: LocalData) -> Manifest:
        self.standing.stage = Stage.EXPORT
        part = data.validation
        halt.at("export", model.facts.round)
        with self.meter.stage(Stage.EXPORT):
            # First the samples, then the model: whoever finds the model finds what to compare it on.
            found = canary.choose(data, self.settings.serve.canary)
            self.vault.save_canary(None if found is None else canary.to_bytes(found))
            validation = (part.x, part.y) if len(part.y) else None
            return model.export(self.vault.artifacts, self.vault.folder, validation, int8=self._int8)

    async def _refuse(self, assignment: Assignment, reason: str) -> None:
        logger.warning("refused", extra={"round": assignment.round, "reason": reason})
        refusal = Refusal(run=assignment.run, round=assignment.round, agent=self.name, reason=reason[:2000])
        await self._publish("refusal", refusal.model_dump_json())

    # --- answering -----------------------------------------------------------------------------

    async def _deliver(self) -> None:
        """Send what is in the outbox, oldest first, until the coordinator has stored it."""
        self._outbox.set()
        while True:
            await self._outbox.wait()
            self._outbox.clear()
            await self._deliver_all()

    async def _deliver_all(self) -> None:
        for outgoing in await asyncio.to_thread(self.vault.outbox):
            await self._deliver_one(outgoing)

    async def _deliver_one(self, outgoing: Outgoing) -> None:
        facts = {"run": outgoing.run, "round": outgoing.round}
        halt.at("upload", outgoing.round)
        try:
            with self.meter.stage(Stage.SEND):
                self.standing.stage = Stage.SEND
                delivery = await self._courier.send(
                    self._topic("update"), outgoing.frame, deadline_s=RETRY_S * 4
                )
        except DeliveryFailed as error:
            if not error.refused:  # the coordinator may be away: keep it and try again later
                logger.warning("update not taken yet", extra=facts | {"reason": str(error)})
                asyncio.get_running_loop().call_later(self._pause_s, self._outbox.set)
                self._pause_s = min(2 * self._pause_s, RETRY_S)
                return
            logger.warning("update refused", extra=facts | {"reason": str(error)})
        else:
            self._pause_s = AGAIN_S
            self._delivered_bytes += delivery.wire_bytes
            logger.info("update delivered", extra=facts | {"bytes": delivery.wire_bytes})
        finally:
            if self.standing.stage is Stage.SEND:
                self.standing.stage = Stage.WAIT
        await asyncio.to_thread(self.vault.delivered, outgoing.run, outgoing.round)

    async def _report(self) -> None:
        last, looked, told, process = 0.0, 0.0, Stage.IDLE, psutil.Process()
        since = time.monotonic()
        while True:
            await asyncio.sleep(TELEMETRY_S)
            stage, now = self.standing.stage, time.monotonic()
            quiet = stage in (Stage.WAIT, Stage.IDLE) and stage is told
            since = since if quiet else now
            if self._conditions is not None and now - looked >= (IDLE_TELEMETRY_S if quiet else 0):
                self._conditions.look()
                looked = now
            if quiet and now - last < pause_s(now - since):
                continue
            last, told = now, stage
            telemetry = self.telemetry(process.memory_info().rss)
            await self._publish("telemetry", telemetry.model_dump_json(), qos=0)

    def telemetry(self, rss_bytes: int | None = None) -> Telemetry:
        """Return where this agent stands."""
        s = self.standing
        working = s.stage not in (Stage.WAIT, Stage.IDLE)
        return Telemetry(
            agent=self.name,
            stage=s.stage,
            run=s.run,
            round=s.round,
            progress=s.fraction if working else None,
            eta_s=s.eta_s if working else None,
            accuracy=None if self.privacy.silent else s.accuracy,
            kept_units=s.kept_units,
            hidden_units=s.hidden_units,
            joules=self.meter.joules_total,
            watts=self.meter.watts(),
            energy_kind=self.meter.kind,
            sent_bytes=self._courier.sent_bytes,
            received_bytes=self._courier.received_bytes,
            rss_bytes=rss_bytes,
        )

    def _topic(self, what: str) -> str:
        return self.topics.of(self.name, what)

    async def _publish(self, what: str, body: str, *, retain: bool = False, qos: int = 1) -> None:
        try:
            await self.transport.publish(self._topic(what), body.encode(), retain=retain, qos=qos)
        except (NotConnected, PublishRefused) as error:
            # Retained letters are sent again on reconnect; telemetry is out of date by then; a refusal
            # that is lost is made again when the coordinator offers the work again.
            logger.warning("not published", extra={"what": what, "reason": str(error)})


def pause_s(resting_s: float) -> float:
    """Return the seconds between two letters of telemetry when there has been nothing to do for so long."""
    return IDLE_TELEMETRY_S if resting_s < RESTING_S else RARE_TELEMETRY_S


def so_far(personal: Personal | None, training: EnergyReading | None) -> EnergyReading:
    """Return what all training of the run took; a meter that moved to another scope starts the sum anew."""
    readings = [personal.trained if personal else None, training]
    known = [reading for reading in readings if reading is not None]
    same_place = len({r.scope for r in known if r.kind is not Kind.NONE}) < 2
    return total(known if same_place else known[-1:])


def _trainer() -> Any:
    """Return the trainer's module, imported by name: the agent's one door to torch."""
    return importlib.import_module("edge_agent.training.trainer")


def _lower_priority() -> None:
    """Let everything else on the device go first; on Linux niceness belongs to the thread."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
