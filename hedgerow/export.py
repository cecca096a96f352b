"""`hedgerow export`: a device's model as far as the coordinator knows it, as a proven artifact.

What a coordinator can write is the model that it would send to the device next: where everything of it is
generated or averaged there. Where a part never leaves its device, or the device chose a model of its own,
only `hedgerow agent export` on that device has the whole. Raw data and the device's own training after the
last round are nowhere in it: accuracy and latency on the device are not known here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from coordinator.planning import Course, context_of, planned
from coordinator.store.sql import Store
from coordinator.strategies.base import State, Strategy, load_strategy
from edge_agent.answer import arrived, weights_of
from edge_agent.export_again import summary
from export.sign import COORDINATOR_KEY, CoordinatorKey
from foundation.artifact import Manifest, Probe
from foundation.codec import update_from
from foundation.errors import ExportError, HedgerowError, SettingsError, SignatureError, StoreError
from foundation.messages import AgentCard, Assignment
from foundation.normalisation import Normalisation
from foundation.parameters import Array, Masks, Parameters, role_of
from foundation.spec import ModelSpec, initial_parameters
from foundation.words import unknown
from hedgerow.ledger import store_folder

PROBE_SAMPLES = 8
ON_THE_DEVICE = "export it on the device: hedgerow agent export --config agent.toml -o DIR"


def run_command(
    run: str,
    device: str,
    folder: Path,
    output: Path,
    *,
    int8: Literal["auto", "on", "off"] = "auto",
    opset: int = 17,
    probabilities: bool = False,
    normalisation: Path | None = None,
    as_json: bool = False,
) -> int:
    """Export, tell, and return the exit code: 0 done, 1 it cannot be, 2 something was asked for wrongly."""
    try:
        manifest = export(
            *(run, device, folder, output),
            int8=int8,
            opset=opset,
            probabilities=probabilities,
            normalisation=normalisation,
        )
    except HedgerowError as error:
        sys.stderr.write(f"hedgerow export: {error}\n")
        return 2 if isinstance(error, SettingsError) else 1
    sys.stdout.write((manifest.model_dump_json(indent=1) if as_json else summary(manifest, output)) + "\n")
    return 0


def export(
    run: str,
    device: str,
    folder: Path,
    output: Path,
    *,
    int8: Literal["auto", "on", "off"] = "auto",
    opset: int = 17,
    probabilities: bool = False,
    normalisation: Path | None = None,
) -> Manifest:
    """Write the model of `device` after the last round of `run` below `output`, and return its manifest.

    `folder` is the coordinator's, or a simulation's; it may be in use. Raises `SettingsError` for names that
    do not exist, `ExportError` for what the coordinator does not know, `StoreError` for a damaged store.
    """
    where = store_folder(folder)
    _say(f"reading {where}")
    with Store.open_to_read(where) as store:
        course, card = _course(store, run), _card(store, run, device)
        strategy = load_strategy(course.settings.strategy, course.settings.settings)
        state = _state(store, run, strategy, course.settings.seed)
        assignment = _assignment(strategy, state, course, card)
        if (why := next(_not_here(assignment), None)) is not None:
            raise ExportError(f"{device} in run {run} ({course.settings.strategy}): {why}; {ON_THE_DEVICE}")
        scale = _normalisation(store, device, course.spec, normalisation)
    parameters, masks = _model(assignment)
    from export.package import export_artifact  # torch and onnx only when there is something to write

    probe = _probe(course.spec, parameters, masks, scale)
    _say("writing and proving it")
    return export_artifact(
        *(course.spec, parameters, masks, scale, course.labels, probe, output),
        agent=device,
        run=run,
        round=state.round,
        strategy=course.settings.strategy,
        opset=opset,
        probabilities=probabilities,
        int8=int8,
        key=_key(where),
        measure_latency=False,
    )


def _course(store: Store, run: str) -> Course:
    names = [record.run for record in store.runs()]
    if run not in names:
        raise SettingsError(unknown("run", run, names) if names else "the store has no run yet")
    try:
        return Course.model_validate_json(store.run(run).settings_json)
    except ValidationError as error:
        raise StoreError(f"run {run} was made by another version: {error}") from error


def _card(store: Store, run: str, device: str) -> AgentCard:
    asked = sorted({agent for record in store.rounds(run) for agent in record.agents})
    if device not in asked:
        raise SettingsError(unknown("device", device, asked) if asked else f"run {run} has asked nobody yet")
    card = store.cards().get(device)
    if card is None:
        raise StoreError(f"the card of {device} cannot be read: it is of another version")
    return card


def _state(store: Store, run: str, strategy: Strategy, seed: int) -> State:
    """Return the state after the last closed round: a snapshot, and the updates of the rounds since."""
    latest = store.latest_state(run)
    if latest is None:
        raise ExportError(f"run {run} has no state yet: export after its first round")
    state = State.from_bytes(latest[1])
    cards = store.cards()
    while (record := store.round_record(run, state.round + 1)) is not None and record.state == "closed":
        for agent in record.agents:
            if (card := cards.get(agent)) is not None:
                state = strategy.enroll(state, card, seed)
        updates = store.updates(run, record.round)
        frames = [store.update_frame(run, record.round, u.agent) for u in updates if u.frame_sha256]
        state = strategy.absorb(state, [update_from(frame) for frame in frames])
    return state


def _assignment(strategy: Strategy, state: State, course: Course, card: AgentCard) -> Assignment:
    """Return what this device would be sent next."""
    state = strategy.enroll(state, card, course.settings.seed)
    number = max(1, min(state.round + 1, course.settings.rounds))
    assignments, left_out = planned(strategy, state, context_of(course, [card], number))
    if not assignments:
        reason = left_out.get(card.agent, "its strategy sends it nothing at present")
        raise ExportError(f"{card.agent}: {reason}; {ON_THE_DEVICE}")
    return assignments[0]


def _not_here(a: Assignment) -> Iterator[str]:
    """Yield why what a device is sent is not its whole model."""
    if a.work.layout == "flat":
        yield "the device chose its model itself, and the coordinator knows no more than its size"
        return
    if a.work.blend() is not None:
        yield "the device mixes what it is sent with what it kept, and that never left it"
    names = [name for name, _ in weights_of(a.spec)]
    own = sorted({str(role_of(n)) for n in names if a.work.keeps(n)})
    if own:
        yield f"the {' and '.join(own)} never left the device"
    lacking = sorted({str(role_of(n)) for n in names if n not in a.parameters})
    if lacking and not a.work.initial:
        yield f"the {' and '.join(lacking)} never left the device"
    if a.masks:
        yield "units that are not sent any more are the device's own"


def _model(a: Assignment) -> tuple[Parameters, Masks]:
    start = initial_parameters(a.spec, a.model_seed)
    parameters = start.updated(arrived(a, a.spec, start))
    term = a.work.pruning()
    if term is None:
        return parameters, {}
    from edge_agent.training.pruning import masks_of  # torch

    return parameters, masks_of(parameters, a.spec, term)


def _normalisation(store: Store, device: str, spec: ModelSpec, given: Path | None) -> Normalisation:
    """Return how this device scales raw values: as given, or as its newest artifact says."""
    if given is not None:
        try:
            return Normalisation.model_validate_json(given.read_bytes())
        except (OSError, ValidationError) as error:
            raise SettingsError(f"{given} has no mean and std per channel: {error}") from error
    if spec.input == "text":
        return Normalisation()
    for manifest in store.artifacts(agent=device):
        if (manifest.input, manifest.shape) == (spec.input, spec.shape):
            return manifest.normalisation
    raise ExportError(
        f"how {device} scales its raw values is learned from its own data, and is known here only from an"
        f" artifact that it has made: let a round export, give --normalisation FILE, or {ON_THE_DEVICE}"
    )


def _probe(spec: ModelSpec, parameters: Parameters, masks: Masks, scale: Normalisation) -> Probe:
    """Return random raw samples in the device's scale, and torch's answers of the masked model."""
    import torch

    from edge_agent.training.pruning import compacted
    from foundation.nn.bridge import tensor_of, to_module

    x = _samples(spec, scale)
    seen = torch.from_numpy(x) if spec.input == "text" else tensor_of(scale.apply(x, spec.input))
    with torch.inference_mode():
        logits = to_module(spec, compacted(parameters, dict(masks)))(seen).numpy().copy()
    return Probe(x, logits)


def _samples(spec: ModelSpec, scale: Normalisation) -> Array:
    rng = np.random.default_rng(0x9B0BE)
    if spec.input == "text":
        return rng.integers(0, spec.classes, (PROBE_SAMPLES, *spec.shape))
    shape = (-1, 1, 1) if spec.input == "image" else (-1,)
    mean, std = (np.reshape(v or (d,), shape) for v, d in ((scale.mean, 0.0), (scale.std, 1.0)))
    x: Array = (rng.standard_normal((PROBE_SAMPLES, *spec.shape)) * std + mean).astype(np.float32)
    return x


def _key(where: Path) -> CoordinatorKey | None:
    """Return the coordinator's key, made at first use; `None`, told, where it cannot be used."""
    try:
        return CoordinatorKey.load(where / COORDINATOR_KEY, make=True)
    except SignatureError as error:
        _say(f"not signed: {error}")
        return None


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
