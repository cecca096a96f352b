"""A store and a live picture as after some rounds of a small federation, for tests of API and page."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from fastapi import FastAPI

from coordinator.app import create_app
from coordinator.fleet.desk import Desk
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.tokens import ApiTokens
from coordinator.live import Live
from coordinator.report import update_summary
from coordinator.rollout.steward import Steward
from coordinator.roster import Roster
from coordinator.settings import CoordinatorSettings, RolloutSettings
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.strategies.base import State
from coordinator.web.models import StartRun
from foundation import settings
from foundation.artifact import Manifest
from foundation.energy import EnergyReading, Kind, Scope, Stage
from foundation.errors import RoundError
from foundation.messages import AgentCard, KeptModel, Models, Telemetry, Update
from foundation.normalisation import Normalisation
from foundation.parameters import Parameters

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
SPEC = '{"input": "image", "shape": [1, 8, 8], "classes": 10, "width": 32, "depth": 2}'
AGENTS = ("jetson-barn", "pi-greenhouse", "pi-kitchen", "vps-1")
PROFILES = ("jetson_orin_nano", "raspberry_pi_5", "raspberry_pi_4b", "unknown_linux")
KINDS = (Kind.MEASURED, Kind.MEASURED, Kind.MODELLED, Kind.NONE)


class Clock:
    """A clock one can turn."""

    def __init__(self) -> None:
        self.now = NOON.timestamp()

    def __call__(self) -> float:
        return self.now


class Engine:
    """A `Control` that opens runs in the store and does no rounds."""

    def __init__(self, store: Store, live: Live) -> None:
        self.store = store
        self.live = live
        self.started: list[StartRun] = []
        self.stopped: list[str] = []

    async def start(self, request: StartRun) -> None:
        if self.started and not self.stopped:
            raise RoundError("a run is under way: stop it first")
        self.started.append(request)
        self.live.phase(request.name, 0, request.rounds or 1, "waiting for agents")

    def gathered(self) -> None:
        """Enough agents are online: only now is the run among the runs."""
        request = self.started[-1]
        self.store.open_run(RunRecord(request.name, request.strategy or "fedavg", "{}", SPEC, 3, 0))
        self.store.set_run_state(request.name, "running")

    async def stop(self, reason: str) -> None:
        self.stopped.append(reason)
        if self.started and self.store.has_run(self.started[-1].name):
            self.store.set_run_state(self.started[-1].name, "stopped", reason)

    async def pause(self, run: str, reason: str) -> None:
        if self.store.run(run).state != "running":
            raise RoundError(f"run {run!r} is {self.store.run(run).state}, not running")
        self.store.set_run_state(run, "paused", reason)

    async def resume(self, run: str) -> None:
        if self.store.run(run).state != "paused":
            raise RoundError(f"run {run!r} is {self.store.run(run).state}, not paused")
        self.store.set_run_state(run, "running")


def reading(kind: Kind, joules: float, seconds: float) -> EnergyReading:
    if kind is Kind.NONE:
        return EnergyReading(seconds=seconds)
    sensor, scope = ("ina3221", Scope.MODULE) if kind is Kind.MEASURED else ("utilisation", Scope.BOARD_DC)
    return EnergyReading(
        joules=joules,
        idle_joules=joules / 3,
        seconds=seconds,
        kind=kind,
        scope=scope,
        sensor=sensor,
        coverage=1.0,
        uncertainty_joules=joules * (0.05 if kind is Kind.MEASURED else 0.4),
    )


def an_update(i: int, round: int, run: str = "greenhouse-1") -> Update:
    accuracy = 1 - math.exp(-(round + 0.7 * (i + 1)) / 3)
    metrics = {
        "accuracy_sent": accuracy * 0.8,
        "accuracy": accuracy,
        "loss_sent": 2.3 * (1 - accuracy * 0.8),
        "loss": 2.3 * (1 - accuracy),
    }
    ledger = {
        Stage.TRAIN: reading(KINDS[i], 18.0 + 3 * i, 7.5 + i),
        Stage.SEND: reading(KINDS[i], 1.5, 0.6),
    }
    return Update(
        run=run,
        round=round,
        agent=AGENTS[i],
        examples=120 + 40 * i,
        metrics=metrics if i != 3 else {**metrics, "accuracy_sent": 0.1},
        kept_units=(128 - 9 * round - i, 128 - 7 * round),
        ledger=ledger,
        received_bytes=91_224,
    )


def a_card(i: int) -> AgentCard:
    return AgentCard(
        agent=AGENTS[i],
        version="0.1.0",
        profile=PROFILES[i],
        examples=120 + 40 * i,
        input="image",
        shape=(1, 8, 8),
        energy_kind=KINDS[i].value,
        energy_source="ina3221" if KINDS[i] is Kind.MEASURED else "utilisation",
        serving="http://192.0.2.7:8000" if i == 1 else None,
        problem="free memory is 41 MiB, training needs 60 MiB" if i == 3 else None,
    )


def a_manifest(i: int, round: int, run: str = "greenhouse-1") -> Manifest:
    return Manifest(
        agent=AGENTS[i],
        run=run,
        round=round,
        strategy="pfl_tpp",
        sha256=hashlib.sha256(f"{i} {round}".encode()).hexdigest(),
        bytes=91_004 - 4000 * i,
        dense_bytes=143_210,
        parameters=21_844,
        dense_parameters=34_900,
        input="image",
        shape=(1, 8, 8),
        labels=tuple("0123456789"),
        normalisation=Normalisation(),
        kept_units=(80, 90),
        hidden_units=128,
        opset=17,
        tolerance=1e-4,
        parity=2.4e-6,
        accuracy=0.93,
        latency_ms=0.84 + i,
        dense_latency_ms=1.71 + i if i else None,
    )


def a_state(round: int) -> bytes:
    """Return a state with an embedding of every device: the first two are near, the last is new."""
    rows = np.random.default_rng(3).standard_normal((4, 8)).astype(np.float32)
    rows[1] = rows[0] + 0.1
    private = {agent: Parameters({"embedding": rows[i]}) for i, agent in enumerate(AGENTS)}
    private[AGENTS[3]] = private[AGENTS[3]].updated({"fresh": np.ones(1, np.float32)})
    return State(round, Parameters(), private).to_bytes()


def finish(store: Store, clock: Clock, run: str, strategy: str = "fedtp", rounds: int = 3) -> None:
    """Write a run that has finished."""
    fill(store, clock, rounds, run, strategy)
    store.set_run_state(run, "finished")
    clock.now += 60


def fill(
    store: Store, clock: Clock, rounds: int = 5, run: str = "greenhouse-1", strategy: str = "pfl_tpp"
) -> None:
    """Write a run with `rounds` closed rounds and one that is open."""
    store.open_run(RunRecord(run, strategy, '{"lr": 0.05}', SPEC, 10, 7))
    store.set_run_state(run, "running")
    store.save_initial_state(run, a_state(0))
    for i in range(4):
        store.upsert_agent(a_card(i), NOON)
    for round in range(1, rounds + 2):
        store.open_round(run, round, AGENTS, clock.now + 60)
        there = range(4) if round <= rounds else range(2)
        for i in there:
            frame = f"{run} {round} {i}".encode() * 300
            update = an_update(i, round, run)
            store.add_update(run, round, update.agent, frame, update_summary(update, 61_440 + 512 * i))
        clock.now += 21.5
        if round <= rounds:
            store.close_round(run, round, a_state(round), {"updates": 4})
            store.add_event("round", run, round, None, f"round {round} closed: 4 of 4 updates")
    store.add_artifact(a_manifest(0, rounds, run))
    store.add_artifact(a_manifest(1, rounds, run))
    store.add_refusal(
        run, 2, "vps-1", "free memory is 41 MiB, training needs 60 MiB", NOON + timedelta(minutes=1)
    )


def enliven(live: Live, clock: Callable[[], float], rounds: int = 5, run: str = "greenhouse-1") -> None:
    """Let agents of `fill` say what they do in the open round."""
    for i in range(4):
        live.card(a_card(i))
        live.presence(AGENTS[i], online=i != 2)
    live.temperature(AGENTS[0], 61.5)
    for round in range(1, rounds + 1):
        live.round_closed(run, round, 21.5)
    live.phase(run, rounds + 1, 10, "collecting", {"updates": 2, "expected": 4})
    stages = (Stage.TRAIN, Stage.SEND, Stage.TRAIN, Stage.WAIT)
    for i in (0, 1, 3):
        live.telemetry(
            Telemetry(
                agent=AGENTS[i],
                stage=stages[i],
                run=run,
                round=rounds + 1,
                progress=(0.62, 0.9, 0.1, None)[i],
                eta_s=(12.0, 1.4, 30.0, None)[i],
                accuracy=(0.84, 0.91, 0.7, None)[i],
                kept_units=((74, 88), (70, 81), (), ())[i],
                hidden_units=128,
                joules=(18.4, 9.7, None, None)[i],
                energy_kind=("measured", "modelled", "none", "none")[i],
                sent_bytes=307_200 * (i + 1),
                received_bytes=456_120,
                rss_bytes=238_000_000,
            )
        )


def furnished(
    store: Store, live: Live, clock: Callable[[], float], folder: Path, tokens: ApiTokens | None = None
) -> FastAPI:
    """Return the application with all that a coordinator gives it: a steward, a desk, settings."""

    async def send(agent: str, body: bytes) -> None:
        pass

    told = {"folder": folder, "enrolment": {"enabled": True, "address": "mqtts://broker.local:8883"}}
    s = CoordinatorSettings.model_validate(
        {**told, "mqtt": {"username": "ada", "password": "keep this to yourself"}}
    )
    records = FleetRecords(store, clock=clock)
    return create_app(
        store,
        live,
        Engine(store, live),
        models=Steward(RolloutSettings(), store=store, live=live, roster=Roster(), send=send),
        desk=Desk(s, records),
        settings=settings.rows(s, {"folder": "--set folder", "mqtt.password": "COORDINATOR__MQTT__PASSWORD"}),
        tokens=tokens,
        records=records,
        clock=clock,
    )


def joined(store: Store, agent: str) -> None:
    """Let a device join with a key."""
    records = FleetRecords(store)
    (place,) = records.invite(1, name=agent, replace=False, expires_s=3600, who="ada")
    records.join(place.invite, agent, "ab" * 32)


def with_models(i: int, rounds: int = 5, run: str = "greenhouse-1") -> AgentCard:
    """Return the card of a device that keeps two models, serves the newer, and has pinned none."""
    kept = [
        KeptModel(
            sha256=a_manifest(i, n, run).sha256,
            run=run,
            round=n,
            links=frozenset({"serving"} if n == rounds else {"previous"}),
        )
        for n in (rounds - 1, rounds)
    ]
    return a_card(i).model_copy(update={"models": Models(serves=True, kept=tuple(kept))})
