"""Peak memory of a coordinator's hypernetwork with many devices, full heads against factored ones.

    python bench/hypernet_memory.py                          1,000 devices, width 128, depth 2: minutes
    python bench/hypernet_memory.py --depth 6 --devices 200
    python bench/hypernet_memory.py --json                   figures for machines

Each line is a process of its own, which does what a round asks of the hypernetwork: begin, enroll everybody,
generate everybody's tensors, one product for the round from changes that come one at a time, Adam on network
and embeddings, and the snapshot. What devices send beside that, and the frames of a round, are not in it.
Ends with 1 when the factored hypernetwork of a strategy takes more than 1 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LIMIT_MB = 1000.0
CASES = (("fedtp", 0), ("fedtp", 8), ("pfedhn", 0), ("pfedhn", 8))
GENERATED_AT_ONCE = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("STRATEGY", "RANK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        strategy, rank = options.one
        print(json.dumps(measured(strategy, int(rank), options.devices, options.width, options.depth)))
        return 0
    sizes = [f"--{name}={getattr(options, name)}" for name in ("devices", "width", "depth")]
    results = []
    for strategy, rank in CASES:
        command = [sys.executable, __file__, "--one", strategy, str(rank), *sizes]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout))
        if not options.json:
            print(line(results[-1], results), flush=True)
    if options.json:
        print(json.dumps(results, indent=2))
    return int(any(r["peak_mb"] > LIMIT_MB for r in results if r["rank"]))


def line(result: dict[str, Any], before: Sequence[dict[str, Any]]) -> str:
    """One result in words, with its ratio to the full heads of the same strategy."""
    full = next(r for r in before if r["strategy"] == result["strategy"] and not r["rank"])
    heads = f"rank {result['rank']}" if result["rank"] else "full"
    text = (
        f"{result['strategy']:7} {heads:7} {result['network_mb']:8.1f} MB of hypernetwork,"
        f" {result['snapshot_mb']:8.1f} MB of snapshot, peak {result['peak_mb']:7.0f} MB"
        f" ({result['bare_mb']:.0f} MB before), {result['seconds']:5.1f} s"
    )
    if result["rank"]:
        text += f"; hypernetwork 1/{full['network_mb'] / result['network_mb']:.1f} of full"
        own = result["peak_mb"] - result["bare_mb"]
        text += f", peak over bare 1/{(full['peak_mb'] - full['bare_mb']) / own:.1f}"
    return text


def measured(name: str, rank: int, devices: int, width: int, depth: int) -> dict[str, Any]:
    """Do a round's work with one strategy and return sizes and the peak of this process."""
    from coordinator import hypernet
    from coordinator.hypernet import Adam
    from coordinator.strategies.base import State, load_strategy
    from foundation.messages import AgentCard
    from foundation.parameters import Array, Layout, Parameters
    from foundation.spec import ModelSpec, initial_parameters

    class Changes(Sequence[Mapping[str, Array]]):
        """Changes as they would come from the store: one at a time, and then gone."""

        def __init__(self, layout: Layout) -> None:
            self.layout = layout

        def __len__(self) -> int:
            return devices

        def __getitem__(self, i: Any) -> Any:
            rng = np.random.default_rng(i)
            return {n: rng.standard_normal(shape, np.float32) * 0.01 for n, shape in self.layout}

    bare, started = peak_mb(), time.perf_counter()
    spec = ModelSpec(input="image", shape=(1, 28, 28), classes=10, width=width, depth=depth, patch=7)
    strategy: Any = load_strategy(name, {"rank": rank})
    state = strategy.begin(initial_parameters(spec, 0), 0)
    for i in range(devices):
        card = AgentCard(agent=f"d{i}", version="0", profile="unknown-linux", examples=100)
        state = strategy.enroll(state, card, 0)
    agents = sorted(state.private)
    rows = np.stack([state.private[agent]["embedding"] for agent in agents])
    network = state.shared.under("hypernet/")
    for start in range(0, devices, GENERATED_AT_ONCE):
        generated = hypernet.generate(network, rows[start : start + GENERATED_AT_ONCE])
    changes = Changes(generated[0].layout)
    gradient, row_gradient = hypernet.pull_back(network, rows, changes, [1 / devices] * devices)
    adam = Adam(strategy.hypernet_rate)
    network, moments = adam.step(network, gradient, state.shared.under("moments/"))
    del gradient
    shared = state.shared.updated(network.prefixed("hypernet/")).updated(moments.prefixed("moments/"))
    private = {}
    for agent, row, g in zip(agents, rows, row_gradient, strict=True):
        moved, own = adam.step(Parameters({"embedding": row}), {"embedding": g}, Parameters())
        private[agent] = moved.updated(own.prefixed("moments/"))
    snapshot = State(1, shared, private).to_bytes()
    return {
        "strategy": name,
        "rank": rank,
        "devices": devices,
        "width": width,
        "depth": depth,
        "generated_values": generated[0].size,
        "network_mb": network.nbytes / 1e6,
        "snapshot_mb": len(snapshot) / 1e6,
        "bare_mb": bare,
        "peak_mb": peak_mb(),
        "seconds": time.perf_counter() - started,
    }


def peak_mb() -> float:
    """Largest resident memory of this process so far, MB; Linux counts it in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    sys.exit(main())
