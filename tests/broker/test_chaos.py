"""A sample of the kill matrix: real processes are killed as a round enters a stage, and come to the same end.

All of it, and `HEDGEROW_KILLS` random instants, with HEDGEROW_LONG=1; `hedgerow doctor --chaos` is the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from edge_agent.enrolment import ENROLMENT
from foundation.errors import HedgerowError
from hedgerow.broker import find_broker
from hedgerow.chaos import Matrix
from hedgerow.chaos_bed import AGENTS, VICTIM
from hedgerow.chaos_check import ending
from hedgerow.chaos_plan import Case, plan
from tests.broker.conftest import LONG
from tests.conftest import require_service

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(900)]

SAMPLE = [  # an agent killed in training is in test_kills.py
    Case(("coordinator",), "absorb"),
    Case(("serving", "broker"), "swap"),
]
ALL = plan(kills=int(os.environ.get("HEDGEROW_KILLS", "30")), seed=0, quick=False, broker=True)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    require_service(find_broker() is not None, "MQTT broker")
    whole = Matrix(tmp_path_factory.mktemp("chaos"), None, seed=0)
    try:
        whole.begin(twice=False)
        yield whole
    finally:
        whole.close()


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    require_service(find_broker() is not None, "MQTT broker")
    whole = Matrix(tmp_path_factory.mktemp("chaos-sealed"), None, seed=0, sealed=True)
    try:
        whole.begin(twice=False)
        assert all((whole.bed.vault(name) / ENROLMENT).exists() for name in AGENTS)
        yield whole
    finally:
        whole.close()


@pytest.mark.parametrize(
    "case", [*SAMPLE, *(pytest.param(case, marks=LONG) for case in ALL if case not in SAMPLE)], ids=str
)
def test_what_is_killed_comes_back_to_the_same_end(matrix: Matrix, case: Case) -> None:
    result = matrix.result(case)
    assert result.verdict == "same", result
    assert result.hit or case.instant is not None


@LONG
@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_same_with_seals(joined: Matrix, case: Case) -> None:
    result = joined.result(case)
    assert result.verdict == "same", result


def test_what_was_lost_is_named(matrix: Matrix) -> None:
    bed = matrix.bed
    personal = bed.vault(VICTIM) / "personal" / matrix.run
    kept = {file: file.read_bytes() for file in personal.iterdir()}
    for file, content in kept.items():
        file.write_bytes(content[:-1])
    with pytest.raises(HedgerowError, match=f"{VICTIM} lost its personal parameters"):
        ending(bed, matrix.run)
    for file, content in kept.items():
        file.write_bytes(content)
    ending(bed, matrix.run)
    with pytest.raises(HedgerowError, match="its rounds are"):
        ending(bed, "never")
