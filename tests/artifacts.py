"""Artifacts by the dozen for tests of swapping: one exported model, and variants whose answers are known.

A variant adds a vector of its own to the logits, so every answer says which version gave it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import onnx
from onnx import helper, numpy_helper

from export import metadata
from export.folder import load_artifact, probe_bytes
from export.folder import publish as put
from export.package import export_artifact
from export.sign import Key
from foundation.artifact import Manifest, Probe
from foundation.parameters import Array
from tests.export.reference import (
    SPECS,
    forward,
    masks_for,
    normalisation_for,
    probe_for,
    raw_inputs,
    trained,
)

ROOT = Path(__file__).parents[1]
SPEC = SPECS["image-mean"]
KEPT = (9, 2, 30)
LABELS = tuple("abcde")
START_S = 60.0
Change = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True)
class Artifact:
    """What is published."""

    manifest: Manifest
    model: bytes
    probe: bytes

    def publish(self, root: Path, key: Key | None = None) -> Path:
        return put(root, self.manifest, self.model, self.probe, key)

    @property
    def sha256(self) -> str:
        return self.manifest.sha256


@dataclass(frozen=True)
class Family:
    """Variants of one model."""

    base: Artifact
    logits: Probe

    def variant(self, round: int, *, change: Change | None = None, agent: str = "d0") -> Artifact:
        """Return the model of a round, whose logits are the base's plus `shift(round)`."""
        model = onnx.load_model_from_string(self.base.model)
        (bias,) = [t for t in model.graph.initializer if t.name == "head.bias"]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + shift(round), bias.name))
        if change is not None:
            change(model)
        return self._packed(model, round, agent, Probe(self.logits.inputs, self.logits.logits + shift(round)))

    def _packed(self, model: onnx.ModelProto, round: int, agent: str, probe: Probe) -> Artifact:
        file = probe_bytes(probe)
        opset = next(o.version for o in model.opset_import)
        draft = self.base.manifest.model_copy(update={"round": round, "agent": agent, "opset": opset})
        facts = metadata.of_manifest(draft) | {metadata.PROBE_SHA256: hashlib.sha256(file).hexdigest()}
        for prop in model.metadata_props:
            prop.value = facts.get(prop.key, prop.value)
        content = model.SerializeToString()
        digest = hashlib.sha256(content).hexdigest()
        return Artifact(draft.model_copy(update={"sha256": digest, "bytes": len(content)}), content, file)

    def expected(self, x: Array, round: int) -> Array:
        """Return the logits of a round's variant, by the double-precision reference."""
        return reference(x) + shift(round)


def shift(round: int) -> Array:
    """Return what a round's variant adds to the logits: tenths that no two rounds share."""
    values = np.random.default_rng(round).uniform(-2, 2, SPEC.classes)
    return values.astype(np.float32)


def reference(x: Array) -> Array:
    return forward(SPEC, trained(SPEC), masks_for(SPEC, KEPT), normalisation_for(SPEC), x)


def family(folder: Path) -> Family:
    """Export the base model, below a folder of its own."""
    parameters, masks = trained(SPEC), masks_for(SPEC, KEPT)
    probe = probe_for(SPEC, parameters, masks)
    manifest = export_artifact(
        SPEC, parameters, masks, normalisation_for(SPEC), LABELS, probe, folder,
        agent="d0", run="run-1", round=1, strategy="fedavg", measure_latency=False,
    )  # fmt: skip
    _, model, probe = load_artifact(folder / manifest.sha256)
    return Family(Artifact(manifest, model, probe_bytes(probe)), probe)


def samples(count: int, seed: int = 5) -> Array:
    return raw_inputs(SPEC, count, seed)


# --- changes ------------------------------------------------------------------------------------


def blind_above(limit: float) -> Change:
    """Return a change after which the model has no finite answer for inputs with values above `limit`."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        graph.initializer.append(numpy_helper.from_array(np.float32(limit), "limit"))
        graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
        _behind(
            model,
            helper.make_node("ReduceMax", ["input"], ["largest"], keepdims=0),
            helper.make_node("Sub", ["limit", "largest"], ["room"]),
            helper.make_node("Sqrt", ["room"], ["root"]),
            helper.make_node("Mul", ["root", "nothing"], ["added"]),
        )

    return change


def slower(size: int, times: int) -> Change:
    """Return a change after which the model also multiplies large matrices, for nothing."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        graph.initializer.append(numpy_helper.from_array(np.ones((size, size), np.float32) / size, "large"))
        graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
        nodes = [
            helper.make_node("ReduceMax", ["input"], ["largest"], keepdims=0),
            helper.make_node("Mul", ["large", "largest"], ["power0"]),
        ]
        nodes += [helper.make_node("MatMul", [f"power{i}", "large"], [f"power{i + 1}"]) for i in range(times)]
        nodes.append(helper.make_node("ReduceMax", [f"power{times}"], ["top"], keepdims=0))
        nodes.append(helper.make_node("Mul", ["top", "nothing"], ["added"]))
        _behind(model, *nodes)

    return change


def _behind(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Add what the nodes call `added` to the logits."""
    graph = model.graph
    for node in graph.node:
        for outputs in (node.output, node.input):
            for i, name in enumerate(outputs):
                if name == "logits":
                    outputs[i] = "before"
    graph.node.extend([*nodes, helper.make_node("Add", ["before", "added"], ["logits"])])


# --- a server -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[str]

    def version(self) -> str:
        index = httpx.post(f"{self.url}/v2/repository/index", timeout=20).json()
        return str(index[0]["version"])


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    """Run `python -m edge_agent.serving` until the end of the block."""
    log = folder.parent / f"{folder.name}.server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_agent.serving", str(folder), "--port", "0", *options],
            stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving http://127.0.0.1:"), log.read_text()
        yield Server(line.split()[1], process)
    finally:
        process.kill()
        process.communicate(timeout=START_S)
