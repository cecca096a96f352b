"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# One thread for arithmetic, here and in every process that a test starts: two on two busy cores wait for each
# other (a pass of 0.4 s took 10 s beside other tests). torch, numpy and onnxruntime read these when imported.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores: tests with real processes wait more than they work."""
    return len(os.sched_getaffinity(0)) + 1


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
