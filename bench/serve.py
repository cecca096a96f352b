"""What serving a personal model costs beside torch and beside the uncut model: both sides in one run.

    python bench/serve.py                    some six minutes on two slow cores
    python bench/serve.py --quick            some two: fewer repeats, the same rows
    python bench/serve.py --only latency --only int8
    python bench/serve.py --json > serve.json

The model: 32 x 32 x 3 images, depth 6, 4 heads, FFLs four times as wide, GELU, pre-norm, class token; width
64 with 16 patches (17 tokens) and width 128 with 64 patches (65 tokens). Query, key and value have no bias,
as in our own code. In our export the last block computes the class token alone, which is exact; torch's
side is the model as it is usually written, all tokens through every block, and our own torch model, which
does the same as our export, stands beside it. Weights are drawn, not trained: speed does not depend on
them. Pruned means 90 % of the hidden units of every block, drawn at random, cut out; the control has as
many zeros at the old shape.

Single-thread ratios: the sides take turns in a drawn order, each timed by its thread's CPU time in the second
of two runs, and the ratio is that of the medians; beside it the smallest and largest ratio of five stretches.
torch runs once with its defaults and once without oneDNN (as our trainer does), and the faster counts.

Ends with 1 if a bar is missed. What is not installed is told as such, never as met.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import serve_models as models
from bench import serve_processes as processes

SECTIONS = ("latency", "int8", "export", "processes", "http", "parity")


@dataclass(frozen=True)
class Row:
    """One ratio or figure, and its bar."""

    what: str
    setting: str
    value: float | None
    bar: float | None = None
    at_least: float | None = None
    """The lower end, where the bar is a band."""
    unit: str = ""
    spread: tuple[float, float] | None = None
    sides: dict[str, float] = field(default_factory=dict)
    """The figures that the value was made of."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; `None` without a bar or a value."""
        if self.value is None or self.bar is None:
            return None
        return self.value <= self.bar and (self.at_least is None or self.value >= self.at_least)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the repeats")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="some of the sections")
    parser.add_argument("--json", action="store_true", help="figures for machines")
    options = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    effort = 0.25 if options.quick else 1.0
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for name in SECTIONS
            if not options.only or name in options.only
            for row in MEASURES[name](effort, Path(folder))
        ]
    report = {
        "machine": machine(),
        "quick": options.quick,
        "rows": [asdict(r) | {"met": r.met} for r in rows],
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if options.json else table(rows))
    return 1 if any(row.met is False for row in rows) else 0


def progress(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def machine() -> dict[str, Any]:
    packages = ("torch", "onnxruntime", "onnx", "onnxscript", "fastapi", "uvicorn", "numpy")
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
    }


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- latency -----------------------------------------------------------------------------------------

BARS = {"128/65": (0.55, 0.32), "64/17": (0.72, 0.20)}
"""Pruned over dense, pruned over torch."""


LEGACY = "dense: our export / torch's legacy exporter's"


def latency(effort: float, folder: Path) -> list[Row]:
    rows = []
    for name in BARS:
        progress(f"latency: {name}, the sides in turn")
        one = models.Drawn(name)
        legacy, why_not = models.legacy(one)
        ours, _ = models.legacy(one, plain=False)
        exported = {"legacy": legacy, "legacy, our torch model": ours}
        sides = models.sides(one, {key: model for key, model in exported.items() if model is not None})
        rows += latency_of(name, models.in_turn(sides, round(effort * models.RUNS[name])))
        if legacy is None:
            rows.append(Row(LEGACY, name, None, 0.85, note=why_not))
    return rows


def latency_of(name: str, times: models.Times) -> list[Row]:
    def faster(what: str) -> str:
        return min((what, f"{what} without oneDNN"), key=lambda side: models.median_of(times[side]))

    def row(what: str, over: str, under: str, **more: Any) -> Row:
        return compared(name, times, what, over, under, **more)

    to_dense, to_torch = BARS[name]
    rows = [
        row("pruned 90 % / dense, both our export", "pruned", "dense", bar=to_dense),
        row("pruned 90 % / torch eager, dense", "pruned", faster("torch"), bar=to_torch),
        row("… / our own torch model, class token alone", "pruned", faster("our torch model")),
        row("dense: our export / torch eager", "dense", faster("torch")),
        row("pruned 90 %: our export / torch eager", "pruned", faster("torch, pruned")),
    ]
    if "pruned, newest opset" in times:
        what = f"pruned 90 %: opset {models.OPSETS[-1]} / opset {models.OPSET}, the default"
        rows.append(row(what, "pruned, newest opset", "pruned"))
    if "legacy" in times:
        rows.append(row(LEGACY, "dense", "legacy", bar=0.85))
    if "legacy, our torch model" in times:
        rows.append(row("… of our own torch model", "dense", "legacy, our torch model"))
    what = "control: 90 % zeros at the old shape / dense"
    return [*rows, row(what, "zeros", "dense", bar=1.05, at_least=0.95)]


def compared(name: str, times: models.Times, what: str, over: str, under: str, **more: Any) -> Row:
    """Return the row of a ratio of two sides."""
    value, spread = models.ratio(times, over, under)
    told = {f"{side} ms": 1e3 * models.median_of(times[side]) for side in (over, under)}
    return Row(what, name, value, spread=spread, sides=told, **more)


def int8(effort: float, folder: Path) -> list[Row]:
    rows = []
    for name in BARS:
        progress(f"int8: {name}")
        one = models.Drawn(name)
        small, how = models.quantised(one.pruned)
        sides = models.sessions({"pruned int8": small, "dense": one.dense}, one.sample)
        times = models.in_turn(sides, round(effort * models.RUNS[name]))
        bar = 0.32 if name == "128/65" else None
        what = "pruned 90 % + int8 / dense"
        rows.append(compared(name, times, what, "pruned int8", "dense", bar=bar, note=how))
        size = {"pruned int8 bytes": float(len(small)), "dense bytes": float(len(one.dense))}
        share = len(small) / len(one.dense)
        rows.append(Row("… file", name, share, 0.17 if bar else None, sides=size))
        rows.append(Row("pruned 90 % file / dense file", name, len(one.pruned) / len(one.dense)))
        off, flips = models.differences(small, one.pruned, one.inputs(1024))
        rows.append(
            Row("… largest change of a logit by int8", name, off, sides={"flips in 1,024": float(flips)},
                note="drawn weights, no accuracy gate here")
        )  # fmt: skip
    return rows


# --- export, processes -------------------------------------------------------------------------------


def export(effort: float, folder: Path) -> list[Row]:
    rows = []
    one = models.Drawn("128/65")
    repeats = max(3, round(effort * 12))
    progress("export: our graph, our whole artifact, torch's exporters")
    dynamo = importlib.util.find_spec("onnxscript") is not None
    why = "" if dynamo else "torch's dynamo exporter needs onnxscript, which is not installed"
    times = models.exports(one, folder / "exports", repeats, dynamo=dynamo)
    for ours, bar in (("whole artifact", 1 / 20), ("graph alone", None)):
        for theirs in ("dynamo", "legacy"):
            what = f"export, {ours} / torch's {theirs} exporter"
            asked = bar if theirs == "dynamo" else None
            if theirs in times:
                rows.append(compared(one.name, times, what, ours, theirs, bar=asked))
            else:
                rows.append(Row(what, one.name, None, asked, note=why or models.legacy(one)[1]))
    found = processes.export_memory(one, folder / "memory")
    note = "torch was loaded" if found["torch"] else "no torch in the process"
    extra = (found["peak_bytes"] - found["before_bytes"]) / 1e6
    told = {key: found[key] / 1e6 for key in ("before_bytes", "peak_bytes")}
    rows.append(
        Row("export: RSS on top of a waiting agent", one.name, extra, 60.0, unit="MB",
            sides={key.replace("bytes", "MB"): value for key, value in told.items()}, note=note)
    )  # fmt: skip
    return rows


def served(effort: float, folder: Path) -> list[Row]:
    repeats = max(2, round(effort * 6))
    progress(f"processes: {repeats} starts each of our server, torch + FastAPI, and torch's import")
    one = models.Drawn("128/65")
    ours, peer, imports = processes.starts(one, folder / "starts", repeats)
    rows = []
    memory = {"ours MB": ours.rss_bytes / 1e6, "torch + FastAPI MB": peer.rss_bytes / 1e6}
    rows.append(
        Row("serving: RSS / torch + FastAPI", one.name, ours.rss_bytes / peer.rss_bytes, 0.40, sides=memory,
            note="goal 0.30")
    )  # fmt: skip
    for clock, mine, alone, theirs in (
        ("CPU", ours.cpu_s, imports.cpu_s, peer.cpu_s),
        ("wall", ours.wall_s, imports.wall_s, peer.wall_s),
    ):
        told = {"ours s": mine, "import torch s": alone, "torch + FastAPI s": theirs}
        what = f"start to first right answer / importing torch, {clock}"
        rows.append(Row(what, one.name, mine / alone, 0.35, sides=told, note="goal 0.20"))
    return rows


def http(effort: float, folder: Path) -> list[Row]:
    one = models.Drawn("64/17")
    count = round(effort * 2000)
    progress(f"http: {count} binary requests, in turn with runs of the session")
    with processes.Server(processes.ours(one.publish(folder / "http"))) as server:
        found = processes.overhead(server, one, count)
        over = found["http ms"] - found["run ms"]
        note = "wall time; one kept connection, its client in Python"
        what = "HTTP, binary, p50 - session's p50"
        rows = [Row(what, one.name, over, 0.5, unit="ms", sides=found, note=note)]
        alone = max(10, round(effort * 40))
        progress(f"http: {alone} isolated requests and runs, half a second of silence after each")
        runs = models.isolated_runs(one, alone)
        what = "CPU of a run with 0.5 s after it / of the run"
        note = "the session as the server opens it: no spinning threads"
        rows.append(Row(what, one.name, runs["with after ms"] / runs["run ms"], 1.2, sides=runs, note=note))
        spent = processes.isolated(server, one, alone)
        what = "the server's CPU of a request, the same"
        note = "a look for a newer artifact every second included"
        value = spent["with after ms"] / spent["until answered ms"]
        rows.append(Row(what, one.name, value, 1.2, sides=spent, note=note))
    return rows


# --- parity ------------------------------------------------------------------------------------------


def parity(effort: float, folder: Path) -> list[Row]:
    rows = []
    for name in BARS:
        one = models.Drawn(name)
        x = one.inputs(1024)
        for what, masked in (("dense", False), ("pruned 90 %", True)):
            progress(f"parity: {name}, {what}, {len(models.OPSETS)} opsets")
            expected = one.torch_logits(x, masked=masked)
            found = {n: one.parity(n, x, expected, masked=masked) for n in models.OPSETS}
            sides = {f"opset {n}": off for n, (off, _) in found.items()}
            worst, flips = max(sides.values()), sum(flipped for _, flipped in found.values())
            rows.append(Row(f"parity with torch, {what}, worst opset", name, worst, 1e-5, sides=sides))
            text = f"… answers that flip in {len(x):,} inputs, all opsets"
            rows.append(Row(text, name, float(flips), 0.0))
    return rows


MEASURES: dict[str, Callable[[float, Path], list[Row]]] = {
    "latency": latency,
    "int8": int8,
    "export": export,
    "processes": served,
    "http": http,
    "parity": parity,
}


# --- table -------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    about = machine()
    versions = ", ".join(f"{name} {v or 'not installed'}" for name, v in about["versions"].items())
    lines = [f"{about['machine']}, {about['cores']} cores, Python {about['python']}; {versions}", ""]
    lines += [f"{'':58} {'':7} {'measured':>10} {'bar':>12}"]
    for row in rows:
        figures = f"{shown(row.value, row.unit):>10} {bar_of(row):>12}"
        lines.append(f"{row.what:58} {row.setting:7} {figures}  {verdict(row)}")
        if detail := "   ".join(filter(None, (spread_of(row), sides_of(row), row.note))):
            lines.append(f"    {detail}")
    return "\n".join(lines) + "\n"


def shown(value: float | None, unit: str = "") -> str:
    if value is None:
        return "not known"
    text = f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def bar_of(row: Row) -> str:
    if row.bar is None:
        return ""
    if row.at_least is not None:
        return f"{row.at_least:g} to {row.bar:g}"
    return f"<= {shown(row.bar, row.unit)}"


def verdict(row: Row) -> str:
    return {True: "", False: "MISSED", None: "not available" if row.value is None else ""}[row.met]


def spread_of(row: Row) -> str:
    return f"{row.spread[0]:.3g} to {row.spread[1]:.3g}" if row.spread else ""


def sides_of(row: Row) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in row.sides.items())


if __name__ == "__main__":
    sys.exit(main())
