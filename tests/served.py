"""Artifacts to serve, and real servers that serve them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.package import export_artifact
from foundation.artifact import Manifest
from foundation.parameters import Array
from foundation.spec import ModelSpec
from tests.export.reference import SPECS, forward, masks_for, normalisation_for, probe_for, trained

ROOT = Path(__file__).parents[1]
KEPT = (9, 2, 30)
START_S = 30.0


def publish(
    folder: Path, name: str = "image-mean", *, round: int = 1, seed: int = 3, agent: str = "agent <1>"
) -> Manifest:
    spec = SPECS[name]
    parameters, masks = trained(spec, seed), masks_for(spec, KEPT)
    return export_artifact(
        spec, parameters, masks, normalisation_for(spec), labels_of(spec),
        probe_for(spec, parameters, masks), folder,
        agent=agent, run="run-1", round=round, strategy="fedavg", measure_latency=False,
    )  # fmt: skip


def labels_of(spec: ModelSpec) -> tuple[str, ...]:
    return tuple("abcdefghijklmnop"[: spec.classes])


def expected(name: str, x: Array, seed: int = 3) -> Array:
    spec = SPECS[name]
    return forward(spec, trained(spec, seed), masks_for(spec, KEPT), normalisation_for(spec), x)


def softmax(logits: Array) -> Array:
    exponentials: Array = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def damage(folder: Path) -> None:
    path = folder / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[str]

    @property
    def address(self) -> str:
        """Host and port."""
        return self.url.partition("://")[2]


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.serving", str(folder), "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving http"), process.communicate(timeout=START_S)
        yield Server(line.split()[1], process)
    finally:
        process.kill()
        process.communicate(timeout=START_S)


def run_server(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent.serving", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=START_S,
    )  # fmt: skip
