"""The last whole model of this device, kept so that it can be exported again without training.

What the vault keeps for the next round is only what is personal, and may be nothing. Here is everything that
an export takes: dense parameters, masks, normalisation, labels, probe and what is known of it. One file,
`last_model.safetensors`, written with every exported model and with a run's last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from edge_agent.vault import read_arrays, write_arrays
from foundation.artifact import Probe
from foundation.energy import EnergyReading
from foundation.errors import ExportError
from foundation.frozen import Frozen
from foundation.normalisation import Normalisation
from foundation.parameters import Masks, Parameters
from foundation.spec import ModelSpec

FILE = "last_model.safetensors"


class Facts(Frozen):
    """What is known of a model beside its numbers."""

    agent: str
    run: str
    round: int
    strategy: str
    spec: ModelSpec
    normalisation: Normalisation
    labels: tuple[str, ...]
    accuracy_sent: float | None = None
    accuracy: float | None = None
    trained: EnergyReading | None = None
    """All training of the run on this device."""


@dataclass(frozen=True, slots=True)
class LastModel:
    """A model as it was trained: dense parameters, the masks of its FFLs, and the probe."""

    facts: Facts
    parameters: Parameters
    masks: Masks
    probe: Probe


def save(vault: Path, model: LastModel) -> None:
    """Write the model into a vault; after a power cut the old or the new one is there."""
    arrays = Parameters(
        {
            **model.parameters.prefixed("model/"),
            **{f"mask/{name}": mask for name, mask in model.masks.items()},
            "probe/inputs": model.probe.inputs,
            "probe/logits": model.probe.logits,
        }
    )
    write_arrays(vault / FILE, arrays, {"facts": model.facts.model_dump(mode="json")})


def load(vault: Path) -> LastModel:
    """Read the model of a vault, which its agent may be using; raises `ExportError` where there is none."""
    if not (vault / FILE).exists():
        raise ExportError(
            f"{vault} holds no whole model yet: there is one after a round that exports, or a run's last"
        )
    found = read_arrays(vault / FILE)
    if found is None:
        raise ExportError(f"{vault / FILE} is damaged: the next exported round writes it anew")
    arrays, meta = found
    try:
        facts = Facts.model_validate(meta["facts"])
        probe = Probe(arrays["probe/inputs"], arrays["probe/logits"])
    except (ValidationError, KeyError) as error:
        raise ExportError(f"{vault / FILE} is of another version: {error}") from error
    return LastModel(facts, arrays.under("model/"), dict(arrays.under("mask/")), probe)
