"""Bytes by role are those that a frame really has."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.report import part_of, role_bytes
from foundation.codec import array_bytes, encode
from foundation.errors import FrameCorrupt
from foundation.parameters import Parameters

RNG = np.random.default_rng(0)
ARRAYS = Parameters(
    {
        "embed.weight": RNG.standard_normal((6, 4)).astype(np.float32),
        "blocks.0.attention.qkv.weight": RNG.standard_normal((12, 4)).astype(np.float32),
        "blocks.0.ffl.up.weight": RNG.standard_normal((8, 4)).astype(np.float32),
        "blocks.0.ffl.up.bias": RNG.standard_normal(8).astype(np.float32),
        "blocks.0.ffl.down.weight": RNG.standard_normal((4, 8)).astype(np.float32),
        "blocks.0.ffl.threshold": RNG.standard_normal(8).astype(np.float32),
        "head.bias": RNG.standard_normal(10).astype(np.float32),
    }
)
MASKS = {"blocks.0.ffl": np.array([True, False, True, False, False, True, False, False])}


def test_float32_takes_four_bytes_a_value() -> None:
    assert role_bytes(encode("{}", ARRAYS, {})) == {
        "ffl": 4 * (32 + 8 + 32),
        "attention": 4 * 48,
        "rest": 4 * 24,
        "head": 4 * 10,
        "threshold": 4 * 8,
    }


def test_only_kept_units_count_and_their_mask_beside_them() -> None:
    found = role_bytes(encode("{}", ARRAYS, MASKS))
    assert found["ffl"] == 4 * (3 * 4 + 3 + 4 * 3)
    assert found["mask"] == 1
    assert found["threshold"] == 4 * 8


def test_int8_takes_a_byte_a_value_and_a_scale_a_row() -> None:
    found = role_bytes(encode("{}", ARRAYS, {}, encoding="int8"))
    assert found["attention"] == 48 + 4 * 12
    assert found["head"] == 4 * 10  # one axis: always float32


def test_a_sparse_change_counts_its_values_and_its_bitmap() -> None:
    change = np.zeros((64, 64), np.float32)
    change[:4, 0] = 1.0
    arrays = Parameters({"blocks.0.attention.qkv.weight": change})
    assert role_bytes(encode("{}", arrays, {})) == {"attention": 4 * 4 + 64 * 64 // 8}


def test_compression_does_not_change_the_count() -> None:
    ones = Parameters({"head.weight": np.ones((100, 100), np.float32)})
    frame = encode("{}", ones, {})
    assert len(frame) < 2000
    assert role_bytes(frame) == {"head": 40_000}


def test_prefixed_and_nameless_arrays_count_as_what_they_are_for() -> None:
    assert part_of("teacher/blocks.0.ffl.up.weight") == "teacher"
    assert part_of("hypernet/head/blocks.0.attention.qkv.weight.bias") == "hypernetwork"
    assert part_of("flat") == "flat"
    assert part_of("embedding") == "embedding"
    assert part_of("blocks.0.ffl|mask") == "mask"
    assert part_of("blocks.0.norm1.weight") == "rest"


@pytest.mark.parametrize("frame", [b"", b"HGR1", encode("{}", ARRAYS, {})[:40], b"HGR1" + bytes(60)])
def test_what_has_no_header_is_said_to_have_none(frame: bytes) -> None:
    with pytest.raises(FrameCorrupt):
        array_bytes(frame)
