"""Cold start: a device that joins late finds its embedding in one exchange, and nothing else moves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.collector import expected_layout
from coordinator.strategies.base import State, load_strategy
from coordinator.strategies.fedtp import FRESH
from foundation.codec import frame_of
from foundation.messages import Assignment, Update
from foundation.parameters import WEIGHTS, Parameters
from foundation.work import ABILITIES, EmbeddingFit, LocalWork
from tests.toys import ToyFederation, same

FAST = {"learning_rate": 5e-3, "epochs": 1}
STRATEGIES = {
    "fedtp": ("fedtp", {}),
    "fedtp, factored": ("fedtp", {"rank": 3}),
    "fedtp, personal head": ("fedtp", {"personal_head": True}),
    "pfl_tpp": ("pfl_tpp", {"warm_up": 0, "target": 0.5}),
    "pfl_tpp, embed": ("pfl_tpp", {"uplink": "embed"}),
    "pfedhn": ("pfedhn", {}),
}
every_strategy = pytest.mark.parametrize("which", STRATEGIES)


def _joined(which: str, **settings: object) -> tuple[ToyFederation, State]:
    """Two rounds of d0 and d1; then d2 is enrolled."""
    name, own = STRATEGIES[which]
    toy = ToyFederation(load_strategy(name, FAST | own | settings))
    everybody, toy.cards = toy.cards, toy.cards[:2]
    state = toy.begin()
    for number in (1, 2):
        state, _ = toy.round(state, number)
    toy.cards = everybody
    return toy, toy.strategy.enroll(state, toy.cards[2], toy.seed)


def _of(plan: list[Assignment], agent: str) -> Assignment:
    return next(assignment for assignment in plan if assignment.agent == agent)


def _first(toy: ToyFederation, state: State) -> tuple[Assignment, Update]:
    assignment = _of(list(toy.plan(state, 3)), "d2")
    return assignment, toy.work(assignment)


@every_strategy
def test_a_newcomer_gets_the_hypernetwork_and_sends_an_embedding(which: str) -> None:
    toy, state = _joined(which)
    assignment, update = _first(toy, state)
    assert assignment.work.embedding_fit() == EmbeddingFit(epochs=5, learning_rate=0.1)
    personal = toy.strategy.personal(state, "d2")
    network = state.shared.prefixed_only("hypernet/")
    embedding = {"embedding": state.private["d2"]["embedding"]}
    assert same(assignment.parameters, personal.updated(network).updated(embedding))
    assert expected_layout(assignment) == (("embedding", (32,)),)
    assert update.parameters.layout == (("embedding", (32,)),)
    assert not same(update.parameters, embedding)
    for other in ("d0", "d1"):
        assert _of(list(toy.plan(state, 3)), other).work.embedding_fit() is None


@every_strategy
def test_nothing_but_its_embedding_moves(which: str) -> None:
    toy, state = _joined(which)
    _, update = _first(toy, state)
    after = toy.strategy.absorb(state, [update])
    assert after.private["d2"] == Parameters({"embedding": update.parameters["embedding"]})
    # All the rest is the same to the last bit.
    back = {**after.private, "d2": state.private["d2"]}
    assert State(state.round, after.shared, back).to_bytes() == state.to_bytes()
    assert after.round == state.round + 1


@every_strategy
def test_what_the_others_bring_counts_as_if_it_were_not_there(which: str) -> None:
    toy, state = _joined(which)
    updates = [toy.work(assignment) for assignment in toy.plan(state, 3)]
    together = toy.strategy.absorb(state, updates)
    apart = toy.strategy.absorb(state, [u for u in updates if u.agent != "d2"])
    assert together.shared == apart.shared
    assert {a: p for a, p in together.private.items() if a != "d2"} == {
        a: p for a, p in apart.private.items() if a != "d2"
    }
    assert FRESH in apart.private["d2"], "who did not answer is still new"


@every_strategy
def test_then_it_takes_part_as_everybody_does(which: str) -> None:
    toy, state = _joined(which)
    found = _first(toy, state)[1]
    state = toy.strategy.absorb(state, [found])
    plan = list(toy.plan(state, 4))
    assert _of(plan, "d2").work == _of(plan, "d0").work
    updates = [toy.work(assignment) for assignment in plan]
    after = toy.strategy.absorb(state, updates)
    learns = which != "pfl_tpp, embed"
    assert same(after.private["d2"], state.private["d2"]) != learns
    assert same(after.shared.under("hypernet/"), state.shared.under("hypernet/")) != learns


@pytest.mark.parametrize("which", ["fedtp", "fedtp, factored", "pfedhn"])
def test_the_embedding_that_is_found_suits_the_device_better(which: str) -> None:
    toy, state = _joined(which, cold_start_epochs=30)
    _, update = _first(toy, state)
    assert update.metrics["loss_fitted"] < update.metrics["loss_sent"]
    # And it is what the coordinator generates from then on.
    state = toy.strategy.absorb(state, [update])
    again = toy.work(_of(list(toy.plan(state, 4)), "d2"))
    assert again.metrics["loss_sent"] == pytest.approx(update.metrics["loss_fitted"], rel=1e-4)


def test_what_is_personal_is_trained_after_the_fit_and_stays() -> None:
    for epochs, moved in ((0, False), (2, True)):
        toy, state = _joined("fedtp, personal head", cold_start_local=epochs)
        assignment, update = _first(toy, state)
        assert [phase.epochs for phase in assignment.work.phases] == [epochs]
        kept, _ = toy.personal["d2"]
        assert set(kept) == {"head.weight", "head.bias"}
        assert np.abs(kept["head.bias"]).max() > 0 or not moved  # it starts at 0
        assert (update.metrics["loss"] != update.metrics["loss_fitted"]) == moved


def test_without_a_setting_it_trains_as_many_epochs_as_in_any_round() -> None:
    toy, state = _joined("fedtp", epochs=3)
    assert [phase.epochs for phase in _first(toy, state)[0].work.phases] == [3]


@every_strategy
def test_an_agent_of_an_older_version_takes_part_as_everybody_does(which: str) -> None:
    toy, state = _joined(which)
    toy.cards[2] = toy.cards[2].model_copy(update={"terms": ABILITIES - {"embedding_fit"}})
    plan = list(toy.plan(state, 3))
    assert _of(plan, "d2").work == _of(plan, "d0").work
    after = toy.strategy.absorb(state, [toy.work(assignment) for assignment in plan])
    assert FRESH not in after.private["d2"]


def test_whoever_is_there_at_the_start_is_not_new() -> None:
    toy = ToyFederation(load_strategy("fedtp", FAST))
    state = toy.begin()
    assert not any(FRESH in own for own in state.private.values())
    assert {a.work.embedding_fit() for a in toy.plan(state, 1)} == {None}


def test_it_can_be_switched_off() -> None:
    toy, state = _joined("fedtp", cold_start=False)
    assert list(state.private["d2"]) == ["embedding"]
    assert _first(toy, state)[0].work.embedding_fit() is None


def test_a_newcomer_is_new_after_a_restart_too() -> None:
    toy, state = _joined("pfl_tpp")
    back = State.from_bytes(state.to_bytes())
    assert [frame_of(a) for a in toy.plan(state, 3)] == [frame_of(a) for a in toy.plan(back, 3)]


def test_a_newcomer_in_a_pruned_federation_cuts_nothing_itself() -> None:
    toy, state = _joined("pfl_tpp")
    work: LocalWork = _first(toy, state)[0].work
    pruning = work.pruning()
    assert pruning is not None
    assert not pruning.active
    assert work.keep >= WEIGHTS - toy.strategy.averaged() - toy.strategy.generated()  # type: ignore[attr-defined]


def test_the_state_before_is_not_written_to() -> None:
    toy, state = _joined("fedtp")
    before = state.to_bytes()
    _, update = _first(toy, state)
    toy.strategy.absorb(dataclasses.replace(state), [update])
    assert state.to_bytes() == before
