"""The tensors of the Open Inference Protocol (V2), as JSON and as appended bytes; no web framework.

With the binary extension a body is JSON of `Inference-Header-Content-Length` bytes followed by raw
little-endian tensors; a length of 0 means that the whole body is the one input tensor, answered with
all outputs as bytes, or as JSON where the client accepts nothing else. An output asked for as
`classification` of n is answered as n texts `value:index:label`, largest value first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json

from edge_agent.serving.predictor import Prediction
from foundation.artifact import Manifest
from foundation.errors import WireError
from foundation.parameters import Array

INPUT = "input"
OUTPUTS = {"logits": "FP32", "probabilities": "FP32", "label": "INT64"}
DATATYPES: Mapping[str, str] = {
    "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "INT8": "<i1", "INT16": "<i2", "INT32": "<i4",
    "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip

_LONGEST_ID = 256
_ELSEWHERE = "shared_memory_region"


class _Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[int] = Field(min_length=1, max_length=8)
    data: list[object] | None = None
    parameters: dict[str, object] = Field(default_factory=dict)


class _Wanted(BaseModel):
    name: str
    parameters: dict[str, object] = Field(default_factory=dict)


class _Request(BaseModel):
    id: str | None = Field(None, max_length=_LONGEST_ID)
    inputs: list[_Tensor] = Field(min_length=1, max_length=1)
    outputs: list[_Wanted] = Field(default_factory=list, max_length=len(OUTPUTS))
    parameters: dict[str, object] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Output:
    """One output that is wanted, and how."""

    name: str
    binary: bool
    classes: int = 0
    """How many of the largest to name, as texts; 0 for the tensor itself."""


_ALL = {binary: tuple(Output(name, binary) for name in OUTPUTS) for binary in (False, True)}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A decoded request: the input, and which outputs are wanted."""

    x: Array
    id: str | None
    outputs: tuple[Output, ...]


def datatype(manifest: Manifest) -> str:
    """Return the protocol's name for the type of a model's input."""
    return "INT64" if manifest.input == "text" else "FP32"


def decode(
    body: bytes, header_length: str | None, manifest: Manifest, *, json_alone: bool = False
) -> InferRequest:
    """Decode a request's body; `header_length` is the `Inference-Header-Content-Length` header, if any.

    `json_alone` says that the client accepts nothing but JSON, which a raw body cannot say itself.

    Raises `WireError` for whatever cannot be what was meant: JSON that is none, another input's name,
    shapes, sizes and counts that contradict each other, unknown types and outputs.
    """
    length = _header_length(body, header_length)
    if length == 0:
        return InferRequest(_raw_tensor(body, manifest), None, _ALL[not json_alone])
    try:
        request = _Request.model_validate_json(body[:length])
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise WireError(f"the request is malformed: {where}: {problem['msg']}") from error
    tensor = request.inputs[0]
    if tensor.name != INPUT:
        raise WireError(f"the model has no input {tensor.name[:64]!r}; its input is {INPUT!r}")
    return InferRequest(_array(tensor, body[length:]), request.id, _outputs(request))


def encode(name: str, prediction: Prediction, request: InferRequest) -> tuple[bytes, int | None]:
    """Return a response's body, and the length of its JSON part where tensors are appended to it."""
    arrays = {
        "logits": prediction.logits.astype("<f4"),
        "probabilities": prediction.probabilities.astype("<f4"),
        "label": prediction.indices.astype("<i8"),
    }
    outputs: list[dict[str, object]] = []
    appended: list[bytes] = []
    for output in request.outputs:
        array, kind = arrays[output.name], OUTPUTS[output.name]
        if output.classes:
            array, kind = _classified(array, output.classes, prediction.manifest.labels), "BYTES"
        entry: dict[str, object] = {"name": output.name, "datatype": kind, "shape": list(array.shape)}
        if output.binary:
            appended.append(_texts(array) if output.classes else array.tobytes())
            entry["parameters"] = {"binary_data_size": len(appended[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        outputs.append(entry)
    answer: dict[str, object] = {
        "model_name": name,
        "model_version": str(prediction.manifest.round),
        "outputs": outputs,
    }
    if request.id is not None:
        answer["id"] = request.id
    head = to_json(answer)
    return b"".join([head, *appended]), len(head) if appended else None


def _classified(values: Array, most: int, labels: tuple[str, ...]) -> Array:
    """Return (..., n) texts `value:index:label`, the largest value first."""
    order = (-values).argsort(-1, kind="stable")[..., :most]
    texts = np.empty(order.shape, object)
    for place, i in np.ndenumerate(order):
        texts[place] = f"{values[(*place[:-1], i)]:f}:{i}:{labels[i]}"
    return texts


def _texts(array: Array) -> bytes:
    """Return texts as the protocol appends them: each after its length in four bytes."""
    encoded = [text.encode() for text in array.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)


def _header_length(body: bytes, header: str | None) -> int:
    if header is None:
        # A body without the extension is JSON to its end; an empty one is no JSON, and not a raw tensor.
        return max(len(body), 1)
    if not (header.isascii() and header.isdigit() and len(header) < 10 and int(header) <= len(body)):
        raise WireError(f"Inference-Header-Content-Length {header[:20]!r} does not fit {len(body)} bytes")
    return int(header)


def _raw_tensor(body: bytes, manifest: Manifest) -> Array:
    kind = np.dtype(DATATYPES[datatype(manifest)])
    text = manifest.input == "text"
    sample = kind.itemsize * (1 if text else math.prod(manifest.shape))
    if not body or len(body) % sample:
        raise WireError(f"a raw body of {len(body)} bytes is no multiple of {sample}")
    return np.frombuffer(body, kind).reshape((1, -1) if text else (-1, *manifest.shape))


def _array(tensor: _Tensor, appended: bytes) -> Array:
    if tensor.datatype not in DATATYPES:
        raise WireError(f"datatype {tensor.datatype[:20]!r} is not one of {', '.join(DATATYPES)}")
    kind, size = np.dtype(DATATYPES[tensor.datatype]), tensor.parameters.get("binary_data_size")
    if min(tensor.shape) < 0:
        raise WireError(f"the shape {tensor.shape} has a negative number")
    if _ELSEWHERE in tensor.parameters:
        raise WireError("tensors in shared memory are not read: send the data")
    if size is not None:
        values = _binary(tensor, kind, size, appended)
    elif tensor.data is None:
        raise WireError(f"the input {tensor.name!r} has neither data nor binary_data_size")
    elif appended:
        raise WireError(f"{len(appended)} bytes follow the JSON, and no tensor claims them")
    else:
        values = _typed(numbers(tensor.data), kind)
    if values.size != math.prod(tensor.shape):
        raise WireError(f"{values.size} numbers do not make the shape {tensor.shape}")
    return values.reshape(tensor.shape)


def _binary(tensor: _Tensor, kind: np.dtype[np.generic], size: object, appended: bytes) -> Array:
    if tensor.data is not None:
        raise WireError(f"the input {tensor.name!r} has both data and binary_data_size")
    if type(size) is not int or size != len(appended) or size != kind.itemsize * math.prod(tensor.shape):
        raise WireError(
            f"binary_data_size {str(size)[:20]} does not fit {len(appended)} bytes for {tensor.shape}"
        )
    return np.frombuffer(appended, kind)


def numbers(data: list[object]) -> Array:
    """Return nested lists of numbers as an array; text, truth values and ragged lists are refused."""
    try:
        values = np.asarray(data)
    except ValueError as error:
        raise WireError("the data is ragged: every sample needs the same shape") from error
    if values.dtype.kind not in "iuf":
        raise WireError("the data has something other than numbers in it")
    return values


def _typed(values: Array, kind: np.dtype[np.generic]) -> Array:
    if kind.kind == "f":
        return values.astype(np.float64)
    if values.size and (values.dtype.kind == "f" or not _within(values, np.iinfo(kind.name))):
        raise WireError(f"the data has numbers that are no {kind.name}")
    return values.astype(kind)


def _within(values: Array, limits: np.iinfo[np.signedinteger]) -> bool:
    return int(values.min()) >= limits.min and int(values.max()) <= limits.max


def _outputs(request: _Request) -> tuple[Output, ...]:
    default = request.parameters.get("binary_data_output") is True
    if not request.outputs:
        return _ALL[default]
    if unknown := [output.name for output in request.outputs if output.name not in OUTPUTS]:
        raise WireError(f"the model has no output {unknown[0][:64]!r}; it has {', '.join(OUTPUTS)}")
    return tuple(
        Output(o.name, o.parameters.get("binary_data", default) is True, _classes(o)) for o in request.outputs
    )


def _classes(output: _Wanted) -> int:
    if _ELSEWHERE in output.parameters:
        raise WireError("answers are not written to shared memory: leave it out, and they are sent")
    classes = output.parameters.get("classification", 0)
    if type(classes) is not int or classes < 0:
        raise WireError(f"classification is a number of classes, not {str(classes)[:20]!r}")
    if classes and OUTPUTS[output.name] != "FP32":
        raise WireError(f"the output {output.name!r} has no classes to name: ask logits or probabilities")
    return classes
