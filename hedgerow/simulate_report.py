"""What a simulation says while it runs, and what it found: tables for people, JSON for machines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from coordinator.live import Event, Listener
from coordinator.store.records import UpdateRecord
from coordinator.store.sql import Store
from foundation.artifact import Manifest
from foundation.energy import EnergyReading, Kind, Stage, split_by_kind, total
from foundation.frozen import Frozen
from foundation.messages import Json
from foundation.spec import ModelSpec
from hedgerow.demo_screen import bytes_text, joules_text

SHOWN_DEVICES = 20


class DeviceRound(Frozen):
    """One device in one round."""

    round: int
    agent: str
    examples: int
    accuracy_sent: float
    """Of the model as it was sent, on the device's own test part."""
    accuracy: float
    """After local training."""
    kept_units: tuple[int, ...]
    """FFL units kept, by block."""
    down_bytes: int
    up_bytes: int
    train_s: float
    """Wall time of training, pruning and evaluating."""
    energy: EnergyReading
    """Of all stages of the round; the part of the receiving and sending that is not the work's is small."""


class RoundResult(Frozen):
    """One round: unweighted means over its devices, the worst of them, and sums."""

    round: int
    devices: int
    seconds: float | None
    accuracy_sent: float
    accuracy_sent_worst: float
    accuracy: float
    accuracy_worst: float
    units_gone: float
    """Share of all FFL units, over devices and blocks, that are physically gone."""
    down_bytes: int
    up_bytes: int
    train_s: float
    joules: dict[Kind, float]


class SimulationReport(Frozen):
    """The whole simulation."""

    simulation: Json
    spec: ModelSpec
    seconds: float
    """Of this call, which may have done some of the rounds only."""
    rounds: tuple[RoundResult, ...]
    devices: tuple[DeviceRound, ...]
    """Every device in every round that asked it, by round and name."""
    refusals: tuple[str, ...]
    """What devices would not do, with their reasons."""
    artifacts: tuple[Manifest, ...]

    @property
    def last(self) -> RoundResult:
        """The last round."""
        return self.rounds[-1]


def gather(store: Store, run: str, simulation: Json, seconds: float) -> SimulationReport:
    """Read a finished run from its store."""
    record = store.run(run)
    spec = ModelSpec.model_validate_json(record.spec_json)
    devices = [_device_round(update) for update in store.history(run)]
    rounds = [
        _round_result(row.round, row.seconds, [d for d in devices if d.round == row.round], spec.hidden)
        for row in store.rounds(run)
    ]
    return SimulationReport(
        simulation=simulation,
        spec=spec,
        seconds=seconds,
        rounds=tuple(rounds),
        devices=tuple(devices),
        refusals=tuple(f"round {r.round}, {r.agent}: {r.reason}" for r in store.refusals(run)),
        artifacts=tuple(sorted(store.artifacts(run), key=lambda m: m.agent)),
    )


def _device_round(record: UpdateRecord) -> DeviceRound:
    summary = record.summary
    ledger = {
        Stage(stage): EnergyReading.model_validate(reading) for stage, reading in summary["ledger"].items()
    }
    worked = (Stage.TRAIN, Stage.PRUNE, Stage.EVALUATE)
    return DeviceRound(
        round=record.round,
        agent=record.agent,
        examples=summary["examples"],
        accuracy_sent=summary["metrics"]["accuracy_sent"],
        accuracy=summary["metrics"]["accuracy"],
        kept_units=tuple(summary["kept_units"]),
        down_bytes=summary["received_bytes"],
        up_bytes=summary["wire_bytes"],
        train_s=sum(ledger[stage].seconds for stage in worked if stage in ledger),
        energy=total(ledger.values()),
    )


def _round_result(
    number: int, seconds: float | None, devices: Sequence[DeviceRound], hidden: int
) -> RoundResult:
    kept = [units for d in devices for units in d.kept_units]
    return RoundResult(
        round=number,
        devices=len(devices),
        seconds=seconds,
        accuracy_sent=statistics.fmean(d.accuracy_sent for d in devices),
        accuracy_sent_worst=min(d.accuracy_sent for d in devices),
        accuracy=statistics.fmean(d.accuracy for d in devices),
        accuracy_worst=min(d.accuracy for d in devices),
        units_gone=1 - sum(kept) / (len(kept) * hidden),
        down_bytes=sum(d.down_bytes for d in devices),
        up_bytes=sum(d.up_bytes for d in devices),
        train_s=sum(d.train_s for d in devices),
        joules=split_by_kind(d.energy for d in devices),
    )


# --- while it runs -------------------------------------------------------------------------------


class Watch:
    """Shows a simulation while it runs: a bar on a terminal, a line for each round in a pipe."""

    def __init__(self, console: Console, rounds: int, devices: int) -> None:
        self._console, self._rounds, self._devices = console, rounds, devices
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[eta]}  {task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=rounds * devices, eta="", figures="")
        self._began: tuple[float, int] | None = None
        self._round, self._updates, self._figures = 0, 0, ""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, what: str) -> None:
        """Say what is being done before the first round."""
        self._progress.update(self._task, description=what)

    async def follow(self, listener: Listener, hidden: int) -> None:
        """Show what the coordinator's event bus tells, until it ends; a block has `hidden` units."""
        self.say("waiting for the devices")
        async for event in listener:
            self._heard(event, hidden)

    def _heard(self, event: Event, hidden: int) -> None:
        if event.kind == "update" and event.round is not None:
            if event.round != self._round:
                self._round, self._updates = event.round, 0
            self._updates += 1
        elif event.kind == "round_closed" and event.round is not None:
            self._round, self._updates = event.round, self._devices
            self._figures = figures(event.data["metrics"], hidden)
            line = f"round {event.round:>{len(str(self._rounds))}}/{self._rounds}  {self._figures}"
            seconds = f"{event.data['metrics']['seconds']:.1f} s"
            self._console.print(f"{line}  {seconds}  {self._eta()}", highlight=False, soft_wrap=True)
        elif event.kind in ("refusal", "problem"):
            self._console.print(event.text, style="yellow", markup=False, highlight=False, soft_wrap=True)
        self._show()

    def _show(self) -> None:
        done = max(0, self._round - 1) * self._devices + min(self._updates, self._devices)
        if self._began is None and done:
            self._began = time.monotonic(), done
        self._progress.update(
            self._task,
            completed=done,
            description=f"round {max(1, self._round)}/{self._rounds}",
            eta=self._eta(),
            figures=self._figures,
        )

    def _eta(self) -> str:
        """Return the time left at the pace since the first update was heard."""
        done = max(0, self._round - 1) * self._devices + self._updates
        if self._began is None or done <= self._began[1]:
            return "ETA –"
        pace = (time.monotonic() - self._began[0]) / (done - self._began[1])
        return f"ETA {pace * (self._rounds * self._devices - done):.0f} s"


def figures(metrics: Json, hidden: int) -> str:
    """Return accuracy and units of a round in one phrase."""
    text = f"accuracy {metrics['accuracy_sent']:.3f} sent, {metrics['accuracy']:.3f} after"
    return f"{text}, units kept {metrics['kept_units'] / hidden:.0%}"


# --- at the end ----------------------------------------------------------------------------------


def show(report: SimulationReport, console: Console) -> None:
    """Print the result; each table fits a terminal of 80 columns."""
    for table in (_rounds(report), _devices(report)):
        console.print()
        console.print(table)
    hidden = len([d for d in report.devices if d.round == report.last.round]) - SHOWN_DEVICES
    if hidden > 0:
        console.print(f"... and {hidden} more devices: see --json", highlight=False)
    if report.artifacts:
        console.print()
        console.print(_artifacts(report))
    for refusal in report.refusals:
        console.print(f"refused: {refusal}", style="yellow", markup=False, highlight=False)
    console.print(_energy_line(report), highlight=False)
    console.print(f"the simulation took {report.seconds:.1f} s", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        left = name in ("round", "device")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _rounds(report: SimulationReport) -> Table:
    title = "rounds: accuracy as sent and after training, mean and worst device"
    table = _table(
        title, "round", "sent", "worst", "after", "worst", "gone", "down", "up", "train s", "wall s"
    )
    for r in report.rounds:
        table.add_row(
            str(r.round),
            f"{r.accuracy_sent:.3f}",
            f"{r.accuracy_sent_worst:.3f}",
            f"{r.accuracy:.3f}",
            f"{r.accuracy_worst:.3f}",
            f"{r.units_gone:.1%}",
            bytes_text(r.down_bytes),
            bytes_text(r.up_bytes),
            f"{r.train_s:.1f}",
            "–" if r.seconds is None else f"{r.seconds:.1f}",
        )
    return table


def _devices(report: SimulationReport) -> Table:
    last = [d for d in report.devices if d.round == report.last.round]
    table = _table(
        f"devices in round {report.last.round}, of {report.spec.depth} x {report.spec.hidden} FFL units",
        *("device", "examples", "sent", "after", "kept", "down", "up", "train s"),
    )
    for d in last[:SHOWN_DEVICES]:
        table.add_row(
            d.agent,
            str(d.examples),
            f"{d.accuracy_sent:.3f}",
            f"{d.accuracy:.3f}",
            "+".join(map(str, d.kept_units)),
            bytes_text(d.down_bytes),
            bytes_text(d.up_bytes),
            f"{d.train_s:.2f}",
        )
    return table


def _artifacts(report: SimulationReport) -> Table:
    title = "personal ONNX models, dense → pruned"
    table = _table(title, "device", "parameters", "bytes", "ms a sample", "parity")
    for m in report.artifacts[:SHOWN_DEVICES]:
        latency = [f"{ms:.2f}" if ms is not None else "–" for ms in (m.dense_latency_ms, m.latency_ms)]
        table.add_row(
            m.agent,
            f"{m.dense_parameters:,} → {m.parameters:,}",
            f"{bytes_text(m.dense_bytes)} → {bytes_text(m.bytes)}",
            " → ".join(latency),
            f"{m.parity:.0e}",
        )
    return table


def _energy_line(report: SimulationReport) -> str:
    split = split_by_kind(d.energy for d in report.devices)
    if not split:
        return "energy: none; give --profile for joules from a power model (see firmware_profiles/)"
    parts = ", ".join(joules_text(joules, kind) for kind, joules in split.items())
    return f"energy of all devices and rounds: {parts} (this machine's, by CPU time of the work)"
