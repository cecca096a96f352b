"""8-bit weights, with activations quantised as they come; kept only where this device gains by it.

Every product with a constant matrix becomes, in standard operators that onnxruntime fuses,

    y = (x_q - z) W_q * (s_x * s_w) ,      W_q = round(W / s_w) in -r..r ,   s_w = max|W| / r

with one s_w for each column of W, and scale s_x and zero point z of the activations found at every run
(DynamicQuantizeLinear). Products of two activations, as in attention, stay float32, and so does the first
product of raw values: their channels differ in scale, and one scale for all would leave nothing of the small
ones. Processors without an
8-bit dot product (x86 before VNNI) add two products in 16 bits, which overflow at r = 127 and cannot at
r = 64: both are written, and the one that answers closer to the probe on this device is taken.

Written here and not by onnxruntime's own tool, which goes through files, and makes a model that cannot be
opened of one with an Attention operator. Its graph and ours end as the same fused operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.proof import answers, open_session, prove
from export.verify import Validation, accuracy_of, latency
from foundation.artifact import Int8, Probe
from foundation.errors import ExportError, ProofFailed
from foundation.parameters import Array

Choice = Literal["auto", "on", "off"]

RANGES = (127, 64)

LARGEST_DROP = 0.005
"""Accuracy on validation data that 8-bit weights may cost: half a point."""
LEAST_EXAMPLES = 50
"""With fewer, no wrong answer more says less than a drop under 6 points (95 %): nothing is proven."""
LEAST_GAIN = 0.95
"""8-bit weights have to run in at most this share of the float model's time; less gain is noise."""


# What leaves raw values raw.
_AS_IT_CAME = frozenset(
    {"Add", "Cast", "Div", "Flatten", "Identity", "Mul", "Pad", "Reshape", "Slice", "Squeeze", "Sub"}
    | {"Transpose", "Unsqueeze"}
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A float32 model, the same one to be quantised, and what they are judged by."""

    float32: bytes
    source: bytes
    """The float32 model with the facts of the 8-bit one in its metadata."""
    probe: Probe
    tolerance: float
    """Of the 8-bit model's logits: see `tolerance_of`."""
    validation: Validation | None


def tolerance_of(probe: Probe) -> float:
    """Return how far an 8-bit model's logits may be from the trained model's: a fifth of the largest one.

    0.03 to 0.15 were seen on logits of 2 to 3, and 0.05 between processors; a wrong graph is off by as much
    as the logits are. What it costs in answers is judged on validation data, not here.
    """
    return 0.2 * max(1.0, float(np.abs(probe.logits).max(initial=0.0)))


def judged(candidate: Candidate, *, insist: bool) -> tuple[Int8, bytes]:
    """Return whether the 8-bit model is to be used, why, the figures of both, and the 8-bit model.

    Without `insist` all of this has to hold: there are enough validation examples, the accuracy on them
    drops by at most `LARGEST_DROP`, the probe's answers are kept, and the 8-bit model takes at most
    `LEAST_GAIN` of the other's time here. With it, only the probe counts, and `ProofFailed` says that its
    answers are not kept. Raises `ExportError` for a model in which there is nothing to quantise.
    """
    c = candidate
    if not insist and (examples := 0 if c.validation is None else c.validation.y.size) < LEAST_EXAMPLES:
        why = f"{examples} validation examples prove nothing; {LEAST_EXAMPLES} are needed"
        return Int8(used=False, why=why), c.float32
    model = min((dynamic(c.source, largest=r) for r in RANGES), key=lambda one: _distance(one, c.probe))
    facts: dict[str, float | int | None] = {"bytes": len(model), "float_bytes": len(c.float32)}
    session = open_session(model)
    try:
        facts["parity"] = prove(session, c.probe, c.tolerance).difference
    except ProofFailed as error:
        if insist:
            raise
        return Int8(used=False, why=f"the probe: {error}", **facts), model
    if c.validation is not None:
        facts["accuracy"] = accuracy_of(session, c.validation)
        facts["float_accuracy"] = accuracy_of(open_session(c.float32), c.validation)
    facts["latency_ms"], facts["float_latency_ms"] = latency(model, c.float32, c.probe.inputs[:1])
    figures = Int8(used=True, why="asked for" if insist else "faster here, and as accurate", **facts)
    if insist or (against := next(_against(figures), None)) is None:
        return figures, model
    return figures.model_copy(update={"used": False, "why": against}), model


def _distance(model: bytes, probe: Probe) -> float:
    return float(np.abs(answers(open_session(model), probe.inputs) - probe.logits).max())


def _against(figures: Int8) -> Iterator[str]:
    if figures.accuracy is None or figures.float_accuracy is None:
        yield "accuracy is not known"
        return
    if (drop := figures.float_accuracy - figures.accuracy) > LARGEST_DROP:
        yield f"accuracy drops by {100 * drop:.1f} points; {100 * LARGEST_DROP:.1f} are allowed"
    if figures.latency_ms is None or figures.float_latency_ms is None:
        yield "latency is not known"
        return
    if (ratio := figures.latency_ms / figures.float_latency_ms) > LEAST_GAIN:
        yield f"no gain here: {ratio:.2f} of the float model's time; {LEAST_GAIN:.2f} or less pays"


def dynamic(model: bytes, *, largest: int = 127) -> bytes:
    """Return the model with 8-bit weights in every MatMul and Gemm of activations with a constant matrix.

    Weights become -`largest`..`largest`. Names, metadata and interface stay, and the same model gives the
    same bytes. Raises `ExportError` when there is no such product.
    """
    proto = onnx.load_model_from_string(model)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    rewriting = _Rewriting(weights, largest, {tensor.name for tensor in proto.graph.input})
    nodes = [fresh for node in proto.graph.node for fresh in rewriting.of(node)]
    if not rewriting.added:
        raise ExportError("the model has no product with a constant matrix: there is nothing to quantise")
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in weights.items() if name in used]
    del proto.graph.node[:]
    del proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend([*kept, *rewriting.added.values()])
    return bytes(proto.SerializeToString(deterministic=True))


class _Rewriting:
    """Replaces one node after the other; what is quantised once is used again."""

    def __init__(self, weights: dict[str, onnx.TensorProto], largest: int, raw: set[str]) -> None:
        self._weights, self._largest = weights, largest
        self._raw = raw - weights.keys()
        """Tensors that are the input, in other shapes or another scale."""
        self._activations: set[str] = set()
        self.added: dict[str, onnx.TensorProto] = {}

    def of(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return what stands in a node's place: itself, or the nodes of a product in integers."""
        if node.op_type in _AS_IT_CAME and node.input[0] in self._raw:
            self._raw.add(node.output[0])
        matrix = self._matrix(node)
        if matrix is None or node.input[0] in self._raw:
            return [node]
        x, name, output = node.input[0], node.name or node.output[0], node.output[0]
        weight, scale = self._quantised(node.input[1], matrix)
        nodes = self._activation(x)
        product = f"{name}.int8.scaled" if len(node.input) > 2 else output
        nodes += [
            _node("MatMulInteger", f"{name}.int8.integers", f"{x}.int8", weight, f"{x}.int8.zero"),
            _node("Cast", f"{name}.int8.cast", f"{name}.int8.integers", to=TensorProto.FLOAT),
            _node("Mul", f"{name}.int8.scale", f"{x}.int8.scale", scale),
            _node("Mul", product, f"{name}.int8.cast", f"{name}.int8.scale"),
        ]
        if product != output:
            nodes.append(_node("Add", output, product, node.input[2]))
        return nodes

    def _matrix(self, node: onnx.NodeProto) -> Array | None:
        """Return the constant matrix that a node multiplies by, rows first; `None` for any other node."""
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in self._weights:
            return None
        matrix = numpy_helper.to_array(self._weights[node.input[1]])
        if matrix.ndim != 2 or matrix.dtype != np.float32 or not matrix.size:
            return None
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Gemm":
            plain = all(attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta"))
            if attributes.get("transA", 0) or not plain:
                return None
        result: Array = matrix.T if attributes.get("transB", 0) else matrix
        return result

    def _quantised(self, name: str, matrix: Array) -> tuple[str, str]:
        """Store a matrix as integers and a scale for each column; return the two names."""
        size, most = np.abs(matrix).max(axis=0), self._largest
        scale = np.where(size > 0, size / most, 1).astype(np.float32)
        integers = np.rint(matrix / scale).clip(-most, most).astype(np.int8)
        for suffix, array in ((".int8", integers), (".int8.scale", scale)):
            self.added[name + suffix] = numpy_helper.from_array(np.asarray(array, order="C"), name + suffix)
        return f"{name}.int8", f"{name}.int8.scale"

    def _activation(self, x: str) -> list[onnx.NodeProto]:
        if x in self._activations:
            return []
        self._activations.add(x)
        outputs = [f"{x}.int8", f"{x}.int8.scale", f"{x}.int8.zero"]
        return [helper.make_node("DynamicQuantizeLinear", [x], outputs, name=f"{x}.int8")]


def _node(operator: str, output: str, *inputs: str, **attributes: int) -> onnx.NodeProto:
    node = helper.make_node(operator, list(inputs), [output], name=output)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return node
