"""The ledger: sums that are known by hand, kinds and scopes that never meet, and what cannot be read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.channel import Radio, rate_bps
from coordinator.ledger.entries import Entry, read
from coordinator.ledger.radiated import LABEL, Fixed, radiated_j
from coordinator.ledger.report import EnergyReport, energy_report
from coordinator.ledger.sums import Joules, Split, split
from coordinator.store.sql import Store
from foundation.energy import EnergyReading, Kind, Scope, Stage
from foundation.errors import SettingsError, StoreError
from tests.coordinator.ledgers import DENSE, PROFILES, book, measured, open_run, put, spoil, told, wall


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as opened:
        open_run(opened)
        yield opened


def report(store: Store, **more: Any) -> EnergyReport:
    return energy_report(book(store), **more)


# --- sums ------------------------------------------------------------------------------------------


def test_totals_are_split_by_kind_and_scope(store: Store) -> None:
    mixed = told(4.0, 2.0, Kind.MIXED, Scope.MODULE, sensor="ina3221")
    put(store, 1, "a", {"train": told(10.0, 3.0), "send": told(1.0, 1.0)})
    put(store, 1, "n", {"train": measured(20.0, 5.0), "send": mixed})
    put(store, 1, "c", {"train": told(7.0, 1.0, Kind.MODELLED, Scope.WALL_AC)})
    put(store, 1, "u", {"train": told(None, 9.0), "send": told(None, 1.0)})
    total = report(store).total
    assert [(p.kind, p.scope, p.joules, p.seconds, p.readings) for p in total.parts] == [
        (Kind.MEASURED, Scope.MODULE, 20.0, 5.0, 1),
        (Kind.MIXED, Scope.MODULE, 4.0, 2.0, 1),
        (Kind.MODELLED, Scope.WALL_AC, 7.0, 1.0, 1),
        (Kind.MODELLED, Scope.BOARD_DC, 11.0, 4.0, 2),
    ]
    assert (total.unknown.readings, total.unknown.seconds) == (2, 10.0)
    assert total.seconds == 22.0
    assert total.modelled[1].idle_joules == 5.5


def test_totals_split_one_number_raises(store: Store) -> None:
    put(store, 1, "a", {"train": told(10.0)})
    put(store, 1, "n", {"train": measured(20.0)})
    total = report(store).total
    with pytest.raises(TypeError, match="no one number"):
        float(total)
    with pytest.raises(TypeError):
        total + total  # type: ignore[operator]
    with pytest.raises(ValueError, match="measured at module, modelled at board_dc"):
        total.only()
    numbers = {
        name for name in Split.model_fields if name not in ("measured", "mixed", "modelled", "unknown")
    }
    assert not numbers
    assert "joules" not in EnergyReport.model_fields
    (device, _) = report(store).devices
    assert device.energy.only().joules == 10.0


def test_unknown_joules_forbid_one_number_as_well(store: Store) -> None:
    put(store, 1, "a", {"train": told(10.0), "send": told(None)})
    with pytest.raises(ValueError, match="1 readings without joules"):
        report(store).total.only()


def test_correlated_sum(store: Store) -> None:
    # Two windows of a device add up; a and b share a model, c has another one.
    put(store, 1, "a", {"train": told(10.0, bar=2.0), "send": told(1.0, bar=1.0)})
    put(store, 1, "b", {"train": told(10.0, bar=4.0)})
    put(store, 1, "c", {"train": told(10.0, bar=24.0)})
    (part,) = report(store).total.modelled
    assert part.uncertainty_joules == pytest.approx(math.hypot(2 + 1 + 4, 24))


def test_measured_devices_add_in_quadrature(store: Store) -> None:
    put(store, 1, "a", {"train": measured(10.0, bar=1.0), "send": measured(10.0, bar=2.0)})
    put(store, 1, "b", {"train": measured(10.0, bar=4.0)})
    (part,) = report(store).total.measured
    assert part.uncertainty_joules == pytest.approx(5.0)


def test_mixed_devices_of_one_profile_add_up() -> None:
    def entry(agent: str, bar: float) -> Entry:
        reading = EnergyReading.model_validate(told(1.0, kind=Kind.MIXED, bar=bar))
        return Entry(agent=agent, round=1, stage=Stage.TRAIN, reading=reading)

    two = [entry("a", 3.0), entry("b", 4.0)]
    assert split(two, {"a": "p", "b": "p"}).mixed[0].uncertainty_joules == 7.0
    assert split(two, {"a": "p", "b": "q"}).mixed[0].uncertainty_joules == 5.0
    assert split(two, {}).mixed[0].uncertainty_joules == 7.0, "of whom nothing is known may be alike"


def test_an_unknown_error_bar_makes_that_of_the_sum_unknown(store: Store) -> None:
    none = told(5.0) | {"uncertainty_joules": None, "idle_joules": None}
    put(store, 1, "a", {"train": told(10.0), "send": none})
    part = report(store).total.only()
    assert (part.joules, part.uncertainty_joules, part.idle_joules) == (15.0, None, None)


KINDS = st.sampled_from([Kind.MEASURED, Kind.MIXED, Kind.MODELLED, Kind.NONE])
READINGS = st.builds(
    lambda kind, scope, joules, seconds: EnergyReading(
        joules=None if kind is Kind.NONE else joules,
        seconds=seconds,
        kind=kind,
        scope=scope,
        uncertainty_joules=joules / 7,
    ),
    KINDS,
    st.sampled_from(list(Scope)),
    st.floats(0, 1e9),
    st.floats(0, 1e6),
)
ENTRIES = st.lists(
    st.builds(
        Entry,
        agent=st.sampled_from("abcd"),
        round=st.integers(1, 4),
        stage=st.sampled_from(list(Stage)),
        reading=READINGS,
    ),
    max_size=40,
)


@given(ENTRIES, st.sampled_from(["agent", "round", "stage"]))
def test_parts_add_up_to_totals_within_kind_and_scope(entries: list[Entry], by: str) -> None:
    total = split(entries, PROFILES)
    groups = {getattr(entry, by) for entry in entries}
    parts = [split([e for e in entries if getattr(e, by) == group], PROFILES) for group in groups]
    for whole in total.parts:
        same = [p for s in parts for p in s.parts if (p.kind, p.scope) == (whole.kind, whole.scope)]
        assert math.fsum(p.joules for p in same) == pytest.approx(whole.joules, rel=1e-9, abs=1e-9)
        assert math.fsum(p.seconds for p in same) == pytest.approx(whole.seconds, rel=1e-9, abs=1e-9)
        assert sum(p.readings for p in same) == whole.readings
        bars = [p.uncertainty_joules for p in same if p.uncertainty_joules is not None]
        assert whole.uncertainty_joules is not None
        assert whole.uncertainty_joules <= math.fsum(bars) * (1 + 1e-9) + 1e-9
    assert {(p.kind, p.scope) for s in parts for p in s.parts} == {(p.kind, p.scope) for p in total.parts}
    assert sum(s.unknown.readings for s in parts) == total.unknown.readings
    assert sum(p.readings for p in total.parts) + total.unknown.readings == len(entries)


# --- devices, stages, rounds -----------------------------------------------------------------------


def test_devices_stages_and_rounds(store: Store) -> None:
    put(store, 1, "a", {"train": told(10.0, 3.0, flags=("process_share",)), "send": told(1.0)})
    put(store, 2, "a", {"train": told(20.0, 5.0)}, interface_received_bytes=1500, interface_sent_bytes=None)
    put(store, 2, "u", {"train": told(None, 4.0)})
    found = report(store)
    a, u = found.devices
    assert (a.agent, a.profile, a.sensors, a.flags) == (
        "a",
        "raspberry-pi-4b",
        ("utilisation",),
        ("process_share",),
    )
    assert (a.energy.only().joules, a.seconds, a.updates, a.coverage) == (31.0, 9.0, 2, 1.0)
    assert (a.bytes.payload_down, a.bytes.payload_up) == (2000, 1000)
    assert a.bytes.interface_received is None, "the first update did not tell"
    assert (u.energy.parts, u.energy.unknown.seconds, u.coverage, u.sensors) == ((), 4.0, None, ())
    assert [(s.stage, s.seconds) for s in found.stages] == [(Stage.TRAIN, 12.0), (Stage.SEND, 1.0)]
    assert [(r.round, r.energy.modelled[0].joules, r.updates) for r in found.rounds] == [
        (1, 11.0, 1),
        (2, 20.0, 2),
    ]
    assert found.rounds[1].energy.unknown.readings == 1
    assert EnergyReport.model_validate_json(found.model_dump_json()) == found


def test_interface_bytes_are_added_when_everybody_told(store: Store) -> None:
    for number in (1, 2):
        put(store, number, "a", {}, interface_received_bytes=number, interface_sent_bytes=10 * number)
    (device,) = report(store).devices
    assert (device.bytes.interface_received, device.bytes.interface_sent) == (3, 30)


def test_a_run_without_updates_has_an_empty_ledger(store: Store) -> None:
    found = report(store, accuracy=0.5)
    assert (found.total.parts, found.seconds, found.devices, found.skipped) == ((), 0.0, (), ())
    assert [one.round for one in found.accuracy.reached] == [None, None]


# --- accuracy --------------------------------------------------------------------------------------


def test_joules_stand_beside_the_model_they_made(store: Store) -> None:
    put(store, 1, "a", {"train": told(10.0)}, accuracy_sent=0.1, accuracy=0.5)
    put(store, 1, "b", {"train": told(30.0)}, accuracy_sent=0.3, accuracy=0.7)
    put(store, 2, "a", {"train": told(5.0)}, accuracy_sent=0.6, accuracy=0.85)
    put(store, 2, "b", {"train": told(5.0)}, accuracy_sent=0.6, accuracy=0.75)
    found = report(store, accuracy=0.8).accuracy
    assert found.start == pytest.approx(0.2)
    told_of = [(p.round, p.model, p.accuracy, [s.joules for s in p.spent.parts]) for p in found.points]
    assert told_of == [
        (1, "sent", pytest.approx(0.2), []),
        (1, "after", pytest.approx(0.6), [40.0]),
        (2, "sent", pytest.approx(0.6), [40.0]),
        (2, "after", pytest.approx(0.8), [50.0]),
    ]
    assert [[p.joules for p in point.per_point] for point in found.points] == [
        [],
        [pytest.approx(40 / 40)],
        [pytest.approx(40 / 40)],
        [pytest.approx(50 / 60)],
    ]
    # 0.8 as a mean is 0.7999..., so ask a little less
    reached = {(r.agent, r.model): r for r in report(store, accuracy=0.79).accuracy.reached}
    assert {key: r.round for key, r in reached.items()} == {
        (None, "sent"): None,
        (None, "after"): 2,
        ("a", "sent"): None,
        ("a", "after"): 2,
        ("b", "sent"): None,
        ("b", "after"): None,
    }
    assert reached[None, "after"].spent is not None
    assert reached[None, "after"].spent.only().joules == 50.0
    assert reached["a", "after"].spent is not None
    assert reached["a", "after"].spent.only().joules == 15.0


def test_joules_per_point_stay_apart_by_kind(store: Store) -> None:
    put(store, 1, "a", {"train": told(10.0, bar=2.0)}, accuracy_sent=0.0, accuracy=0.5)
    put(store, 1, "n", {"train": measured(30.0)}, accuracy_sent=0.0, accuracy=0.5)
    (after,) = [p for p in report(store).accuracy.points if p.model == "after"]
    assert {(p.kind, p.joules) for p in after.per_point} == {
        (Kind.MEASURED, 30 / 50),
        (Kind.MODELLED, 10 / 50),
    }
    assert after.per_point[1].uncertainty_joules == pytest.approx(2 / 50)


# --- pairs -----------------------------------------------------------------------------------------


def test_pruned_over_dense_by_step_on_the_same_device(store: Store) -> None:
    rounds = {1: (10.0, DENSE), 2: (14.0, DENSE), 3: (6.0, [32, 64]), 4: (3.0, [32, 32])}
    for number, (joules, kept) in rounds.items():
        steps = 20 if number != 4 else 10
        put(store, number, "a", {"train": told(joules, joules / 2)}, kept_units=kept, steps=steps)
    (found,) = report(store).pruning.devices
    assert (found.dense.rounds, found.pruned.rounds, found.per) == ((1, 2), (3, 4), "step")
    assert (found.dense.joules, found.dense.seconds, found.dense.steps) == (24.0, 12.0, 40.0)
    assert found.pruned.units_kept == pytest.approx((96 / 256 + 64 / 256) / 2)
    assert found.joules is not None
    # by step: 0.5 and 0.7 dense, 0.3 and 0.3 pruned
    assert found.joules.ratio == pytest.approx(0.3 / 0.6)
    dense = 2 * np.std([0.5, 0.7], ddof=1) / math.sqrt(2) / 0.6
    assert found.joules.uncertainty == pytest.approx(0.5 * dense)
    assert found.seconds is not None
    assert found.seconds.ratio == pytest.approx(0.5)


def test_without_steps_rounds_are_compared_and_without_joules_seconds(store: Store) -> None:
    put(store, 1, "u", {"train": told(None, 8.0)})
    put(store, 2, "u", {"train": told(None, 2.0)}, kept_units=[1, 1])
    (found,) = report(store).pruning.devices
    assert (found.per, found.kind, found.joules) == ("round", Kind.NONE, None)
    assert found.seconds is not None
    assert (found.seconds.ratio, found.seconds.uncertainty) == (0.25, None)


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        ([DENSE, DENSE], "no round with fewer than 2 x 128 FFL units"),
        ([[9, 9], [8, 8]], "no round with all 2 x 128 FFL units"),
        ([[], []], "kept units are not told"),
        ([[999, 1], [128]], "kept units are not told, or not of the run's model"),
    ],
)
def test_dense_against_pruned_says_when_there_is_only_one(store: Store, kept: list[Any], why: str) -> None:
    for number, units in enumerate(kept, 1):
        put(store, number, "a", {"train": told(1.0)}, kept_units=units)
    found = report(store).pruning
    assert not found.devices
    assert [m.agent for m in found.missing] == ["a"]
    assert why in found.missing[0].why


def test_measured_rounds_are_not_held_against_modelled_ones(store: Store) -> None:
    put(store, 1, "a", {"train": measured(10.0)}, kept_units=DENSE)
    put(store, 2, "a", {"train": told(5.0)}, kept_units=[1, 1])
    found = report(store).pruning
    assert not found.devices
    assert "not known in the same way" in found.missing[0].why


def test_one_run_against_another_is_paired_by_round(store: Store) -> None:
    open_run(store, "s")
    for number, mine, theirs in ((1, 5.0, 10.0), (2, 8.0, 10.0), (3, 1.0, None)):
        put(store, number, "n", {"train": measured(mine), "wait": measured(1.0)})
        if theirs is not None:
            put(store, number, "n", {"train": measured(theirs), "wait": measured(1.0)}, run="s")
    found = report(store, other=book(store, "s")).against
    assert found is not None
    train, whole = found.devices
    assert (train.stage, whole.stage, train.rounds) == (Stage.TRAIN, None, (1, 2))
    assert train.joules is not None
    assert train.joules.ratio == pytest.approx((0.5 + 0.8) / 2)
    assert train.joules.uncertainty == pytest.approx(2 * np.std([0.5, 0.8], ddof=1) / math.sqrt(2))
    assert train.joules.gain_cancels, "10 % of gain on both sides is nothing in the ratio"
    assert whole.joules is not None
    assert whole.joules.ratio == pytest.approx((6 / 11 + 9 / 11) / 2)


def test_two_sensors_keep_their_own_error_bars(store: Store) -> None:
    open_run(store, "s")
    for number in (1, 2):
        put(store, number, "n", {"train": measured(5.0, bar=0.5)})
        put(store, number, "n", {"train": measured(10.0, bar=2.0, sensor="inline_ina")}, run="s")
    found = report(store, other=book(store, "s")).against
    assert found is not None
    assert found.devices[0].sensor == "several"
    ratio = found.devices[0].joules
    assert ratio is not None
    assert not ratio.gain_cancels
    assert ratio.uncertainty == pytest.approx(0.5 * math.hypot(0.1, 0.2))


def test_kinds_scopes_and_strangers_are_not_compared(store: Store) -> None:
    open_run(store, "s")
    put(store, 1, "a", {"train": told(5.0)})
    put(store, 1, "a", {"train": told(5.0, scope=Scope.WALL_AC)}, run="s")
    put(store, 1, "b", {"train": told(5.0)})
    put(store, 1, "n", {"train": measured(5.0)})
    put(store, 1, "n", {"train": told(5.0)}, run="s")
    put(store, 1, "c", {"train": told(5.0)})
    put(store, 2, "c", {"train": told(5.0)}, run="s")
    found = report(store, other=book(store, "s")).against
    assert found is not None
    assert not found.devices
    why = {(m.agent, m.why) for m in found.missing}
    assert ("a", "train: modelled at board_dc and modelled at wall_ac are not compared") in why
    assert ("n", "all stages: measured at module and modelled at board_dc are not compared") in why
    assert ("b", "it has no readings in both r and s") in why
    assert ("c", "train: no round that both runs have") in why


def test_a_round_of_two_scopes_has_seconds_only(store: Store) -> None:
    open_run(store, "s")
    for run in ("r", "s"):
        put(store, 1, "a", {"train": told(5.0), "send": measured(1.0)}, run=run)
    found = report(store, other=book(store, "s")).against
    assert found is not None
    whole = found.devices[1]
    assert (whole.kind, whole.joules) == (Kind.NONE, None)
    assert whole.seconds is not None
    assert whole.seconds.ratio == 1.0


# --- radiated --------------------------------------------------------------------------------------


def test_shannon_oracle(store: Store) -> None:
    uplink = Fixed.at(0.25)
    assert rate_bps(uplink.link, uplink.bandwidth_hz) == pytest.approx(6_178_073, abs=1)
    assert 8e6 / rate_bps(uplink.link, uplink.bandwidth_hz) == pytest.approx(1.2949, abs=5e-5)
    assert radiated_j(8e6, uplink.link, uplink.bandwidth_hz) == pytest.approx(0.012949, abs=5e-7)
    put(store, 1, "a", {"send": told(3.0)}, wire_bytes=1_000_000)
    found = report(store, radio_km=0.25)
    assert found.radiated is not None
    assert (found.radiated.kind, found.radiated.label) == ("modelled-radiated", LABEL)
    assert "not battery energy" in LABEL
    assert found.radiated.radiated_j == pytest.approx(0.012949, abs=5e-7)
    assert found.devices[0].radiated_j == found.rounds[0].radiated_j == found.radiated.radiated_j
    without = report(store)
    assert (found.total, found.stages) == (without.total, without.stages), "in no sum of joules"
    assert (without.radiated, without.devices[0].radiated_j) == (None, None)
    assert found.total.only().joules == 3.0


def test_unknown_bytes_have_no_radiated_energy(store: Store) -> None:
    put(store, 1, "a", {}, wire_bytes=None)
    put(store, 1, "b", {}, wire_bytes=100)
    found = report(store, radio_km=0.25)
    assert found.radiated is not None
    assert (found.radiated.radiated_j, found.radiated.unknown) == (None, 1)
    assert found.devices[0].radiated_j is None
    assert found.devices[1].radiated_j is not None


@pytest.mark.parametrize("distance", [0.0, -1.0, math.nan, math.inf])
def test_a_radio_is_somewhere(store: Store, distance: float) -> None:
    with pytest.raises(SettingsError, match="cannot be"):
        report(store, radio_km=distance)


def test_a_run_with_a_cell_has_its_own_radios(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        course = {"settings": {"settings": {"power_dbm": 23, "bandwidth_hz": 2e5}}}
        open_run(store, strategy="adaptive_pruning", settings=json.dumps(course))
        put(store, 1, "a", {"send": told(3.0)}, wire_bytes=50_000)
        found = report(store)
        far = report(store, radio_km=0.25)
    rng = np.random.default_rng([7, int.from_bytes(b"a", "big"), 0xCE11])
    link = Radio(23, math.sqrt(rng.uniform(0.05**2, 0.5**2)))
    assert found.radiated is not None
    assert "own cell" in found.radiated.how
    # alone in its round, it has all of the bandwidth
    assert found.radiated.radiated_j == pytest.approx(
        10**2.3 / 1000 * 400_000 / rate_bps(link, 2e5), rel=1e-6
    )
    assert far.radiated is not None
    assert far.radiated.radiated_j != found.radiated.radiated_j, "--radio goes before it"


@pytest.mark.parametrize(
    ("settings", "how"),
    [({"rates": "measured"}, None), ({"power_dbm": "much"}, "not known: strategy adaptive_pruning")],
)
def test_a_run_without_a_cell_has_none(tmp_path: Path, settings: dict[str, Any], how: str | None) -> None:
    with Store.open(tmp_path) as store:
        course = json.dumps({"settings": {"settings": settings}})
        open_run(store, strategy="adaptive_pruning", settings=course)
        put(store, 1, "a", {"send": told(3.0)})
        found = report(store).radiated
    if how is None:
        assert found is None
    else:
        assert found is not None
        assert how in found.how
        assert (found.radiated_j, found.unknown) == (None, 1)


# --- what cannot be read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "[]", "null", "3", '"ledger"', "[" * 50_000, '{"ledger": 3}', '{"metrics": {}}', "{}"],
)
def test_a_broken_summary_is_skipped_and_counted(store: Store, text: str) -> None:
    put(store, 1, "a", {"train": told(1.0)})
    put(store, 1, "b", {"train": told(2.0)})
    spoil(store, 1, "b", text)
    found = report(store, accuracy=0.5, radio_km=1.0)
    assert found.total.only().joules == 1.0
    assert [(s.agent, s.round) for s in found.skipped] == [("b", 1)]


@pytest.mark.parametrize(
    "reading",
    [
        None,
        [],
        {},
        told(1.0) | {"seconds": -1},
        told(1.0) | {"joules": -3},
        told(1.0) | {"joules": 1e300},
        told(1.0) | {"joules": 10**400},
        told(1.0) | {"joules": "much"},
        told(1.0) | {"kind": "guessed"},
        told(1.0) | {"uncertainty_joules": -1.0},
    ],
)
def test_a_broken_reading_is_skipped_and_counted(store: Store, reading: Any) -> None:
    put(store, 1, "a", {"train": told(1.0)})
    summary = {"ledger": {"train": told(5.0), "send": reading, "sleep": told(1.0)}}
    put(store, 1, "b", {})
    spoil(store, 1, "b", json.dumps(summary))
    found = report(store)
    assert found.total.only().joules == 6.0
    assert sorted(s.what for s in found.skipped) == [
        "a reading of no stage, 'sleep'",
        "the reading of 'send'",
    ]


def test_joules_without_a_kind_are_unknown(store: Store) -> None:
    put(store, 1, "a", {"train": told(5.0) | {"kind": "none"}})
    assert (report(store).total.parts, report(store).total.unknown.readings) == ((), 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELD = st.sampled_from(
    ["ledger", "metrics", "kept_units", "received_bytes", "wire_bytes", "steps", "joules"]
)
PLACES = st.sampled_from(
    ["train", "send", "seconds", "joules", "kind", "scope", "accuracy", "accuracy_sent", "steps"]
)
NEARLY = st.dictionaries(
    FIELD, JSON | st.dictionaries(PLACES, JSON | st.dictionaries(PLACES, JSON)), max_size=6
)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(tmp_path_factory.mktemp("spoiled")) as opened:
        open_run(opened)
        put(opened, 1, "a", {"train": told(1.0)})
        put(opened, 1, "b", {"train": told(2.0)})
        yield opened


@given(NEARLY.map(json.dumps) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=200)
def test_no_summary_is_fatal(spoiled: Store, text: str) -> None:
    spoil(spoiled, 1, "b", text)
    found = report(spoiled, accuracy=0.5, other=book(spoiled), radio_km=0.1)
    (known,) = [device for device in found.devices if device.agent == "a"]
    assert known.energy.only().joules == 1.0
    for part in found.total.parts:
        assert math.isfinite(part.joules)
        assert part.joules >= 0
    EnergyReport.model_validate_json(found.model_dump_json())


def test_a_card_of_another_version_is_an_unknown_profile(store: Store) -> None:
    import sqlalchemy as sa

    from coordinator.store import schema

    put(store, 1, "a", {"train": told(1.0)})
    with store._writing() as connection:
        change = sa.update(schema.agents).where(schema.agents.c.agent == "a")
        connection.execute(change.values(card_json='{"from": "elsewhere"}'))
    assert report(store).devices[0].profile is None


# --- a store that is in use ------------------------------------------------------------------------


def test_a_store_is_read_while_its_coordinator_writes(tmp_path: Path) -> None:
    with Store.open(tmp_path) as writer:
        open_run(writer)
        put(writer, 1, "a", {"train": told(1.0)})
        with Store.open_to_read(tmp_path) as reader:
            assert energy_report(read(reader, "r")).total.only().joules == 1.0
            put(writer, 2, "a", {"train": told(2.0)})
            assert energy_report(read(reader, "r")).total.only().joules == 3.0
            with pytest.raises(StoreError, match="the store failed"):
                reader.set_run_state("r", "failed")
        assert writer.run("r").state == "running"
        put(writer, 3, "a", {"train": told(2.0)})


def test_reading_changes_nothing(tmp_path: Path) -> None:
    with Store.open(tmp_path) as writer:
        open_run(writer)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with Store.open_to_read(tmp_path) as reader:
        read(reader, "r")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_not_ours_is_read_without_a_file_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(tmp_path) as writer:
        open_run(writer)
    monkeypatch.setattr("coordinator.store.schema.os.access", lambda *_: False)
    with Store.open_to_read(tmp_path) as reader:
        assert read(reader, "r").run == "r"
        assert {path.name for path in tmp_path.iterdir()} == {"hedgerow.sqlite", "blobs"}


def test_what_cannot_be_read_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store in"):
        Store.open_to_read(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "hedgerow.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="cannot be read"):
        Store.open_to_read(tmp_path)


def test_another_revision_is_not_guessed_at(tmp_path: Path) -> None:
    import sqlalchemy as sa

    with Store.open(tmp_path) as writer, writer._writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="is at revision 9999"):
        Store.open_to_read(tmp_path)


def test_parts_say_what_they_are() -> None:
    part = Joules(kind=Kind.MEASURED, scope=Scope.MODULE, joules=1.0, seconds=1.0, readings=1)
    assert Split(measured=(part,)).only() is part
    with pytest.raises(ValueError, match="no readings"):
        Split().only()


# --- the wall beside it ----------------------------------------------------------------------------


def test_the_wall_stands_beside_the_devices_and_is_in_no_sum(store: Store) -> None:
    for number in (1, 2, 3):
        put(store, number, "n", {"train": measured(80.0), "send": measured(10.0)})
    put(store, 1, "a", {"train": told(7.0)})
    before = report(store)
    assert before.wall is None
    wall(store, 1, "n", 120.0)
    wall(store, 2, "n", None)
    wall(store, 3, "n", 100.0)
    after = report(store)
    assert after.wall is not None
    assert after.model_copy(update={"wall": None}) == before
    (device,) = after.wall.devices
    assert (device.agent, device.plugs, device.rounds) == ("n", ("shelly:n",), (1, 3))
    (at_wall,), (own,) = device.energy.parts, device.own.parts
    assert (at_wall.kind, at_wall.scope, at_wall.joules) == (Kind.MEASURED, Scope.WALL_AC, 220.0)
    assert at_wall.uncertainty_joules == pytest.approx(11.0)  # one plug: its error bars add up
    assert (own.scope, own.joules) == (Scope.MODULE, 180.0)  # of the same rounds alone
    assert device.own_over_wall == pytest.approx(180 / 220)
    assert [(missing.round, missing.why) for missing in device.missing] == [(2, "it was silent")]
    assert not device.implausible


def test_measured_and_mixed_joules_at_the_wall_are_not_added(store: Store) -> None:
    for number in (1, 2):
        put(store, number, "a", {"train": told(7.0)})
    wall(store, 1, "a", 10.0)
    wall(store, 2, "a", 10.0, kind=Kind.MIXED)
    found = report(store).wall
    assert found is not None
    assert [(part.kind, part.joules) for part in found.devices[0].energy.parts] == [
        (Kind.MEASURED, 10.0),
        (Kind.MIXED, 10.0),
    ]
    assert found.devices[0].own_over_wall is None


def test_a_wall_below_the_board_is_said(store: Store) -> None:
    put(store, 1, "n", {"train": measured(100.0)})
    put(store, 1, "a", {"train": told(100.0)})
    wall(store, 1, "n", 50.0)
    wall(store, 1, "a", 50.0)  # a model may be wrong by that much
    found = report(store).wall
    assert found is not None
    assert [(device.agent, device.implausible) for device in found.devices] == [("a", False), ("n", True)]


def test_a_record_that_cannot_be_read_is_told_and_not_fatal(store: Store) -> None:
    put(store, 1, "n", {"train": measured(100.0)})
    store.add_wall("r", 1, "n", '{"agent": "n"}')
    found = report(store)
    assert found.wall is None
    assert [(one.agent, one.what) for one in found.skipped] == [("n", "what its plug said")]
