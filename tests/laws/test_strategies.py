"""What must hold for every strategy: the files of coordinator/strategies, as they are found."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from coordinator.collector import expected_layout
from coordinator.strategies.base import State, available, load_strategy
from foundation.codec import assignment_from, frame_of, update_from
from foundation.errors import SettingsError, StoreError
from foundation.parameters import EVERYTHING, role_of
from foundation.work import TERMS
from tests.toys import ToyFederation, same

VARIANTS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in available()),
    ("fedtp", {"personal_head": True, "topk": 0.3}),
    ("pfl_tpp", {"ffl": "mean_of_keepers", "warm_up": 0, "target": 0.5}),
    ("pfl_tpp", {"ffl": "mean", "warm_up": 0, "personal_head": False}),
    ("pfl_tpp", {"uplink": "topk", "topk": 0.3, "lean": True}),
    ("pfl_tpp", {"uplink": "embed"}),
    ("hedgerow", {"target": 0, "gate_rate": 0.0}),
    ("hedgerow", {"target": 0.5, "lean_after": 0.5, "encoding_down": "float16"}),
    ("adaptive_pruning", {"tightness": 1.0}),
    ("adaptive_pruning", {"rates": "measured"}),
    ("pfedla", {"mixing": "hypernetwork"}),
    ("pfedla", {"heuristic": 2}),
]

every_strategy = pytest.mark.parametrize(
    ("name", "settings"),
    VARIANTS,
    ids=["-".join([name, *map(str, settings.values())]) for name, settings in VARIANTS],
)


def _federation(name: str, settings: dict[str, object]) -> ToyFederation:
    return ToyFederation(load_strategy(name, {"learning_rate": 5e-3} | settings))


def _equal(a: State, b: State, tolerance: float = 0.0) -> bool:
    return (
        a.round == b.round
        and same(a.shared, b.shared, tolerance)
        and a.private.keys() == b.private.keys()
        and all(same(a.private[agent], b.private[agent], tolerance) for agent in a.private)
    )


@every_strategy
def test_planning_twice_gives_the_same_frames(name: str, settings: dict[str, object]) -> None:
    toy = _federation(name, settings)
    state = toy.begin()
    first, second = toy.plan(state, 1), toy.plan(state, 1)
    assert [frame_of(a) for a in first] == [frame_of(a) for a in second]
    assert [a.agent for a in first] == [card.agent for card in toy.cards]
    assert len({a.seed for a in first}) == len(first)


@every_strategy
def test_what_goes_down_is_what_is_personal(name: str, settings: dict[str, object]) -> None:
    toy = _federation(name, settings)
    state = toy.begin()
    for assignment in toy.plan(state, 1):
        personal = toy.strategy.personal(state, assignment.agent)
        assert same(assignment.parameters, personal, 1e-7)
        assert {t.term for t in assignment.work.terms} <= TERMS
        assert not any(n.startswith(assignment.work.own) for n in assignment.parameters)
        # A blend needs both, what is kept and what is sent; and what may be `own` next time is kept beside.
        if assignment.work.blend() is None and not assignment.work.own:
            frozen = EVERYTHING - assignment.work.keep
            assert {role_of(n) for n in assignment.parameters} <= frozen, "what is personal must not be sent"


@every_strategy
def test_absorbing_does_not_care_who_came_first(name: str, settings: dict[str, object]) -> None:
    toy = _federation(name, settings)
    state = toy.begin()
    updates = [toy.work(a) for a in toy.plan(state, 1)]
    forward = toy.strategy.absorb(state, updates)
    assert _equal(forward, toy.strategy.absorb(state, updates[::-1]), 1e-5)
    assert forward.round == 1


@every_strategy
def test_absorbing_survives_missing_updates(name: str, settings: dict[str, object]) -> None:
    toy = _federation(name, settings)
    state = toy.begin()
    updates = [toy.work(a) for a in toy.plan(state, 1)]
    nobody = toy.strategy.absorb(state, [])
    assert _equal(nobody, dataclasses.replace(state, round=1))
    one = toy.strategy.absorb(state, updates[1:2])
    for absent in ("d0", "d2"):
        if absent in state.private:
            assert same(one.private[absent], state.private[absent]), "absent agents' rows must not move"
    assert toy.plan(one, 2)


@every_strategy
def test_the_state_survives_being_written(name: str, settings: dict[str, object]) -> None:
    toy = _federation(name, settings)
    state, _ = toy.round(toy.begin(), 1)
    back = State.from_bytes(state.to_bytes())
    assert _equal(state, back)
    assert back.to_bytes() == state.to_bytes()
    assert [frame_of(a) for a in toy.plan(state, 2)] == [frame_of(a) for a in toy.plan(back, 2)]


@every_strategy
def test_killed_and_resumed_equals_unbroken(name: str, settings: dict[str, object]) -> None:
    unbroken, broken = _federation(name, settings), _federation(name, settings)
    a, b = unbroken.begin(), broken.begin()
    for number in (1, 2, 3):
        a, _ = unbroken.round(a, number)
        # Killed after the updates came in: state from the snapshot, updates from their frames.
        frames = [frame_of(u) for u in (broken.work(x) for x in broken.plan(b, number))]
        b = State.from_bytes(b.to_bytes())
        b = broken.strategy.absorb(b, [update_from(frame) for frame in frames])
    assert _equal(a, b)


@every_strategy
def test_three_rounds_lower_the_loss(name: str, settings: dict[str, object]) -> None:
    toy = _federation(name, {"epochs": 3} | settings)
    state = toy.begin()
    losses = []
    for number in (1, 2, 3):
        state, updates = toy.round(state, number)
        losses.append(statistics.fmean(u.metrics["loss"] for u in updates))
        first = losses[0] if number > 1 else statistics.fmean(u.metrics["loss_sent"] for u in updates)
        assert losses[-1] < first
    assert state.round == 3


@every_strategy
def test_frames_carry_everything(name: str, settings: dict[str, object]) -> None:
    toy = _federation(name, settings)
    for assignment in toy.plan(toy.begin(), 1):
        back = assignment_from(frame_of(assignment))
        assert back.model_dump() == assignment.model_dump()
        assert back.parameters == assignment.parameters
        update = toy.work(assignment)
        layout = {name: array.shape for name, array in update.parameters.items()}
        assert layout == dict(expected_layout(assignment))
        received = update_from(frame_of(update))
        assert same(received.parameters, update.parameters) or update.masks
        assert {k: v.tolist() for k, v in received.masks.items()} == {
            k: v.tolist() for k, v in update.masks.items()
        }


def test_the_folder_is_the_registry() -> None:
    assert {"fedavg", "fedtp", "local", "pfl_tpp"} <= set(available())
    with pytest.raises(SettingsError, match=r"no strategy 'fedagv'; did you mean 'fedavg'\? There are: "):
        load_strategy("fedagv")
    with pytest.raises(SettingsError, match=r"no strategy 'zzz'\. There are: .*fedavg.*local"):
        load_strategy("zzz")


@pytest.mark.parametrize("name", available())
def test_a_misspelt_setting_is_named(name: str) -> None:
    said = r"there is no setting 'epoch_s'; did you mean 'epochs'\? There are: .*learning_rate"
    with pytest.raises(SettingsError, match=f"strategy {name}: {said}"):
        load_strategy(name, {"epoch_s": 3})
    with pytest.raises(SettingsError, match=r"learning_rate: .*greater.*; there is no setting 'nothing'"):
        load_strategy(name, {"learning_rate": -1, "nothing": 0})
    with pytest.raises(SettingsError, match="learning_rate"):
        load_strategy(name, {"learning_rate": -1})


def test_a_torn_snapshot_is_a_store_error() -> None:
    toy = _federation("fedtp", {})
    data = toy.begin().to_bytes()
    for broken in (b"", data[:7], data[:100], data[: len(data) // 2], b"\xff" * 64):
        with pytest.raises(StoreError):
            State.from_bytes(broken)
