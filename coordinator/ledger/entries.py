"""From a run in the store to entries: one device, one round, one stage. What cannot be read is told."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from coordinator.store.records import RoundRecord, RunRecord, state_of
from coordinator.store.sql import Store
from coordinator.wall.join import WallRecord
from foundation.energy import EnergyReading, Stage
from foundation.frozen import Frozen
from foundation.messages import AgentCard, DeviceState, Json
from foundation.spec import ModelSpec

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

MOST = 1e15
"""Joules and seconds beyond this are no reading: a device of 100 W would need 300,000 years."""


class Entry(Frozen):
    """One stage of one device in one round. A round's readings begin where those of the update before end."""

    agent: str
    round: int
    stage: Stage
    reading: EnergyReading


class Turn(Frozen):
    """What else one device told of one round; `None` where it did not."""

    agent: str
    round: int
    accuracy_sent: float | None = None
    """Of the model as it came down, on the device's own test part."""
    accuracy: float | None = None
    """After local training."""
    steps: float | None = None
    """Steps of the optimizer."""
    kept_units: tuple[int, ...] = ()
    """FFL units at the end of the round, by block."""
    down_bytes: int | None = None
    """Payload with the parts' headers, as the device counted it."""
    up_bytes: int | None = None
    """The same of the update, as the coordinator counted it."""
    interface_received_bytes: int | None = None
    """All that the network interface saw in that time, other programs' included."""
    interface_sent_bytes: int | None = None
    state: DeviceState | None = None
    """Power mode, clock, heat, throttling and threads of the device in that round."""
    radiated_j: float | None = None
    """Radiated RF energy of sending the update, modelled, not battery energy: in no sum of joules."""


class Skipped(Frozen):
    """What could not be read, and is therefore in no figure."""

    agent: str
    round: int
    what: str


@dataclass(frozen=True, slots=True)
class Book:
    """All that the store knows of a run's costs."""

    record: RunRecord
    spec: ModelSpec | None
    """`None` when the run's cannot be read."""
    rounds: tuple[RoundRecord, ...]
    received: Mapping[int, int]
    """Updates by round, unreadable ones as well."""
    entries: tuple[Entry, ...]
    turns: tuple[Turn, ...]
    skipped: tuple[Skipped, ...]
    cards: Mapping[str, AgentCard | None]
    wall: tuple[WallRecord, ...] = ()
    """What smart plugs said of updates: beside the entries, never among them."""

    @property
    def run(self) -> str:
        """The run's name."""
        return self.record.run

    def profile(self, agent: str) -> str | None:
        """Return the device profile that an agent's card names; `None` when nobody knows."""
        card = self.cards.get(agent)
        return card.profile if card else None


def read(store: Store, run: str) -> Book:
    """Return what the store has of a run; raises `StoreError` when there is no such run."""
    record = store.run(run)
    entries: list[Entry] = []
    turns: list[Turn] = []
    skipped: list[Skipped] = []
    summaries = store.summaries(run)
    for number, agent, text in summaries:
        told = _object(text)
        if told is None:
            skipped.append(Skipped(agent=agent, round=number, what="the update's summary is no JSON object"))
            continue
        turns.append(_turn(agent, number, told))
        found = list(_entries(agent, number, told))
        entries += [one for one in found if isinstance(one, Entry)]
        skipped += [one for one in found if isinstance(one, Skipped)]
    wall = [_wall(agent, number, text) for number, agent, text in store.walls(run)]
    skipped += [one for one in wall if isinstance(one, Skipped)]
    return Book(
        record=record,
        spec=_spec(record.spec_json),
        rounds=tuple(store.rounds(run)),
        received=Counter(number for number, _, _ in summaries),
        entries=tuple(entries),
        turns=tuple(turns),
        skipped=tuple(skipped),
        cards=store.cards(),
        wall=tuple(one for one in wall if isinstance(one, WallRecord)),
    )


def _object(text: str) -> Json | None:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None


def _wall(agent: str, number: int, text: str) -> WallRecord | Skipped:
    try:
        return WallRecord.model_validate_json(text)
    except ValidationError:
        return Skipped(agent=agent, round=number, what="what its plug said")


def _spec(text: str) -> ModelSpec | None:
    try:
        return ModelSpec.model_validate_json(text)
    except ValidationError:
        return None


def _entries(agent: str, number: int, told: Json) -> Iterator[Entry | Skipped]:
    """Give the entries of an update, and what of its ledger is none."""
    ledger = told.get("ledger")
    if not isinstance(ledger, Mapping):
        yield Skipped(agent=agent, round=number, what="the update has no ledger")
        return
    for stage, said in ledger.items():
        reading = _reading(said)
        if reading is None or stage not in set(Stage):
            what = (
                f"the reading of {stage[:40]!r}"
                if reading is None
                else f"a reading of no stage, {stage[:40]!r}"
            )
            yield Skipped(agent=agent, round=number, what=what)
        else:
            yield Entry(agent=agent, round=number, stage=Stage(stage), reading=reading)


def _reading(told: Any) -> EnergyReading | None:
    try:
        reading = EnergyReading.model_validate(told)
    except (ValidationError, OverflowError):
        return None
    bounded = (
        reading.joules,
        reading.idle_joules,
        reading.uncertainty_joules,
        reading.net_uncertainty_joules,
        reading.process_joules,
        reading.seconds,
    )
    fine = all(value is None or 0 <= value <= MOST for value in bounded)
    return reading if fine else None


def _turn(agent: str, number: int, told: Json) -> Turn:
    metrics = told.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    kept = told.get("kept_units")
    units = [_whole(unit) for unit in kept] if isinstance(kept, list) else []
    whole = tuple(unit for unit in units if unit is not None)
    return Turn(
        agent=agent,
        round=number,
        accuracy_sent=number_of(metrics.get("accuracy_sent")),
        accuracy=number_of(metrics.get("accuracy")),
        steps=number_of(metrics.get("steps")),
        kept_units=whole if len(whole) == len(units) else (),
        down_bytes=_whole(told.get("received_bytes")),
        up_bytes=_whole(told.get("wire_bytes")),
        interface_received_bytes=_whole(told.get("interface_received_bytes")),
        interface_sent_bytes=_whole(told.get("interface_sent_bytes")),
        state=state_of(told.get("state")),
    )


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return items by key, each list in the order they came."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def number_of(value: object) -> float | None:
    """Return a number within `MOST` of 0, or `None` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and abs(value) <= MOST else None


def _whole(value: object) -> int | None:
    fine = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
    return value if fine and isinstance(value, int) else None
