"""Swaps under load, and kills at every step of install and swap, with real processes.

`HEDGEROW_KILLS=100` kills more often.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from edge_agent.serving import canary, owner, record
from edge_agent.serving.predictor import Predictor
from export.folder import GOOD, SERVING, linked, load_artifact
from foundation.parameters import Array
from tests.artifacts import START_S, Family, Server, blind_above, family, samples, serving
from tests.kills import Nursery, written

SWAPS = 50
CLIENTS = 4
RATE_HZ = 200.0
KILLS = int(os.environ.get("HEDGEROW_KILLS", "30"))
RSS_GROWTH = 1.3

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fork, /proc")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("base"))


def until(condition: Callable[[], bool], within_s: float = START_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.01)


# --- under load ---------------------------------------------------------------------------------


@dataclass
class Load:
    """Several clients that ask one after another, so many a second together, and check every answer."""

    url: str
    expected: dict[str, Array]
    """Logits of the one sample by version."""
    x: Array
    answered: list[str] = field(default_factory=list)
    """Versions, in order."""
    failed: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(START_S)

    def _ask(self) -> None:
        headers = {"Inference-Header-Content-Length": "0", "Accept": "application/json"}
        due = time.monotonic()
        with httpx.Client(base_url=self.url, timeout=START_S) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post("/v2/models/model/infer", content=self.x.tobytes(), headers=headers)
                    self._check(answer)
                except httpx.HTTPError as error:
                    self.failed.append(repr(error))
                due = max(due + CLIENTS / RATE_HZ, time.monotonic() - 0.5)
                self._stop.wait(max(0.0, due - time.monotonic()))

    def _check(self, answer: httpx.Response) -> None:
        if answer.status_code != 200:
            self.failed.append(f"{answer.status_code} {answer.text[:200]}")
            return
        told = answer.json()
        version = told["model_version"]
        logits = np.asarray(told["outputs"][0]["data"])
        if np.abs(logits - self.expected[version]).max() > 1e-4:
            self.mixed.append(f"{version}: {logits}")
        self.answered.append(version)


@pytest.mark.slow
def test_no_request_fails_or_is_mixed_in_50_swaps_kills_of_installers_and_rollbacks(
    tmp_path: Path, models: Family
) -> None:
    root, x = tmp_path / "vault" / "artifacts", samples(1) + np.float32(1000)
    versions = {r: models.variant(r) for r in range(1, SWAPS + 2)}
    # A second model for some rounds that is rolled back by itself: it cannot answer what clients send.
    blind = {r: models.variant(r + 1000, change=blind_above(900.0)) for r in range(10, SWAPS, 20)}
    rounds = [*versions, *(r + 1000 for r in blind)]
    load = Load("", {str(r): models.expected(x, r)[0] for r in rounds}, x)
    versions[1].publish(root)
    with serving(root, "--watch", "0.02") as server, Nursery() as nursery:
        load.url = server.url
        process = psutil.Process(server.process.pid)
        early = 0
        with load.running():
            for r in range(2, SWAPS + 2):
                if r % 5 == 0:  # an installer that is killed in the middle of its work
                    at = random.Random(r).randint(1, 12)
                    killed = nursery.install(at, root.parent, [written(versions[r], tmp_path / "pool")])
                    assert killed == signal.SIGKILL
                versions[r].publish(root)
                reached(server, r)
                if r % 7 == 0:  # by hand, to the one before, and then on
                    owner.roll_back(root)
                    until(lambda: len(load.answered) > 0 and server.version() != str(r))  # noqa: B023
                if r in blind:
                    blind[r].publish(root)
                    until(lambda: blind[r].sha256 in record.read(root).barred)  # noqa: B023
                if r == 7:
                    early = process.memory_info().rss
            seen = len(load.answered)
            until(lambda: len(load.answered) >= max(1000, seen + 20))
        late = process.memory_info().rss
        counters = httpx.get(f"{server.url}/metrics").text
    sys.stdout.write(
        f"{len(load.answered)} answers, RSS {early / 1e6:.0f} -> {late / 1e6:.0f} MB over {SWAPS} swaps\n"
    )
    assert load.failed == []
    assert load.mixed == []
    assert len(load.answered) >= 1000
    swaps = int(
        next(line for line in counters.splitlines() if line.startswith("hedgerow_swaps_total")).split()[1]
    )
    assert swaps >= SWAPS
    assert {v.kind for v in record.read(root).verdicts} == {"rolled_back"}
    assert late <= RSS_GROWTH * early


def reached(server: Server, round: int) -> None:
    until(lambda: server.version() == str(round))


# --- SIGTERM ------------------------------------------------------------------------------------


def test_sigterm_answers_every_request_that_was_accepted(tmp_path: Path, models: Family) -> None:
    """A server that says `100 Continue` has accepted the request: it is answered, signal or not."""
    root, x = tmp_path / "artifacts", samples(1)
    models.variant(1).publish(root)
    body = x.tobytes()
    head = (
        "POST /v2/models/model/infer HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        "Inference-Header-Content-Length: 0\r\n"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    ).encode()
    with serving(root) as server:
        port = int(server.url.rpartition(":")[2])
        connections = [socket.create_connection(("127.0.0.1", port), START_S) for _ in range(8)]
        for connection in connections:
            connection.sendall(head)
            assert connection.recv(1000).startswith(b"HTTP/1.1 100")
            connection.sendall(body[:100])
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refused(port))
        for connection in connections:
            connection.sendall(body[100:])
            answer = b""
            while chunk := connection.recv(1 << 16):
                answer += chunk
            assert answer.startswith(b"HTTP/1.1 200")
            assert b'"model_version":"1"' in answer
            connection.close()
        assert server.process.wait(START_S) == 0


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError as error:  # reset: it was still in the queue of the socket that was just closed
        return isinstance(error, ConnectionRefusedError)
    return False


# --- kills at every step ------------------------------------------------------------------------


def test_a_kill_at_any_step_of_install_and_swap_leaves_a_proven_model(
    tmp_path: Path, models: Family, caplog: pytest.LogCaptureFixture
) -> None:
    first = models.variant(1)
    template = tmp_path / "template"
    first.publish(template / "artifacts")
    Predictor(template / "artifacts")
    pool = [written(models.variant(round), tmp_path / "pool") for round in (2, 3, 4)]
    x = samples(2)
    expected = {round: models.expected(x, round) for round in (1, 2, 3, 4)}
    with Nursery() as nursery:
        whole = tmp_path / "whole"
        shutil.copytree(template, whole, symlinks=True)
        assert nursery.life(0, whole, pool) == 0, "without a kill it comes to its end"
        steps = int((whole / "steps").read_text())
        assert record.read(whole / "artifacts").barred == (models.variant(4).sha256,)
        points = random.Random(1).sample(range(1, steps + 1), min(KILLS, steps))
        served = set()
        for at in points:
            vault = tmp_path / f"v{at}"
            shutil.copytree(template, vault, symlinks=True)
            assert nursery.life(at, vault, pool) == signal.SIGKILL
            served.add(proven(vault, x, expected))
            shutil.rmtree(vault)
    sys.stdout.write(f"killed at {len(points)} of {steps} steps; rounds {sorted(served)} served afterwards\n")
    assert len(served) > 1, "the kills were spread over several swaps"
    assert not caplog.records or "taken for" not in caplog.text, "no file was torn"


def proven(vault: Path, x: Array, expected: dict[int, Array]) -> int:
    """Check that the vault serves, as the next process finds it, and return which round."""
    root = vault / "artifacts"
    if (root / record.FILE).exists():
        record.Record.model_validate_json((root / record.FILE).read_bytes())
    if (vault / canary.FILE).exists():
        assert canary.parse((vault / canary.FILE).read_bytes()) is not None
    good = linked(root, GOOD)
    assert good is not None
    load_artifact(root / good)
    predictor = Predictor(root)
    found = predictor.predict(x)
    np.testing.assert_allclose(found.logits, expected[found.manifest.round], rtol=0, atol=1e-4)
    assert linked(root, SERVING) == found.manifest.sha256
    return found.manifest.round


@pytest.mark.slow
def test_a_server_killed_at_random_comes_back_with_a_proven_model(tmp_path: Path, models: Family) -> None:
    root, x = tmp_path / "artifacts", samples(1)
    models.variant(1).publish(root)
    rng = random.Random(3)
    for turn in range(5):
        with serving(root, "--watch", "0.01") as server:
            assert server.process.poll() is None
            told = httpx.post(
                f"{server.url}/v2/models/model/infer",
                content=x.tobytes(),
                headers={"Inference-Header-Content-Length": "0", "Accept": "application/json"},
            ).json()
            logits = models.expected(x, int(told["model_version"]))[0]
            np.testing.assert_allclose(told["outputs"][0]["data"], logits, rtol=0, atol=1e-4)
            for k in range(rng.randint(1, 4)):
                models.variant(10 * turn + k + 2).publish(root)
                time.sleep(rng.uniform(0, 0.05))  # a random point is the point
            server.process.kill()
            server.process.wait(START_S)
