"""`/metrics`: the present run and every device, for Prometheus.

One label set is one series for Prometheus to keep, so there are few: a device has `PER_DEVICE` at most, told
for `MOST_DEVICES` at most, and what grows without end (rounds, hashes, reasons) is a value and no label. How
joules are known is the label `kind`, where the meter sits `scope`; nothing here adds over either.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import get_args

import psutil
from fastapi import APIRouter
from fastapi.responses import Response

from coordinator.live import AgentStatus, Live, Phase, Status
from coordinator.store.sql import Store
from coordinator.web.models import UpdateView
from foundation.energy import Kind, Scope, Stage
from foundation.prometheus import CONTENT_TYPE, Family, Value, counter, gauge, process_families, render

MOST_DEVICES = 1_000
"""Devices that are told one by one: those online first, then by name; the rest are counted."""
PER_DEVICE = 15
"""Series of one device, at most."""
ROUNDS_BACK = 200
"""Rounds of a run that are read when it is first asked for; from there on each is added."""
LONGEST_LABEL = 100
"""Characters of what a device says of itself."""
PHASES: tuple[Phase, ...] = get_args(Phase)

Figure = Callable[[AgentStatus], float | None]


def routes(store: Store, live: Live) -> APIRouter:
    """Return the route of the metrics."""
    router = APIRouter(include_in_schema=False)
    costs, process = RunCosts(store), psutil.Process()

    def text(status: Status) -> str:
        return render(families(status, costs.of(status.run), process))

    @router.get("/metrics")
    async def metrics() -> Response:
        """Return everything in Prometheus' text form."""
        # The picture belongs to the event loop; writing it for a thousand devices does not.
        return Response(await asyncio.to_thread(text, live.snapshot()), media_type=CONTENT_TYPE)

    return router


def families(status: Status, costs: Costs | None, process: psutil.Process) -> Iterator[Family]:
    """Yield all families: the run, what it cost, the devices, this process."""
    yield from _run(status)
    if status.run is not None and costs is not None:
        yield from _costs(status.run, costs)
    yield from _fleet(status.agents)
    told = sorted(status.agents, key=lambda agent: (not agent.online, agent.agent))[:MOST_DEVICES]
    untold = len(status.agents) - len(told)
    yield gauge("hedgerow_devices_untold", "Devices beyond those told one by one.", [({}, untold)])
    yield from _devices(told)
    yield from process_families(process)


# --- the run -----------------------------------------------------------------------------------------


def _run(status: Status) -> Iterator[Family]:
    named: list[Value] = [] if status.run is None else [({"run": status.run}, 1)]
    yield gauge("hedgerow_run_info", "The run under way, or the last one.", named)
    phases: list[Value] = [({"phase": phase}, status.phase == phase) for phase in PHASES]
    yield gauge("hedgerow_run_phase", "1 for the phase it is in.", phases)
    run = status.run is not None
    for name, told, value in (
        ("hedgerow_run_round", "The present round.", float(status.round) if run else None),
        ("hedgerow_run_rounds", "Rounds that it is to have.", float(status.rounds) if run else None),
        ("hedgerow_run_progress_ratio", "Share of it that is done, 0 to 1.", status.progress),
        ("hedgerow_run_left_seconds", "Seconds left, by the mean of its rounds.", status.eta_s),
        ("hedgerow_run_phase_start_time_seconds", "When its phase began.", status.since.timestamp()),
    ):
        yield gauge(name, told, [({}, value)])


@dataclass
class Costs:
    """What updates told."""

    updates: int = 0
    unknown: int = 0
    """Updates with work whose joules nobody knows."""
    up_bytes: int = 0
    down_bytes: int | None = None
    """`None` while no device has told."""
    joules: dict[tuple[Kind, Scope], float] = field(default_factory=dict)

    def add(self, other: Costs) -> None:
        """Add others' updates."""
        self.updates += other.updates
        self.unknown += other.unknown
        self.up_bytes += other.up_bytes
        if other.down_bytes is not None:
            self.down_bytes = (self.down_bytes or 0) + other.down_bytes
        for key, joules in other.joules.items():
            self.joules[key] = self.joules.get(key, 0.0) + joules


class RunCosts:
    """What the updates of a run told, each round read anew only when updates came to it; from any thread."""

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._run: str | None = None
        self._first = 0
        self._rounds: dict[int, Costs] = {}

    def of(self, run: str | None) -> Costs | None:
        """Return the costs of a run, from `ROUNDS_BACK` rounds before it was first asked for."""
        if run is None:
            return None
        with self._lock:
            counts = self._store.counts(run)
            if run != self._run:
                self._run, self._rounds = run, {}
                self._first = max(counts, default=0) - ROUNDS_BACK
            total = Costs()
            for round, count in counts.items():
                if round <= self._first:
                    continue
                if (known := self._rounds.get(round)) is None or known.updates != count:
                    updates = map(UpdateView.of, self._store.updates(run, round))
                    known = self._rounds[round] = costs_of(updates)
                total.add(known)
            return total


def costs_of(updates: Iterable[UpdateView]) -> Costs:
    """Return the sums over updates: joules by kind and scope, all stages."""
    result = Costs()
    for update in updates:
        one = Costs(1, up_bytes=update.wire_bytes or 0, down_bytes=update.received_bytes)
        for reading in update.ledger.values():
            if reading.joules is not None and reading.kind is not Kind.NONE:
                key = reading.kind, reading.scope
                one.joules[key] = one.joules.get(key, 0.0) + reading.joules
            elif reading.seconds > 0 or reading.flags:
                one.unknown = 1
        result.add(one)
    return result


def _costs(run: str, costs: Costs) -> Iterator[Family]:
    labels = {"run": run}
    joules: list[Value] = [
        ({**labels, "kind": kind, "scope": scope}, value)
        for (kind, scope), value in sorted(costs.joules.items())
    ]
    yield counter("hedgerow_run_energy_joules_total", "Joules that updates told, by kind and scope.", joules)
    for name, told, value in (
        ("hedgerow_run_updates_total", "Updates that came in.", costs.updates),
        ("hedgerow_run_unknown_energy_updates_total", "Updates whose joules nobody knows.", costs.unknown),
        ("hedgerow_run_received_bytes_total", "Bytes of updates as they came up.", costs.up_bytes),
        ("hedgerow_run_sent_bytes_total", "Bytes that devices say came down.", costs.down_bytes),
    ):
        yield counter(name, told, [(labels, value)])


# --- the devices -------------------------------------------------------------------------------------


def _fleet(agents: Sequence[AgentStatus]) -> Iterator[Family]:
    stages = Counter(agent.stage for agent in agents if agent.online and agent.stage is not None)
    yield gauge("hedgerow_devices_known", "Devices that were ever heard of.", [({}, len(agents))])
    online = sum(agent.online for agent in agents)
    yield gauge("hedgerow_devices_online", "Devices that are connected.", [({}, online)])
    doing: list[Value] = [({"stage": stage}, stages[stage]) for stage in Stage]
    yield gauge("hedgerow_devices_in_stage", "Devices online, by what they do.", doing)


FIGURES: tuple[tuple[str, str, Figure], ...] = (
    ("hedgerow_device_online", "1 while it is connected.", lambda a: float(a.online)),
    ("hedgerow_device_problem", "1 while its card tells of one.", lambda a: float(a.problem is not None)),
    (
        "hedgerow_device_unavailable",
        "1 while its owner's limits keep it from work.",
        lambda a: float(a.unavailable is not None),
    ),
    (
        "hedgerow_device_skipped",
        "1 while the present round does without it.",
        lambda a: float(a.skipped is not None),
    ),
    (
        "hedgerow_device_last_seen_timestamp_seconds",
        "When it was last heard, since the epoch.",
        lambda a: None if a.last_seen is None else a.last_seen.timestamp(),
    ),
    ("hedgerow_device_round", "The round that it works on or worked on last.", lambda a: a.round),
    ("hedgerow_device_progress_ratio", "Share of its work that is done, 0 to 1.", lambda a: a.progress),
    (
        "hedgerow_device_accuracy_ratio",
        "Right answers on its own held-out part, 0 to 1.",
        lambda a: a.accuracy,
    ),
    ("hedgerow_device_kept_units_ratio", "FFL units that are left, 0 to 1.", lambda a: _kept(a)),
    ("hedgerow_device_resident_memory_bytes", "Memory of its agent.", lambda a: a.rss_bytes),
)


def _devices(agents: Sequence[AgentStatus]) -> Iterator[Family]:
    infos: list[Value] = [
        (
            {
                "device": agent.agent,
                "profile": _short(agent.profile),
                "version": _short(agent.version),
                "source": _short(agent.energy_source),
            },
            1,
        )
        for agent in agents
    ]
    yield gauge("hedgerow_device_info", "Its profile, version and energy source.", infos)
    for name, told, figure in FIGURES:
        yield gauge(name, told, [({"device": agent.agent}, figure(agent)) for agent in agents])
    for name, told, figure in (
        ("hedgerow_device_sent_bytes_total", "Bytes up, since its agent's start.", lambda a: a.sent_bytes),
        (
            "hedgerow_device_received_bytes_total",
            "Bytes down, since its agent's start.",
            lambda a: a.received_bytes,
        ),
    ):
        yield counter(name, told, [({"device": agent.agent}, figure(agent)) for agent in agents])
    metered = [agent for agent in agents if agent.energy_kind is not Kind.NONE]
    joules: list[Value] = [
        ({"device": a.agent, "kind": a.energy_kind, "source": _short(a.energy_source)}, a.joules)
        for a in metered
    ]
    yield counter("hedgerow_device_energy_joules_total", "Joules since its agent's start.", joules)
    watts: list[Value] = [({"device": a.agent, "kind": a.energy_kind}, a.watts) for a in metered]
    yield gauge("hedgerow_device_power_watts", "Power at present, a mean over about a second.", watts)


def _kept(agent: AgentStatus) -> float | None:
    dense = len(agent.kept_units) * (agent.hidden_units or 0)
    return sum(agent.kept_units) / dense if dense else None


def _short(text: str | None) -> str:
    return (text or "unknown")[:LONGEST_LABEL]
