"""Is a model file of the form that is run here? Read from its bytes, without onnx.

A device opens only what stands by itself: no tensor kept in another file, no operator but the standard's, the
opset that its manifest names, its own name in the manifest. onnxruntime would follow an outside file's path
and says of a foreign operator no more than that it failed; here each is refused by name, before it is opened.
"""

from __future__ import annotations

from collections.abc import Iterator

from export.metadata import fields, integers
from foundation.artifact import Manifest
from foundation.errors import ExportError, FormRefused

STANDARD = ("", "ai.onnx")

# The parts of a model that can hold tensors or operators: type -> field -> type (onnx.proto).
_PARTS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_TENSOR_EXTERNAL_DATA, _TENSOR_LOCATION, _OUTSIDE = 13, 14, 1
_NODE_OPERATOR, _NODE_DOMAIN = 4, 7
_MODEL_OPSET, _OPSET_DOMAIN, _OPSET_VERSION = 8, 1, 2
_TENSOR_NAME = 8
_DEEPEST = 12


def check(manifest: Manifest, model: bytes, *, agent: str | None = None) -> None:
    """Raise `FormRefused` for a model that is not to be opened here, `ExportError` for one that is no model.

    With `agent`, the manifest has to be that agent's.
    """
    if agent is not None and manifest.agent != agent:
        raise FormRefused(
            f"the artifact was made for {manifest.agent!r}, and this is {agent!r}: export this device's own"
        )
    if (opset := opset_of(model)) != manifest.opset:
        raise FormRefused(f"the model is of opset {opset}, and its manifest says {manifest.opset}")
    for complaint in complaints(model):
        raise FormRefused(complaint)


def opset_of(model: bytes) -> int | None:
    """Return the version of the standard operators that a model asks for; `None` where it asks for none."""
    found: int | None = None
    for number, value in fields(memoryview(model)):
        if number == _MODEL_OPSET and _text(value, _OPSET_DOMAIN) in STANDARD:
            found = integers(value).get(_OPSET_VERSION, found)
    return found


def complaints(model: bytes) -> Iterator[str]:
    """Yield what a self-contained model of standard operators does not have."""
    for number, value in fields(memoryview(model)):
        if number == _MODEL_OPSET and (domain := _text(value, _OPSET_DOMAIN)) not in STANDARD:
            yield f"the model uses operators of {domain}"
    yield from _walk("model", memoryview(model), 0)


def _walk(kind: str, data: memoryview, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise ExportError(f"the model's graphs lie more than {_DEEPEST} parts deep")
    if kind == "tensor":
        yield from _tensor(data)
        return
    if kind == "node" and (domain := _text(data, _NODE_DOMAIN)) not in STANDARD:
        yield f"the model uses the foreign operator {domain}.{_text(data, _NODE_OPERATOR)}"
    parts = _PARTS[kind]
    for number, value in fields(data):
        if number in parts:
            yield from _walk(parts[number], value, depth + 1)


def _tensor(data: memoryview) -> Iterator[str]:
    outside = integers(data).get(_TENSOR_LOCATION) == _OUTSIDE
    if outside or any(number == _TENSOR_EXTERNAL_DATA for number, _ in fields(data)):
        yield f"the model keeps {_text(data, _TENSOR_NAME) or 'a tensor'} outside of its file"


def _text(data: memoryview, wanted: int) -> str:
    found = b""
    for number, value in fields(data):
        if number == wanted:
            found = bytes(value)
    return found.decode("utf-8", "replace")
