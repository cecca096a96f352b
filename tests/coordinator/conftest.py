"""Visits to the page: of a coordinator that has just begun, and of one in its sixth round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.coordinator.visiting import Prepared, Visit, visiting


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("prepared"), filled=True)


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("begun"), filled=False)


@pytest.fixture
def visit(tmp_path: Path, begun: Prepared) -> Iterator[Visit]:
    """Nobody is here yet."""
    with visiting(tmp_path / "bare", begun) as visit:
        yield visit


@pytest.fixture
def filled(tmp_path: Path, prepared: Prepared) -> Iterator[Visit]:
    """Five rounds are closed and four agents are at work in the sixth."""
    with visiting(tmp_path / "filled", prepared) as visit:
        yield visit


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory, begun: Prepared) -> Iterator[Visit]:
    """As `visit`, for tests that look and change nothing: they share it."""
    with visiting(tmp_path_factory.mktemp("bare"), begun) as visit:
        yield visit


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory, prepared: Prepared) -> Iterator[Visit]:
    """As `filled`, for tests that look and change nothing: they share it."""
    with visiting(tmp_path_factory.mktemp("shown"), prepared) as visit:
        yield visit
