"""What the demo found, as one value: printed as tables for people, as JSON for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.table import Table

from foundation.artifact import Manifest
from foundation.energy import EnergyReading, Kind, Stage
from foundation.frozen import Frozen
from hedgerow.demo_screen import bytes_text, joules_text

if TYPE_CHECKING:
    from hedgerow.demo import Federation


class Sample(Frozen):
    """Held-out samples that a device's own server answered."""

    agent: str
    address: str
    predicted: tuple[str, ...]
    probability: tuple[float, ...]
    truth: tuple[str, ...]
    request_ms: float

    @property
    def hits(self) -> int:
        """How many were right."""
        return sum(p == t for p, t in zip(self.predicted, self.truth, strict=True))


class DeviceReport(Frozen):
    """One device at the end of the run."""

    agent: str
    examples: int
    accuracy_sent: float
    """Of the model as it was sent in the last round, on the device's own test part."""
    accuracy: float
    """After the last round's local training; the exported model's."""
    reference_sent: float | None = None
    reference: float | None = None
    """The same two for FedAvg with the dense model, on the same fleet."""
    kept_units: tuple[int, ...]
    manifest: Manifest
    down_bytes: int
    up_bytes: int
    ledger: dict[Stage, EnergyReading]
    """All rounds together; the sending of the last update is not in it, as an update cannot hold itself."""


class DemoReport(Frozen):
    """The whole demo."""

    strategy: str
    dataset: str
    partition: str
    rounds: int
    seed: int
    seconds: float
    """From the first process started to the last sample answered."""
    broker: str
    devices: tuple[DeviceReport, ...]
    samples: tuple[Sample, ...]

    def with_reference(self, updates: Sequence[dict[str, Any]]) -> Self:
        """Return the report with FedAvg's figures beside each device's."""
        last = {u["agent"]: u["metrics"] for u in updates if u["round"] == self.rounds}
        devices = tuple(
            d.model_copy(
                update={
                    "reference_sent": last[d.agent]["accuracy_sent"],
                    "reference": last[d.agent]["accuracy"],
                }
            )
            for d in self.devices
        )
        return self.model_copy(update={"devices": devices})


def gather(federation: Federation, run: str, samples: Sequence[Sample], seconds: float) -> DemoReport:
    """Read a finished run from the coordinator's API."""
    options = federation.options
    updates = federation.items(f"/api/v1/runs/{run}/updates")
    manifests = {a["agent"]: a for a in federation.items("/api/v1/artifacts") if a["run"] == run}
    devices = []
    for agent in sorted({u["agent"] for u in updates}):
        own = sorted((u for u in updates if u["agent"] == agent), key=lambda u: int(u["round"]))
        last = own[-1]
        devices.append(
            DeviceReport(
                agent=agent,
                examples=last["examples"],
                accuracy_sent=last["metrics"]["accuracy_sent"],
                accuracy=last["metrics"]["accuracy"],
                kept_units=tuple(last["kept_units"]),
                manifest=Manifest.model_validate(manifests[agent]),
                down_bytes=sum(u["received_bytes"] or 0 for u in own),
                up_bytes=sum(u["wire_bytes"] or 0 for u in own),
                ledger=summed([u["ledger"] for u in own]),
            )
        )
    return DemoReport(
        strategy=options.strategy,
        dataset=options.dataset,
        partition=options.partition,
        rounds=options.rounds,
        seed=options.seed,
        seconds=seconds,
        broker=federation.broker_url,
        devices=tuple(devices),
        samples=tuple(samples),
    )


def summed(ledgers: Sequence[dict[str, Any]]) -> dict[Stage, EnergyReading]:
    """Add the ledgers of one device's rounds, stage by stage."""
    result: dict[Stage, EnergyReading] = {}
    for ledger in ledgers:
        for name, fields in ledger.items():
            reading, stage = EnergyReading.model_validate(fields), Stage(name)
            result[stage] = result[stage] + reading if stage in result else reading
    return result


def show(report: DemoReport, console: Console) -> None:
    """Print the tables; each fits a terminal of 80 columns."""
    for table in (_learned(report), _shrunk(report), _stages(report)):
        console.print()
        _print(table, console)
    console.print(_energy_line(report), highlight=False)
    if report.samples:
        console.print()
        _show_sample(report.samples[0], console)
        hits, asked = sum(s.hits for s in report.samples), sum(len(s.truth) for s in report.samples)
        console.print(f"all devices: {hits} of {asked} held-out samples right", highlight=False)
    console.print(f"the whole run took {report.seconds:.1f} s", highlight=False)


def _print(table: Table, console: Console) -> None:
    """Print a table below its title, which may be wider than the table."""
    console.print(table.title, style="bold", highlight=False)
    table.title = None
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table


def _learned(report: DemoReport) -> Table:
    reference = report.devices[0].reference_sent is not None
    title = f"what was learned: accuracy on each device's own test part, round {report.rounds}"
    columns = ["device", "training\nexamples", "as sent", "after\ntraining"]
    columns += ["FedAvg dense\nas sent", "FedAvg dense\nafter"] if reference else []
    table = _table(title, *columns, "bytes\nreceived", "bytes\nsent")
    for d in report.devices:
        row = [d.agent, f"{d.examples}", f"{d.accuracy_sent:.3f}", f"{d.accuracy:.3f}"]
        row += [f"{d.reference_sent:.3f}", f"{d.reference:.3f}"] if reference else []
        table.add_row(*row, bytes_text(d.down_bytes), bytes_text(d.up_bytes))
    means = [f"{sum(values) / len(values):.3f}" for values in _columns(report)]
    examples = sum(d.examples for d in report.devices)
    down = sum(d.down_bytes for d in report.devices)
    up = sum(d.up_bytes for d in report.devices)
    table.add_row(
        "mean, sum", f"{examples}", *means, bytes_text(down), bytes_text(up), style="bold", end_section=True
    )
    return table


def _shrunk(report: DemoReport) -> Table:
    title = "what was exported: the personal ONNX model, dense → pruned"
    columns = ("device", "FFL units", "parameters", "bytes", "ms a sample", "parity")
    table = _table(title, *columns)
    for d in report.devices:
        m = d.manifest
        table.add_row(
            d.agent,
            f"{len(d.kept_units)} x {m.hidden_units} → " + "+".join(map(str, d.kept_units)),
            f"{m.dense_parameters:,} → {m.parameters:,}",
            f"{m.dense_bytes / 1000:.0f} → {m.bytes / 1000:.0f} kB",
            f"{_ms(m.dense_latency_ms)} → {_ms(m.latency_ms)}",
            f"{m.parity:.0e}",
        )
    return table


def _columns(report: DemoReport) -> list[list[float]]:
    columns = [[d.accuracy_sent for d in report.devices], [d.accuracy for d in report.devices]]
    if report.devices[0].reference_sent is not None:
        columns += [[d.reference_sent or 0.0 for d in report.devices]]
        columns += [[d.reference or 0.0 for d in report.devices]]
    return columns


def _stages(report: DemoReport) -> Table:
    present = [
        s for s in Stage if any(s in d.ledger and d.ledger[s].seconds >= 0.005 for d in report.devices)
    ]
    title = "what it took: seconds by stage, all rounds"
    table = _table(title, "device", *present, "joules")
    for d in report.devices:
        seconds = [f"{d.ledger[s].seconds:.2f}" if s in d.ledger else "–" for s in present]
        joules, kind = joules_of(d)
        table.add_row(d.agent, *seconds, joules_text(joules, kind).removesuffix(" modelled"))
    return table


def joules_of(device: DeviceReport) -> tuple[float | None, Kind]:
    """Return a device's joules over all stages, and their kind."""
    sum_ = EnergyReading(seconds=0.0)
    for reading in device.ledger.values():
        sum_ = sum_ + reading
    return sum_.joules, sum_.kind


def _energy_line(report: DemoReport) -> str:
    kinds = {joules_of(d)[1] for d in report.devices}
    if kinds == {Kind.NONE}:
        return (
            "energy: none. This machine has no sensor that Hedgerow reads, and no profile: seconds are real,"
            " joules are unknown.\nTo see joules from a power model, give --profile (see firmware_profiles/)."
        )
    sensors = {r.sensor for d in report.devices for r in d.ledger.values()}
    flags = sorted({f for d in report.devices for r in d.ledger.values() for f in r.flags})
    named = ", ".join(sorted(sensors))
    text = f"energy: {', '.join(sorted(kinds))}, from {named}"
    if Kind.MODELLED in kinds:
        text += " (~): a model of a board's power from CPU use, not a measurement"
    return text + (f" (flags: {', '.join(flags)})" if flags else "")


def _show_sample(sample: Sample, console: Console) -> None:
    title = f"{sample.agent} answers at {sample.address}: held-out samples, in {sample.request_ms:.0f} ms"
    table = _table(title, "prediction")
    for p in sample.predicted:
        table.add_column(p, justify="right")
    table.add_row("probability", *(f"{p:.2f}" for p in sample.probability))
    marks = [
        f"[green]{t}[/green]" if t == p else f"[red]{t}[/red]"
        for p, t in zip(sample.predicted, sample.truth, strict=True)
    ]
    table.add_row("truth", *marks)
    _print(table, console)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
