"""Carries out `LocalWork`: the only training loop on a device.

Phases say which roles move. What stands still below the first moving tensor is computed once per sample
and cached. Thresholds cut units out of the matrices while training goes on (see pruning.py). After every
epoch the state is handed to `Hooks.save`, so that a killed agent goes on from there and ends where an
unbroken one would have ended, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from edge_agent.samples import LocalData, Part
from edge_agent.training.blend import GATES, ROLES, gates_of, mixed, moved, some
from edge_agent.training.optimizer import Adam, Sgd
from edge_agent.training.pruning import Cutter, ImportanceCutter, Pruner, compacted, masks_of, scattered
from edge_agent.training.terms import Lesson, ProximalPull
from foundation.artifact import Probe
from foundation.energy import Stage
from foundation.errors import WorkRefused
from foundation.nn.bridge import tensor_of, to_module, to_parameters
from foundation.nn.transformer import Transformer, loss_of
from foundation.parameters import Array, BoolArray, Masks, Parameters, Role, role_of
from foundation.spec import ModelSpec
from foundation.work import EmbeddingFit, LocalWork, Phase

EVALUATION_BATCH = 256
PROBE_SAMPLES = 8


class Cancelled(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The work was called off between two batches."""


@dataclass(frozen=True, slots=True)
class Task:
    """Work, the model to start from, and the data."""

    spec: ModelSpec
    work: LocalWork
    start: Parameters
    """The dense model: the device's own parameters with what arrived on top."""
    sent: Parameters
    """What arrived, a flat vector under the names of the model's tensors."""
    data: LocalData
    seed: int
    teacher: ModelSpec | None = None
    """The model of the parameters that arrived under `teacher/`."""
    pruning_steps: int = 0
    """Optimizer steps that threshold pruning has counted in earlier rounds."""
    own: Parameters = field(default_factory=Parameters)
    """What this device kept of the rounds before, for work that mixes it with what arrived."""
    offered: Masks = field(default_factory=dict)
    """Which FFL units came along, where not all did: `blocks.i.ffl` -> (hidden,)."""
    cache_bytes: int = 64 << 20
    """Largest cache of frozen-prefix activations; beyond it the prefix is computed every time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the work."""

    parameters: Parameters
    """Dense, thresholds included: trained units at their coordinates, parked ones as they were."""
    masks: dict[str, BoolArray]
    kept_units: tuple[int, ...]
    metrics: dict[str, float]
    pruning_steps: int
    probe: Probe
    extra: Parameters = field(default_factory=Parameters)
    """What is not the model's: the fitted `embedding`, and the trained `teacher/...`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is."""

    fraction: float
    eta_s: float | None
    kept_units: tuple[int, ...]
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything needed to go on at an epoch's edge: arrays by name, and plain counters."""

    arrays: Mapping[str, Array]
    counters: Mapping[str, float]


class Hooks(Protocol):
    """What the trainer asks of its surroundings."""

    def stage(self, stage: Stage) -> AbstractContextManager[None]:
        """Open a stage of the energy meter."""
        ...

    def progress(self, progress: Progress) -> None:
        """Say how far the work is."""
        ...

    def cancelled(self) -> bool:
        """Whether the work was called off."""
        ...

    def pause(self) -> float:
        """Stand still between two steps, if something else on the device goes first; returns the seconds."""
        ...

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, durably."""
        ...

    def load(self) -> Checkpoint | None:
        """Return the last checkpoint of this very work, if there is one."""
        ...


@dataclass(frozen=True, slots=True)
class Unsaved:
    """Hooks for work beside the work, which is done anew after a restart: nothing is kept of it."""

    hooks: Hooks

    def stage(self, stage: Stage) -> AbstractContextManager[None]:
        """Open a stage of the energy meter."""
        return self.hooks.stage(stage)

    def progress(self, progress: Progress) -> None:
        """Say nothing: the share of the whole is not known here."""

    def cancelled(self) -> bool:
        """Whether the work was called off."""
        return self.hooks.cancelled()

    def pause(self) -> float:
        """Stand still, if something else on the device goes first."""
        return self.hooks.pause()

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep nothing."""

    def load(self) -> Checkpoint | None:
        """There is nothing."""
        return None


@dataclass
class _Course:
    """The changing state of one training run."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    pruner: Cutter | None
    pull: ProximalPull | None
    lesson: Lesson | None
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Array] = field(default_factory=dict)
    phase: int = 0
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    paused_s: float = 0.0
    cpu_s: float = 0.0
    loss: float = math.inf
    """Mean training loss of the last epoch."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the model's parameters in order, without a walk through its modules."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def carry_out(task: Task, hooks: Hooks) -> Outcome:
    """Do the work and return what came of it.

    Raises `Cancelled` when called off, and `WorkRefused` when the loss is no longer finite.
    """
    checkpoint = hooks.load()
    if checkpoint is not None:
        course = _restored(checkpoint, task)
        task = _mixed(task, course.extra.get(GATES))
    else:
        started = cpu_clock()
        task, gates = _blended(task, hooks)
        course = _begin(task)
        course.extra |= gates
        course.cpu_s = cpu_clock() - started
        with hooks.stage(Stage.EVALUATE):
            course.metrics = _judged(course.model, task.data, "_sent")
        course.metrics["kept_sent"] = float(sum(_widths(course)))
        if (fit := task.work.embedding_fit()) is not None:
            course = _fitted(course, fit, task, hooks)
    if task.work.train:
        _train(course, task, hooks)
        _teach(course, task, hooks)
    return _finish(course, task, hooks)


def _blended(task: Task, hooks: Hooks) -> tuple[Task, dict[str, Array]]:
    """Return the task from the mixture of what arrived and what was kept, and the gates to keep."""
    term = task.work.blend()
    if term is None:
        return task, {}
    gates = gates_of(term, task.own)
    part = task.data.validation
    rows = some(len(part.y), term, task.seed)
    if term.rate and len(rows) and any(name in task.sent for name in task.own):
        with hooks.stage(Stage.TRAIN):
            start = _mixed(task, gates).start
            pruning = task.work.pruning()
            masks = masks_of(start, task.spec, pruning, task.offered) if pruning else {}
            x, y = _tensors(task.data, Part(part.x[rows], part.y[rows]))
            small = compacted(start, masks)
            gates = moved(gates, term, task.spec, small, masks, task.own - task.sent, x, y)
    return _mixed(task, gates), {GATES: gates}


def _mixed(task: Task, gates: Array | None) -> Task:
    """Return the task from the mixture of what arrived and what was kept; the same one without gates."""
    if gates is None:
        return task
    names = tuple(name for name, _ in task.spec.layout)
    start = task.start.updated(mixed(task.sent, task.own, gates, names))
    return dataclasses.replace(task, start=start)


def _judged(model: Transformer, data: LocalData, when: str) -> dict[str, float]:
    """Return loss and accuracy on the test part, and accuracy on the validation part."""
    loss, accuracy = evaluate(model, data, data.test)
    validation = evaluate(model, data, data.validation)[1]
    return {f"loss{when}": loss, f"accuracy{when}": accuracy, f"validation{when}": validation}


def _as_sent(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the same figures of a model that was not trained since."""
    return {name: metrics[f"{name}_sent"] for name in ("loss", "accuracy", "validation")}


def _fitted(course: _Course, fit: EmbeddingFit, task: Task, hooks: Hooks) -> _Course:
    """Return a new course from the model of the embedding that suits this device best."""
    from edge_agent.training.embedding import fit_embedding  # torch.func weighs, and few need it

    with hooks.stage(Stage.TRAIN):
        started = cpu_clock()
        x, y = _tensors(task.data, task.data.train)
        found = fit_embedding(course.model, task.sent, x, y, fit, task.work.batch_size, task.seed)
        seconds = cpu_clock() - started
    fresh = _begin(dataclasses.replace(task, start=task.start.updated(found.generated)))
    fresh.metrics = course.metrics | {"cpu_fit_s": seconds}
    with hooks.stage(Stage.EVALUATE):
        fresh.metrics |= _judged(fresh.model, task.data, "_fitted")
    fresh.extra["embedding"] = found.embedding
    fresh.cpu_s = seconds
    hooks.save(_checkpoint(fresh))
    return fresh


def _teach(course: _Course, task: Task, hooks: Hooks) -> None:
    """Train the teacher that came along, as its own coordinator would have it: on the labels alone."""
    term = task.work.distillation()
    if term is None or task.teacher is None:
        return
    sent = task.sent.under("teacher/")
    rate = task.work.phases[0].learning_rate if task.work.phases else 1e-3
    phases = (Phase(epochs=term.epochs, learning_rate=rate),)
    work = task.work.model_copy(update={"phases": phases, "terms": ()})
    lesson = dataclasses.replace(task, spec=task.teacher, work=work, start=sent, sent=sent, teacher=None)
    teacher = _begin(lesson)
    _train(teacher, lesson, Unsaved(hooks))
    course.cpu_s += teacher.cpu_s
    course.extra |= to_parameters(teacher.model).prefixed("teacher/")


def evaluate(model: Transformer, data: LocalData, part: Part) -> tuple[float, float]:
    """Return mean loss and accuracy of the model on raw samples; (nan-free) zeros for an empty part."""
    if not len(part.y):
        return 0.0, 0.0
    losses, hits, answers = 0.0, 0, 0
    with torch.inference_mode():
        for x, y in _in_order(data, part):
            logits = model(x)
            losses += float(loss_of(logits, y)) * y.numel()
            hits += int((logits.argmax(dim=-1) == y).sum())
            answers += y.numel()
    return losses / answers, hits / answers


def _begin(task: Task) -> _Course:
    term = task.work.pruning()
    masks = masks_of(task.start, task.spec, term, task.offered) if term else {}
    return _course(task, compacted(task.start, masks), masks, task.start, task.pruning_steps)


def _course(
    task: Task, start: Parameters, masks: dict[str, BoolArray], thresholds: Parameters, pruning_steps: int
) -> _Course:
    """Return a course that begins at compacted parameters."""
    model = to_module(task.spec, start)
    work = task.work
    pruner: Cutter | None = None
    if (learned := work.pruning()) is not None:
        pruner = Pruner(model, thresholds, masks, learned, steps=pruning_steps)
    elif (measured := work.importance()) is not None:
        pruner = ImportanceCutter(model, masks, measured)
    proximal = work.proximal()
    pull = ProximalPull(proximal, task.sent, masks) if proximal else None
    term = work.distillation()
    lesson = Lesson(term, task.teacher, task.sent.under("teacher/")) if term and task.teacher else None
    return _Course(model, _optimizer(model, work), pruner, pull, lesson)


def _optimizer(model: Transformer, work: LocalWork) -> torch.optim.Optimizer:
    rate = work.phases[0].learning_rate if work.phases else 1e-3
    if work.optimizer == "sgd":
        return Sgd(model.parameters(), rate, momentum=work.momentum, weight_decay=work.weight_decay)
    return Adam(
        model.parameters(),
        rate,
        betas=(work.momentum, work.beta2),
        weight_decay=work.weight_decay,
        fused=True,
    )


def _train(course: _Course, task: Task, hooks: Hooks) -> None:
    x, y = _tensors(task.data, task.data.train)
    total = sum(phase.epochs for phase in task.work.phases) * -(-len(y) // task.work.batch_size)
    say = partial(_say, hooks=hooks, total=total, begun=time.monotonic(), before=course.steps)
    if course.lesson is not None:
        with hooks.stage(Stage.TRAIN):
            course.lesson.prepare(x)
    _by_importance(course, task, hooks)
    for index, phase in enumerate(task.work.phases):
        if index < course.phase:
            continue
        if course.phase != index:
            course.phase, course.epoch = index, 0
        with hooks.stage(Stage.TRAIN):
            started = cpu_clock()
            source, start = _prepared(course.model, phase, x, task)
            course.cpu_s += cpu_clock() - started
        if start is None:
            continue  # every role of this phase stands still
        for group in course.optimizer.param_groups:
            group["lr"] = phase.learning_rate
        while course.epoch < phase.epochs and not course.loss <= phase.enough:
            with hooks.stage(Stage.TRAIN):
                _epoch(course, task, hooks, source, y, start, say)
            course.epoch += 1
            _by_importance(course, task, hooks)
            hooks.save(_checkpoint(course))


def _epoch(
    course: _Course,
    task: Task,
    hooks: Hooks,
    source: Tensor,
    y: Tensor,
    start: int,
    say: Callable[[_Course], None],
) -> None:
    started, started_cpu, total = time.perf_counter(), cpu_clock(), 0.0
    course.paused_s = 0.0
    for rows in _batches(len(y), task, course.phase, course.epoch):
        total += len(rows) * _step(course, task, hooks, rows, source[rows], y[rows], start)
        say(course)
    course.loss = total / len(y)
    course.seconds = max(0.0, time.perf_counter() - started - course.paused_s)
    course.cpu_s += cpu_clock() - started_cpu


def _by_importance(course: _Course, task: Task, hooks: Hooks) -> None:
    """Cut by importance when as many epochs with moving FFLs are over as the term says."""
    if course.pruner is None:
        return
    phases = task.work.phases[: course.phase]
    done = sum(phase.epochs for phase in phases if Role.FFL in phase.train)
    if course.phase < len(task.work.phases) and Role.FFL in task.work.phases[course.phase].train:
        done += course.epoch
    keeps = course.pruner.after_epochs(done, task.start)
    if any(keep is not None for keep in keeps):
        _cut(course, keeps, hooks)


def _cut(course: _Course, keeps: list[Tensor | None], hooks: Hooks) -> None:
    assert course.pruner is not None
    with hooks.stage(Stage.PRUNE):
        course.pruner.cut(keeps, course.optimizer)
        if course.pull:
            course.pull.refresh(course.pruner.masks)


def _prepared(model: Transformer, phase: Phase, x: Tensor, task: Task) -> tuple[Tensor, int | None]:
    """Set what moves; return the tensor to train from and the stage to start at (None: nothing moves)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(role_of(name) in phase.train)
        parameter.grad = None
    frozen = model.frozen_stages()
    if frozen == len(model.stages):
        return x, None
    size = len(x) * task.spec.tokens * task.spec.width * 4
    if frozen == 0 or phase.epochs == 0 or size > task.cache_bytes:
        return x, 0
    with torch.no_grad():
        pieces = [model(piece, stop=frozen) for piece in torch.split(x, EVALUATION_BATCH)]
    return torch.cat(pieces), frozen


def _step(course: _Course, task: Task, hooks: Hooks, rows: Tensor, x: Tensor, y: Tensor, start: int) -> float:
    course.paused_s += hooks.pause()
    if hooks.cancelled():
        raise Cancelled
    for parameter in course.parameters():
        parameter.grad = None
    logits = course.model(x, start=start)
    loss = loss_of(logits, y) if course.lesson is None else course.lesson.loss(logits, y, rows)
    value = loss.item()
    if not math.isfinite(value):
        raise WorkRefused(
            f"the local loss became {value} at step {course.steps + 1}: lower the learning rate,"
            " or look at this device's data for extreme values"
        )
    loss.backward()  # type: ignore[no-untyped-call]
    keeps = course.pruner.after_backward() if course.pruner else []
    if course.pull:
        course.pull.add_gradient(course.model)
    torch.nn.utils.clip_grad_norm_(course.parameters(), task.work.clip)
    course.optimizer.step()
    course.steps += 1
    if any(keep is not None for keep in keeps):
        _cut(course, keeps, hooks)
    return value


def _say(course: _Course, *, hooks: Hooks, total: int, begun: float, before: int) -> None:
    done, here = course.steps, course.steps - before
    eta = (time.monotonic() - begun) / here * (total - done) if here else None
    hooks.progress(
        Progress(
            fraction=min(1.0, done / max(1, total)),
            eta_s=eta,
            kept_units=_widths(course),
            accuracy=course.metrics.get("accuracy_sent"),
        )
    )


def _finish(course: _Course, task: Task, hooks: Hooks) -> Outcome:
    with hooks.stage(Stage.EVALUATE):
        judged = _judged(course.model, task.data, "") if task.work.train else _as_sent(course.metrics)
        probe = _probe(course.model, task.data)
    per_epoch = max(1, -(-task.data.examples // task.work.batch_size))
    metrics = {
        **course.metrics,
        **judged,
        **{f"gate_{role}": float(g) for role, g in zip(ROLES, course.extra.get(GATES, ()), strict=False)},
        "cpu_s": course.cpu_s,
        "steps": float(course.steps),
        **({"loss_trained": course.loss} if math.isfinite(course.loss) else {}),
        "step_ms": 1000 * course.seconds / per_epoch,
    }
    trained, extra = to_parameters(course.model), Parameters(course.extra)
    # Only the model: what came to teach it is not part of it.
    start = Parameters((name, task.start[name]) for name, _ in task.spec.layout)
    if course.pruner is None:
        return Outcome(start.updated(trained), {}, _widths(course), metrics, task.pruning_steps, probe, extra)
    masks = course.pruner.masks
    parameters = scattered(trained, start, masks).updated(course.pruner.threshold_parameters())
    steps = course.pruner.steps or task.pruning_steps
    return Outcome(parameters, masks, _widths(course), metrics, steps, probe, extra)


def _probe(model: Transformer, data: LocalData) -> Probe:
    part = data.test if len(data.test.y) else data.train
    # Raw values, as clients send them: float32, whatever the data set keeps on disk.
    inputs = np.array(part.x[:PROBE_SAMPLES], np.int64 if data.input == "text" else np.float32)
    with torch.inference_mode():
        logits = model(_tensor(data, inputs)).numpy().copy()
    return Probe(inputs, logits)


def _widths(course: _Course) -> tuple[int, ...]:
    if course.pruner:
        return course.pruner.widths
    return (course.model.spec.hidden,) * course.model.spec.depth


def _tensor(data: LocalData, x: Array) -> Tensor:
    if data.input == "text":
        return torch.from_numpy(np.array(x, np.int64))
    return tensor_of(data.normalisation.apply(x, data.input))


def _tensors(data: LocalData, part: Part) -> tuple[Tensor, Tensor]:
    return _tensor(data, part.x), torch.from_numpy(np.array(part.y, np.int64))


def _in_order(data: LocalData, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(part.y), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        yield _tensor(data, part.x[rows]), torch.from_numpy(np.array(part.y[rows], np.int64))


def _batches(examples: int, task: Task, phase: int, epoch: int) -> Iterator[Tensor]:
    """Rows of one epoch in an order that depends on seed, phase and epoch alone: resuming repeats it."""
    rng = np.random.default_rng([task.seed, phase, epoch])
    return iter(torch.split(torch.from_numpy(rng.permutation(examples)), task.work.batch_size))


def _checkpoint(course: _Course) -> Checkpoint:
    arrays: dict[str, Array] = dict(to_parameters(course.model).prefixed("model/"))
    for name, parameter in course.model.named_parameters():
        for key, value in course.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                arrays[f"state/{key}/{name}"] = value.numpy().copy()
    if course.pruner:
        arrays |= course.pruner.threshold_parameters().prefixed("model/")
        arrays |= {f"kept/{name}": mask for name, mask in course.pruner.masks.items()}
    arrays |= {f"extra/{name}": array for name, array in course.extra.items()}
    counters = {f"metric/{key}": value for key, value in course.metrics.items()}
    counters |= {
        "phase": float(course.phase),
        "epoch": float(course.epoch),
        "steps": float(course.steps),
        "seconds": course.seconds,
        "cpu_s": course.cpu_s,
        "loss": course.loss,
        "pruning_steps": float(course.pruner.steps if course.pruner else 0),
    }
    return Checkpoint(arrays, counters)


def _restored(checkpoint: Checkpoint, task: Task) -> _Course:
    saved, counters = Parameters(checkpoint.arrays), checkpoint.counters
    masks: dict[str, BoolArray] = dict(saved.under("kept/"))
    weights = saved.under("model/")
    course = _course(task, weights, masks, weights, int(counters["pruning_steps"]))
    parameters = dict(course.model.named_parameters())
    for path, array in saved.under("state/").items():
        key, _, name = path.partition("/")
        course.optimizer.state[parameters[name]][key] = torch.tensor(np.asarray(array))
    course.extra = dict(saved.under("extra/"))
    course.phase, course.epoch = int(counters["phase"]), int(counters["epoch"])
    course.steps, course.seconds = int(counters["steps"]), counters["seconds"]
    course.cpu_s, course.loss = counters["cpu_s"], counters["loss"]
    course.metrics = {k.removeprefix("metric/"): v for k, v in counters.items() if "/" in k}
    return course


def cpu_clock() -> float:
    """Return CPU seconds of the work: of this thread, or of the whole process when arithmetic has several."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.process_time()


def use_threads(threads: int) -> None:
    """Use so many threads for arithmetic; on a serving device one is best."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
