"""Swaps under load: failed and mixed answers, and how the server's memory grows. Bars: 0, 0, 15 %.

python bench/swap.py [--swaps 50] [--rate 200]: a server process, four clients, artifacts published one after
another as fast as they are taken. Nothing here is a time: the figures hold on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.artifacts import family, samples, serving  # noqa: E402

CLIENTS = 4
BAR_GROWTH = 0.15
SETTLED = 5
"""Swaps after which growth is counted: the first ones fill pools that stay."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=200.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), options.swaps, options.rate)
    print(json.dumps(found, indent=1))
    good = found["failed"] == 0 and found["mixed"] == 0 and found["growth"] <= BAR_GROWTH
    print("within the bars" if good else "MISSED a bar")
    return 0 if good else 1


class Clients:
    """Ask for one sample again and again, and check every answer against its version's."""

    def __init__(self, url: str, x: np.ndarray, expected: dict[str, np.ndarray], rate: float) -> None:
        self.counts = {"answers": 0, "failed": 0, "mixed": 0}
        self._url, self._x, self._expected, self._rate = url, x, expected, rate
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        due = time.monotonic()
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.is_set():
                what = self._one(client)
                with self._lock:
                    self.counts[what] += 1
                due += CLIENTS / self._rate
                self._stop.wait(max(0.0, due - time.monotonic()))

    def _one(self, client: httpx.Client) -> str:
        headers = {"Inference-Header-Content-Length": "0", "Accept": "application/json"}
        try:
            answer = client.post("/v2/models/model/infer", content=self._x.tobytes(), headers=headers)
        except httpx.HTTPError as error:
            print(repr(error), file=sys.stderr)
            return "failed"
        if answer.status_code != 200:
            return "failed"
        told = answer.json()
        off = np.abs(told["outputs"][0]["data"] - self._expected[told["model_version"]]).max()
        return "answers" if off < 1e-4 else "mixed"


def measured(folder: Path, swaps: int, rate: float) -> dict[str, float | list[float]]:
    models, root, x = family(folder / "base"), folder / "vault" / "artifacts", samples(1)
    versions = {round: models.variant(round) for round in range(1, swaps + 2)}
    expected = {str(round): models.expected(x, round)[0] for round in versions}
    versions[1].publish(root)
    rss = []
    with serving(root, "--watch", "0.02") as server:
        process = psutil.Process(server.process.pid)
        clients, begun = Clients(server.url, x, expected, rate), time.monotonic()
        for round in range(2, swaps + 2):
            versions[round].publish(root)
            while server.version() != str(round):
                time.sleep(0.02)
            rss.append(process.memory_info().rss / 1e6)
        seconds = time.monotonic() - begun
        clients.end()
    first = rss[min(SETTLED, len(rss) - 1)]
    return {
        **clients.counts,
        "swaps": swaps,
        "answers_per_s": rounded(clients.counts["answers"] / seconds),
        "rss_mb": [rounded(one) for one in rss[:: max(1, swaps // 10)]],
        "growth": rounded(rss[-1] / first - 1, 3),
    }


def rounded(value: float, digits: int = 1) -> float:
    return round(value, digits)


if __name__ == "__main__":
    sys.exit(main())
