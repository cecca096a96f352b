"""The models of bench/serve.py, and what is measured of them inside one process."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import torch

from export.cut import cut
from export.graph import OPSET, build
from export.package import export_artifact
from export.proof import open_session
from export.runtime import ort
from export.verify import attention_runs
from foundation.artifact import Probe
from foundation.errors import ExportError
from foundation.nn.bridge import to_module
from foundation.nn.transformer import Transformer
from foundation.normalisation import Normalisation
from foundation.parameters import Array, Masks, Parameters
from foundation.spec import ModelSpec, initial_parameters

PATCHES = {"64/17": (64, 8), "128/65": (128, 4)}
RUNS = {"64/17": 2000, "128/65": 400}
STRETCHES = 5
GONE = 0.9
CLASSES = 10


def known(opset: int) -> bool:
    spec = ModelSpec(input="series", shape=(2, 1), classes=2, width=4, depth=1, heads=1, patch=1)
    try:
        build(spec, initial_parameters(spec, 0), Normalisation(), metadata={}, opset=opset)
    except ExportError:
        return False
    return True


OPSETS = tuple(opset for opset in range(9, 30) if known(opset))
"""Every opset that our writer offers."""


class Drawn:
    """A model with drawn weights, whole, cut, and with zeros at the old shape."""

    def __init__(self, name: str) -> None:
        self.name = name
        width, patch = PATCHES[name]
        self.spec = ModelSpec(
            input="image", shape=(3, 32, 32), classes=CLASSES, width=width, depth=6, heads=4, patch=patch,
            pool="cls",
        )  # fmt: skip
        rng = np.random.default_rng(0)
        drawn = initial_parameters(self.spec, 0)
        # Biases are 0 at first, and a dropped unit's bias must not be missed: give them values.
        noisy = {
            k: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32)
            for k, a in drawn.items()
            if a.ndim == 1
        }
        self.parameters = drawn.updated(noisy)
        kept = round((1 - GONE) * self.spec.hidden)
        self.masks: Masks = {
            f"blocks.{i}.ffl": rng.permutation(self.spec.hidden) < kept for i in range(self.spec.depth)
        }
        self.sample = self.inputs(1)

    def inputs(self, count: int) -> Array:
        return np.random.default_rng(1).standard_normal((count, *self.spec.shape)).astype(np.float32)

    @cached_property
    def dense(self) -> bytes:
        return self.graph(self.parameters)

    @cached_property
    def pruned(self) -> bytes:
        return self.graph(cut(self.parameters, self.masks))

    @cached_property
    def zeros(self) -> bytes:
        """As many weights of the FFLs are 0, anywhere, and nothing is smaller."""
        rng = np.random.default_rng(2)
        return self.graph(
            self.parameters.updated(
                {k: np.where(rng.random(a.shape) < GONE, np.float32(0), a) for k, a in self.parameters.items()
                 if ".ffl." in k and k.endswith("weight")}
            )
        )  # fmt: skip

    def graph(self, parameters: Parameters, opset: int = OPSET) -> bytes:
        """Write it as an export does, with attention as one operator where opset and runtime have it."""
        attention = attention_runs(opset)
        return build(self.spec, parameters, Normalisation(), metadata={}, opset=opset, attention=attention)

    def module(self, *, masked: bool = False, small: bool = False) -> Transformer:
        """Return the torch model; masked as it is trained, or small as it is after training."""
        if small:
            return to_module(self.spec, cut(self.parameters, self.masks)).eval()
        return to_module(self.spec, self._masked() if masked else self.parameters).eval()

    def _masked(self) -> Parameters:
        changed: dict[str, Array] = {}
        for block, mask in self.masks.items():
            for part in ("up.weight", "up.bias", "down.weight"):
                array = self.parameters[f"{block}.{part}"]
                changed[f"{block}.{part}"] = array * (mask[:, None] if part == "up.weight" else mask)
        return self.parameters.updated(changed)

    def torch_logits(self, x: Array, *, masked: bool) -> Array:
        model = self.module(masked=masked)
        with torch.inference_mode():
            parts = [model(torch.from_numpy(x[i : i + 64])).numpy() for i in range(0, len(x), 64)]
        return np.concatenate(parts)

    def parity(self, opset: int, x: Array, expected: Array, *, masked: bool) -> tuple[float, int]:
        """Return the largest difference to torch, and how many answers are other ones."""
        parameters = cut(self.parameters, self.masks) if masked else self.parameters
        return compared(self.graph(parameters, opset), x, expected)

    def publish(self, folder: Path) -> Path:
        """Export the pruned model as an agent does, proof included, and return the folder."""
        x = self.inputs(8)
        export_artifact(
            self.spec, self.parameters, self.masks, Normalisation(), [f"c{i}" for i in range(CLASSES)],
            Probe(x, self.torch_logits(x, masked=True)), folder,
            agent="bench", run="bench", round=1, strategy="local", measure_latency=False,
        )  # fmt: skip
        return folder


def compared(model: bytes, x: Array, expected: Array) -> tuple[float, int]:
    found = answers(model, x)
    return float(np.abs(found - expected).max()), int((found.argmax(-1) != expected.argmax(-1)).sum())


def differences(model: bytes, other: bytes, x: Array) -> tuple[float, int]:
    return compared(model, x, answers(other, x))


def answers(model: bytes, x: Array) -> Array:
    session = open_session(model)
    return np.concatenate(
        [session.run(["logits"], {"input": x[i : i + 64]})[0] for i in range(0, len(x), 64)]
    )


# --- sides -------------------------------------------------------------------------------------------


Times: TypeAlias = Mapping[str, list[float]]
"""CPU seconds of every run, by side."""


@dataclass(frozen=True)
class Side:
    """One run of something, and what has to be set before it."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


def sessions(graphs: Mapping[str, bytes], sample: Array) -> dict[str, Side]:
    found = {}
    for name, model in graphs.items():
        session = open_session(model)
        found[name] = Side(lambda s=session: s.run(["logits"], {"input": sample}))
    return found


class Plain(torch.nn.Module):
    """The same model as it is usually written: every token goes through every block."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.model._embedded(x)
        for block in self.model.blocks:
            x = block.feed(block.attend(x))
        return self.model._answer(x)


def sides(one: Drawn, exported: Mapping[str, bytes]) -> dict[str, Side]:
    """Return our exports, those of others, and torch: as usually written, and our own torch model."""
    graphs = {"dense": one.dense, "pruned": one.pruned, "zeros": one.zeros, **exported}
    if OPSETS[-1] != OPSET:
        small = cut(one.parameters, one.masks)
        graphs["pruned, newest opset"] = one.graph(small, OPSETS[-1])
    found = sessions(graphs, one.sample)
    x = torch.from_numpy(one.sample)
    for what, model in (
        ("torch", Plain(one.module())),
        ("torch, pruned", Plain(one.module(small=True))),
        ("our torch model", one.module()),
    ):
        for library, on in (("", True), (" without oneDNN", False)):
            found[what + library] = Side(
                lambda m=model: m(x), lambda on=on: torch.backends.mkldnn.set_flags(on)
            )
    return found


def in_turn(found: Mapping[str, Side], runs: int) -> Times:
    """Let the sides take turns in a new order each time; returns seconds of this thread's CPU time.

    Of two runs the second is timed: the first one's caches are those of the side before, and with a fixed
    order that alone makes a fifth.
    """
    times: dict[str, list[float]] = {name: [] for name in found}
    rng = np.random.default_rng(0)
    enabled = torch.backends.mkldnn.set_flags(True)[0]
    try:
        with torch.inference_mode():
            for turn in range(-max(5, runs // 20), runs):
                for i in rng.permutation(len(found)):
                    name, side = list(found.items())[i]
                    spent = second_run(side)
                    if turn >= 0:
                        times[name].append(spent)
    finally:
        torch.backends.mkldnn.set_flags(enabled)
    return times


def second_run(side: Side) -> float:
    side.before()
    side.run()
    begin = time.thread_time()
    side.run()
    return time.thread_time() - begin


def median_of(times: list[float]) -> float:
    return median(times)


def ratio(times: Times, over: str, under: str) -> tuple[float, tuple[float, float]]:
    """Return the ratio of two medians, and the smallest and largest of five stretches of the run."""
    a, b = times[over], times[under]
    step = max(1, len(a) // STRETCHES)
    parts = [median(a[i : i + step]) / median(b[i : i + step]) for i in range(0, len(a) - step + 1, step)]
    return median(a) / median(b), (min(parts), max(parts))


def isolated_runs(one: Drawn, count: int) -> dict[str, float]:
    """Run the session now and then; returns CPU of the run, and of the process until half a second later."""
    session = open_session(one.pruned)
    feed = {"input": one.sample}
    for _ in range(20):
        session.run(["logits"], feed)
    run = whole = 0.0
    for _ in range(count):
        time.sleep(0.1)
        before, begin = time.process_time(), time.thread_time()
        session.run(["logits"], feed)
        run += time.thread_time() - begin
        time.sleep(0.5)
        whole += time.process_time() - before
    return {"run ms": 1e3 * run / count, "with after ms": 1e3 * whole / count}


# --- the other exporters, and int8 -------------------------------------------------------------------


def torch_export(one: Drawn, *, dynamo: bool, plain: bool = True) -> bytes:
    buffer = io.BytesIO()
    how: dict[str, Any] = {"dynamo": dynamo, "input_names": ["input"], "output_names": ["logits"]}
    if dynamo:
        how["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=1)},)
        how["external_data"] = False
        how["verbose"] = False
    else:
        how["dynamic_axes"] = {"input": {0: "batch"}, "logits": {0: "batch"}}
        how["opset_version"] = OPSET
    count = 2 if dynamo else 1  # a batch of one is no dynamic batch to torch.export
    model = Plain(one.module()).eval() if plain else one.module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.zeros(count, *one.spec.shape),), buffer, **how)
    return buffer.getvalue()


def legacy(one: Drawn, *, plain: bool = True) -> tuple[bytes | None, str]:
    """Return what torch's legacy exporter makes of the dense model, or why it does not."""
    try:
        model = torch_export(one, dynamo=False, plain=plain)
    except (ImportError, RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        return None, f"torch's legacy exporter: {type(error).__name__}: {str(error)[:200]}"
    x = one.inputs(64)
    off, flips = compared(model, x, one.torch_logits(x, masked=False))
    if off > 1e-4 or flips:
        return None, f"torch's legacy exporter's model answers differently: {off:.2g}"
    return model, ""


def exports(one: Drawn, folder: Path, repeats: int, *, dynamo: bool) -> dict[str, list[float]]:
    """Export by every way in turn; returns CPU seconds of the calling thread."""
    ways: dict[str, Callable[[], object]] = {
        "whole artifact": lambda: one.publish(folder),
        "graph alone": lambda: one.graph(cut(one.parameters, one.masks)),
    }
    if legacy(one)[0] is not None:
        ways["legacy"] = lambda: torch_export(one, dynamo=False)
    if dynamo:
        ways["dynamo"] = lambda: torch_export(one, dynamo=True)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, repeats):
        for name, way in ways.items():
            begin = time.thread_time()
            way()
            if turn >= 0:
                times[name].append(time.thread_time() - begin)
    return times


def quantised(model: bytes) -> tuple[bytes, str]:
    """Return a model with dynamic int8 matrices, and how it was made: by our own writer where it is there."""
    if importlib.util.find_spec("export.quantise") is not None:
        written: bytes = importlib.import_module("export.quantise").dynamic(model)
        return written, "export.quantise.dynamic, without its gates"
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            onnx.load_model_from_string(model), path, op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
        )  # fmt: skip
        return path.read_bytes(), f"onnxruntime {ort.__version__}'s quantize_dynamic, no accuracy gate"


def quiet() -> Any:
    logging.getLogger().setLevel(logging.ERROR)
    return nullcontext()
