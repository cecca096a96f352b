"""What a run of the kill matrix came to, and how far that is from the unbroken one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from coordinator.store.sql import Store
from coordinator.strategies.base import State
from edge_agent.vault import read_arrays
from export.folder import CURRENT, load_artifact, resolve
from export.proof import default_tolerance, open_session, prove
from foundation.artifact import Manifest, Probe
from foundation.errors import HedgerowError
from foundation.parameters import Parameters
from hedgerow.chaos_bed import AGENTS, ROUNDS, STEP_S, Bed

CLOSE = 1e-6
"""Largest difference that floating point may make where the bits differ."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What is left of a run on both sides."""

    state: bytes
    arrays: Parameters
    """Everything that was learned, by a name that says where it is."""


def ending(bed: Bed, run: str) -> Ending:
    """Return what a finished run came to.

    Raises `HedgerowError` naming what was lost: an update, a round, a personal model, the answering one.
    """
    state = _counted(bed, run)
    arrays = dict(_of_state(state))
    for agent in AGENTS:
        outbox = bed.vault(agent) / "outbox"
        bed.until(lambda outbox=outbox: not [*outbox.glob("*.frame")], f"the outbox of {agent} was empty")  # type: ignore[misc]
        arrays |= _personal(bed, run, agent)
        manifest, probe = proven(bed, agent)
        if (manifest.run, manifest.round) != (run, ROUNDS):
            raise HedgerowError(f"{agent} has the model of {manifest.run}, round {manifest.round}")
        arrays[f"{agent}: logits of its model"] = probe.logits
    current = resolve(bed.vault(AGENTS[0]) / "artifacts", CURRENT).name
    bed.until(lambda: bed.served() == current, f"{AGENTS[0]} answered with its new model", STEP_S)
    return Ending(state, Parameters(arrays.items()))


def proven(bed: Bed, agent: str) -> tuple[Manifest, Probe]:
    """Load and prove an agent's current model; raises `HedgerowError` where it does not hold."""
    folder = resolve(bed.vault(agent) / "artifacts", CURRENT)
    manifest, model, probe = load_artifact(folder, agent=agent)
    prove(open_session(model), probe, default_tolerance(probe))
    return manifest, probe


def _counted(bed: Bed, run: str) -> bytes:
    """Return the last state of a run in which every update was counted once; raises `HedgerowError`."""
    with Store.open(bed.store) as store:
        told = Counter((e.round, e.agent) for e in store.latest_events(1000, run) if e.kind == "update")
        rounds = store.rounds(run)
        if [(r.round, r.state) for r in rounds] != [(n, "closed") for n in range(1, ROUNDS + 1)]:
            raise HedgerowError(f"its rounds are {[(r.round, r.state) for r in rounds]}")
        for record in rounds:
            agents = sorted(update.agent for update in store.updates(run, record.round))
            absorbed = agents if record.absorbed is None else sorted(record.absorbed)
            if agents != list(AGENTS) or absorbed != list(AGENTS):
                raise HedgerowError(f"round {record.round} stored {agents} and absorbed {absorbed}")
        if twice := [key for key, count in told.items() if count > 1]:
            raise HedgerowError(f"updates counted twice: {twice}")
        latest = store.latest_state(run)
    if latest is None or latest[0] != ROUNDS:
        raise HedgerowError(f"its last snapshot is {latest and latest[0]}")
    return latest[1]


def _of_state(data: bytes) -> Parameters:
    state = State.from_bytes(data)
    arrays = {f"coordinator: {name}": array for name, array in state.shared.items()}
    for agent, private in state.private.items():
        arrays |= {f"coordinator: {agent}/{name}": array for name, array in private.items()}
    return Parameters(arrays.items())


def _personal(bed: Bed, run: str, agent: str) -> Parameters:
    file = bed.vault(agent) / "personal" / run / f"{ROUNDS:06d}.safetensors"
    found = read_arrays(file) if file.exists() else None
    if found is None:
        raise HedgerowError(f"{agent} lost its personal parameters of round {ROUNDS}")
    return Parameters((f"{agent}: {name}", array) for name, array in found[0].items())


@dataclass(frozen=True, slots=True)
class Distance:
    """How far one ending is from another."""

    bits: bool
    """Whether everything is the same to the bit."""
    largest: float = 0.0
    where: str = ""


def distance(one: Ending, other: Ending) -> Distance:
    """Return how far two endings are apart; infinite where they have not the same arrays."""
    if [*one.arrays] != [*other.arrays]:
        missing = sorted(set(one.arrays) ^ set(other.arrays))
        return Distance(False, float("inf"), ", ".join(missing[:3]) or "another order")
    found = Distance(one.state == other.state)
    for name, array in one.arrays.items():
        wanted = other.arrays[name]
        if array.shape == wanted.shape and array.tobytes() == wanted.tobytes():
            continue
        far = float("inf")
        if array.shape == wanted.shape:
            far = float(np.abs(array.astype(np.float64) - wanted.astype(np.float64)).max())
        if found.bits or not far <= found.largest:
            found = Distance(False, far, name)
    return found
