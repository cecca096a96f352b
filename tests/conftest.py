"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, through the pytest plugin that ships with anyio."""
    return "asyncio"


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data sets; skips with a reason where there is none."""
    folder = os.environ.get("HEDGEROW_DATA")
    if not folder:
        pytest.skip("HEDGEROW_DATA is not set: no real data sets here")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"HEDGEROW_DATA={folder} is not a folder")
    return path


def require_service(present: bool, what: str) -> None:
    """Skip where a service is missing, or fail where HEDGEROW_REQUIRE_SERVICES=1 says it must be there."""
    if present:
        return
    if os.environ.get("HEDGEROW_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what} is required here (HEDGEROW_REQUIRE_SERVICES=1) and missing")
    pytest.skip(f"no {what} on this machine")
