"""What the store gives and takes: frozen records, and JSON as it keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, TypeAlias, get_args

from pydantic import ValidationError

from foundation.errors import StoreError
from foundation.messages import AgentCard, DeviceState, Json

RunState: TypeAlias = Literal["waiting", "running", "paused", "finished", "failed", "stopped"]
RUN_STATES: tuple[str, ...] = get_args(RunState)

RoundState: TypeAlias = Literal["open", "closed"]

EPOCH = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One federation; the last four fields are the store's, and what a caller puts there is not kept."""

    run: str
    strategy: str
    settings_json: str
    spec_json: str
    rounds: int
    seed: int
    state: RunState = "waiting"
    reason: str = ""
    created: datetime = EPOCH
    changed: datetime = EPOCH
    """When the state was last set."""


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """An agent that has introduced itself at least once."""

    card: AgentCard
    first_seen: datetime
    last_seen: datetime


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One turn of a run: who was asked, until when, and what came of it."""

    run: str
    round: int
    state: RoundState
    agents: tuple[str, ...]
    """Those that were asked."""
    deadline: float
    """UTC, seconds since the epoch."""
    opened: datetime
    closed: datetime | None = None
    metrics: Json = field(default_factory=dict)
    eased: Json = field(default_factory=dict)
    """By agent: with what ease it is asked, as `coordinator.easing.Ease`; most rounds have none."""
    skipped: Json = field(default_factory=dict)
    """By agent: why it was left out when the round was opened."""
    absorbed: tuple[str, ...] | None = None
    """Whose own updates the state after it was made of; `None` while it is open, or where nobody noted it."""
    late: tuple[tuple[int, str], ...] = ()
    """Updates of earlier rounds that it was made of as well: round and agent."""

    @property
    def seconds(self) -> float | None:
        """From opening to closing; `None` while the round is open."""
        return None if self.closed is None else (self.closed - self.opened).total_seconds()


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """One update, without its frame."""

    run: str
    round: int
    agent: str
    received: datetime
    summary: Json
    frame_sha256: str | None
    """`None` once the frame has been released."""
    frame_bytes: int


@dataclass(frozen=True, slots=True)
class RefusalRecord:
    """A reasoned no of one agent."""

    id: int
    run: str
    round: int
    agent: str
    reason: str
    when: datetime


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something that happened, in words; `id` grows by at least one with every event."""

    id: int
    kind: str
    when: datetime
    text: str
    run: str | None = None
    round: int | None = None
    agent: str | None = None
    data: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlugRecord:
    """A plug that a device is on."""

    id: int
    agent: str
    plug: str
    """As the settings name it."""
    since: float
    """UTC seconds since the epoch: what was before is not joined to it."""
    step_j: float | None
    """Finest step of its total so far; `None` before it has told one."""
    step_w: float | None
    """The same of its watts."""


@dataclass(frozen=True, slots=True)
class PlugReading:
    """What a plug said; `None` for what it did not."""

    at: float
    """When it arrived here, UTC seconds since the epoch."""
    watts: float | None
    joules: float | None
    """Its own total."""


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event on its way into the store; `when` is set by the store if it is `None`."""

    kind: str
    text: str
    run: str | None = None
    round: int | None = None
    agent: str | None = None
    data: Json = field(default_factory=dict)
    when: datetime | None = None


def state_of(told: object) -> DeviceState | None:
    """Return what a stored update tells of its device's conditions; `None` for anything else."""
    try:
        return None if told is None else DeviceState.model_validate(told)
    except (ValidationError, OverflowError):
        return None


def dumps(value: Mapping[str, object]) -> str:
    """Return canonical JSON; what is not finite becomes null, as JSON has no word for it.

    Raises `StoreError` for values that JSON cannot hold.
    """
    try:
        return json.dumps(finite(value), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"cannot be kept as JSON: {error}") from error


def loads(text: str) -> Json:
    """Return the object that `dumps` wrote; raises `StoreError` if it is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise StoreError(f"a row holds broken JSON ({error}): restore the database from a copy") from error
    if not isinstance(value, dict):
        raise StoreError("a row holds JSON that is no object: restore the database from a copy")
    return value


def finite(value: object) -> object:
    """Return `value` with every NaN and infinity replaced by `None`, all the way down."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [finite(item) for item in items]
    return value
