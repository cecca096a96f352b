"""The targets of `bench/fuzz.py`, on what they begin with and on what hypothesis makes of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import fuzz
from bench.fuzz_targets import TARGETS, Target
from foundation.errors import WireError

EXAMPLES = {"artifact": 20, "settings": 40}

pytest.importorskip("onnx")


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_or_refused_and_one_is_taken(name: str) -> None:
    taken = [TARGETS[name](seed) for seed in TARGETS[name].seeds()]
    assert True in taken


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_its_refusals_leaves_a_target(name: str) -> None:
    target = TARGETS[name]
    seeds = [*target.seeds()]

    @settings(
        max_examples=EXAMPLES.get(name, 80), deadline=None, derandomize=True, database=None,
        suppress_health_check=[*HealthCheck],
    )  # fmt: skip
    @given(st.data())
    def read(data: st.DataObject) -> None:
        body = bytearray(data.draw(st.sampled_from(seeds)))
        for _ in range(data.draw(st.integers(0, 4))):
            at = data.draw(st.integers(0, len(body)))
            piece = data.draw(st.binary(max_size=6))
            body[at : at + data.draw(st.integers(0, 6))] = piece
        target(bytes(body))

    read()


def test_what_is_no_refusal_leaves_a_target() -> None:
    def wrong(data: bytes) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        Target(wrong, (WireError,), lambda: iter(()))(b"")


def test_the_script_knows_the_targets_and_says_what_it_needs() -> None:
    assert fuzz._names() == [*TARGETS]
    said = subprocess.run(
        [sys.executable, fuzz.__file__, "--seconds", "1"], capture_output=True, text=True, check=False
    )
    if said.returncode == 2:
        assert "pip install atheris" in said.stderr
