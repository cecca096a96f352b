"""A simulation's result as tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from foundation.energy import split_by_kind
from hedgerow.demo_screen import bytes_text, joules_text
from hedgerow.simulate_report import Quarantined, SimulationReport

SHOWN_DEVICES = 20
AVERAGED = frozenset({"fedavg", "fedprox"})
"""Strategies whose devices do not keep what training made of the model: `after` is fine-tuning."""


def show(report: SimulationReport, console: Console) -> None:
    """Print the result; each table fits a terminal of 80 columns."""
    for table in (_rounds(report), _devices(report)):
        console.print()
        console.print(table)
    if report.simulation.get("strategy") in AVERAGED:
        console.print("after: fine-tuned, each device for itself; what is sent next is the average again")
    hidden = len([d for d in report.devices if d.round == report.last.round]) - SHOWN_DEVICES
    if hidden > 0:
        console.print(f"... and {hidden} more devices: see --json", highlight=False)
    for table in [
        *([_late(report)] if report.late else []),
        *([_artifacts(report)] if report.artifacts else []),
    ]:
        console.print()
        console.print(table)
    for refusal in report.refusals:
        console.print(f"refused: {refusal}", style="yellow", markup=False, highlight=False)
    for case in report.quarantined:
        console.print(_quarantine_line(case), style="yellow", markup=False, highlight=False)
    console.print(_energy_line(report), highlight=False)
    console.print(f"the simulation took {report.seconds:.1f} s", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        left = name in ("round", "device")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _rounds(report: SimulationReport) -> Table:
    title = "rounds: mean accuracy as sent and after training; 10%: the worst tenth of the devices, ±: spread"
    columns = ("round", "sent", "10%", "±", "after", "10%", "±", "gone", "down", "up", "train s")
    table = _table(title, *columns)
    for r in report.rounds:
        table.add_row(
            str(r.round),
            f"{r.accuracy_sent:.3f}",
            f"{r.accuracy_sent_worst_tenth:.3f}",
            f"{r.accuracy_sent_deviation:.2f}",
            f"{r.accuracy:.3f}",
            f"{r.accuracy_worst_tenth:.3f}",
            f"{r.accuracy_deviation:.2f}",
            f"{r.units_gone:.0%}",
            bytes_text(r.down_bytes),
            bytes_text(r.up_bytes),
            f"{r.train_s:.1f}",
        )
    return table


def _late(report: SimulationReport) -> Table:
    title = "late joiners in the first rounds that asked them, beside everybody else then"
    table = _table(title, "turn", "rounds", "devices", "sent", "after", "others sent", "others after")
    for turn in report.late:
        first, last = turn.rounds[0], turn.rounds[-1]
        table.add_row(
            str(turn.turn),
            str(first) if first == last else f"{first} to {last}",
            str(turn.devices),
            f"{turn.accuracy_sent:.3f}",
            f"{turn.accuracy:.3f}",
            "–" if turn.others_sent is None else f"{turn.others_sent:.3f}",
            "–" if turn.others is None else f"{turn.others:.3f}",
        )
    return table


def _devices(report: SimulationReport) -> Table:
    last = [d for d in report.devices if d.round == report.last.round]
    of = f", of {report.spec.depth} x {report.spec.hidden} FFL units"
    table = _table(
        f"devices in round {report.last.round}{'' if report.simulation.get('device_models') else of}",
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


def _quarantine_line(case: Quarantined) -> str:
    rounds = ", ".join(map(str, case.rounds)) or "not known"
    many = "an update" if case.updates == 1 else f"{case.updates} updates"
    then = ", then set aside" if case.set_aside else ""
    return f"quarantined: {many} of {case.agent}{then} ({case.cause}; round {rounds}): {case.reason}"


def _energy_line(report: SimulationReport) -> str:
    split = split_by_kind(d.energy for d in report.devices)
    if not split:
        return "energy: none; give --profile for joules from a power model (see firmware_profiles/)"
    parts = ", ".join(joules_text(joules, kind) for kind, joules in split.items())
    return f"energy of all devices and rounds: {parts} (this machine's, by CPU time of the work)"
