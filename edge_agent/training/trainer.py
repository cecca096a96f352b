"""Carries out `LocalWork`: the only training loop on a device.

Phases say which roles move. What stands still below the first moving tensor is computed once per sample
and cached. Thresholds cut units out of the matrices while training goes on (see pruning.py). After every
epoch the state is handed to `Hooks.save`, so that a killed agent goes on from there and ends where an
unbroken one would have ended, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from edge_agent.samples import LocalData, Part
from edge_agent.training.optimizer import Adam, Sgd
from edge_agent.training.pruning import Pruner, compacted, masks_of, scattered
from edge_agent.training.terms import ProximalPull
from foundation.artifact import Probe
from foundation.energy import Stage
from foundation.errors import WorkRefused
from foundation.nn.bridge import tensor_of, to_module, to_parameters
from foundation.nn.transformer import Transformer, loss_of
from foundation.parameters import Array, BoolArray, Parameters, role_of
from foundation.spec import ModelSpec
from foundation.work import LocalWork, Phase, ThresholdPruning

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
    """What arrived."""
    data: LocalData
    seed: int
    pruning_steps: int = 0
    """Optimizer steps that threshold pruning has counted in earlier rounds."""
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

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, durably."""
        ...

    def load(self) -> Checkpoint | None:
        """Return the last checkpoint of this very work, if there is one."""
        ...


@dataclass
class _Course:
    """The changing state of one training run."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    pruner: Pruner | None
    pull: ProximalPull | None
    metrics: dict[str, float] = field(default_factory=dict)
    phase: int = 0
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0


def carry_out(task: Task, hooks: Hooks) -> Outcome:
    """Do the work and return what came of it.

    Raises `Cancelled` when called off, and `WorkRefused` when the loss is no longer finite.
    """
    course = _begin(task)
    checkpoint = hooks.load()
    if checkpoint is not None:
        _restore(course, checkpoint, task)
    else:
        with hooks.stage(Stage.EVALUATE):
            loss, accuracy = evaluate(course.model, task.data, task.data.test)
        course.metrics = {"loss_sent": loss, "accuracy_sent": accuracy}
        course.metrics["kept_sent"] = float(sum(_widths(course)))
    if task.work.train:
        _train(course, task, hooks)
    return _finish(course, task, hooks)


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
    masks = masks_of(task.start, task.spec, term) if term else {}
    model = to_module(task.spec, compacted(task.start, masks))
    pruner = _pruner(model, task, term, masks)
    proximal = task.work.proximal()
    pull = ProximalPull(proximal, task.sent, masks) if proximal else None
    return _Course(model, _optimizer(model, task.work), pruner, pull)


def _pruner(
    model: Transformer, task: Task, term: ThresholdPruning | None, masks: dict[str, BoolArray]
) -> Pruner | None:
    if term is None:
        return None
    return Pruner(model, task.start, masks, term, steps=task.pruning_steps)


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
    begun, steps_before = time.monotonic(), course.steps
    for index, phase in enumerate(task.work.phases):
        if index < course.phase:
            continue
        if course.phase != index:
            course.phase, course.epoch = index, 0
        with hooks.stage(Stage.TRAIN):
            source, start = _prepared(course.model, phase, x, task)
        if start is None:
            continue  # every role of this phase stands still
        for group in course.optimizer.param_groups:
            group["lr"] = phase.learning_rate
        while course.epoch < phase.epochs:
            with hooks.stage(Stage.TRAIN):
                started = time.perf_counter()
                for rows in _batches(len(y), task, index, course.epoch):
                    _step(course, task, hooks, source[rows], y[rows], start)
                    _say(course, hooks, total, begun, steps_before)
                course.seconds = time.perf_counter() - started
            course.epoch += 1
            hooks.save(_checkpoint(course))


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


def _step(course: _Course, task: Task, hooks: Hooks, x: Tensor, y: Tensor, start: int) -> None:
    if hooks.cancelled():
        raise Cancelled
    course.optimizer.zero_grad(set_to_none=True)
    loss = loss_of(course.model(x, start=start), y)
    if not torch.isfinite(loss):
        raise WorkRefused(
            f"the local loss became {loss.item()} at step {course.steps + 1}: lower the learning rate,"
            " or look at this device's data for extreme values"
        )
    loss.backward()  # type: ignore[no-untyped-call]
    keeps = course.pruner.after_backward() if course.pruner else []
    if course.pull:
        course.pull.add_gradient(course.model)
    torch.nn.utils.clip_grad_norm_(course.model.parameters(), task.work.clip)
    course.optimizer.step()
    course.steps += 1
    if course.pruner and any(keep is not None for keep in keeps):
        with hooks.stage(Stage.PRUNE):
            course.pruner.cut(keeps, course.optimizer)
            if course.pull:
                course.pull.refresh(course.pruner.masks)


def _say(course: _Course, hooks: Hooks, total: int, begun: float, before: int) -> None:
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
        loss, accuracy = evaluate(course.model, task.data, task.data.test)
        probe = _probe(course.model, task.data)
    per_epoch = max(1, -(-task.data.examples // task.work.batch_size))
    metrics = {
        **course.metrics,
        "loss": loss,
        "accuracy": accuracy,
        "steps": float(course.steps),
        "step_ms": 1000 * course.seconds / per_epoch,
    }
    trained = to_parameters(course.model)
    if course.pruner is None:
        parameters = task.start.updated(trained)
        return Outcome(parameters, {}, _widths(course), metrics, task.pruning_steps, probe)
    masks = course.pruner.masks
    parameters = scattered(trained, task.start, masks).updated(course.pruner.threshold_parameters())
    return Outcome(parameters, masks, _widths(course), metrics, course.pruner.steps, probe)


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
    counters = {f"metric/{key}": value for key, value in course.metrics.items()}
    counters |= {
        "phase": float(course.phase),
        "epoch": float(course.epoch),
        "steps": float(course.steps),
        "seconds": course.seconds,
        "pruning_steps": float(course.pruner.steps if course.pruner else 0),
    }
    return Checkpoint(arrays, counters)


def _restore(course: _Course, checkpoint: Checkpoint, task: Task) -> None:
    saved = Parameters(checkpoint.arrays)
    course.model = to_module(task.spec, saved.under("model/"))
    course.optimizer = _optimizer(course.model, task.work)
    parameters = dict(course.model.named_parameters())
    for path, array in saved.under("state/").items():
        key, _, name = path.partition("/")
        course.optimizer.state[parameters[name]][key] = torch.tensor(np.asarray(array))
    counters = checkpoint.counters
    term = task.work.pruning()
    if term is not None:
        masks: dict[str, BoolArray] = dict(saved.under("kept/"))
        thresholds = saved.under("model/")
        course.pruner = Pruner(course.model, thresholds, masks, term, steps=int(counters["pruning_steps"]))
        if course.pull:
            course.pull.refresh(masks)
    course.phase, course.epoch = int(counters["phase"]), int(counters["epoch"])
    course.steps, course.seconds = int(counters["steps"]), counters["seconds"]
    course.metrics = {k.removeprefix("metric/"): v for k, v in counters.items() if "/" in k}


def use_threads(threads: int) -> None:
    """Use so many threads for arithmetic; on a serving device one is best."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
