from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import metadata
from export.graph import build
from export.proof import open_session
from foundation.errors import ExportError
from foundation.normalisation import Normalisation
from tests.export.reference import SPECS, trained

SPEC = SPECS["series-cls"]
FACTS = {"agent": "a-1", "labels": '["stehen","gehen","\\u00fc"]', "empty": "", "umlaut": "grün"}
MODEL = build(SPEC, trained(SPEC), Normalisation(), metadata=FACTS)


def test_our_reader_and_onnxruntime_read_what_was_written() -> None:
    assert metadata.read(MODEL) == FACTS
    assert open_session(MODEL).get_modelmeta().custom_metadata_map == FACTS


def test_truncated_model_is_refused() -> None:
    with pytest.raises(ExportError, match="ends inside of a field"):
        metadata.read(MODEL[: len(MODEL) // 2])


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with suppress(ExportError):
        metadata.read(content)


@given(st.integers(0, len(MODEL) - 1), st.integers(0, 7))
def test_any_flipped_bit_is_read_or_refused(at: int, bit: int) -> None:
    flipped = bytearray(MODEL)
    flipped[at] ^= 1 << bit
    with suppress(ExportError):
        metadata.read(bytes(flipped))
