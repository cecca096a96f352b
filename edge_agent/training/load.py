"""`python -m edge_agent.training.load`: trains the product's transformer on drawn data until it is ended.

The load that a calibration is judged by: what an agent really does, on as many threads as it would use.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

import numpy as np

from edge_agent.memory import hold_little
from edge_agent.samples import LocalData, Part
from edge_agent.training.trainer import Checkpoint, Progress, Task, carry_out, use_threads
from foundation.energy import Stage
from foundation.normalisation import Normalisation
from foundation.spec import ModelSpec, initial_parameters
from foundation.work import LocalWork, Phase

SPEC = ModelSpec(input="image", shape=(1, 28, 28), classes=10, width=64, depth=2, heads=4, patch=4)
EXAMPLES = 512
EPOCHS = 1000


class Loud:
    """Trainer hooks that say `ready` with the first progress, and keep nothing."""

    def __init__(self) -> None:
        self._said = False

    def stage(self, stage: Stage) -> contextlib.AbstractContextManager[None]:
        """Open nothing: nobody measures here."""
        return contextlib.nullcontext()

    def progress(self, progress: Progress) -> None:
        """Say once that training runs."""
        if not self._said:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            self._said = True

    def cancelled(self) -> bool:
        """Go on until killed."""
        return False

    def pause(self) -> float:
        """Give way to nobody."""
        return 0.0

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep nothing."""

    def load(self) -> Checkpoint | None:
        """Begin anew."""
        return None


def task(seed: int) -> Task:
    """Return much training of the product's model on drawn images."""
    rng = np.random.default_rng(seed)

    def part(count: int) -> Part:
        x = rng.normal(size=(count, *SPEC.shape)).astype(np.float32)
        return Part(x, rng.integers(0, SPEC.classes, count))

    train, few = part(EXAMPLES), part(16)
    labels = tuple(map(str, range(SPEC.classes)))
    learned = Normalisation.learn(train.x, SPEC.input)
    data = LocalData(SPEC.input, SPEC.shape, labels, train, few, few, learned)
    start = initial_parameters(SPEC, seed)
    work = LocalWork(phases=(Phase(epochs=EPOCHS, learning_rate=1e-4),))
    return Task(SPEC, work, start, start, data, seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Train until killed."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent.training.load", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    hold_little()
    use_threads(arguments.threads)
    hooks = Loud()
    seed = 0
    while True:
        carry_out(task(seed), hooks)
        seed += 1


if __name__ == "__main__":
    sys.exit(main())
