"""What a personal model costs on this device, beside the uncut one: seconds, bytes, memory, joules.

The sides take turns, so that what else happens on the device falls on all of them. Latency is wall time of
one run in this process; memory and cold start are those of `hedgerow serve` in a process of its own. Joules
are read over two seconds of runs or more without a pause, as no meter here sees a single run.

The uncut model never answered on this device, where units were cut while training went on. It is written
anew: with the whole matrices of the vault's last model where that is the one that is reported on, else with
drawn weights, and the report says which. Speed, size and joules do not depend on them; its accuracy is not
known. No torch here.
"""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from pydantic import Field

from edge_agent import last_model
from edge_agent.energy.meter import Meter
from export import metadata
from export.folder import load_artifact, resolve
from export.proof import open_session, prove
from foundation.artifact import Manifest, Probe
from foundation.energy import EnergyReading, Kind, Stage
from foundation.errors import ExportError, HedgerowError
from foundation.frozen import Frozen
from foundation.parameters import Array, Parameters
from foundation.process import bound_to_parent
from foundation.spec import ModelSpec, initial_parameters

SMALL, LARGE = 1, 32
RUNS = {SMALL: 400, LARGE: 60}
LATENCY_S = 20.0
"""Longest time for all runs of one batch size."""
STARTS = 3
BATCH_S, BATCH_RUNS, BATCH_MOST_S = 2.0, 200, 20.0
"""Runs in one reading of joules: for so long and so many, and not for longer."""
START_S = 30.0

Say = Callable[[str], None]


class Latency(Frozen):
    """Of runs with one batch size, milliseconds of wall time."""

    p50_ms: float
    p99_ms: float | None = None
    runs: int = 0
    """0 where it was not measured now."""


class Joules(Frozen):
    """Of 1,000 inferences of one sample, taken from a reading over many."""

    joules: float | None
    """Gross: with what the idle device uses meanwhile; `None` when nobody knows."""
    uncertainty_joules: float | None
    """Half-width of the error bar at k = 2."""
    net_joules: float | None
    """Above idle."""
    net_uncertainty_joules: float | None
    kind: Kind
    scope: str
    sensor: str
    coverage: float
    flags: tuple[str, ...]
    runs: int
    """Inferences in the reading."""
    seconds: float
    """Length of the reading."""


class Figures(Frozen):
    """One side of the report; `None` is unknown, and `remarks` say why."""

    name: str
    bytes: int | None
    hidden_units: int | None = None
    """Kept, over all blocks."""
    latency: dict[int, Latency] = Field(default_factory=dict)
    """By batch size."""
    per_second: float | None = None
    """Samples a second, at the batch size that gives most."""
    rss_bytes: int | None = None
    """Of the serving process after a batch of 32."""
    start_s: float | None = None
    """From the start of the serving process to its first answer; median of three."""
    parity: float | None = None
    """Largest difference of a logit to the trained model's."""
    accuracy: float | None = None
    energy: Joules | None = None
    remarks: tuple[str, ...] = ()


class Report(Frozen):
    """Everything, as JSON has it."""

    folder: str
    agent: str
    run: str
    round: int
    sha256: str
    profile: str
    energy_source: str
    sides: tuple[Figures, ...]


@dataclass(frozen=True)
class Side:
    """A model to be measured."""

    name: str
    folder: Path | None
    """`None` where no server can serve it."""
    manifest: Manifest
    model: bytes
    probe: Probe
    untrained: str = ""
    """Where nobody trained it as it is: whose weights it has."""


def report(folder: Path, scratch: Path, meter: Meter, profile: str, say: Say = lambda _: None) -> Report:
    """Measure the artifact of a folder and what it is compared with; `scratch` is an empty folder.

    Raises `ExportError` and `ProofFailed` for an artifact that is damaged or does not prove itself.
    """
    target = resolve(folder)
    manifest, model, probe = load_artifact(target)
    prove(open_session(model), probe, manifest.tolerance)
    pruned = Side("pruned", target, manifest, model, probe)
    sides, absent = [pruned], []
    for name, make in (("dense", dense), ("int8", int8)):
        say(f"writing the {name} model")
        made = make(pruned, scratch / name)
        if isinstance(made, Side):
            sides.append(made)
        else:
            absent.append(made)
    figures = [*measured(sides, meter, say), *absent]
    order = {name: i for i, name in enumerate(("dense", "pruned", "int8"))}
    return Report(
        folder=str(folder),
        agent=manifest.agent,
        run=manifest.run,
        round=manifest.round,
        sha256=manifest.sha256,
        profile=profile,
        energy_source=meter.source,
        sides=tuple(sorted(figures, key=lambda one: order[one.name])),
    )


# --- what is compared --------------------------------------------------------------------------------


def dense(pruned: Side, folder: Path) -> Side | Figures:
    """Write the uncut model of the same spec, or return what the manifest says of it."""
    m = pruned.manifest
    recorded = Figures(
        name="dense",
        bytes=m.dense_bytes,
        hidden_units=m.hidden_units * len(m.kept_units),
        latency={SMALL: Latency(p50_ms=m.dense_latency_ms)} if m.dense_latency_ms else {},
        remarks=("as the manifest says, measured at export: writing it anew needs the extra `export`",),
    )
    if importlib.util.find_spec("onnx") is None:
        return recorded
    from export.graph import build
    from export.package import export_artifact  # onnx weighs 30 MB: only when it is needed

    spec = ModelSpec.model_validate_json(metadata.read(pruned.model)["spec"])
    weights, whose = _uncut(pruned, spec)
    alone = open_session(build(spec, weights, m.normalisation, metadata={}))
    x = pruned.probe.inputs
    made = export_artifact(
        spec,
        weights,
        {},
        m.normalisation,
        m.labels,
        Probe(x, alone.run(["logits"], {"input": x})[0]),
        folder,
        agent=m.agent,
        run=m.run,
        round=m.round,
        strategy=m.strategy,
        measure_latency=False,
    )
    target = resolve(folder)
    return Side("dense", target, made, *load_artifact(target)[1:], untrained=whose)


def _uncut(pruned: Side, spec: ModelSpec) -> tuple[Parameters, str]:
    """Return the parameters of the uncut model, and whose they are, in words."""
    m = pruned.manifest
    if pruned.folder is not None:
        try:
            last = last_model.load(pruned.folder.parent.parent)
        except ExportError as error:
            why = str(error)
        else:
            f = last.facts
            if (f.agent, f.run, f.round, f.spec) == (m.agent, m.run, m.round, spec):
                return last.parameters, (
                    "this device's own weights, with the units that were cut as they were left: what it costs"
                    " is known, not how well it answers"
                )
            why = f"the vault's last model is of run {f.run}, round {f.round}"
    else:
        why = "there is no vault"
    told = f"same spec, drawn weights: what it costs is known, not how well it answers ({why})"
    return initial_parameters(spec, 0), told


def int8(pruned: Side, folder: Path) -> Side | Figures:
    """Write the artifact's model with 8-bit weights, or say why not; it has no manifest to be served by."""
    try:
        writer = importlib.import_module("export.quantise")
    except ModuleNotFoundError as error:
        why = f"not written: it needs {error.name}"
        return Figures(name="int8", bytes=None, remarks=(why,))
    try:
        model: bytes = writer.dynamic(pruned.model)
    except ExportError as error:
        return Figures(name="int8", bytes=None, remarks=(f"not written: {error}",))
    return Side("int8", None, pruned.manifest, model, pruned.probe)


# --- measuring ---------------------------------------------------------------------------------------


def measured(sides: Sequence[Side], meter: Meter, say: Say) -> list[Figures]:
    """Measure all sides, in turn."""
    latencies: dict[int, dict[str, Latency]] = {}
    for size in RUNS:
        say(f"latency of batches of {size}")
        latencies[size] = in_turn(sides, size)
    processes = {}
    for side in sides:
        say(f"starting the server with the {side.name} model, {STARTS} times")
        processes[side.name] = starts(side)
    found = []
    for side in sides:
        say(f"joules of the {side.name} model")
        energy = joules(side, meter)
        latency = {size: each[side.name] for size, each in latencies.items()}
        found.append(_figures(side, latency, processes[side.name], energy))
    return found


def _figures(
    side: Side, latency: dict[int, Latency], process: tuple[float, int] | str, energy: Joules
) -> Figures:
    m = side.manifest
    known = not isinstance(process, str)
    remarks = [] if known else [str(process)]
    if side.untrained:
        remarks.append(side.untrained)
    return Figures(
        name=side.name,
        bytes=len(side.model),
        hidden_units=sum(m.kept_units),
        latency=latency,
        per_second=max(1e3 * size / each.p50_ms for size, each in latency.items()),
        start_s=process[0] if known else None,
        rss_bytes=process[1] if known else None,
        parity=None if side.untrained else _parity(side),
        accuracy=m.accuracy if side.name == "pruned" else None,
        energy=energy,
        remarks=tuple(remarks),
    )


def _parity(side: Side) -> float:
    """Return the largest difference of a logit; 8-bit weights have one that no proof allows."""
    session, probe = open_session(side.model), side.probe
    found = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: probe.inputs})[0]
    return float(np.abs(found - probe.logits).max())


def batch(probe: Probe, size: int) -> Array:
    """Return so many raw samples, those of the probe again and again."""
    return np.ascontiguousarray(probe.inputs[np.arange(size) % len(probe.inputs)])


def in_turn(sides: Sequence[Side], size: int) -> dict[str, Latency]:
    """Time runs of one batch size, side after side, again and again."""
    runs = {side.name: _run(side, size) for side in sides}
    times: Mapping[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + LATENCY_S
    for turn in range(-5, RUNS[size]):
        if turn >= 5 and time.monotonic() > end:
            break
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn >= 0:
                times[name].append(time.perf_counter() - begin)
    return {
        name: Latency(p50_ms=1e3 * median(each), p99_ms=1e3 * float(np.quantile(each, 0.99)), runs=len(each))
        for name, each in times.items()
    }


def _run(side: Side, size: int) -> Callable[[], object]:
    session = open_session(side.model)
    feed = {session.get_inputs()[0].name: batch(side.probe, size)}
    output = [session.get_outputs()[0].name]
    return lambda: session.run(output, feed)


def joules(side: Side, meter: Meter) -> Joules:
    """Run without a pause under the meter's stage `infer`, and return joules for 1,000 samples."""
    run = _run(side, SMALL)
    for _ in range(5):
        run()
    meter.take()
    begin, runs = time.monotonic(), 0
    with meter.stage(Stage.INFER):
        while not _enough(time.monotonic() - begin, runs):
            run()
            runs += 1
    return per_thousand(meter.take()[Stage.INFER], runs)


def _enough(seconds: float, runs: int) -> bool:
    return seconds >= BATCH_MOST_S or (seconds >= BATCH_S and runs >= BATCH_RUNS)


def per_thousand(reading: EnergyReading, runs: int) -> Joules:
    """Return a reading's joules for 1,000 of its `runs`."""

    def share(value: float | None) -> float | None:
        return None if value is None else 1000 * value / runs

    return Joules(
        joules=share(reading.joules),
        uncertainty_joules=share(reading.uncertainty_joules),
        net_joules=share(reading.net_joules),
        net_uncertainty_joules=share(reading.net_uncertainty_joules),
        kind=reading.kind,
        scope=reading.scope.value,
        sensor=reading.sensor,
        coverage=reading.coverage,
        flags=reading.flags,
        runs=runs,
        seconds=reading.seconds,
    )


# --- a serving process -------------------------------------------------------------------------------


def starts(side: Side) -> tuple[float, int] | str:
    """Start the server a few times; returns seconds to the first answer and its memory, or why not."""
    if side.folder is None:
        return "the server was not started with it: it is no artifact"
    found = []
    for _ in range(STARTS):
        try:
            found.append(_start(side.folder, side.probe))
        except (HedgerowError, OSError, http.client.HTTPException) as error:
            return f"the server cannot be measured: {error}"
    return median(s for s, _ in found), int(median(b for _, b in found))


def _start(folder: Path, probe: Probe) -> tuple[float, int]:
    command = [sys.executable, "-m", "edge_agent.serving", str(folder), "--port", "0", "--watch", "0"]
    begin = time.monotonic()
    process = subprocess.Popen(
        bound_to_parent(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        if not line:
            raise HedgerowError(process.communicate(timeout=START_S)[1].strip()[-200:] or "it ended at once")
        where = http.client.HTTPConnection(line[-1].removeprefix("http://"), timeout=START_S)
        _ask(where, probe.inputs[:1])
        seconds = time.monotonic() - begin
        _ask(where, batch(probe, LARGE))
        where.close()
        return seconds, psutil.Process(process.pid).memory_info().rss
    finally:
        process.kill()
        process.communicate()


def _ask(where: http.client.HTTPConnection, x: Array) -> None:
    kind = "INT64" if x.dtype.kind == "i" else "FP32"
    tensor = {
        "name": "input",
        "datatype": kind,
        "shape": list(x.shape),
        "parameters": {"binary_data_size": x.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "label"}]}).encode()
    where.request(
        "POST",
        "/v2/models/model/infer",
        head + x.tobytes(),
        {"Inference-Header-Content-Length": str(len(head))},
    )
    answer = where.getresponse()
    said = answer.read()
    if answer.status != 200:
        raise ExportError(f"the server answers {answer.status}: {said[:200]!r}")
