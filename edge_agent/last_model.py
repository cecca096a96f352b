"""The last whole model of this device, kept so that it can be exported again without training.

What the vault keeps for the next round is only what is personal, and may be nothing. Here is everything that
an export takes: dense parameters, masks, normalisation, labels, probe and what is known of it. One file,
`last_model.safetensors`, written with every exported model and with a run's last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from edge_agent.vault import read_arrays, write_arrays
from foundation.artifact import Manifest, Probe
from foundation.energy import EnergyReading, Kind
from foundation.errors import ExportError
from foundation.frozen import Frozen
from foundation.normalisation import Normalisation
from foundation.parameters import Array, Masks, Parameters
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

    def export(
        self,
        folder: Path,
        vault: Path,
        validation: tuple[Array, Array] | None,
        *,
        int8: Literal["auto", "on", "off"],
        opset: int | None = None,
        probabilities: bool = False,
    ) -> Manifest:
        """Prove, measure and publish it below `folder`, signed with the vault's key; returns the manifest.

        `validation` are raw samples that were not trained on, and the right answers. The rest is as in
        `export.package.export_artifact`, and so is what it raises.
        """
        from export.graph import OPSET
        from export.package import export_artifact  # onnx weighs 30 MB: only when it is needed
        from export.sign import DEVICE_KEY, DeviceKey
        from export.verify import Validation

        f = self.facts
        return export_artifact(
            *(f.spec, self.parameters, self.masks, f.normalisation, f.labels, self.probe, folder),
            agent=f.agent,
            run=f.run,
            round=f.round,
            strategy=f.strategy,
            accuracy_sent=f.accuracy_sent,
            accuracy=f.accuracy,
            train_joules=f.trained.joules if f.trained else None,
            train_joules_kind=f.trained.kind if f.trained else Kind.NONE,
            opset=OPSET if opset is None else opset,
            probabilities=probabilities,
            validation=None if validation is None else Validation(*validation),
            int8=int8,
            key=DeviceKey.load(vault / DEVICE_KEY, make=True),
        )


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
