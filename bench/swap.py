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


def measured(folder: Path, swaps: int, rate: float) -> dict[str, float]:
    models, root, x = family(folder / "base"), folder / "vault" / "artifacts", samples(1)
    versions = {round: models.variant(round) for round in range(1, swaps + 2)}
    expected = {str(round): models.expected(x, round)[0] for round in versions}
    counts, stop = {"answers": 0, "failed": 0, "mixed": 0}, threading.Event()
    lock = threading.Lock()

    def ask(url: str) -> None:
        headers, due = {"Inference-Header-Content-Length": "0"}, time.monotonic()
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                what = "failed"
                try:
                    answer = client.post("/v2/models/model/infer", content=x.tobytes(), headers=headers)
                    if answer.status_code == 200:
                        told = answer.json()
                        off = np.abs(told["outputs"][0]["data"] - expected[told["model_version"]]).max()
                        what = "answers" if off < 1e-4 else "mixed"
                except httpx.HTTPError as error:
                    print(repr(error), file=sys.stderr)
                with lock:
                    counts[what] += 1
                due += CLIENTS / rate
                stop.wait(max(0.0, due - time.monotonic()))

    versions[1].publish(root)
    rss = []
    with serving(root, "--watch", "0.02") as server:
        process = psutil.Process(server.process.pid)
        threads = [threading.Thread(target=ask, args=(server.url,)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        for round in range(2, swaps + 2):
            versions[round].publish(root)
            while server.version() != str(round):
                time.sleep(0.02)
            rss.append(process.memory_info().rss)
            print(f"\r{round - 1} of {swaps} swaps", end="", file=sys.stderr)
        print(file=sys.stderr)
        seconds = time.monotonic() - begun
        stop.set()
        for thread in threads:
            thread.join()
    first = rss[min(SETTLED, len(rss) - 1)]
    return {
        **counts,
        "swaps": swaps,
        "answers_per_s": round_to(counts["answers"] / seconds),
        "rss_mb_settled": round_to(first / 1e6),
        "rss_mb_end": round_to(rss[-1] / 1e6),
        "growth": round_to(rss[-1] / first - 1, 3),
    }


def round_to(value: float, digits: int = 1) -> float:
    return round(value, digits)


if __name__ == "__main__":
    sys.exit(main())
