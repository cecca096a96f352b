"""Frames: bit for bit there and back, small, the same in every process, and never surprised by bytes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from foundation.artifact import Manifest
from foundation.codec import (
    Decoded,
    Expected,
    Limits,
    assignment_from,
    check_update,
    decode,
    encode,
    frame_of,
    update_from,
)
from foundation.energy import EnergyReading, Kind, Scope, Stage
from foundation.errors import FrameCorrupt, FrameMismatch, FrameTooLarge
from foundation.messages import Assignment, Update
from foundation.normalisation import Normalisation
from foundation.parameters import Array, Parameters, Role
from foundation.spec import ModelSpec, initial_parameters
from foundation.work import LocalWork, Phase, Proximal, ThresholdPruning

HEAD = struct.Struct("<4sBQ")
SPEC = ModelSpec(input="series", shape=(8, 1), classes=3, width=8, depth=2, heads=2, patch=2)
TWO_BY_TWO = Parameters({"head.weight": np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)})


def random_parameters(spec: ModelSpec = SPEC, seed: int = 0) -> Parameters:
    rng = np.random.default_rng(seed)
    return Parameters((name, rng.standard_normal(shape).astype(np.float32)) for name, shape in spec.layout)


def round_trip(parameters: Parameters, **options: Any) -> Decoded:
    return decode(encode("{}", parameters, options.pop("masks", {}), **options))


def same_bits(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def plain(body: bytes) -> bytes:
    return HEAD.pack(b"HGR1", 0, len(body)) + body


def unwrapped(frame: bytes) -> bytes:
    return frame[13:] if frame[4] == 0 else zstandard.ZstdDecompressor().decompress(frame[13:])


def handmade(
    header: Any, data: bytes = b"", *, length: int | None = None, index: str | None = '{"arrays":[]}'
) -> bytes:
    """A frame whose safetensors header says whatever we like."""
    if isinstance(header, dict) and index is not None:
        header = {"__metadata__": {"hedgerow": index + "\n{}"}, **header}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return plain(struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensor(dtype: str, shape: Any, start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# ---- there and back ----


def test_the_frame_of_a_two_by_two_model_is_pinned() -> None:
    frame = encode('{"round":1}', TWO_BY_TWO, {})
    assert unwrapped(frame) == (
        b"\xa0\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"hedgerow":"{\\"arrays\\":[\\"head.weight\\"],\\"masks\\":[]}\\n{\\"round\\":1}"},'
        b'"head.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}    '
        b"\x00\x00\xc0\x3f\x00\x00\x00\xc0\x00\x00\x80\x3e\x00\x00\x40\x40"
    )
    assert (len(unwrapped(frame)), len(frame)) == (184, 171)
    decoded = decode(frame)
    assert decoded.header == '{"round":1}'
    assert same_bits(decoded.parameters["head.weight"], TWO_BY_TWO["head.weight"])
    assert encode(decoded.header, decoded.parameters, decoded.masks) == frame


FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(
    st.dictionaries(st.text("abcxyz./", min_size=1, max_size=12), FLOATS, max_size=5), st.text(max_size=40)
)
def test_float32_is_bit_for_bit_in_the_senders_order(arrays: dict[str, Array], header: str) -> None:
    decoded = decode(encode(header, Parameters(arrays), {}))
    assert decoded.header == header
    assert list(decoded.parameters) == list(arrays)
    assert all(same_bits(decoded.parameters[name], array) for name, array in arrays.items())


def test_decoded_arrays_are_read_only() -> None:
    decoded = round_trip(random_parameters(), masks={"blocks.0.ffl": np.arange(32) % 2 == 0})
    for array in (*decoded.parameters.values(), *decoded.masks.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize(
    "array", [np.array([[1.5, 2]], np.float64), np.array([[1, 2]]), np.ones((4, 6), np.float32).T[1:, ::2]]
)
def test_other_types_and_views_arrive_as_float32(array: Array) -> None:
    came = round_trip(Parameters({"x": array})).parameters["x"]
    assert came.dtype == np.float32
    assert np.array_equal(came, array)


@given(FLOATS)
def test_float16_is_the_nearest_half_or_float32(array: Array) -> None:
    came = round_trip(Parameters({"x": array}), encoding="float16").parameters["x"]
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    kept = array.ndim < 2 or not np.isfinite(half).all()
    assert np.array_equal(came, array if kept else half.astype(np.float32))


def test_float16_beyond_its_range_falls_back() -> None:
    arrays = Parameters(
        {"big": np.array([[1e5, 1 / 3]], np.float32), "small": np.array([[1 / 3, 1]], np.float32)}
    )
    came = round_trip(arrays, encoding="float16").parameters
    assert np.array_equal(came["big"], arrays["big"])
    assert came["small"][0, 0] == np.float16(1 / 3)


@given(FLOATS)
def test_int8_is_within_half_a_step_of_its_row(array: Array) -> None:
    came = round_trip(Parameters({"x": array}), encoding="int8").parameters["x"]
    if array.ndim < 2 or array.size == 0:
        assert same_bits(came, array)
        return
    rows, got = array.reshape(len(array), -1).astype(np.float64), came.reshape(len(array), -1)
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    assert (np.abs(got - rows) <= step * 0.50001 + 1e-42).all()


def test_int8_keeps_zeros_extremes_and_one_dimensional_arrays() -> None:
    biggest = np.finfo(np.float32).max
    arrays = Parameters(
        {
            "w": np.array([[0, 0], [-2.54, 2.54], [1e-45, 0]], np.float32),
            "huge": np.array([[biggest, -biggest]], np.float32),
            "blocks.0.ffl.threshold": np.array([0.123456789, 1], np.float32),
        }
    )
    came = round_trip(arrays, encoding="int8").parameters
    assert came["w"].tolist()[0] == [0, 0]
    assert np.allclose(came["w"], arrays["w"], atol=1e-6)
    assert np.allclose(came["huge"], arrays["huge"], rtol=1e-2)
    assert same_bits(came["blocks.0.ffl.threshold"], arrays["blocks.0.ffl.threshold"])


def test_sizes_are_what_the_encodings_promise() -> None:
    spec = ModelSpec(input="series", shape=(32, 4), classes=10, width=64, depth=2, heads=4, patch=4)
    parameters = random_parameters(spec)
    sizes = {e: len(encode("{}", parameters, {}, encoding=e)) for e in ("float32", "float16", "int8")}
    assert sizes["float32"] < 1.02 * parameters.nbytes
    assert sizes["float16"] < 0.53 * parameters.nbytes
    assert sizes["int8"] < 0.30 * parameters.nbytes


# ---- masks and zeros ----


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_dropped_units_do_not_travel_and_arrive_as_zeros(encoding: Any) -> None:
    parameters, keep = random_parameters(), np.arange(SPEC.hidden) % 8 == 3
    masks = {"blocks.0.ffl": keep, "blocks.1.ffl": np.zeros(SPEC.hidden, np.bool_)}
    frame = encode("{}", parameters, masks, encoding=encoding)
    decoded = decode(frame)
    assert len(frame) < len(encode("{}", parameters, {}, encoding=encoding)) - 1000
    assert {name: m.tolist() for name, m in decoded.masks.items()} == {
        n: m.tolist() for n, m in masks.items()
    }
    assert decoded.parameters.layout == SPEC.layout
    came, tolerance = decoded.parameters, {"float32": 0.0, "float16": 2e-3, "int8": 2e-2}[encoding]
    for name, array in parameters.items():
        mask = masks.get(name.rsplit(".ffl.")[0] + ".ffl", keep)
        wanted = array.copy()
        if name.endswith(("ffl.up.weight", "ffl.up.bias")):
            wanted[~mask] = 0
        elif name.endswith("ffl.down.weight"):
            wanted[:, ~mask] = 0
        assert np.allclose(came[name], wanted, atol=tolerance), name
        assert same_bits(came[name] != 0, wanted != 0) or encoding == "int8", name


@given(hnp.arrays(np.bool_, st.integers(0, 70)))
def test_masks_alone_travel_too(mask: Array) -> None:
    decoded = round_trip(Parameters(), masks={"blocks.0.ffl": mask})
    assert same_bits(decoded.masks["blocks.0.ffl"], mask)
    assert len(decoded.parameters) == 0


def test_a_mask_that_does_not_fit_is_not_sent() -> None:
    with pytest.raises(FrameMismatch, match=r"'blocks.0.ffl' of 31 units does not fit"):
        encode("{}", random_parameters(), {"blocks.0.ffl": np.ones(31, np.bool_)})


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_a_change_of_few_values_travels_as_bitmap_and_values(encoding: Any) -> None:
    rng = np.random.default_rng(1)
    change = rng.standard_normal((192, 64)).astype(np.float32)
    change[np.abs(change) < np.quantile(np.abs(change), 0.9)] = 0
    sparse = round_trip(Parameters({"x": change}), encoding=encoding).parameters["x"]
    frame = encode("{}", Parameters({"x": change}), {}, encoding=encoding)
    width = {"float32": 4, "float16": 2, "int8": 1}[encoding]
    assert len(frame) < change.size * (0.1 * width + 1 / 8) + 192 * 4 + 400
    assert np.allclose(sparse, change, atol={"float32": 0, "float16": 2e-3, "int8": 2e-2}[encoding])
    assert np.count_nonzero(sparse[change == 0]) == 0


def test_a_negative_zero_is_a_value() -> None:
    array = np.zeros((40, 40), np.float32)
    array[3, 4], array[5, 6] = -0.0, 1
    assert same_bits(round_trip(Parameters({"x": array})).parameters["x"], array)


# ---- what is not sent ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_what_is_not_finite_is_not_sent(value: float) -> None:
    with pytest.raises(FrameCorrupt, match=r"'head\.bias' holds values that are not finite"):
        encode("{}", Parameters({"head.bias": np.array([1, value])}), {})


@pytest.mark.parametrize("name", ["", "a|b", "__metadata__"])
def test_names_that_mean_something_in_a_frame_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an array"):
        encode("{}", Parameters({name: np.zeros(1)}), {})


# ---- messages ----


def an_assignment() -> Assignment:
    return Assignment(
        run="r1",
        round=3,
        agent="a",
        strategy="pfl_tpp",
        spec=SPEC,
        model_seed=1,
        seed=2,
        work=LocalWork(
            phases=(Phase(train=frozenset({Role.HEAD, Role.FFL, Role.REST})), Phase()),
            terms=(ThresholdPruning(), Proximal()),
            send=frozenset(Role) - {Role.THRESHOLD},
        ),
        deadline_s=60,
        parameters=initial_parameters(SPEC, 1).only({Role.ATTENTION}),
    )


def an_update(**changes: Any) -> Update:
    manifest = Manifest(
        agent="a",
        run="r1",
        round=3,
        strategy="pfl_tpp",
        sha256="0" * 64,
        bytes=1,
        dense_bytes=2,
        parameters=3,
        dense_parameters=4,
        input="series",
        shape=(8, 1),
        labels=("x", "y", "ü"),
        normalisation=Normalisation(mean=(0.1,), std=(1.5,)),
        kept_units=(4, 4),
        hidden_units=32,
        opset=17,
        tolerance=1e-4,
        parity=1e-6,
    )
    reading = EnergyReading(joules=1.5, seconds=2.0, kind=Kind.MEASURED, scope=Scope.WALL_AC, sensor="plug")
    facts: dict[str, Any] = {
        "run": "r1",
        "round": 3,
        "agent": "a",
        "examples": 10,
        "metrics": {"loss": 0.1, "accuracy": 0.9},
        "kept_units": (4, 4),
        "ledger": {Stage.TRAIN: reading, Stage.SEND: EnergyReading(seconds=1.0)},
        "artifact": manifest,
        "parameters": random_parameters().only({Role.ATTENTION, Role.THRESHOLD}),
        "masks": {f"blocks.{i}.ffl": np.arange(32) % 8 == 0 for i in range(2)},
    }
    return Update(**{**facts, **changes})


def test_messages_come_back_as_they_were() -> None:
    assignment, update = an_assignment(), an_update()
    came, back = assignment_from(frame_of(assignment)), update_from(frame_of(update))
    assert came == assignment
    assert back.model_dump() == update.model_dump()
    assert back.parameters == update.parameters
    assert {n: m.tolist() for n, m in back.masks.items()} == {n: m.tolist() for n, m in update.masks.items()}


def test_one_message_is_not_another() -> None:
    with pytest.raises(FrameMismatch, match="does not hold an update"):
        update_from(frame_of(an_assignment()))
    with pytest.raises(FrameMismatch, match="does not hold an assignment"):
        assignment_from(frame_of(an_update()))
    for header in ("", "{}", "null", "[" * 5000, '{"update":{}}', '{"update":null,"x":1}', "\x00\x7f"):
        with pytest.raises(FrameMismatch):
            update_from(encode(header, Parameters(), {}))


def test_a_header_cannot_bring_its_own_arrays() -> None:
    header = json.loads(decode(frame_of(an_update())).header)
    header["update"]["parameters"] = {"head.weight": [[1]]}
    with pytest.raises(FrameMismatch):
        update_from(encode(json.dumps(header), Parameters(), {}))


def test_equal_messages_are_equal_bytes_in_every_process() -> None:
    script = (
        "import hashlib, test_codec as t\n"
        "frames = [t.frame_of(t.an_assignment()), t.frame_of(t.an_update(), 'int8')]\n"
        "print([hashlib.sha256(f).hexdigest() for f in frames])\n"
    )
    path = os.pathsep.join(p or "." for p in (os.path.dirname(__file__), *sys.path))  # noqa: PTH120
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


# ---- what was asked for ----


def test_an_update_that_fits_passes() -> None:
    update = an_update()
    check_update(update, Expected("r1", 3, "a", update.parameters.layout[::-1]))
    check_update(update, Expected.of(an_assignment(), update.parameters.layout))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": "r2"}, "run is 'r2', not 'r1'"),
        ({"round": 4}, "round is 4, not 3"),
        ({"agent": "b"}, "agent is 'b', not 'a'"),
        ({"parameters": Parameters({"x": np.zeros(2)})}, "array 'x' was not asked for"),
        ({"parameters": Parameters()}, "2 arrays are missing, the first is 'head.weight'"),
        ({"parameters": Parameters({"head.weight": np.zeros((3, 9))})}, r"shape \(3, 9\), not \(3, 8\)"),
        ({"masks": {"blocks.2.ffl": np.ones(32, np.bool_)}}, "mask 'blocks.2.ffl' was not asked for"),
        ({"masks": {"blocks.1.ffl": np.ones(16, np.bool_)}}, r"has shape \(16,\), not \(32,\)"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    parameters = random_parameters().only({Role.HEAD})
    update = an_update(**{"parameters": parameters, **changes})
    with pytest.raises(FrameMismatch, match=reason):
        check_update(update, Expected.of(an_assignment(), parameters.layout))


def test_without_masks_named_their_length_must_fit_the_arrays() -> None:
    parameters = random_parameters().only({Role.FFL})
    update = an_update(parameters=parameters, masks={"blocks.1.ffl": np.ones(16, np.bool_)})
    with pytest.raises(FrameMismatch, match=r"has shape \(16,\), not \(32,\)"):
        check_update(update, Expected("r1", 3, "a", parameters.layout))


# ---- bytes from strangers ----


def survives(frame: bytes) -> Decoded | None:
    """Decode, with nothing but the two errors that are promised."""
    try:
        decoded = decode(frame)
    except (FrameCorrupt, FrameTooLarge):
        return None
    assert all(np.isfinite(a).all() and a.dtype == np.float32 for a in decoded.parameters.values())
    return decoded


def small_frame(compressed: bool) -> bytes:  # noqa: FBT001, RUF100
    rng = np.random.default_rng(0)
    sparse = np.zeros((20, 20), np.float32)
    sparse[4, 4] = 1
    arrays: dict[str, Array] = {
        "blocks.0.ffl.up.weight": rng.standard_normal((8, 2)),
        "blocks.0.ffl.down.weight": rng.standard_normal((2, 8)),
        "sparse": sparse,
        "b": rng.standard_normal(3),
    }
    frame = encode("{}", Parameters(arrays), {"blocks.0.ffl": np.arange(8) < 3}, encoding="int8")
    return frame if compressed == (frame[4] == 1) else plain(unwrapped(frame))


@pytest.mark.parametrize("compressed", [False, True])
def test_truncation_at_every_length_is_seen(compressed: bool) -> None:  # noqa: FBT001, RUF100
    frame = small_frame(compressed)
    assert survives(frame) is not None
    for length in range(len(frame)):
        assert survives(frame[:length]) is None, length
    assert survives(frame + b"\x00") is None


@pytest.mark.parametrize("compressed", [False, True])
def test_every_flipped_bit_is_survived(compressed: bool) -> None:  # noqa: FBT001, RUF100
    frame = small_frame(compressed)
    for bit in range(8 * len(frame)):
        broken = bytearray(frame)
        broken[bit // 8] ^= 1 << bit % 8
        survives(bytes(broken))


@given(st.binary(max_size=300))
@example(b"")
@example(b"HGR1")
@example(plain(b""))
@example(plain(b"\xff" * 8))
def test_random_bytes_are_survived(body: bytes) -> None:
    for frame in (body, b"HGR1" + body, plain(body), plain(struct.pack("<Q", len(body)) + body)):
        assert survives(frame) is None
    squeezed = zstandard.ZstdCompressor().compress(body)
    assert survives(HEAD.pack(b"HGR1", 1, len(body)) + squeezed) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "U8", "F64", "BOOL", 3, None]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, 2**31, 2**63, -1, True, 1.0, None]), max_size=10)
        | JSON,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 2**63, -1]), max_size=3) | JSON,
    }
)


@given(JSON | st.dictionaries(st.sampled_from("abc"), JSON | ENTRY, max_size=3), st.binary(max_size=16))
@settings(max_examples=200)
def test_lies_in_the_header_are_survived(header: Any, data: bytes) -> None:
    survives(handmade(header, data))


PLACED = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["w", "w|where", "blocks.0.ffl.up.weight", "m|mask", "none", "\ud800"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 2**20, 2**31, 2**40]), max_size=9),
        "form": st.sampled_from(["kept", "sparse", "dense"]),
    }
)
INDEX = st.fixed_dictionaries(
    {
        "arrays": st.lists(PLACED | st.sampled_from(["w", "w|where", "m|mask", "none"]), max_size=3),
        "masks": st.lists(
            st.tuples(
                st.sampled_from(["m", "blocks.0.ffl", "none"]), st.sampled_from([0, 1, 8, 9, 2**31, -1])
            ),
            max_size=3,
        ),
    }
)


@given(INDEX | JSON, st.sampled_from([np.int8, np.float32, np.float16, np.uint8]))
@settings(max_examples=300)
def test_lies_in_the_index_are_survived(index: Any, dtype: Any) -> None:
    stored = {
        "w": np.ones((2, 2), dtype),
        "w|scale": np.array([1, np.inf], np.float32),
        "w|where": np.array([0b11000000], np.uint8),
        "blocks.0.ffl.up.weight": np.ones((1, 3), dtype),
        "blocks.0.ffl|mask": np.array([0b10000000], np.uint8),
        "m|mask": np.array([255], np.uint8),
    }
    for names in (stored, ["w"], ["w", "w|scale"], ["w", "w|where"], [*stored][3:5]):
        body = save({name: stored[name] for name in names}, {"hedgerow": json.dumps(index) + "\n{}"})
        survives(plain(body))


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"HGR2" + bytes(20), "starts with b'HGR1'"),
        (HEAD.pack(b"HGR1", 7, 0), "compression 7 is not known"),
        (plain(b"12345678")[:-1], "has 7 bytes, its frame says 8"),
        (handmade(b"{" * 100_000), "not JSON"),
        (handmade(b"\xff\xfe{}"), "not JSON"),
        (handmade(b'{"a":1,"a":2}'), "a name stands twice"),
        (handmade(b"9" * 5000), "not JSON"),
        (handmade([]), "not that of a frame"),
        (handmade({}, length=2**19), "claims 524,288 bytes"),
        (handmade({"x": 1}), "'x' is not described"),
        (handmade({"x": tensor("F64", [1], 0, 8)}, bytes(8)), "'x' has a type that is none of F32"),
        (handmade({"x": tensor("F32", [1], 0, 8)}, bytes(8)), "'x' is not as long as its shape says"),
        (handmade({"x": tensor("U8", [2**40], 0, 2**40)}), "arrays fill 1,099,511,627,776 of 0 bytes"),
        (handmade({"x": tensor("F32", [1], 4, 8)}, bytes(8)), "'x' starts at byte 4, not 0"),
        (handmade({"x": tensor("F32", [1], 0, 4)}, bytes(8)), "fill 4 of 8 bytes"),
        (handmade({"x": tensor("F32", [1], 0, 4)}, bytes(4)), "'x'"),
        (handmade({"x": tensor("F32", [1], 0, 4)}, bytes(4), index='{"arrays":["x","x"]}'), "named twice"),
        (
            handmade({"x": tensor("F32", [1], 0, 4)}, b"\x00\x00\xc0\x7f", index='{"arrays":["x"]}'),
            "not finite",
        ),
        (handmade({"x": tensor("I8", [1], 0, 1)}, b"1", index='{"arrays":["x"]}'), "cannot be int8 with 1"),
        (
            handmade({"x": tensor("I8", [1, 1], 0, 1)}, b"1", index='{"arrays":["x"]}'),
            r"'x\|scale' is missing",
        ),
    ],
)
def test_what_is_wrong_is_named(frame: bytes, reason: str) -> None:
    with pytest.raises(FrameCorrupt, match=reason):
        decode(frame)


BOMB = zstandard.ZstdCompressor().compress(bytes(2**22))
UNFOLDS = (
    '{"arrays":[{"name":"blocks.0.ffl.up.weight","shape":[8,100000000],"form":"kept"}],'
    '"masks":[["blocks.0.ffl",8]]}'
)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (bytes(2**20 + 1), "1,048,577 bytes is over 1,048,576"),
        (HEAD.pack(b"HGR1", 1, 2**60) + b"x", "decompressed is over"),
        (HEAD.pack(b"HGR1", 1, 2**22) + BOMB, "decompressed is over"),
        (handmade({}, length=2**17), "a header of 131,072 bytes is over 65,536"),
        (handmade({str(i): tensor("F32", [0], 0, 0) for i in range(101)}), "101 arrays are over 100"),
        (
            plain(
                save(
                    {"blocks.0.ffl.up.weight": np.zeros((0, 10**8), np.float32), "m": np.zeros(1, np.uint8)},
                    {"hedgerow": UNFOLDS + "\n"},
                )
            ),
            "3,200,000,008 bytes as float32",
        ),
    ],
)
def test_claims_over_a_limit_are_refused_before_they_cost(frame: bytes, reason: str) -> None:
    with pytest.raises(FrameTooLarge, match=reason):
        decode(frame, Limits(frame_bytes=2**20, header_bytes=2**16, arrays=100))


def test_a_compressed_body_must_claim_what_its_frame_claims() -> None:
    with pytest.raises(FrameCorrupt, match="claims 4194304 bytes, its frame 100"):
        decode(HEAD.pack(b"HGR1", 1, 100) + BOMB)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    with pytest.raises(FrameCorrupt, match="claims"):
        decode(HEAD.pack(b"HGR1", 1, 100) + unsized)
