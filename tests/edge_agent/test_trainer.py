"""The training loop: phases, cached prefix, checkpoints, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from edge_agent.answer import largest, to_send
from edge_agent.training.trainer import Cancelled, Checkpoint, Outcome, Task, carry_out, evaluate
from foundation.energy import Stage
from foundation.errors import WorkRefused
from foundation.nn.bridge import to_module
from foundation.parameters import EVERYTHING, Parameters, Role, role_of
from foundation.spec import ModelSpec, initial_parameters
from foundation.work import LocalWork, Phase, Proximal, ThresholdPruning
from tests.toys import SPEC, Quiet, same, toy_data

TEXT = ModelSpec(input="text", shape=(6,), classes=5, width=8, depth=1, heads=2, ffl_ratio=2)
SERIES = ModelSpec(
    input="series", shape=(8, 3), classes=3, width=8, depth=2, heads=2, ffl_ratio=2, patch=2, pool="cls"
)
PRUNING = ThresholdPruning(target=0.5, every=2, floor=2, max_drop=0.5)


def _task(work: LocalWork, *, spec: ModelSpec = SPEC, cache_bytes: int = 1 << 20) -> Task:
    start = initial_parameters(spec, 0)
    return Task(spec, work, start, start, toy_data(0, spec=spec), 3, cache_bytes=cache_bytes)


def _work(*phases: Phase, **changes: object) -> LocalWork:
    fields = {"phases": phases or (Phase(epochs=2, learning_rate=5e-3),), "batch_size": 8}
    return LocalWork(**(fields | changes))


def _done(work: LocalWork, **changes: object) -> Outcome:
    return carry_out(_task(work, **changes), Quiet())


@pytest.mark.parametrize("spec", [SPEC, TEXT, SERIES], ids=["image", "text", "series"])
def test_training_lowers_the_loss_for_every_input(spec: ModelSpec) -> None:
    outcome = _done(_work(Phase(epochs=8, learning_rate=1e-2)), spec=spec)
    assert outcome.metrics["loss"] < 0.8 * outcome.metrics["loss_sent"]
    assert outcome.metrics["accuracy"] > outcome.metrics["accuracy_sent"]
    assert outcome.probe.logits.shape[0] == 8
    again = to_module(spec, outcome.parameters)
    x = torch.from_numpy(outcome.probe.inputs)
    if spec.input != "text":
        data = toy_data(0, spec=spec)
        x = torch.from_numpy(data.normalisation.apply(outcome.probe.inputs, spec.input))
    with torch.no_grad():
        assert np.allclose(again(x).numpy(), outcome.probe.logits, atol=1e-5)


@pytest.mark.parametrize(
    "roles",
    [{Role.HEAD}, {Role.FFL}, {Role.ATTENTION}, {Role.REST}, {Role.FFL, Role.HEAD}],
    ids=lambda roles: "+".join(sorted(roles)),  # the same in every process, as pytest-xdist asks
)
def test_a_phase_moves_its_roles_and_no_other(roles: set[Role]) -> None:
    outcome = _done(_work(Phase(train=frozenset(roles), epochs=1)))
    start = initial_parameters(SPEC, 0)
    for name, array in outcome.parameters.items():
        moved = not np.array_equal(array, start[name])
        assert moved == (role_of(name) in roles), name


def test_a_phase_without_roles_trains_nothing_and_ends() -> None:
    outcome = _done(_work(Phase(train=frozenset(), epochs=3), Phase(train=frozenset({Role.THRESHOLD}))))
    assert same(outcome.parameters, initial_parameters(SPEC, 0))


@pytest.mark.parametrize("spec", [SPEC, SERIES, TEXT], ids=["image", "series", "text"])
def test_the_cached_prefix_changes_nothing_but_the_cost(spec: ModelSpec) -> None:
    lean = (
        Phase(epochs=1),
        Phase(train=EVERYTHING - {Role.ATTENTION, Role.REST}, epochs=2),
    )
    cached = _done(_work(*lean, terms=(PRUNING,)), spec=spec)
    plain = _done(_work(*lean, terms=(PRUNING,)), spec=spec, cache_bytes=0)
    assert same(cached.parameters, plain.parameters, 1e-5)
    assert cached.kept_units == plain.kept_units


def test_the_frozen_prefix_is_everything_below_the_first_moving_tensor() -> None:
    model = to_module(SPEC, initial_parameters(SPEC, 0))
    for roles, stages in (({Role.REST}, 0), ({Role.ATTENTION}, 1), ({Role.FFL}, 2), ({Role.HEAD}, 5)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(role_of(name) in roles)
        assert model.frozen_stages() == stages
        x = torch.randn(3, *SPEC.shape)
        with torch.no_grad():
            halves = model(model(x, stop=stages), start=stages)
        assert torch.allclose(halves, model(x), atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_killed_at_every_epoch_and_resumed_equals_unbroken(optimizer: str) -> None:
    work = _work(
        Phase(epochs=2, learning_rate=5e-3),
        Phase(train=EVERYTHING - {Role.ATTENTION, Role.REST}, epochs=2, learning_rate=2e-3),
        terms=(PRUNING, Proximal(mu=0.1)),
        optimizer=optimizer,
    )
    hooks = Quiet()
    unbroken = carry_out(_task(work), hooks)
    assert sum(unbroken.kept_units) < 2 * SPEC.hidden, "something must have been cut"
    assert len(hooks.checkpoints) == 4
    for checkpoint in hooks.checkpoints:
        copy = Checkpoint({n: a.copy() for n, a in checkpoint.arrays.items()}, dict(checkpoint.counters))
        resumed = carry_out(_task(work), Quiet(resume=copy))
        assert same(resumed.parameters, unbroken.parameters)
        assert resumed.kept_units == unbroken.kept_units
        assert resumed.pruning_steps == unbroken.pruning_steps
        assert resumed.metrics["accuracy_sent"] == unbroken.metrics["accuracy_sent"]
        assert resumed.metrics["steps"] == unbroken.metrics["steps"]


def test_the_proximal_term_pulls_towards_what_was_sent() -> None:
    start = initial_parameters(SPEC, 0)
    free = _done(_work(Phase(epochs=4)))
    pulled = _done(_work(Phase(epochs=4), terms=(Proximal(mu=10.0),)))
    distance = [float(np.square((o.parameters - start).flat()).sum()) for o in (free, pulled)]
    assert distance[1] < 0.7 * distance[0]


def test_pruning_makes_matrices_smaller_and_parks_the_rest() -> None:
    work = _work(Phase(epochs=6, learning_rate=5e-3), terms=(PRUNING,), keep=frozenset({Role.FFL}))
    outcome = _done(work)
    assert all(kept < SPEC.hidden for kept in outcome.kept_units)
    for i, kept in enumerate(outcome.kept_units):
        mask = outcome.masks[f"blocks.{i}.ffl"]
        assert mask.sum() == kept
        up = f"blocks.{i}.ffl.up.weight"
        assert outcome.parameters[up].shape == (SPEC.hidden, SPEC.width), "parked units keep their place"
        assert np.abs(outcome.parameters[up][~mask]).min() > 0
    assert outcome.pruning_steps == outcome.metrics["steps"]


def test_it_stops_between_two_batches() -> None:
    hooks = Quiet(stop_after=3)
    with pytest.raises(Cancelled):
        carry_out(_task(_work(Phase(epochs=50))), hooks)
    assert len(hooks.progresses) == 3


def test_a_loss_that_is_not_finite_is_refused_with_advice() -> None:
    task = _task(_work(Phase(epochs=3, learning_rate=1e-3)))
    wild = Parameters({**task.start, "head.weight": np.full_like(task.start["head.weight"], 3e38)})
    with pytest.raises(WorkRefused, match="lower the learning rate"):
        carry_out(dataclasses.replace(task, start=wild), Quiet())


def test_stages_and_progress_are_told() -> None:
    hooks = Quiet()
    carry_out(_task(_work(Phase(epochs=3), terms=(PRUNING,))), hooks)
    assert {Stage.TRAIN, Stage.EVALUATE, Stage.PRUNE} <= set(hooks.stages)
    fractions = [p.fraction for p in hooks.progresses]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert hooks.progresses[-1].kept_units == tuple(hooks.progresses[-1].kept_units)


def test_an_evaluation_only_trains_nothing() -> None:
    outcome = _done(_work(train=False))
    assert same(outcome.parameters, initial_parameters(SPEC, 0))
    assert outcome.metrics["accuracy"] == outcome.metrics["accuracy_sent"]


def test_an_empty_part_evaluates_to_zero_not_nan() -> None:
    data = toy_data(0)
    empty = dataclasses.replace(data.test, x=data.test.x[:0], y=data.test.y[:0])
    assert evaluate(to_module(SPEC, initial_parameters(SPEC, 0)), data, empty) == (0.0, 0.0)


def test_what_comes_back_is_what_was_asked() -> None:
    trained = initial_parameters(SPEC, 1)
    sent = initial_parameters(SPEC, 0).only({Role.ATTENTION, Role.REST})
    work = LocalWork(send=frozenset({Role.ATTENTION, Role.THRESHOLD}), change=frozenset({Role.ATTENTION}))
    back = to_send(trained, Parameters(), sent, work)
    assert {role_of(n) for n in back} == {Role.ATTENTION, Role.THRESHOLD}
    name = "blocks.0.attention.qkv.weight"
    assert np.array_equal(back[name], sent[name] - trained[name])  # sent - trained: everything descends


def test_the_largest_share_keeps_the_largest() -> None:
    change = np.array([[0.1, -3.0], [2.0, 0.0]], np.float32)
    assert largest(change, 0.5).tolist() == [[0.0, -3.0], [2.0, 0.0]]
    assert largest(change, 1.0) is change
    assert np.count_nonzero(largest(change, 0.01)) == 1
