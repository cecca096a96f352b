"""Stores with made-up ledgers, whose sums are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from coordinator.ledger.entries import Book, read
from coordinator.store import schema
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from coordinator.wall.join import WallPhase, WallRecord
from foundation.energy import EnergyReading, Kind, Scope, Stage
from foundation.messages import AgentCard
from tests.coordinator.filled_store import NOON

SPEC = (
    '{"input": "image", "shape": [1, 8, 8], "classes": 10, "width": 32, "depth": 2, "heads": 4,'
    ' "ffl_ratio": 4.0, "patch": 4, "pool": "mean"}'
)
DENSE = [128, 128]
PROFILES = {
    "a": "raspberry-pi-4b",
    "b": "raspberry-pi-4b",
    "c": "raspberry-pi-5",
    "n": "jetson-orin-nano",
    "u": "unknown-linux",
}


def told(
    joules: float | None,
    seconds: float = 1.0,
    kind: Kind = Kind.MODELLED,
    scope: Scope = Scope.BOARD_DC,
    bar: float | None = None,
    sensor: str = "utilisation",
    **more: Any,
) -> dict[str, Any]:
    """A reading as an update's summary has it."""
    if joules is None:
        return EnergyReading(seconds=seconds).model_dump(mode="json")
    return EnergyReading(
        joules=joules,
        idle_joules=joules / 2,
        seconds=seconds,
        kind=kind,
        scope=scope,
        sensor=sensor,
        coverage=1.0,
        uncertainty_joules=joules / 10 if bar is None else bar,
        **more,
    ).model_dump(mode="json")


def measured(joules: float, seconds: float = 1.0, bar: float | None = None, sensor: str = "ina3221") -> Any:
    return told(joules, seconds, Kind.MEASURED, Scope.MODULE, bar, sensor)


def open_run(store: Store, run: str = "r", strategy: str = "pfl_tpp", settings: str = "{}") -> None:
    store.open_run(RunRecord(run, strategy, settings, SPEC, 10, 7))
    store.set_run_state(run, "running")
    for agent, profile in PROFILES.items():
        store.upsert_agent(AgentCard(agent=agent, version="0", profile=profile, examples=100), NOON)


def put(store: Store, round: int, agent: str, ledger: Mapping[str, Any], run: str = "r", **more: Any) -> None:
    """Keep an update; `accuracy`, `accuracy_sent` and `steps` become metrics."""
    store.open_round(run, round, [agent], 0)
    names = ("accuracy", "accuracy_sent", "steps")
    summary = {
        "metrics": {name: more.pop(name) for name in names if name in more},
        "kept_units": DENSE,
        "ledger": dict(ledger),
        "received_bytes": 1000,
        "wire_bytes": 500,
        **more,
    }
    assert store.add_update(run, round, agent, f"{run} {round} {agent}".encode(), summary)


def book(store: Store, run: str = "r") -> Book:
    return read(store, run)


def spoil(store: Store, round: int, agent: str, text: str) -> None:
    """Write another summary over an update's, as a disk or another version might."""
    table = schema.updates
    change = sa.update(table).where(table.c.round == round, table.c.agent == agent)
    with store._writing() as connection:
        assert connection.execute(change.values(summary_json=text)).rowcount == 1


def wall(
    store: Store, number: int, agent: str, joules: float | None, *phases: float, run: str = "r", **more: Any
) -> None:
    """Keep what a plug said of an update."""

    def at_wall(value: float | None, seconds: float) -> EnergyReading:
        if value is None:
            return EnergyReading(seconds=seconds, scope=Scope.WALL_AC, sensor="plug")
        return EnergyReading(
            joules=value,
            seconds=seconds,
            kind=more.get("kind", Kind.MEASURED),
            scope=Scope.WALL_AC,
            sensor="plug",
            coverage=1.0,
            uncertainty_joules=value / 20,
        )

    record = WallRecord(
        agent=agent,
        round=number,
        plug=f"shelly:{agent}",
        reading=at_wall(joules, 100.0),
        phases=tuple(WallPhase(stage=Stage.TRAIN, reading=at_wall(phase, 60.0)) for phase in phases),
        why="it was silent" if joules is None else None,
    )
    store.add_wall(run, number, agent, record.model_dump_json())
