"""A torch model of one's own as an artifact: torch's exporter, then the same proof, signature and folder.

    from export.torch_model import export_torch_model

    export_torch_model(model, samples, "artifacts", input="image", labels=["cat", "dog"])

The model takes one tensor of raw samples, (batch, *shape), and returns logits, (batch, classes) or
(batch, sequence, classes) for text; scaling belongs inside of it. Nothing else in this package imports torch.
With `onnxscript` (extra `export-torch`) torch's present exporter is used, without it the one it replaces.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import helper

from export.form import opset_of
from export.graph import INPUT, LOGITS, OPSET
from export.package import check_probe, publish
from export.proof import default_tolerance
from export.quantise import Choice
from export.sign import Key
from export.verify import Validation
from foundation.artifact import Manifest, Probe
from foundation.errors import ExportError
from foundation.normalisation import Normalisation
from foundation.parameters import Array

PROBE_SAMPLES = 8
_FIRST_OPSET = 18


def export_torch_model(
    model: torch.nn.Module,
    samples: Array,
    folder: Path | str,
    *,
    input: Literal["image", "series", "text"],
    labels: Sequence[str],
    agent: str = "local",
    run: str = "local",
    round: int = 0,
    strategy: str = "own model",
    opset: int = OPSET,
    tolerance: float | None = None,
    validation: Validation | None = None,
    int8: Choice = "off",
    key: Key | None = None,
    measure_latency: bool = True,
) -> Manifest:
    """Export, prove, measure, sign and publish a torch model below `folder`, and return its manifest.

    `samples` are at least two raw samples, (n, *shape), int64 for text; the first ones become the probe,
    with the answers that the model gives in evaluation mode. The rest is as in
    `export.package.export_artifact`.

    Raises `ExportError` for a model that torch cannot export or whose answers have another shape, and
    `ProofFailed` when the exported model answers differently, such as at another batch size.
    """
    if len(samples) < 2:
        raise ExportError(f"{len(samples)} samples prove nothing of a batch: give 2 or more")
    samples = np.asarray(samples, np.int64 if input == "text" else np.float32)
    training = model.training
    model.eval()
    try:
        probe = _probe(model, samples[:PROBE_SAMPLES])
        check_probe(input, samples.shape[1:], labels, probe)
        proto = _exported(model, torch.from_numpy(samples[:2]), opset, text=input == "text")
    finally:
        model.train(training)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    draft = Manifest(
        agent=agent,
        run=run,
        round=round,
        strategy=strategy,
        sha256="",
        bytes=0,
        dense_bytes=0,
        parameters=numbers,
        dense_parameters=numbers,
        input=input,
        shape=samples.shape[1:],
        labels=tuple(labels),
        normalisation=Normalisation(),
        kept_units=(),
        hidden_units=0,
        opset=opset_of(proto.SerializeToString()) or opset,
        tolerance=default_tolerance(probe) if tolerance is None else tolerance,
        parity=0.0,
    )
    return publish(
        draft,
        lambda facts: _with(proto, facts),
        probe,
        Path(folder),
        validation=validation,
        int8=int8,
        key=key,
        measure_latency=measure_latency,
    )


def _probe(model: torch.nn.Module, samples: Array) -> Probe:
    with torch.inference_mode():
        answer = model(torch.from_numpy(samples))
    if not isinstance(answer, torch.Tensor):
        raise ExportError(f"the model returns {type(answer).__name__}; it has to return one tensor of logits")
    return Probe(samples, answer.to(torch.float32).cpu().numpy().copy())


def _exported(model: torch.nn.Module, example: torch.Tensor, opset: int, *, text: bool) -> onnx.ModelProto:
    axes = {0: "batch", 1: "sequence"} if text else {0: "batch"}
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [LOGITS], "opset_version": opset}
    try:
        if find_spec("onnxscript") is not None:
            return _programmed(model, example, axes, names)
        return _traced(model, example, {INPUT: axes, LOGITS: axes}, names)
    except (RuntimeError, TypeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        raise ExportError(f"torch cannot export this model: {error}") from error


def _programmed(
    model: torch.nn.Module, example: torch.Tensor, axes: Mapping[int, str], names: dict[str, Any]
) -> onnx.ModelProto:
    """Return what torch's present exporter makes, which begins at opset 18."""
    names = {**names, "opset_version": max(names["opset_version"], _FIRST_OPSET)}
    dimensions = {axis: torch.export.Dim(name, min=1) for axis, name in axes.items()}
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # of torch's own ways, not of the model
            warnings.simplefilter("ignore", kind)
        program = torch.onnx.export(
            *(model, (example,)),
            dynamo=True,
            dynamic_shapes=(dimensions,),
            external_data=False,
            verbose=False,
            **names,
        )
    assert program is not None
    return program.model_proto


def _traced(
    model: torch.nn.Module,
    example: torch.Tensor,
    axes: Mapping[str, Mapping[int, str]],
    names: dict[str, Any],
) -> onnx.ModelProto:
    """Return what torch's older exporter makes; it needs nothing but onnx."""
    written: Any = io.BytesIO()  # which torch takes, and does not say so
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # known: the newer one needs onnxscript
        torch.onnx.export(model, (example,), written, dynamo=False, dynamic_axes=axes, **names)
    return onnx.load_model_from_string(written.getvalue())


def _with(proto: onnx.ModelProto, facts: Mapping[str, str]) -> bytes:
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    helper.set_model_props(result, dict(sorted(facts.items())))
    return bytes(result.SerializeToString(deterministic=True))
