"""Rules against hostile updates, on numbers small enough to do by hand; and what is quarantined."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.aggregate import mean_of_keepers
from coordinator.robust import blocks as blocks_module
from coordinator.robust.blocks import combined
from coordinator.robust.changes import changes_of, restated
from coordinator.robust.rules import consensus, distances, krum, median, trimmed
from coordinator.robust.screen import judged
from coordinator.robust.settle import Round, settled
from coordinator.settings import Robust
from coordinator.strategies.base import State, available, load_strategy
from foundation.messages import Assignment, Update
from foundation.parameters import Parameters, Role, role_of
from hedgerow.hostile import turned
from tests.toys import ToyFederation, same

UP, DOWN, HEAD = "blocks.0.ffl.up.weight", "blocks.0.ffl.down.weight", "head.weight"


def update(agent: str, arrays: dict[str, object], mask: Sequence[bool] | None = None) -> Update:
    masks = {} if mask is None else {"blocks.0.ffl": np.array(mask)}
    parameters = Parameters((n, np.array(a, np.float32)) for n, a in arrays.items())
    return Update(run="r", round=1, agent=agent, examples=10, parameters=parameters, masks=masks)


def heads(*rows: Sequence[float]) -> list[Update]:
    return [update(f"d{i}", {HEAD: row}) for i, row in enumerate(rows)]


def of(updates: Sequence[Update]) -> list[Parameters]:
    return [u.parameters for u in updates]


# --- rules ---------------------------------------------------------------------------------------


def test_the_median_by_coordinate() -> None:
    odd, even = heads([1, 9], [2, -1], [1e6, 3]), heads([1], [2], [4], [1e6])
    assert combined(odd, of(odd), [HEAD], median)[HEAD].tolist() == [2, 3]
    assert combined(even, of(even), [HEAD], median)[HEAD].tolist() == [3]


def test_the_trimmed_mean_leaves_out_both_ends() -> None:
    five = heads([1], [2], [3], [4], [1e6])
    assert combined(five, of(five), [HEAD], trimmed(0.2))[HEAD].tolist() == [3]
    assert combined(five, of(five), [HEAD], trimmed(0.49))[HEAD].tolist() == [3]
    assert combined(five[:4], of(five[:4]), [HEAD], trimmed(0.0))[HEAD].tolist() == [2.5]
    assert combined(five[:2], of(five[:2]), [HEAD], trimmed(0.4))[HEAD].tolist() == [1.5]


def test_a_unit_counts_those_that_have_it() -> None:
    updates = [
        update("d0", {UP: [[1], [0], [0]], DOWN: [[1, 0, 0]]}, [True, False, False]),
        update("d1", {UP: [[2], [5], [0]], DOWN: [[2, 5, 0]]}, [True, True, False]),
        update("d2", {UP: [[9], [7], [0]], DOWN: [[9, 7, 0]]}, [True, True, False]),
    ]
    for rule in ("median", "trimmed_mean", "multi_krum"):
        found = consensus(rule, 0.34, updates, of(updates), [UP, DOWN])
        assert found[UP][2] == found[DOWN][0, 2] == 0, "nobody has it"
    found = consensus("median", 0.2, updates, of(updates), [UP, DOWN])
    assert found[UP].tolist() == [[2], [6], [0]]
    assert found[DOWN].tolist() == [[2, 6, 0]]


def test_krum_chooses_from_the_crowd() -> None:
    updates = heads([0.0, 0.1], [0.1, 0], [0, 0], [0.1, 0.1], [50, 50])
    between = distances(updates, of(updates), [HEAD])
    assert between[0, 2] == pytest.approx(0.01 / 2)
    assert between[2, 4] == pytest.approx(2500)
    assert krum(between, 0.2, multi=True) == [0, 1, 2, 3]
    (chosen,) = krum(between, 0.2, multi=False)
    assert chosen < 4
    found = consensus("multi_krum", 0.2, updates, of(updates), [HEAD])[HEAD]
    assert found.tolist() == pytest.approx([0.05, 0.05])
    with pytest.raises(ValueError, match="no rule 'mode'"):
        consensus("mode", 0.2, updates, of(updates), [HEAD])


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=7, max_size=7), min_size=1, max_size=6),
    st.integers(1, 9),
)
def test_blocks_of_any_size_give_the_same(rows: list[list[float]], size: int) -> None:
    updates = heads(*rows)
    whole = consensus("median", 0.2, updates, of(updates), [HEAD])
    before = blocks_module.BLOCK_VALUES
    blocks_module.BLOCK_VALUES = size
    try:
        assert same(consensus("median", 0.2, updates, of(updates), [HEAD]), whole)
    finally:
        blocks_module.BLOCK_VALUES = before
    assert whole[HEAD].tolist() == pytest.approx([statistics.median(c) for c in zip(*rows, strict=True)])


# --- changes, for every strategy -----------------------------------------------------------------


def answered(name: str, **settings: object) -> tuple[ToyFederation, Round, State]:
    return trained(name, tuple(sorted(settings.items())))


@cache
def trained(name: str, settings: tuple[tuple[str, object], ...]) -> tuple[ToyFederation, Round, State]:
    """One round of five devices, which no test changes."""
    toy = ToyFederation(load_strategy(name, {"learning_rate": 5e-3, "epochs": 1} | dict(settings)), 5)
    state = toy.begin()
    assignments = toy.plan(state, 1)
    return toy, Round.of(assignments, [toy.work(a) for a in assignments]), state


STRATEGIES = [
    *((name, {}) for name in available()),
    ("pfl_tpp", {"ffl": "mean_of_keepers", "warm_up": 0, "target": 0.5}),
    ("adaptive_pruning", {"tightness": 1.0}),
    ("mh_pfedhn", {"teacher": True}),
]
every = pytest.mark.parametrize(("name", "settings"), STRATEGIES, ids=[f"{n}{len(s)}" for n, s in STRATEGIES])


@every
def test_changes_are_the_same_there_and_back(name: str, settings: dict[str, object]) -> None:
    _, round, _ = answered(name, **settings)
    for assignment, one, base in zip(round.assignments, round.updates, round.bases(), strict=True):
        changes = changes_of(one, assignment, base)
        again = restated(one, assignment, base, changes)
        assert same(again.parameters, one.parameters, 1e-6)
        for key, mask in one.masks.items():
            if f"{key}.up.weight" in changes:
                assert not changes[f"{key}.up.weight"][~mask].any(), "what was cut away changed nothing"


@every
def test_nothing_is_touched_unless_it_is_asked_for(name: str, settings: dict[str, object]) -> None:
    toy, round, state = answered(name, **settings)
    found = settled(Robust(), toy.strategy, state, round)
    assert all(a is b for a, b in zip(found, round.updates, strict=True))


@every
def test_a_consensus_of_equals_is_the_mean(name: str, settings: dict[str, object]) -> None:
    """With everybody's change the same, every rule absorbs what the mean would have."""
    toy, round, state = answered(name, **settings)
    first = round.bases()[0]
    changes = changes_of(round.updates[0], round.assignments[0], first)
    names = {n for n in changes if toy.strategy.pools(n)}
    alike = []
    for assignment, one, base in zip(round.assignments, round.updates, round.bases(), strict=True):
        own = changes_of(one, assignment, base)
        told = one.model_copy(update={"masks": round.updates[0].masks})
        alike.append(restated(told, assignment, base, own.updated({n: changes[n] for n in names})))
    same_round = Round.of(round.assignments, alike)
    plain = toy.strategy.absorb(state, alike)
    for rule in ("median", "trimmed_mean", "krum", "multi_krum"):
        found = settled(Robust(rule=rule), toy.strategy, state, same_round)
        assert same(toy.strategy.absorb(state, found).shared, plain.shared, 1e-5), rule


def test_the_keepers_of_a_unit_get_the_rule_of_the_keepers() -> None:
    toy, round, state = answered("pfl_tpp", ffl="mean_of_keepers", warm_up=0, target=0.5, every=1)
    (found, *_) = settled(Robust(rule="median"), toy.strategy, state, round)
    names = [n for n in found.parameters if role_of(n) is Role.FFL]
    old = Parameters((n, round.bases()[0][n]) for n in names)
    ready = settled(Robust(rule="median"), toy.strategy, state, round)
    mean = mean_of_keepers(ready, [1.0] * len(ready), old)
    agreed = consensus("median", 0.2, round.updates, round.changes(round.bases()), names)
    assert any(not mask.all() for u in round.updates for mask in u.masks.values())
    for name in names:
        assert np.allclose(mean[name], old[name] - agreed[name], atol=1e-5), name


@every
def test_clipping_bounds_what_one_device_can_do(name: str, settings: dict[str, object]) -> None:
    toy, round, state = answered(name, **settings)
    honest = toy.strategy.absorb(state, list(round.updates))
    changes = round.changes(round.bases())
    if not any(changes):
        pytest.skip("nothing travels")
    loud = Parameters((n, c * np.float32(1e6)) for n, c in changes[0].items())
    first = restated(round.updates[0], round.assignments[0], round.bases()[0], loud)
    attacked = Round.of(round.assignments, [first, *round.updates[1:]])
    ready = settled(Robust(clip=1.0, huge=None), toy.strategy, state, attacked)
    norms = [np.sqrt(sum(float((c**2).sum()) for c in ch.values())) for ch in changes]
    bounded = Round.of(round.assignments, ready).changes(round.bases())
    largest = max(np.sqrt(sum(float((c**2).sum()) for c in ch.values())) for ch in bounded)
    assert largest <= 1.1 * max(norms)
    after = toy.strategy.absorb(state, ready)
    start = state.shared
    moved = [n for n in start if n.startswith("model/")]
    for key in moved:
        honest_step = np.abs(honest.shared[key] - start[key]).max()
        assert np.abs(after.shared[key] - start[key]).max() <= 50 * honest_step + 1e-3, key


def test_claimed_examples_are_bounded() -> None:
    toy, round, state = answered("fedavg")
    liar = round.updates[0].model_copy(update={"examples": 10**30})
    ready = settled(
        Robust(examples=2.0),
        toy.strategy,
        state,
        Round.of(round.assignments, [liar, *round.updates[1:]]),
    )
    assert [u.examples for u in ready] == [96, 48, 48, 48, 48]


def test_a_fixed_bound_holds_whatever_the_others_do() -> None:
    toy, round, state = answered("fedavg")
    ready = settled(Robust(clip_norm=0.01), toy.strategy, state, round)
    for change in Round.of(round.assignments, ready).changes(round.bases()):
        assert np.sqrt(sum(float((c**2).sum()) for c in change.values())) == pytest.approx(0.01, rel=1e-2)


# --- quarantine ----------------------------------------------------------------------------------


def screened(settings: Robust, updates: Sequence[Update], history: Sequence[float] = ()) -> dict[str, str]:
    return dict(judged(settings, updates, of(updates), [HEAD], history).quarantined)


CROWD = ([1, 0.1, 0], [1, 0, 0.1], [0.9, 0, 0], [1.1, 0, 0])


def test_a_huge_change_is_quarantined_by_default() -> None:
    found = screened(Robust(), heads(*CROWD, [1e6, 0, 0]))
    assert found == {"d4": found["d4"]}
    assert "times the median of the others'" in found["d4"]
    assert screened(Robust(huge=None), heads(*CROWD, [1e6, 0, 0])) == {}


def test_who_is_far_outside_is_quarantined_only_where_asked() -> None:
    updates = heads(*CROWD, [10, 0, 0])
    assert screened(Robust(), updates) == {}
    found = screened(Robust(outlier=3.0), updates)
    assert list(found) == ["d4"]
    assert "deviations away" in found["d4"]


def test_a_flipped_sign_points_away() -> None:
    found = screened(Robust(outlier=3.0), heads(*CROWD, [-1, 0, -0.1]))
    assert list(found) == ["d4"]
    assert "points away from the others' (cosine -1.00" in found["d4"]


def test_honest_differences_are_not_quarantined() -> None:
    assert screened(Robust(outlier=3.0), heads(*CROWD, [0.3, 0.5, -0.2])) == {}
    assert screened(Robust(outlier=3.0), heads(*CROWD, [0, 0, 0])) == {}, "who changes nothing harms nobody"
    assert screened(Robust(outlier=3.0), heads([0, 0], [0, 0], [0, 0], [0, 0], [1, 1])) == {}


def test_a_small_fleet_is_judged_by_its_history() -> None:
    pair = heads([1, 0, 0], [1e6, 0, 0])
    assert screened(Robust(), pair) == {}, "nobody can say which of two is right"
    assert list(screened(Robust(), pair, [0.5, 0.6, 0.7])) == ["d1"]


def test_only_those_with_the_same_arrays_are_compared() -> None:
    newcomer = update("n", {"embedding": [1e6, 1e6]})
    other = update("o", {UP: [[1e6], [1e6]]})
    assert screened(Robust(outlier=3.0), [*heads(*CROWD), newcomer, other]) == {}


@every
def test_honest_toy_devices_stay_and_a_loud_one_goes(name: str, settings: dict[str, object]) -> None:
    toy, round, _ = answered(name, **settings)
    changes = round.changes(round.bases())
    pooled = [n for n in changes[0] if toy.strategy.pools(n)]
    honest = judged(Robust(outlier=3.0), round.updates, changes, pooled)
    assert not honest.quarantined
    if not any(changes):
        return
    loud = Parameters((n, c * np.float32(1e6)) for n, c in changes[0].items())
    found = judged(Robust(), round.updates, [loud, *changes[1:]], pooled)
    assert list(found.quarantined) == ["d0"]
    assert found.size is not None


def test_turning_a_change_is_what_the_attacks_say() -> None:
    sent, trained = Parameters({HEAD: np.ones(2, np.float32)}), Parameters({HEAD: np.full(2, 3, np.float32)})
    assert turned(trained, sent, "sign_flip")[HEAD].tolist() == [-1, -1]
    assert turned(trained, sent, "huge")[HEAD].tolist() == [2e6 + 1] * 2
    assert turned(trained, sent, "label_flip") is trained


def test_an_assignment_of_the_initial_model_has_it_as_its_base() -> None:
    toy, round, _ = answered("hedgerow")
    assert isinstance(round.assignments[0], Assignment)
    assert round.assignments[0].work.initial
    bases = round.bases()
    assert bases[0] is bases[1]
    assert set(toy.spec.layout) >= {(n, a.shape) for n, a in bases[0].items()}
