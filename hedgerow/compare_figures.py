"""From simulations to what a comparison shows: figures of runs, costs to reach, medians over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from foundation.energy import Kind, Stage
from foundation.messages import Json
from hedgerow.compare_report import (
    ComparisonReport,
    Cost,
    Curve,
    CurvePoint,
    DeviceFigures,
    Failure,
    ModelFigures,
    Over,
    Reach,
    RoundFigures,
    RunFigures,
    Saved,
    Spread,
    StageFigures,
    StageSum,
    Summary,
    Total,
    Worst,
    energy_sums,
)
from hedgerow.simulate_report import DeviceRound, SimulationReport

TUNED = " + fine-tuning"
"""What is appended to a FedAvg's label for its accuracy after local training."""
WORK = (Stage.TRAIN, Stage.PRUNE)
_EVEN = 1e-12


def report_of(
    runs: Sequence[RunFigures],
    *,
    comparison: Json,
    reference: str | None,
    averages: Sequence[str],
    machine: Json,
    hedgerow: str,
    failures: Sequence[Failure] = (),
) -> ComparisonReport:
    """Return the whole report; `averages` are the labels whose fine-tuned models have a row of their own."""
    curves = [curve for run in runs for curve in curves_of(run, is_average=run.label in averages)]
    reaches = reaches_of(curves, reference) if reference else []
    totals = totals_of(curves, runs, reference)
    rows = list(dict.fromkeys(curve.label for curve in curves))
    return ComparisonReport(
        hedgerow=hedgerow,
        machine=machine,
        comparison=comparison,
        reference=reference,
        runs=tuple(runs),
        curves=tuple(curves),
        reaches=tuple(reaches),
        totals=tuple(totals),
        summaries=tuple(summary_of(label, runs, curves, reaches, totals) for label in rows),
        failures=tuple(failures),
    )


# --- from simulations ----------------------------------------------------------------------------


def run_figures(label: str, seed: int, report: SimulationReport) -> RunFigures:
    """Return what a comparison keeps of one simulation."""
    stages = [
        StageSum(stage=stage, **part.model_dump())
        for stage in Stage
        for part in energy_sums(d.stages[stage] for d in report.devices if stage in d.stages)
    ]
    return RunFigures(
        label=label,
        seed=seed,
        spec=report.spec,
        rounds=tuple(
            _round(r.round, r.seconds, [d for d in report.devices if d.round == r.round])
            for r in report.rounds
        ),
        devices=tuple(_device(d) for d in report.devices),
        stages=tuple(stages),
        models=tuple(map(ModelFigures.of, report.artifacts)),
        refusals=report.refusals,
    )


def _round(number: int, seconds: float | None, devices: Sequence[DeviceRound]) -> RoundFigures:
    cpu = [d.cpu_s for d in devices]
    known = [value for value in cpu if value is not None]
    received = [d.stages[Stage.RECEIVE] for d in devices if Stage.RECEIVE in d.stages]
    worked = [d.stages[stage] for d in devices for stage in WORK if stage in d.stages]
    sent = [d.stages[Stage.SEND] for d in devices if Stage.SEND in d.stages]
    return RoundFigures(
        round=number,
        devices=len(devices),
        sent=Spread.of([d.accuracy_sent for d in devices]),
        after=Spread.of([d.accuracy for d in devices]),
        validation_sent=_mean([d.validation_sent for d in devices]),
        validation=_mean([d.validation for d in devices]),
        kept_units=kept_by_block([d.kept_units for d in devices]),
        received=Cost(energy=energy_sums(received), down_bytes=sum(d.down_bytes for d in devices)),
        worked=Cost(
            cpu_s=math.fsum(known) if len(known) == len(cpu) else None,
            wall_s=math.fsum(reading.seconds for reading in worked),
            energy=energy_sums(worked),
        ),
        sent_back=Cost(energy=energy_sums(sent), up_bytes=sum(d.up_bytes for d in devices)),
        seconds=seconds,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def kept_by_block(kept: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Return the mean of units kept by block, over those that have that block."""
    depth = max((len(units) for units in kept), default=0)
    return tuple(statistics.fmean(units[i] for units in kept if len(units) > i) for i in range(depth))


def _device(d: DeviceRound) -> DeviceFigures:
    stages = {
        stage: StageFigures(
            seconds=round(reading.seconds, 6),
            joules=None if reading.joules is None else round(reading.joules, 6),
            kind=reading.kind,
            scope=reading.scope,
        )
        for stage, reading in d.stages.items()
    }
    fields = {name: getattr(d, name) for name in DeviceFigures.model_fields if name != "stages"}
    return DeviceFigures(**fields, stages=stages)


# --- derived -------------------------------------------------------------------------------------


def curves_of(run: RunFigures, *, is_average: bool) -> list[Curve]:
    """Return a run's row, and for FedAvg the row of its fine-tuned models beside it."""
    rows = [curve_of(run, tuned=False)]
    return [*rows, curve_of(run, tuned=True)] if is_average else rows


def curve_of(run: RunFigures, *, tuned: bool) -> Curve:
    """Return accuracy by what it took: as sent, or (`tuned`) after local training."""
    points, before = [], Cost()
    for each in run.rounds:
        here = before + each.received
        accuracy = each.after.mean if tuned else each.sent.mean
        cost = here + each.worked if tuned else here
        points.append(CurvePoint(round=each.round, accuracy=accuracy, cost=cost))
        before = here + each.worked + each.sent_back
    label = run.label + (TUNED if tuned else "")
    return Curve(label=label, run=run.label, seed=run.seed, tuned=tuned, points=tuple(points))


def reaches_of(curves: Sequence[Curve], reference: str) -> list[Reach]:
    """Return for every curve whether it reached the reference's best accuracy of the same seed."""
    found = []
    for curve in curves:
        yardstick = next((c for c in curves if c.label == reference and c.seed == curve.seed), None)
        if yardstick is None:
            continue  # the reference failed with this seed, and is among the failures
        target = yardstick.best
        there, base = first_at(curve, target), first_at(yardstick, target)
        saved = saved_of(there.cost, base.cost) if there is not None and base is not None else None
        found.append(
            Reach(
                label=curve.label,
                seed=curve.seed,
                target=target,
                best=curve.best,
                round=there.round if there else None,
                cost=there.cost if there else None,
                saved=saved,
            )
        )
    return found


def first_at(curve: Curve, target: float) -> CurvePoint | None:
    """Return the first point with at least that accuracy."""
    return next((point for point in curve.points if point.accuracy >= target - _EVEN), None)


def totals_of(curves: Sequence[Curve], runs: Sequence[RunFigures], reference: str | None) -> list[Total]:
    """Return what all rounds took, against the reference of the same seed where there is one."""
    costs = {(run.label, run.seed): run.cost for run in runs}
    found = []
    for curve in curves:
        cost = costs[curve.run, curve.seed]
        base = costs.get((reference, curve.seed)) if reference else None
        saved = saved_of(cost, base) if base else None
        found.append(Total(label=curve.label, seed=curve.seed, cost=cost, saved=saved))
    return found


def saved_of(cost: Cost, base: Cost) -> Saved:
    """Return what `cost` saves against `base`, in per cent of `base`."""
    mine, theirs = cost.joules, base.joules
    same = mine is not None and theirs is not None and (mine.kind, mine.scope) == (theirs.kind, theirs.scope)
    return Saved(
        cpu=_less(cost.cpu_s, base.cpu_s),
        joules=_less(mine.joules, theirs.joules) if same and mine and theirs else None,
        bytes=_less(cost.total_bytes, base.total_bytes),
    )


def _less(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None or base <= 0 else 100 * (1 - value / base)


# --- over seeds ----------------------------------------------------------------------------------


def summary_of(
    label: str,
    all_runs: Sequence[RunFigures],
    all_curves: Sequence[Curve],
    all_reaches: Sequence[Reach],
    all_totals: Sequence[Total],
) -> Summary:
    """Return one row's figures over its seeds."""
    curves = [curve for curve in all_curves if curve.label == label]
    tuned = curves[0].tuned
    runs = [run for run in all_runs if run.label == curves[0].run]
    sent = [run.last.after if tuned else run.last.sent for run in runs]
    reaches = [reach for reach in all_reaches if reach.label == label]
    there = [reach for reach in reaches if reach.cost is not None]
    totals = [total for total in all_totals if total.label == label]
    return Summary(
        label=label,
        tuned=tuned,
        sent=Over.of(s.mean for s in sent),
        sent_worst_tenth=Over.of(s.worst_tenth for s in sent),
        sent_deviation=Over.of(s.deviation for s in sent),
        after=Over.of(run.last.after.mean for run in runs),
        after_worst_tenth=Over.of(run.last.after.worst_tenth for run in runs),
        best=Over.of(curve.best for curve in curves),
        reached=len(there),
        seeds=len(reaches),
        short=Over.of(reach.target - reach.best for reach in reaches if reach.cost is None),
        round=Over.of(reach.round for reach in there),
        **_costs("reach_", [r.cost for r in there if r.cost], [r.saved for r in there]),
        **_costs("", [t.cost for t in totals], [t.saved for t in totals]),
        wall_s=Over.of(t.cost.wall_s for t in totals),
        seconds=Over.of(_plus([r.seconds for r in run.rounds]) for run in runs),
        down_bytes=Over.of(t.cost.down_bytes for t in totals),
        up_bytes=Over.of(t.cost.up_bytes for t in totals),
        kind=_kind([t.cost for t in totals]),
    )


def _costs(prefix: str, costs: Sequence[Cost], saved: Sequence[Saved | None]) -> dict[str, Over | None]:
    joules = [cost.joules for cost in costs]
    figures = {
        "cpu_s": Over.of(cost.cpu_s for cost in costs),
        "joules": Over.of(part.joules if part else None for part in joules),
        "saved_cpu": Over.of(each.cpu if each else None for each in saved),
        "saved_joules": Over.of(each.joules if each else None for each in saved),
        "saved_bytes": Over.of(each.bytes if each else None for each in saved),
    }
    if prefix:
        figures["bytes"] = Over.of(cost.total_bytes for cost in costs)
    return {prefix + name: value for name, value in figures.items()}


def _plus(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _kind(costs: Sequence[Cost]) -> Kind:
    kinds = {part.kind for cost in costs for part in cost.energy}
    return (
        next(iter(kinds)) if len(kinds) == 1 else Kind.NONE if Kind.NONE in kinds or not kinds else Kind.MIXED
    )


def worst_devices(report: ComparisonReport, label: str, count: int) -> list[Worst]:
    """Return the `count` devices with the lowest accuracy as sent in the last round, over all seeds."""
    found = [
        Worst(
            label=label,
            seed=run.seed,
            agent=d.agent,
            examples=d.examples,
            accuracy_sent=d.accuracy_sent,
            accuracy=d.accuracy,
        )
        for run in report.runs_of(label)
        for d in run.devices
        if d.round == run.last.round
    ]
    return sorted(found, key=lambda w: (w.accuracy_sent, w.accuracy, w.agent, w.seed))[:count]


def role_bytes_of(runs: Sequence[RunFigures], direction: Literal["down", "up"]) -> Mapping[str, float]:
    """Return payload bytes by role for one device and round, mean over all of them; largest first."""
    rows = [getattr(d, f"{direction}_role_bytes") for run in runs for d in run.devices]
    roles = {role for row in rows for role in row}
    means = {role: statistics.fmean(row.get(role, 0) for row in rows) for role in roles}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))


def stage_sums(runs: Sequence[RunFigures]) -> dict[Kind, dict[Stage, Over]]:
    """Return joules of all devices and rounds by kind and stage, over seeds; unknown ones have no place."""
    found: dict[Kind, dict[Stage, Over]] = {}
    for kind in (Kind.MEASURED, Kind.MIXED, Kind.MODELLED):
        for stage in Stage:
            sums = [
                math.fsum(
                    part.joules or 0.0 for part in run.stages if (part.stage, part.kind) == (stage, kind)
                )
                for run in runs
            ]
            over = Over.of(sums)
            if over is not None and over.max > 0:
                found.setdefault(kind, {})[stage] = over
    return found
