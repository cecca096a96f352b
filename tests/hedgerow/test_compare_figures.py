"""What a comparison derives, on numbers small enough to do by hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from foundation.energy import EnergyReading, Kind, Scope, Stage
from foundation.spec import ModelSpec
from hedgerow.compare_csv import csv_text
from hedgerow.compare_figures import (
    kept_by_block,
    reaches_of,
    report_of,
    role_bytes_of,
    run_figures,
    saved_of,
    stage_sums,
    worst_devices,
)
from hedgerow.compare_page import page
from hedgerow.compare_report import (
    ComparisonReport,
    Cost,
    EnergySum,
    Failure,
    Over,
    RunFigures,
    Spread,
    energy_sums,
)
from hedgerow.compare_tables import grids, show
from hedgerow.simulate_report import DeviceRound, RoundResult, SimulationReport

SPEC = ModelSpec(input="image", shape=(1, 8, 8), classes=10, width=8, heads=2, depth=2, ffl_ratio=2, patch=4)
MODEL_W = 10.0


def reading(seconds: float, kind: Kind = Kind.MODELLED) -> EnergyReading:
    joules = None if kind is Kind.NONE else MODEL_W * seconds
    return EnergyReading(joules=joules, seconds=seconds, kind=kind, scope=Scope.BOARD_DC, coverage=1.0)


def device(number: int, agent: str, sent: float, after: float, **changes: Any) -> DeviceRound:
    stages = {Stage.RECEIVE: 0.1, Stage.TRAIN: 2.0, Stage.PRUNE: 0.5, Stage.EVALUATE: 9.0, Stage.SEND: 0.2}
    fields: dict[str, Any] = {
        "round": number,
        "agent": agent,
        "examples": 50,
        "accuracy_sent": sent,
        "accuracy": after,
        "kept_units": (16, 8),
        "down_bytes": 1000,
        "up_bytes": 600,
        "train_s": 11.5,
        "energy": reading(11.8),
        "stages": {stage: reading(seconds) for stage, seconds in stages.items()},
        "cpu_s": 1.5,
        "down_role_bytes": {"ffl": 800, "head": 100},
        "up_role_bytes": {"ffl": 500},
    }
    return DeviceRound(**(fields | changes))


def simulation(devices: Sequence[DeviceRound]) -> SimulationReport:
    rounds = [
        RoundResult(
            round=number,
            devices=2,
            seconds=4.0,
            accuracy_sent=0.0,
            accuracy_sent_worst=0.0,
            accuracy=0.0,
            accuracy_worst=0.0,
            units_gone=0.25,
            down_bytes=0,
            up_bytes=0,
            train_s=0.0,
            joules={},
        )
        for number in sorted({d.round for d in devices})
    ]
    return SimulationReport(
        simulation={},
        spec=SPEC,
        seconds=1.0,
        rounds=tuple(rounds),
        devices=tuple(devices),
        refusals=(),
        artifacts=(),
    )


def run(label: str, seed: int, sent: Sequence[float], after: Sequence[float], **changes: Any) -> RunFigures:
    """A run of two devices: one 0.1 above the mean, one 0.1 below."""
    devices = [
        device(number, f"d{i}", s + sign * 0.1, a + sign * 0.1, **changes)
        for number, (s, a) in enumerate(zip(sent, after, strict=True), 1)
        for i, sign in enumerate((1, -1))
    ]
    return run_figures(label, seed, simulation(devices))


def report(runs: Sequence[RunFigures], reference: str | None = "fedavg", **more: Any) -> ComparisonReport:
    labels = list(dict.fromkeys(r.label for r in runs))
    entries = [{"label": label, "strategy": label.split()[0], "settings": {}} for label in labels]
    return report_of(
        runs,
        comparison={"entries": entries, "seeds": [0, 1], "fleet": {"rounds": 3}},
        reference=reference,
        averages=["fedavg"] if "fedavg" in labels else [],
        machine={},
        hedgerow="0",
        **more,
    )


def two_seeds() -> ComparisonReport:
    runs = [
        run("fedavg", 0, (0.1, 0.5, 0.4), (0.6, 0.7, 0.7)),
        run("fedavg", 1, (0.1, 0.3, 0.6), (0.4, 0.7, 0.8)),
        run("quick", 0, (0.1, 0.6, 0.7), (0.6, 0.7, 0.8), cpu_s=0.75, down_bytes=100, up_bytes=60),
        run("quick", 1, (0.1, 0.4, 0.5), (0.6, 0.7, 0.8), cpu_s=0.75, down_bytes=100, up_bytes=60),
    ]
    return report(runs)


def test_accuracy_of_a_round_is_mean_worst_tenth_and_deviation() -> None:
    spread = Spread.of([0.0, *[0.5] * 9, *[1.0] * 10])
    assert spread.mean == pytest.approx((4.5 + 10) / 20)
    assert spread.worst_tenth == pytest.approx(0.25)  # two of twenty: 0 and 0.5
    assert spread.worst == 0.0
    assert Spread.of([0.2, 0.6]).deviation == pytest.approx(0.2)
    assert Spread.of([0.2, 0.6]).worst_tenth == 0.2  # of two devices at least one


def test_accuracy_as_sent_costs_the_rounds_before_and_the_downlink_of_its_own() -> None:
    fedavg = run("fedavg", 0, (0.1, 0.5, 0.4), (0.6, 0.7, 0.7))
    sent, tuned = report([fedavg]).curves
    first, second, third = (point.cost for point in sent.points)
    assert (first.cpu_s, first.down_bytes, first.up_bytes) == (0.0, 2000, 0)
    assert (second.cpu_s, second.down_bytes, second.up_bytes) == (3.0, 4000, 1200)
    assert (third.cpu_s, third.down_bytes, third.up_bytes) == (6.0, 6000, 2400)
    # 2 devices x (0.1 s received, 2.5 s trained and pruned, 0.2 s sent) x 10 W; evaluating is not counted.
    assert first.joules is not None
    assert first.joules.joules == pytest.approx(2.0)
    assert second.joules is not None
    assert second.joules.joules == pytest.approx(2 * 2.0 + 50.0 + 4.0)
    assert tuned.label == "fedavg + fine-tuning"
    assert [point.accuracy for point in tuned.points] == pytest.approx([0.6, 0.7, 0.7])
    assert [point.cost.cpu_s for point in tuned.points] == pytest.approx([3.0, 6.0, 9.0])
    assert [point.cost.up_bytes for point in tuned.points] == [0, 1200, 2400]


def test_savings_to_reach_the_best_accuracy_are_against_the_same_seed() -> None:
    found = {(r.label, r.seed): r for r in two_seeds().reaches}
    assert found["fedavg", 0].target == pytest.approx(0.5)
    assert found["fedavg", 1].target == pytest.approx(0.6)
    assert (found["fedavg", 0].round, found["fedavg", 1].round) == (2, 3)
    quick = found["quick", 0]
    assert quick.round == 2
    assert quick.saved is not None
    assert quick.saved.cpu == pytest.approx(50.0)
    assert quick.saved.joules == pytest.approx(0.0)
    assert quick.saved.bytes == pytest.approx(90.0)
    missed = found["quick", 1]
    assert (missed.round, missed.cost, missed.saved) == (None, None, None)
    assert missed.best == pytest.approx(0.5)
    row = next(s for s in two_seeds().summaries if s.label == "quick")
    assert (row.reached, row.seeds) == (1, 2)
    assert row.short is not None
    assert row.short.median == pytest.approx(0.1)


def test_at_the_last_round_everything_is_counted() -> None:
    totals = {(t.label, t.seed): t for t in two_seeds().totals}
    cost = totals["quick", 0].cost
    assert cost.cpu_s == pytest.approx(3 * 2 * 0.75)
    assert cost.wall_s == pytest.approx(3 * 2 * 2.5)
    assert (cost.down_bytes, cost.up_bytes) == (600, 360)
    assert cost.joules is not None
    assert cost.joules.joules == pytest.approx(3 * 2 * 28.0)
    saved = totals["quick", 0].saved
    assert saved is not None
    assert (saved.cpu, saved.bytes) == (pytest.approx(50.0), pytest.approx(90.0))
    tuned = totals["fedavg + fine-tuning", 1]
    assert tuned.cost == totals["fedavg", 1].cost


def test_rows_are_medians_and_ranges_over_seeds() -> None:
    rows = {s.label: s for s in two_seeds().summaries}
    assert list(rows) == ["fedavg", "fedavg + fine-tuning", "quick"]
    sent = rows["fedavg"].sent
    assert sent is not None
    assert (sent.median, sent.min, sent.max, sent.seeds) == pytest.approx((0.5, 0.4, 0.6, 2))
    tuned = rows["fedavg + fine-tuning"].sent
    assert tuned is not None
    assert tuned.median == pytest.approx(0.75)
    assert Over.of([1.0, None]) is None
    assert Over.of([]) is None


def test_joules_of_different_kinds_or_scopes_are_never_added_nor_compared() -> None:
    parts = energy_sums([reading(1.0), reading(2.0, Kind.MEASURED), reading(3.0), reading(4.0, Kind.NONE)])
    assert [(p.kind, p.joules, p.seconds) for p in parts] == [
        (Kind.MEASURED, 20.0, 2.0),
        (Kind.MODELLED, 40.0, 4.0),
        (Kind.NONE, None, 4.0),
    ]
    mixed = Cost(energy=parts)
    assert mixed.joules is None
    one = Cost(energy=energy_sums([reading(1.0)]))
    measured = Cost(energy=energy_sums([reading(2.0, Kind.MEASURED)]))
    elsewhere = Cost(energy=(EnergySum(kind=Kind.MODELLED, scope=Scope.WALL_AC, joules=10.0, seconds=1.0),))
    for other in (measured, elsewhere, mixed):
        assert saved_of(one, other).joules is None
    assert saved_of(one, one + one).joules == pytest.approx(50.0)


def test_what_a_device_does_not_tell_is_unknown_and_not_nothing() -> None:
    runs = [run("fedavg", 0, (0.1, 0.5), (0.6, 0.7), cpu_s=None, stages={Stage.TRAIN: reading(2, Kind.NONE)})]
    found = report(runs)
    row = found.summaries[0]
    assert (row.cpu_s, row.joules, row.kind) == (None, None, Kind.NONE)
    assert "J unknown" in " ".join(grids(found, wide=False)["reach"].notes)
    assert "energy" not in grids(found, wide=False)


@pytest.mark.parametrize("reference", ["fedavg", None])
def test_the_page_is_there_without_joules_and_without_a_reference(reference: str | None) -> None:
    stages = {Stage.TRAIN: reading(2, Kind.NONE)}
    unknown = run("fedavg", 0, (0.1, 0.5), (0.6, 0.7), stages=stages, energy=reading(2, Kind.NONE))
    found = report([unknown], reference=reference)
    fleet = {"dataset": "digits", "partition": "iid", "devices": 2, "rounds": 3, "profile": "auto"}
    text = page(found.model_copy(update={"comparison": found.comparison | {"fleet": fleet}}))
    head = text[: text.index('<script type="application/json"')]
    drawn = {part.split('"')[0] for part in head.split('data-figure="')[1:]}
    assert {"sent", "after", "kept"} <= drawn
    assert not {"stages", "joules"} & drawn
    figures = text[text.index('id="figures">') + len('id="figures">') :]
    assert set(json.loads(figures[: figures.index("</script>")])) == drawn


def test_joules_by_stage_keep_their_kind() -> None:
    sums = stage_sums([run("fedavg", 0, (0.1, 0.5), (0.6, 0.7))])
    assert set(sums) == {Kind.MODELLED}
    assert sums[Kind.MODELLED][Stage.TRAIN].median == pytest.approx(2 * 2 * 20.0)
    assert sums[Kind.MODELLED][Stage.EVALUATE].median == pytest.approx(2 * 2 * 90.0)


def test_bytes_by_role_are_of_one_device_and_round() -> None:
    runs = [run("a", 0, (0.1, 0.5), (0.6, 0.7)), run("a", 1, (0.1,), (0.6,), down_role_bytes={"ffl": 200})]
    assert role_bytes_of(runs, "down") == pytest.approx({"ffl": (4 * 800 + 2 * 200) / 6, "head": 400 / 6})


def test_units_are_kept_by_block_where_a_device_has_it() -> None:
    assert kept_by_block([(16, 8), (8, 4), (4,)]) == pytest.approx((28 / 3, 6.0))
    assert kept_by_block([]) == ()


def test_the_worst_devices_are_of_the_last_round_over_all_seeds() -> None:
    found = worst_devices(two_seeds(), "fedavg", 2)
    assert [(w.seed, w.agent) for w in found] == [(0, "d1"), (1, "d1")]
    assert [w.accuracy_sent for w in found] == pytest.approx([0.3, 0.5])


def test_tables_fit_100_columns_and_mark_what_is_modelled() -> None:
    failures = [Failure(label="slow", seed=0, reason="it stopped")]
    long = run("a_strategy_with_a_name key=1234567 other=7654321", 0, (0.1, 0.9, 0.9), (0.6, 0.7, 0.7))
    paper = io.StringIO()
    show(report([*two_seeds().runs, long], failures=failures), Console(file=paper, width=100))
    text = paper.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "†75.0 [70.0..80.0]" in text
    assert "~58.0" in text
    assert "quick did not reach it with 1 of 2 seeds: its best was 10.0 points short" in text
    assert "failed: slow, seed 0: it stopped" in text


def test_without_fedavg_nothing_is_saved_against_anything() -> None:
    found = report([run("quick", 0, (0.1, 0.6), (0.6, 0.7))], reference=None)
    assert found.reaches == ()
    assert found.totals[0].saved is None
    assert "reach" not in grids(found, wide=True)


def test_csv_has_a_row_for_every_strategy_seed_round_and_device() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(two_seeds()))))
    assert len(rows) == 4 * 3 * 2
    first = rows[0]
    assert (first["label"], first["seed"], first["round"], first["agent"]) == ("fedavg", "0", "1", "d0")
    assert float(first["accuracy_sent"]) == pytest.approx(0.2)
    assert (first["kept_units_0"], first["kept_units_1"]) == ("16", "8")
    assert (first["down_ffl_bytes"], first["up_ffl_bytes"], first["down_bytes"]) == ("800", "500", "1000")
    assert (first["train_joules"], first["train_joules_kind"], first["train_s"]) == (
        "20.0",
        "modelled",
        "2.0",
    )
    assert first["validation"] == ""


def test_a_report_is_the_same_after_json() -> None:
    found = two_seeds()
    assert ComparisonReport.model_validate_json(found.model_dump_json()) == found
    assert reaches_of(found.curves, "fedavg") == list(found.reaches)
