"""Fixtures that all tests share."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# One thread for arithmetic, here and in every process that a test starts: two on two busy cores wait for each
# other (a pass of 0.4 s took 10 s beside other tests). torch, numpy and onnxruntime read these when imported.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from tests import postgres  # noqa: E402

if TYPE_CHECKING:  # there are tests where nothing of the coordinator's is installed
    from coordinator.store.place import S3Settings

LONG = pytest.mark.skipif(
    not os.environ.get("HEDGEROW_LONG"),
    reason="much like another one: HEDGEROW_LONG=1 runs it",
)


@pytest.hookimpl(optionalhook=True)
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


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[postgres.Cluster]:
    """A running PostgreSQL of this session's own; skips with a reason where there is none."""
    if postgres.program("initdb") is None:
        pytest.skip("no PostgreSQL on this machine")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("no psycopg here: pip install 'hedgerow[postgres]'")
    with postgres.cluster() as running:
        yield running


@pytest.fixture
def database(postgres_cluster: postgres.Cluster) -> str:
    """The URL of a new, empty database."""
    return postgres_cluster.database()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3-compatible store inside this process, with real HTTP."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("no moto here: pip install 'moto[s3,server]'")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> S3Settings:
    """A new, empty bucket."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests-own-secret")
    from coordinator.store.place import S3Settings

    settings = S3Settings(
        bucket=f"b-{uuid.uuid4().hex}", endpoint=s3_server, prefix="fleet/one", region="us-east-1"
    )
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=settings.bucket)
    return settings
