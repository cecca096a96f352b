"""What the API takes and gives, and what the web asks of the engine.

The views are made from the store's records here, once, and both the API and the page read them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coordinator.live import AgentStatus
from coordinator.store.records import (
    RefusalRecord,
    RoundRecord,
    RoundState,
    RunRecord,
    RunState,
    UpdateRecord,
    loads,
    state_of,
)
from foundation.artifact import Manifest
from foundation.energy import EnergyReading, Kind, split_by_kind, total
from foundation.errors import SettingsError
from foundation.frozen import Frozen
from foundation.messages import AgentCard, DeviceState, Json
from foundation.spec import ModelSettings
from foundation.topics import NAME, checked_name
from foundation.work import Encoding

T = TypeVar("T")


class Body(Frozen):
    """What comes in with a request: built at once, as FastAPI warns of aliases where it is not."""

    model_config = ConfigDict(defer_build=False)


class StartRun(Body):
    """What is to be other than in the coordinator's settings; a field that is left out is as it is there."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "greenhouse-1",
                    "strategy": "fedtp",
                    "settings": {"epochs": 1, "learning_rate": 0.05},
                    "rounds": 10,
                    "seed": 7,
                    "min_agents": 3,
                }
            ]
        }
    )

    name: str = Field("", json_schema_extra={"pattern": rf"^({NAME.pattern})?$"})
    """Of the run; made from the strategy and the time when it is empty."""
    strategy: str | None = Field(None, min_length=1, max_length=64)
    settings: Json | None = None
    """The strategy's own fields, as in its TOML table."""
    rounds: int | None = Field(None, ge=1, le=100_000)
    seed: int | None = Field(None, ge=0, lt=2**63)
    min_agents: int | None = Field(None, ge=1)
    """Agents that must be online before the first round."""
    fraction: float | None = Field(None, gt=0, le=1)
    """Share of the present agents that is asked in each round."""
    quorum: float | None = Field(None, gt=0, le=1)
    """Share of the asked agents whose updates suffice when the deadline has passed."""
    deadline_s: float | None = Field(None, gt=0)
    grace_s: float | None = Field(None, ge=0)
    wait_s: float | None = Field(None, gt=0)
    """Seconds to wait for `min_agents`."""
    export_every: int | None = Field(None, ge=0)
    export: bool | None = None
    encoding: Encoding | None = None
    model: ModelSettings | None = None

    @field_validator("name")
    @classmethod
    def _can_be_a_name(cls, name: str) -> str:
        try:
            return name and checked_name(name, "run")
        except SettingsError as error:
            raise ValueError(str(error)) from error

    def named(self, now: datetime) -> StartRun:
        """Return this request with a name: its own, or one made from the strategy and the time."""
        return (
            self
            if self.name
            else self.model_copy(update={"name": f"{self.strategy or 'run'}-{now:%Y%m%d-%H%M%S}"})
        )


class RunAnswer(BaseModel):
    """How a run stands after it was started or stopped."""

    run: str
    state: RunState
    """`waiting` until enough agents are online; from then on the run is among the runs."""


class StopRun(Body):
    """Why a run is to stop."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"reason": "the greenhouse is being repainted"}]}
    )

    reason: str = Field("stopped by hand", min_length=1, max_length=500)


class PauseRun(Body):
    """Why a run is to pause."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "the power is needed elsewhere"}]})

    reason: str = Field("paused by hand", min_length=1, max_length=500)


class Control(Protocol):
    """What the web may ask of the engine. Errors of `foundation.errors` become problems with their words."""

    async def start(self, request: StartRun) -> None:
        """Begin the run, which always has a name; returns when it is under way or refused.

        Raises `SettingsError` for a request that cannot be, `RoundError` while another run is under way.
        """
        ...

    async def stop(self, reason: str) -> None:
        """End the run that is under way; raises `RoundError` when there is none."""
        ...

    async def pause(self, run: str, reason: str) -> None:
        """Open no further round until `resume`; raises `RoundError` unless the run is running."""
        ...

    async def resume(self, run: str) -> None:
        """Go on with a paused run; raises `RoundError` for one that is not."""
        ...


class Problem(BaseModel):
    """An error as RFC 9457 writes it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Not Found",
                    "status": 404,
                    "detail": "there is no run 'x' in this store",
                    "instance": "/api/v1/runs/x",
                }
            ]
        }
    )

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str = ""


class Page(BaseModel, Generic[T]):
    """A piece of a list that grows."""

    items: list[T]
    next: str | None = None
    """Give this as `after` to get what follows; `None` at the end."""


class Health(BaseModel):
    """Whether the coordinator can do its work."""

    status: str = "ok"


class RunView(BaseModel):
    """One run."""

    run: str
    strategy: str
    settings: Json
    spec: Json
    rounds: int
    seed: int
    state: RunState
    reason: str
    created: datetime
    changed: datetime

    @classmethod
    def of(cls, record: RunRecord) -> RunView:
        """Return the view of a row."""
        return cls(
            run=record.run,
            strategy=record.strategy,
            settings=loads(record.settings_json),
            spec=loads(record.spec_json),
            rounds=record.rounds,
            seed=record.seed,
            state=record.state,
            reason=record.reason,
            created=record.created,
            changed=record.changed,
        )


class Spread(BaseModel):
    """A figure over agents: plain mean, the worst, and the mean of the worst tenth, one at least."""

    mean: float
    worst: float
    worst_tenth: float
    agents: int

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Spread | None:
        """Return the spread of the values that are known, or `None` when none is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        tenth = sorted(known)[: max(1, len(known) // 10)]
        return cls(
            mean=math.fsum(known) / len(known),
            worst=tenth[0],
            worst_tenth=math.fsum(tenth) / len(tenth),
            agents=len(known),
        )


class UpdateView(BaseModel):
    """One update without its arrays; a figure that the agent did not tell is null."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "run": "greenhouse-1",
                    "round": 3,
                    "agent": "pi-kitchen",
                    "received": "2026-03-01T12:00:42Z",
                    "examples": 180,
                    "metrics": {"accuracy_sent": 0.81, "accuracy": 0.93, "loss": 0.24},
                    "kept_units": [41, 37],
                    "energy": {"joules": 21.4, "seconds": 8.1, "kind": "modelled", "scope": "board_dc"},
                    "ledger": {
                        "train": {"joules": 19.0, "seconds": 7.0, "kind": "modelled", "scope": "board_dc"}
                    },
                    "received_bytes": 90112,
                    "wire_bytes": 61440,
                    "artifact": None,
                }
            ]
        }
    )

    run: str
    round: int
    agent: str
    received: datetime
    examples: int | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)
    kept_units: tuple[int, ...] = ()
    energy: EnergyReading | None = None
    """All stages added up; `None` when they cannot be, as their meters sit in different places."""
    ledger: dict[str, EnergyReading] = Field(default_factory=dict)
    received_bytes: int | None = None
    wire_bytes: int | None = None
    """Of the frame as it travelled up."""
    state: DeviceState | None = None
    """Power mode, clock, heat, throttling and threads of the device in this round, as far as it told."""
    artifact: str | None = None
    """SHA-256 of the model that the agent exported with this update."""
    problem: str | None = None
    """What went wrong on the device beside the training."""

    @classmethod
    def of(cls, record: UpdateRecord) -> UpdateView:
        """Return the view of a row; what its summary does not say, or says in another form, is unknown."""
        told = record.summary
        ledger = _ledger(told.get("ledger"))
        metrics = told.get("metrics")
        kept = told.get("kept_units")
        return cls(
            run=record.run,
            round=record.round,
            agent=record.agent,
            received=record.received,
            examples=_whole(told.get("examples")),
            metrics={str(k): number(v) for k, v in metrics.items()} if isinstance(metrics, dict) else {},
            kept_units=tuple(int(n) for n in kept if isinstance(n, int)) if isinstance(kept, list) else (),
            energy=_added(ledger.values()),
            ledger=ledger,
            received_bytes=_whole(told.get("received_bytes")),
            wire_bytes=_whole(told.get("wire_bytes")),
            state=state_of(told.get("state")),
            artifact=_words(told.get("artifact")),
            problem=_words(told.get("problem")),
        )

    def metric(self, name: str) -> float | None:
        """Return one figure, or `None` when it is not known."""
        return self.metrics.get(name)


class RoundView(BaseModel):
    """One round, with what its updates say together."""

    run: str
    round: int
    state: RoundState
    agents: tuple[str, ...]
    eased: dict[str, str]
    """Who was asked for less, and why."""
    skipped: dict[str, str]
    """Who was left out when the round was opened, and why."""
    opened: datetime
    closed: datetime | None
    deadline: datetime
    seconds: float | None
    metrics: Json
    """As the engine wrote them when it closed the round."""
    updates: int
    accuracy_sent: Spread | None
    """Of the model as it was sent, on every agent's own held-out part."""
    accuracy: Spread | None
    """Of the model after the agent's own training."""
    joules: dict[Kind, float]
    """Over agents, split by how they are known; never one sum."""
    unknown_energy: int
    """Updates whose joules nobody knows."""
    wire_bytes: int
    """Of all updates together, as they travelled up."""
    received_bytes: int | None
    """What came down for them; `None` when no device said."""

    @classmethod
    def of(cls, record: RoundRecord, updates: Sequence[UpdateView]) -> RoundView:
        """Return the view of a round and of the updates that belong to it."""
        readings = [update.energy for update in updates if update.energy is not None]
        return cls(
            run=record.run,
            round=record.round,
            state=record.state,
            agents=record.agents,
            eased={agent: str(ease.get("reason", "")) for agent, ease in record.eased.items()},
            skipped={agent: str(reason) for agent, reason in record.skipped.items()},
            opened=record.opened,
            closed=record.closed,
            deadline=datetime.fromtimestamp(record.deadline, UTC),
            seconds=record.seconds,
            metrics=record.metrics,
            updates=len(updates),
            accuracy_sent=Spread.over(update.metric("accuracy_sent") for update in updates),
            accuracy=Spread.over(update.metric("accuracy") for update in updates),
            joules=split_by_kind(readings),
            unknown_energy=len(updates) - sum(reading.joules is not None for reading in readings),
            wire_bytes=sum(update.wire_bytes or 0 for update in updates),
            received_bytes=_sum(update.received_bytes for update in updates),
        )


class RefusalView(BaseModel):
    """A reasoned no."""

    id: int
    run: str
    round: int
    agent: str
    reason: str
    when: datetime

    @classmethod
    def of(cls, record: RefusalRecord) -> RefusalView:
        """Return the view of a row."""
        return cls(
            id=record.id,
            run=record.run,
            round=record.round,
            agent=record.agent,
            reason=record.reason,
            when=record.when,
        )


class AgentView(BaseModel):
    """One agent: as last heard, as it introduced itself, and the artifacts it has told of."""

    status: AgentStatus
    card: AgentCard | None
    first_seen: datetime | None
    artifacts: list[Manifest]
    """The newest twenty."""


def views(rounds: Sequence[RoundRecord], updates: Iterable[UpdateView]) -> list[RoundView]:
    """Return the views of rounds, each with its own of the updates."""
    by_round: dict[int, list[UpdateView]] = {record.round: [] for record in rounds}
    for update in updates:
        if update.round in by_round:
            by_round[update.round].append(update)
    return [RoundView.of(record, by_round[record.round]) for record in rounds]


def number(value: object) -> float | None:
    """Return a finite number, or `None` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _words(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _ledger(told: object) -> dict[str, EnergyReading]:
    if not isinstance(told, Mapping):
        return {}
    readings: dict[str, EnergyReading] = {}
    for stage, reading in told.items():
        try:
            readings[str(stage)] = EnergyReading.model_validate(reading)
        except ValidationError:
            # Of another version: unknown joules over an unknown time, which makes the sum unknown too.
            readings[str(stage)] = EnergyReading(seconds=0.0, flags=("unreadable",))
    return readings


def _added(readings: Iterable[EnergyReading]) -> EnergyReading | None:
    readings = list(readings)
    if not readings or any("unreadable" in reading.flags for reading in readings):
        return None
    try:
        return total(readings)
    except ValueError:
        return None
