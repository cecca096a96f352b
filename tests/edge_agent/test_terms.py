"""Additions to local work: importance pruning, distillation, blending; each dies and comes back the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from edge_agent.answer import arrived, kept, to_send, weights_of
from edge_agent.training.blend import GATES, ROLES, mixed, moved
from edge_agent.training.terms import Lesson
from edge_agent.training.trainer import Checkpoint, Outcome, Task, carry_out
from foundation.errors import WorkRefused
from foundation.messages import Assignment
from foundation.nn.bridge import tensor_of, to_module
from foundation.nn.transformer import loss_of
from foundation.parameters import EVERYTHING, WEIGHTS, Parameters, Role, layout_size, role_of
from foundation.spec import ModelSpec, initial_parameters
from foundation.work import (
    Blend,
    Distillation,
    ImportancePruning,
    LocalWork,
    Phase,
    Term,
    ThresholdPruning,
)
from tests.toys import SPEC, Quiet, same, toy_data

START = initial_parameters(SPEC, 0)
OTHER = initial_parameters(SPEC, 1)
SMALL = SPEC.model_copy(update={"width": 4, "depth": 1, "heads": 1})
PERSONAL = Phase(train=frozenset({Role.HEAD}), epochs=1)
SHARED = Phase(train=EVERYTHING - {Role.HEAD}, epochs=2, learning_rate=5e-3)


def _work(*terms: Term, phases: tuple[Phase, ...] = (PERSONAL, SHARED), **changes: object) -> LocalWork:
    return LocalWork(**({"phases": phases, "terms": terms, "batch_size": 8} | changes))


def _task(work: LocalWork, **changes: object) -> Task:
    task = Task(SPEC, work, START, START, toy_data(0), 3)
    return dataclasses.replace(task, **changes)


def _resumed_everywhere(task: Task) -> Outcome:
    """Kill after every checkpoint and resume; all must come to the same end."""
    hooks = Quiet()
    unbroken = carry_out(task, hooks)
    assert hooks.checkpoints
    for checkpoint in hooks.checkpoints:
        copy = Checkpoint({n: a.copy() for n, a in checkpoint.arrays.items()}, dict(checkpoint.counters))
        resumed = carry_out(task, Quiet(resume=copy))
        assert same(resumed.parameters, unbroken.parameters)
        assert same(resumed.extra, unbroken.extra)
        assert resumed.kept_units == unbroken.kept_units
    return unbroken


# --- importance pruning ----------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["change", "change_gradient", "magnitude"])
def test_importance_pruning_cuts_its_share_once_and_goes_on(score: str) -> None:
    term = ImportancePruning(ratio=0.75, score=score, epochs=1)
    outcome = _resumed_everywhere(_task(_work(term)))
    assert outcome.kept_units == (SPEC.hidden // 4, SPEC.hidden // 4)
    for i in range(SPEC.depth):
        mask = outcome.masks[f"blocks.{i}.ffl"]
        assert mask.sum() == SPEC.hidden // 4


def test_the_units_that_moved_least_are_the_ones_cut() -> None:
    before = carry_out(_task(_work(phases=(PERSONAL, SHARED.model_copy(update={"epochs": 1})))), Quiet())
    after = carry_out(_task(_work(ImportancePruning(ratio=0.5, epochs=1))), Quiet())
    for i in range(SPEC.depth):
        b = f"blocks.{i}.ffl."
        change = before.parameters - START
        moved_by = (
            np.square(change[b + "up.weight"]).sum(1)
            + np.square(change[b + "up.bias"])
            + np.square(change[b + "down.weight"]).sum(0)
        )
        mask = after.masks[f"blocks.{i}.ffl"]
        assert moved_by[mask].min() > moved_by[~mask].max()


def test_pruning_nothing_is_no_pruning_and_a_floor_holds() -> None:
    plain = carry_out(_task(_work()), Quiet())
    nothing = carry_out(_task(_work(ImportancePruning(ratio=0.0))), Quiet())
    assert same(plain.parameters, nothing.parameters)
    floor = carry_out(_task(_work(ImportancePruning(ratio=0.99, floor=3))), Quiet())
    assert floor.kept_units == (3, 3)


def test_epochs_in_which_ffls_stand_still_do_not_count() -> None:
    work = _work(ImportancePruning(ratio=0.5, epochs=2))
    hooks = Quiet()
    carry_out(_task(work), hooks)
    # One epoch of the head, two of the rest: the cut comes after the last.
    assert [int(c.arrays["kept/blocks.0.ffl"].sum()) for c in hooks.checkpoints] == [16, 16, 8]


# --- distillation ----------------------------------------------------------------------------------


def _with_teacher(alpha: float, temperature: float = 15.0, epochs: int = 1) -> Task:
    teacher = initial_parameters(SMALL, 5).only(WEIGHTS)
    sent = START.updated(teacher.prefixed("teacher/"))
    term = Distillation(alpha=alpha, temperature=temperature, epochs=epochs)
    return _task(_work(term), sent=sent, teacher=SMALL, start=START.updated(sent))


def test_without_weight_on_the_teacher_the_student_is_the_plain_one() -> None:
    plain, taught = carry_out(_task(_work()), Quiet()), carry_out(_with_teacher(0.0), Quiet())
    assert same(plain.parameters, taught.parameters)
    other = carry_out(_with_teacher(0.5), Quiet())
    assert not same(plain.parameters, other.parameters)


def test_the_teacher_is_trained_too_and_its_change_goes_back() -> None:
    task = _with_teacher(0.2)
    outcome = _resumed_everywhere(task)
    names = {f"teacher/{name}" for name, _ in weights_of(SMALL)}
    assert outcome.extra.keys() == names
    back = to_send(outcome.parameters, outcome.extra, task.sent, task.work)
    assert names <= back.keys()
    assert np.abs(back["teacher/head.weight"]).max() > 0
    teacher = to_module(SMALL, task.sent.under("teacher/"))
    better = to_module(SMALL, outcome.extra.under("teacher/"))
    data = toy_data(0)
    x = tensor_of(data.normalisation.apply(data.train.x, "image"))
    y = torch.from_numpy(data.train.y)
    assert loss_of(better(x), y) < loss_of(teacher(x), y)


def test_all_weight_on_the_teacher_leaves_the_labels_without_a_gradient() -> None:
    x = torch.randn(8, *SPEC.shape)
    logits = torch.randn(8, SPEC.classes, requires_grad=True)
    gradients = []
    for targets in (torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64)):
        lesson = Lesson(Distillation(alpha=1.0), SMALL, initial_parameters(SMALL, 5))
        lesson.prepare(x)
        (gradient,) = torch.autograd.grad(lesson.loss(logits, targets, torch.arange(8)), logits)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_the_square_of_the_temperature_keeps_the_gradient_about_as_long() -> None:
    x = torch.randn(64, *SPEC.shape, generator=torch.Generator().manual_seed(0))
    logits = 0.1 * torch.randn(64, SPEC.classes, generator=torch.Generator().manual_seed(1))
    lengths = []
    for temperature in (5.0, 25.0):
        lesson = Lesson(Distillation(alpha=1.0, temperature=temperature), SMALL, initial_parameters(SMALL, 5))
        lesson.prepare(x)
        z = logits.clone().requires_grad_()
        loss = lesson.loss(z, torch.zeros(64, dtype=torch.int64), torch.arange(64))
        lengths.append(float(torch.autograd.grad(loss, z)[0].norm()))
    assert lengths[1] == pytest.approx(lengths[0], rel=0.25)  # without T^2 it would be 25 times shorter


# --- blending --------------------------------------------------------------------------------------


def _blending(gates: dict[Role, float], rate: float = 0.0, **changes: object) -> Task:
    work = _work(Blend(gates=gates, rate=rate), keep=WEIGHTS, **changes)
    return _task(work, own=OTHER.only(WEIGHTS), start=OTHER.updated(START))


def test_gates_at_their_ends_are_what_arrived_and_what_was_kept() -> None:
    nothing = carry_out(_blending({}, train=False), Quiet())
    assert same(nothing.parameters, START)
    everything = carry_out(_blending(dict.fromkeys(WEIGHTS, 1.0), train=False), Quiet())
    assert same(everything.parameters.only(WEIGHTS), OTHER.only(WEIGHTS))
    head = carry_out(_blending({Role.HEAD: 1.0}, train=False), Quiet())  # FedPer
    assert same(head.parameters.only({Role.HEAD}), OTHER.only({Role.HEAD}))
    assert same(head.parameters.only(WEIGHTS - {Role.HEAD}), START.only(WEIGHTS - {Role.HEAD}))


def test_a_gate_follows_the_loss_on_the_validation_part() -> None:
    # The slope of eq. 2 against a finite difference of the loss, in float64 on the numbers that it used.
    data = toy_data(0)
    x = tensor_of(data.normalisation.apply(data.validation.x, "image"))
    y = torch.from_numpy(data.validation.y)
    names = tuple(n for n, _ in SPEC.layout)
    gates = np.full(len(ROLES), 0.5, np.float32)

    def loss(at: np.ndarray) -> float:
        model = to_module(SPEC, START.updated(mixed(START, OTHER, at, names))).double()
        with torch.no_grad():
            return float(loss_of(model(x.double()), y))

    slopes = []
    for i in range(len(ROLES)):
        step = np.zeros(len(ROLES))
        step[i] = 1e-3
        slopes.append((loss(gates + step) - loss(gates - step)) / 2e-3)
    start = START.updated(mixed(START, OTHER, gates, names))
    after = moved(gates, Blend(rate=0.2), SPEC, start, {}, OTHER - START, x, y)
    expected = gates - 0.2 * np.array(slopes) / np.abs(slopes).max()
    assert np.allclose(after, np.clip(expected, 0, 1), atol=2e-3)
    little = moved(gates, Blend(rate=0.02), SPEC, start, {}, OTHER - START, x, y)
    assert loss(little) < loss(gates)


def test_gates_stay_on_the_device_and_survive_kills() -> None:
    task = _blending({Role.HEAD: 0.5}, rate=0.25)
    outcome = _resumed_everywhere(task)
    gates = outcome.extra[GATES]
    assert gates.shape == (len(ROLES),)
    assert not np.array_equal(gates, [0, 0, 0, 0.5, 0])
    assert GATES in kept(outcome.parameters, outcome.extra, task.work)
    assert GATES not in to_send(outcome.parameters, outcome.extra, task.sent, task.work)
    again = dataclasses.replace(task, own=task.own.updated({GATES: gates}))
    later = carry_out(again, Quiet()).extra[GATES]
    assert np.abs(later - gates).max() <= 0.25 + 1e-6


def test_a_blend_prunes_from_the_mixture() -> None:
    pruning = ThresholdPruning(target=0.5, every=2, floor=2, max_drop=0.5)
    work = _work(pruning, Blend(gates=dict.fromkeys(WEIGHTS, 0.5)), keep=WEIGHTS)
    task = _task(work, own=OTHER.only(WEIGHTS), start=OTHER.updated(START))
    outcome = _resumed_everywhere(task)
    mask = outcome.masks["blocks.0.ffl"]
    assert 0 < mask.sum() < SPEC.hidden
    names = tuple(n for n, _ in SPEC.layout)
    parked = START.updated(mixed(START, OTHER, outcome.extra[GATES], names))["blocks.0.ffl.up.weight"][~mask]
    assert np.array_equal(outcome.parameters["blocks.0.ffl.up.weight"][~mask], parked)


# --- a model of the device's own -------------------------------------------------------------------


def _flat(spec: ModelSpec, vector: np.ndarray, **changes: object) -> Assignment:
    work = LocalWork(layout="flat", **changes)
    return Assignment(
        run="r", round=1, agent="d0", strategy="s", spec=SPEC, model_seed=0, seed=0, work=work,
        deadline_s=9, parameters=Parameters({"flat": vector}),
    )  # fmt: skip


@pytest.mark.parametrize("spec", [SPEC, SMALL], ids=["run's", "own"])
def test_a_flat_vector_names_every_weight_once_and_comes_back_as_a_change(spec: ModelSpec) -> None:
    size = layout_size(weights_of(spec))
    assert size == sum(a.size for n, a in initial_parameters(spec, 0).items() if role_of(n) in WEIGHTS)
    vector = np.arange(size, dtype=np.float32)
    absolute = arrived(_flat(spec, vector, offset=False), spec, {})
    assert np.array_equal(absolute.flat(), vector)
    assert absolute.layout == weights_of(spec)
    offset = arrived(_flat(spec, vector), spec, {})
    initial = initial_parameters(spec, 0).only(WEIGHTS)
    assert np.array_equal(offset.flat(), vector + initial.flat())
    trained = Parameters((n, a - 1) for n, a in absolute.items()).updated(
        initial_parameters(spec, 0).only({Role.THRESHOLD})
    )
    back = to_send(trained, Parameters(), absolute, LocalWork(layout="flat"))
    assert back.keys() == {"flat"}
    assert np.array_equal(back["flat"], np.ones(size, np.float32))


def test_a_vector_of_another_size_is_refused() -> None:
    with pytest.raises(WorkRefused, match="this device's model"):
        arrived(_flat(SPEC, np.zeros(7, np.float32)), SPEC, {})
