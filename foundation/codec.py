"""Frames: a message and its arrays as bytes, and back, with every bound checked before it can cost memory.

A frame is `HGR1`, one byte of compression (0 none, 1 zstd), eight bytes of raw length (little endian) and the
body. The body is a safetensors file, which the safetensors library writes and reads; what its header claims
is checked here first. Its `__metadata__` has the one key `hedgerow`: a line of JSON that says in which order
and form arrays travel, and after the first line break the message's JSON. (One key, because the library
writes several in no fixed order.)

How an array travels. Its values, in one of three encodings:

* `float32`: bit for bit.
* `float16`: rounded to nearest; an array with a value beyond 65,504 stays float32.
* `int8`: symmetric, one float32 scale per index of the first axis (`<name>|scale`): |error| <= scale / 2.

Arrays of fewer than two axes (biases, norms, thresholds) are always float32: they are small, and thresholds
decide what is cut. And its places, in one of three forms:

* dense: everything.
* kept: where a mask `blocks.i.ffl` comes along, `blocks.i.ffl.up.weight` and `.up.bias` travel as the rows of
  kept units and `.down.weight` as their columns; dropped units arrive as zeros, every unit at its own index.
  `.down.bias` and `.threshold` travel whole.
* sparse: a bitmap of what is not zero (`<name>|where`) and those values, where that is smaller, as for a
  top-k change.

Masks travel as packed bits under `<name>|mask`. The same input gives the same bytes, in every process.

safetensors and zstandard are loaded with the first frame: an idle agent is a megabyte smaller without.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field

from foundation.errors import FrameCorrupt, FrameMismatch, FrameTooLarge
from foundation.frozen import Frozen
from foundation.messages import Assignment, Update
from foundation.parameters import Array, BoolArray, Layout, Masks, Parameters
from foundation.work import Encoding

MAGIC = b"HGR1"
_HEAD = struct.Struct("<4sBQ")
_LENGTH = struct.Struct("<Q")
_PLAIN, _ZSTD = 0, 1
_ZSTD_LEVEL = 3
_WORTH = 0.97
"""zstd is kept when it makes the body at least 3 % smaller."""
_SPARSE_COST = 96
"""About what a bitmap costs in the header, in bytes."""
_KEY = "hedgerow"
_WIDTHS: Mapping[str, int] = {"F32": 4, "F16": 2, "I8": 1, "U8": 1}
_MASKED_AXES = ((".up.weight", 0), (".up.bias", 0), (".down.weight", 1))


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a frame may claim: on the wire, decompressed and decoded to float32 alike."""

    frame_bytes: int = 256 * 1024 * 1024
    header_bytes: int = 1024 * 1024
    arrays: int = 8192


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a frame says: the message's JSON, float32 arrays (read-only, in the sender's order), and masks."""

    header: str
    parameters: Parameters
    masks: dict[str, BoolArray]


@dataclass(frozen=True, slots=True)
class Expected:
    """What an update must be: sender, place in the run, and the arrays that were asked for.

    `masks` are the masks that may come, with their shapes; `None` leaves them to what the arrays' shapes say.
    """

    run: str
    round: int
    agent: str
    layout: Layout
    masks: Layout | None = None

    @classmethod
    def of(cls, assignment: Assignment, layout: Layout) -> Self:
        """Return what answers an assignment: arrays of `layout`, at most one mask per FFL of its model."""
        spec = assignment.spec
        masks = tuple((f"blocks.{i}.ffl", (spec.hidden,)) for i in range(spec.depth))
        return cls(assignment.run, assignment.round, assignment.agent, layout, masks)


Dimension = Annotated[int, Field(ge=0, le=2**31)]


class _Placed(Frozen):
    """An array that does not travel dense: its full shape, and its form."""

    name: str
    shape: tuple[Dimension, ...] = Field(max_length=8)
    form: Literal["kept", "sparse"]


class _Index(Frozen):
    """The order and form of what is in the file; a bare name is a dense array."""

    arrays: tuple[str | _Placed, ...]
    masks: tuple[tuple[str, Dimension], ...] = ()


class _AssignmentHeader(Frozen):
    assignment: Assignment


class _UpdateHeader(Frozen):
    update: Update


def frame_of(message: Assignment | Update, encoding: Encoding = "float32") -> bytes:
    """Return the frame of a message; equal messages give equal bytes, whatever the process's hash seed.

    Raises `FrameCorrupt` when an array holds values that are not finite, as `encode` does.
    """
    kind = "assignment" if isinstance(message, Assignment) else "update"
    # Sets have no order of their own: sorted, and keys too, so that digests survive a restart.
    header = json.dumps(
        {kind: message.model_dump()}, default=sorted, sort_keys=True, allow_nan=False, separators=(",", ":")
    )
    return encode(header, message.parameters, message.masks, encoding=encoding)


def assignment_from(frame: bytes, limits: Limits = Limits()) -> Assignment:
    """Return the assignment in a frame; raises as `decode`, and `FrameMismatch` for another message."""
    decoded = decode(frame, limits)
    try:
        message = _AssignmentHeader.model_validate_json(decoded.header).assignment
    except ValueError as error:
        raise FrameMismatch(f"the frame does not hold an assignment: {_brief(error)}") from error
    return message.model_copy(update={"parameters": decoded.parameters, "masks": decoded.masks})


def update_from(frame: bytes, limits: Limits = Limits()) -> Update:
    """Return the update in a frame; raises as `decode`, and `FrameMismatch` for another message."""
    decoded = decode(frame, limits)
    try:
        message = _UpdateHeader.model_validate_json(decoded.header).update
    except ValueError as error:
        raise FrameMismatch(f"the frame does not hold an update: {_brief(error)}") from error
    return message.model_copy(update={"parameters": decoded.parameters, "masks": decoded.masks})


def check_update(update: Update, expected: Expected) -> None:
    """Raise `FrameMismatch`, saying which, unless an update is the one that was asked for."""
    for what in ("run", "round", "agent"):
        came, asked = getattr(update, what), getattr(expected, what)
        if came != asked:
            raise FrameMismatch(f"{what} is {came!r}, not {asked!r}")
    asked_shapes = dict(expected.layout)
    for name, array in update.parameters.items():
        if name not in asked_shapes:
            raise FrameMismatch(f"array {name!r} was not asked for")
        if array.shape != asked_shapes[name]:
            raise FrameMismatch(f"array {name!r} has shape {array.shape}, not {asked_shapes[name]}")
    if missing := [name for name in asked_shapes if name not in update.parameters]:
        raise FrameMismatch(f"{len(missing)} arrays are missing, the first is {missing[0]!r}")
    _check_masks(update.masks, expected)


def _check_masks(masks: Masks, expected: Expected) -> None:
    arrays = dict(expected.layout)
    allowed = None if expected.masks is None else dict(expected.masks)
    for name, mask in masks.items():
        if allowed is not None and name not in allowed:
            raise FrameMismatch(f"mask {name!r} was not asked for")
        shape = arrays.get(f"{name}.up.bias") if allowed is None else allowed[name]
        if shape is not None and mask.shape != shape:
            raise FrameMismatch(f"mask {name!r} has shape {mask.shape}, not {shape}")


def array_bytes(frame: bytes) -> dict[str, int]:
    """Return the bytes that every array of a well-formed frame takes, as it travels, before compression.

    An array's scales and bitmap count with it; packed masks stand under their own names, `blocks.i.ffl|mask`.
    Only the header is read, so it costs little however large the frame is. Raises `FrameCorrupt` when there
    is none.
    """
    import zstandard

    if len(frame) < _HEAD.size:
        raise FrameCorrupt(f"{len(frame)} bytes are too few for a frame")
    _, compression, _ = _HEAD.unpack_from(frame)
    body = io.BytesIO(frame[_HEAD.size :])
    source = zstandard.ZstdDecompressor().stream_reader(body) if compression == _ZSTD else body
    try:
        (length,) = _LENGTH.unpack(source.read(_LENGTH.size))
        entries = json.loads(source.read(min(length, Limits().header_bytes)))
        spans = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
        sizes = {name: int(stop) - int(start) for name, (start, stop) in spans.items()}
    except (struct.error, zstandard.ZstdError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FrameCorrupt(f"the frame has no header that can be read: {_brief(error)}") from error
    result: dict[str, int] = {}
    for name, size in sizes.items():
        owner = name if name.endswith("|mask") else name.partition("|")[0]
        result[owner] = result.get(owner, 0) + size
    return result


# ---- encoding ----


def encode(header: str, arrays: Parameters, masks: Masks, *, encoding: Encoding = "float32") -> bytes:
    """Return a frame of a message's JSON, arrays and masks.

    Raises `FrameCorrupt` when an array holds values that are not finite in float32 (a diverged model is not
    sent), `FrameMismatch` when a mask does not fit its arrays, `ValueError` for a name with `|`.
    """
    from safetensors.numpy import save

    stored: dict[str, Array] = {}
    placed: list[str | dict[str, Any]] = []
    for name, array in arrays.items():
        values = _float32(name, array)
        places = _mask_for(name, values.shape, masks)
        kept = values if places is None else values.compress(places[0], axis=places[1])
        packed, scale = _quantised(kept, encoding)
        if scale is not None:
            stored[f"{name}|scale"] = scale
        where = None if places is not None else _sparse(packed)
        if where is not None:
            stored[f"{name}|where"] = np.packbits(where)
            packed = packed.ravel()[where]
        stored[name] = packed
        form = "sparse" if where is not None else "kept"
        whole = where is None and places is None
        placed.append(name if whole else {"name": name, "shape": list(values.shape), "form": form})
    for key, mask in masks.items():
        stored[f"{_checked_name(key)}|mask"] = np.packbits(mask)
    index = {"arrays": placed, "masks": [[key, int(mask.size)] for key, mask in masks.items()]}
    return _wrapped(save(stored, {_KEY: json.dumps(index, separators=(",", ":")) + "\n" + header}))


def _wrapped(body: bytes) -> bytes:
    import zstandard

    squeezed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(body)
    if len(squeezed) <= _WORTH * len(body):
        return _HEAD.pack(MAGIC, _ZSTD, len(body)) + squeezed
    return _HEAD.pack(MAGIC, _PLAIN, len(body)) + body


def _checked_name(name: str) -> str:
    if "|" in name or name in ("", "__metadata__"):
        raise ValueError(f"{name!r} cannot name an array in a frame")
    return name


def _float32(name: str, array: Array) -> Array:
    _checked_name(name)
    with np.errstate(over="ignore"):  # what overflows is found in the next line
        values = np.asarray(array, np.float32, order="C")
    if not np.isfinite(values).all():
        raise FrameCorrupt(f"array {name!r} holds values that are not finite")
    return values


def _mask_for(name: str, shape: tuple[int, ...], masks: Masks) -> tuple[BoolArray, int] | None:
    """Return the mask of an array and the axis it lies on; `None` when the array is whole."""
    for suffix, axis in _MASKED_AXES:
        key = name.removesuffix(suffix)
        if key == name or key not in masks:
            continue
        mask = masks[key]
        if mask.ndim != 1 or mask.dtype != np.bool_ or len(shape) <= axis or shape[axis] != mask.size:
            raise FrameMismatch(
                f"mask {key!r} of {mask.size} units does not fit array {name!r} of shape {shape}"
            )
        return mask, axis
    return None


def _quantised(values: Array, encoding: Encoding) -> tuple[Array, Array | None]:
    """Return values as they travel, and the scale of each row for int8."""
    if values.ndim < 2 or values.size == 0 or encoding == "float32":
        return values, None
    if encoding == "float16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        return (half if np.isfinite(half).all() else values), None
    rows = values.reshape(len(values), -1)
    scale = (np.abs(rows).max(axis=1) / np.float32(127)).astype(np.float32)
    with np.errstate(over="ignore"):
        if not np.isfinite(scale * np.float32(127)).all():
            return values, None  # rounding would carry the largest float32 beyond itself
    # A row of zeros, or of values so small that their scale is zero, arrives as zeros.
    steps = rows / np.where(scale > 0, scale, np.float32(1))[:, None]
    return np.clip(np.rint(steps), -127, 127).astype(np.int8).reshape(values.shape), scale


def _sparse(packed: Array) -> BoolArray | None:
    """Return where values are not zero, if a bitmap and those values are smaller than all of them."""
    # By bits: -0.0 is a value too, so that float32 arrives bit for bit.
    where: BoolArray = packed.ravel().view(f"u{packed.itemsize}") != 0
    bytes_sparse = int(where.sum()) * packed.itemsize + _bitmap_bytes(where.size) + _SPARSE_COST
    return where if bytes_sparse < packed.nbytes else None


def _bitmap_bytes(bits: int) -> int:
    return (bits + 7) // 8


# ---- decoding ----


def decode(frame: bytes, limits: Limits = Limits()) -> Decoded:
    """Return what a frame says.

    Raises `FrameTooLarge` when it is, or claims to be, over a limit, and `FrameCorrupt` when it is not a
    whole and well-formed frame or holds values that are not finite; nothing else, whatever the bytes.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    body = _unwrapped(frame, limits)
    metadata = _checked_header(body, limits)
    try:
        stored = load(body)
    except (SafetensorError, ValueError) as error:
        raise FrameCorrupt(f"the frame's body is not a safetensors file: {_brief(error)}") from error
    except MemoryError as error:
        raise FrameTooLarge(f"a frame of {len(body):,} bytes does not fit into memory") from error
    line, _, header = metadata.partition("\n")
    try:
        index = _Index.model_validate_json(line)
    except ValueError as error:
        raise FrameCorrupt(f"the frame's index is not readable: {_brief(error)}") from error
    return _unpacked(index, stored, header, limits)


def _unpacked(index: _Index, stored: dict[str, Array], header: str, limits: Limits) -> Decoded:
    rest = dict(stored)
    entries = [_Placed(name=e, shape=(), form="kept") if isinstance(e, str) else e for e in index.arrays]
    dense = {e for e in index.arrays if isinstance(e, str)}
    _check_size(index, stored, limits)
    masks: dict[str, BoolArray] = {}
    for key, units in index.masks:
        masks[key] = _bits(_taken(rest, f"{key}|mask"), units, key)
        masks[key].flags.writeable = False
    parameters: dict[str, Array] = {}
    for entry in entries:
        values = _taken(rest, entry.name)
        if entry.name in dense:
            values = _scaled(entry.name, values, rest)
        elif entry.form == "sparse":
            values = _scaled(entry.name, _scattered(entry, values, rest), rest)
        else:
            values = _unmasked(entry, _scaled(entry.name, values, rest), masks)
        if not np.isfinite(values).all():
            raise FrameCorrupt(f"array {_shown(entry.name)} holds values that are not finite")
        values.flags.writeable = False
        parameters[entry.name] = values
    if rest:
        raise FrameCorrupt(
            f"{len(rest)} arrays are not in the index, the first is {_shown(next(iter(rest)))}"
        )
    return Decoded(header, Parameters(parameters), masks)


def _check_size(index: _Index, stored: dict[str, Array], limits: Limits) -> None:
    """Refuse, before anything is allocated, a small file that would unfold into large arrays."""
    unfolded = sum(units for _, units in index.masks)  # a byte a unit
    for entry in index.arrays:
        name, shape = (entry, None) if isinstance(entry, str) else (entry.name, entry.shape)
        if shape is None and name in stored:
            shape = stored[name].shape
        unfolded += 4 * math.prod(max(1, n) for n in shape or ())
    if unfolded > limits.frame_bytes:
        raise FrameTooLarge(f"a frame of {unfolded:,} bytes as float32 is over {limits.frame_bytes:,}")


def _taken(rest: dict[str, Array], name: str) -> Array:
    try:
        return rest.pop(name)
    except KeyError:
        raise FrameCorrupt(f"array {_shown(name)} is missing, or named twice") from None


def _bits(packed: Array, count: int, name: str) -> BoolArray:
    """Return `count` packed bits as bools."""
    if packed.dtype != np.uint8 or packed.shape != (_bitmap_bytes(count),):
        raise FrameCorrupt(f"the bits of {_shown(name)} are not {count} packed bits")
    bits = np.unpackbits(packed, count=count)
    if not np.array_equal(np.packbits(bits), packed):
        raise FrameCorrupt(f"the bits of {_shown(name)} go on after the last of {count}")
    return bits.view(np.bool_)


def _scattered(entry: _Placed, values: Array, rest: dict[str, Array]) -> Array:
    """Return sparse values in their places, zeros between them, still as they travelled."""
    where = _bits(_taken(rest, f"{entry.name}|where"), math.prod(entry.shape), entry.name)
    if values.shape != (int(where.sum()),):
        raise FrameCorrupt(
            f"array {_shown(entry.name)} has {values.size} values for {int(where.sum())} places"
        )
    full = np.zeros(where.size, values.dtype)
    full[where] = values
    return full.reshape(entry.shape)


def _scaled(name: str, values: Array, rest: dict[str, Array]) -> Array:
    """Return values as float32."""
    if values.dtype in (np.float32, np.float16):
        return values.astype(np.float32, copy=False)
    if values.dtype != np.int8 or values.ndim < 2:
        raise FrameCorrupt(f"array {_shown(name)} cannot be {values.dtype} with {values.ndim} axes")
    scale = _taken(rest, f"{name}|scale")
    if scale.dtype != np.float32 or scale.shape != values.shape[:1]:
        raise FrameCorrupt(f"array {_shown(name)} does not have one scale a row")
    with np.errstate(all="ignore"):  # what is not finite is refused by name afterwards
        return values.astype(np.float32) * scale.reshape(-1, *[1] * (values.ndim - 1))


def _unmasked(entry: _Placed, values: Array, masks: Masks) -> Array:
    """Return the rows or columns of kept units at their own indices, zeros at dropped ones."""
    try:
        places = _mask_for(entry.name, entry.shape, masks)
    except FrameMismatch as error:
        raise FrameCorrupt(str(error)) from error
    if places is None:
        raise FrameCorrupt(f"array {_shown(entry.name)} comes without its mask")
    mask, axis = places
    shape = list(entry.shape)
    shape[axis] = int(mask.sum())
    if values.shape != tuple(shape):
        raise FrameCorrupt(
            f"array {_shown(entry.name)} has shape {values.shape}, its mask keeps {tuple(shape)}"
        )
    full = np.zeros(entry.shape, np.float32)
    full[(slice(None),) * axis + (mask,)] = values
    return full


def _unwrapped(frame: bytes, limits: Limits) -> bytes:
    """Return the body, decompressed within bounds."""
    if len(frame) > limits.frame_bytes:
        raise FrameTooLarge(f"a frame of {len(frame):,} bytes is over {limits.frame_bytes:,}")
    if len(frame) < _HEAD.size:
        raise FrameCorrupt(f"{len(frame)} bytes are too few for a frame")
    magic, compression, raw = _HEAD.unpack_from(frame)
    if magic != MAGIC:
        raise FrameCorrupt(f"a frame starts with {MAGIC!r}, not {magic!r}")
    if raw > limits.frame_bytes:
        raise FrameTooLarge(f"a frame of {raw:,} bytes decompressed is over {limits.frame_bytes:,}")
    body = bytes(frame[_HEAD.size :])
    if compression == _ZSTD:
        body = _decompressed(body, raw)
    elif compression != _PLAIN:
        raise FrameCorrupt(f"compression {compression} is not known")
    if len(body) != raw:
        raise FrameCorrupt(f"the body has {len(body):,} bytes, its frame says {raw:,}")
    return body


def _decompressed(body: bytes, raw: int) -> bytes:
    import zstandard

    try:
        # zstd allocates what its own header claims, so that claim must be the one that was checked.
        claimed = zstandard.frame_content_size(body)
        if claimed != raw:
            raise FrameCorrupt(f"the compressed body claims {claimed} bytes, its frame {raw}")
        plain: bytes = zstandard.ZstdDecompressor().decompress(
            body, max_output_size=raw, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise FrameCorrupt(f"the body cannot be decompressed: {_brief(error)}") from error
    except MemoryError as error:
        raise FrameTooLarge(f"a frame of {raw:,} bytes does not fit into memory") from error
    return plain


def _checked_header(body: bytes, limits: Limits) -> str:
    """Return our metadata once everything that a safetensors header claims about the body is true."""
    if len(body) < _LENGTH.size:
        raise FrameCorrupt("the body is too short for a safetensors file")
    (length,) = _LENGTH.unpack_from(body)
    if length > limits.header_bytes:
        raise FrameTooLarge(f"a header of {length:,} bytes is over {limits.header_bytes:,}")
    if length > len(body) - _LENGTH.size:
        raise FrameCorrupt(f"the header claims {length:,} bytes of a body of {len(body):,}")
    try:
        text = body[_LENGTH.size : _LENGTH.size + length].decode("utf-8")
        entries = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise FrameCorrupt(f"the header is not JSON: {_brief(error)}") from error
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not (isinstance(metadata, dict) and set(metadata) == {_KEY} and isinstance(metadata[_KEY], str)):
        raise FrameCorrupt(f"the header is not that of a frame: it has no {_KEY!r} in its metadata")
    if len(entries) > limits.arrays:
        raise FrameTooLarge(f"{len(entries):,} arrays are over {limits.arrays:,}")
    _check_spans(entries, len(body) - _LENGTH.size - length)
    return str(metadata[_KEY])


def _check_spans(entries: dict[str, Any], data_bytes: int) -> None:
    """Check that arrays follow each other without gaps, fill the data, and are as long as they say."""
    spans = sorted(_span(name, entry) for name, entry in entries.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise FrameCorrupt(f"array {_shown(name)} starts at byte {start}, not {end}")
        end = stop
    if end != data_bytes:
        raise FrameCorrupt(f"the arrays fill {end:,} of {data_bytes:,} bytes")


def _span(name: str, entry: object) -> tuple[int, int, str]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FrameCorrupt(f"array {_shown(name)} is not described as in safetensors")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _WIDTHS:
        raise FrameCorrupt(f"array {_shown(name)} has a type that is none of {', '.join(_WIDTHS)}")
    if not (_naturals(shape) and len(shape) <= 8 and _naturals(offsets) and len(offsets) == 2):
        raise FrameCorrupt(f"array {_shown(name)} has no shape or no offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * _WIDTHS[dtype]:
        raise FrameCorrupt(f"array {_shown(name)} is not as long as its shape says")
    return offsets[0], offsets[1], name


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= 2**40 for n in value)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _shown(name: str) -> str:
    """Return a stranger's name as it can stand in a log line."""
    return ascii(name[:80])


def _brief(error: Exception) -> str:
    return ascii(" ".join(str(error).split())[:200])[1:-1]
