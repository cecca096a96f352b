"""What this agent tells Prometheus: where it stands, its joules by stage, its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import psutil

from edge_agent.agent import Agent
from edge_agent.surroundings import hottest_c
from foundation.energy import Kind, Stage
from foundation.messages import Telemetry
from foundation.prometheus import Family, Value, counter, gauge, process_families


def families(agent: Agent, process: psutil.Process) -> Iterator[Family]:
    """Yield all families of one agent. What it keeps to itself (privacy.metrics) is not here either."""
    told = agent.telemetry(process.memory_info().rss)
    meter = agent.meter
    who = {"agent": agent.name, "version": version("hedgerow"), "profile": agent.profile}
    yield gauge("hedgerow_agent_info", "Which agent this is.", [({**who, "source": meter.source}, 1)])
    yield from _energy(agent)
    yield from _standing(told)
    yield counter(
        "hedgerow_agent_paused_seconds_total",
        "Seconds in which training gave way to answering.",
        [({}, agent.paused_s)],
    )
    yield gauge(
        "hedgerow_agent_outbox_updates",
        "Updates that the coordinator has not confirmed.",
        [({}, agent.vault.unconfirmed())],
    )
    yield gauge("hedgerow_agent_temperature_celsius", "Of the hottest thermal zone.", [({}, hottest_c())])
    unavailable = agent.limits.look() is not None
    yield gauge(
        "hedgerow_agent_unavailable", "1 while its owner's limits keep it from work.", [({}, unavailable)]
    )
    yield from process_families(process)


def _energy(agent: Agent) -> Iterator[Family]:
    places = agent.meter.since_start()
    joules: list[Value] = [
        ({"stage": stage, "kind": reading.kind, "scope": scope}, reading.joules)
        for (stage, scope), reading in sorted(places.items())
        if reading.kind is not Kind.NONE
    ]
    name = "hedgerow_agent_energy_joules_total"
    yield counter(name, "Joules since the start, by stage, kind and scope.", joules)
    seconds: dict[Stage, float] = {}
    for (stage, _), reading in sorted(places.items()):
        seconds[stage] = seconds.get(stage, 0.0) + reading.seconds
    spent: list[Value] = [({"stage": stage}, value) for stage, value in seconds.items()]
    yield counter("hedgerow_agent_stage_seconds_total", "Seconds since the start, by stage.", spent)
    kind = agent.meter.kind
    watts: list[Value] = [] if kind is Kind.NONE else [({"kind": kind}, agent.meter.watts())]
    yield gauge("hedgerow_agent_power_watts", "Power at present, a mean over about a second.", watts)


def _standing(told: Telemetry) -> Iterator[Family]:
    stages: list[Value] = [({"stage": stage}, told.stage is stage) for stage in Stage]
    yield gauge("hedgerow_agent_stage", "1 for what it does.", stages)
    dense = len(told.kept_units) * told.hidden_units
    for name, text, value in (
        ("hedgerow_agent_round", "The round that it works on or worked on last.", told.round),
        ("hedgerow_agent_progress_ratio", "Share of its work that is done, 0 to 1.", told.progress),
        ("hedgerow_agent_left_seconds", "Seconds left of its work.", told.eta_s),
        ("hedgerow_agent_accuracy_ratio", "Right answers on its own held-out part, 0 to 1.", told.accuracy),
        (
            "hedgerow_agent_kept_units_ratio",
            "FFL units that are left, 0 to 1.",
            sum(told.kept_units) / dense if dense else None,
        ),
    ):
        yield gauge(name, text, [({}, value)])
    yield counter("hedgerow_agent_sent_bytes_total", "Bytes sent since the start.", [({}, told.sent_bytes)])
    received = "hedgerow_agent_received_bytes_total"
    yield counter(received, "Bytes received since the start.", [({}, told.received_bytes)])
