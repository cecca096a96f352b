"""What a model file says about itself, written into it and read back without onnx.

The manifest's facts are stored in the model's `metadata_props`, so the hash of the model covers them, and
the hash of the probe file is there as well: one hash vouches for the whole artifact. Reading needs no
protobuf library, as a served device has none: the format of field numbers and lengths is simple enough.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from foundation.artifact import Manifest
from foundation.errors import ExportError

PROBE_SHA256 = "probe_sha256"

# Known only once the model's bytes are, so they cannot be inside of them.
_AFTERWARDS = frozenset(
    {
        "sha256",
        "bytes",
        "dense_bytes",
        "parity",
        "latency_ms",
        "dense_latency_ms",
        "validation",
        "validation_examples",
        "int8",
    }
)
_METADATA_PROPS, _KEY, _VALUE = 14, 1, 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


def of_manifest(manifest: Manifest) -> dict[str, str]:
    """Return the facts of a manifest that belong inside the model: text as it is, the rest as JSON."""
    facts = manifest.model_dump(mode="json", exclude=set(_AFTERWARDS))
    return {key: value if isinstance(value, str) else _json(value) for key, value in facts.items()}


def disagreements(manifest: Manifest, stored: Mapping[str, str]) -> list[str]:
    """Return the names of facts on which a manifest and a model's metadata differ."""
    return [key for key, value in of_manifest(manifest).items() if stored.get(key) != value]


def read(model: bytes) -> dict[str, str]:
    """Return the metadata of a model file without parsing its graph.

    Raises `ExportError` when the bytes are not a protobuf message of that form.
    """
    found: dict[str, str] = {}
    for number, value in fields(memoryview(model)):
        if number == _METADATA_PROPS:
            entry = dict(fields(value))
            try:
                found[bytes(entry.get(_KEY, b"")).decode()] = bytes(entry.get(_VALUE, b"")).decode()
            except UnicodeDecodeError as error:
                raise ExportError("the model's metadata is not text") from error
    return found


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and contents of every field of a protobuf message that has a length."""
    for number, value in _all(data):
        if isinstance(value, memoryview):
            yield number, value


def integers(data: memoryview) -> dict[int, int]:
    """Return the whole numbers of a protobuf message by field; of several, the last."""
    return {number: value for number, value in _all(data) if isinstance(value, int)}


def _all(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield number and value of every field but those of fixed size, which are stepped over."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == _LENGTH:
            size, at = _varint(data, at)
        elif wire in _FIXED_SIZES:
            size = _FIXED_SIZES[wire]
        else:
            raise ExportError(f"the model is not a protobuf message: wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise ExportError(f"the model ends inside of a field: {size} bytes wanted at byte {at}")
        if wire == _LENGTH:
            yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return a variable-length integer and where it ends; ten bytes hold 64 bits and no integer is longer."""
    value = 0
    for position, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, at + position + 1
    raise ExportError(f"the model is not a protobuf message: no number at byte {at}")
