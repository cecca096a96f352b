"""What the kill matrix kills, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

Who = Literal["agent", "coordinator", "broker", "serving"]
WHO: tuple[Who, ...] = ("agent", "coordinator", "broker", "serving")
STAGES = ("offer", "download", "train", "prune", "export", "upload", "absorb", "snapshot", "swap")
"""In the order in which a round goes through them; points of `foundation/halt.py`."""
OF_COORDINATOR = frozenset({"offer", "absorb", "snapshot"})
"""Stages that happen in the coordinator; the others happen on the device."""
ROUND = 2
"""The round whose stages are hit: something is there from before, and something comes after."""
QUICK: tuple[tuple[tuple[Who, ...], str], ...] = (
    (("agent",), "train"),
    (("agent",), "upload"),
    (("coordinator",), "absorb"),
    (("coordinator",), "snapshot"),
    (("broker",), "upload"),
    (("serving",), "swap"),
    (("agent", "coordinator"), "train"),
    (("coordinator", "broker"), "upload"),
)
"""The sample: what has gone wrong elsewhere most often."""
QUICK_KILLS = 2


@dataclass(frozen=True, slots=True)
class Case:
    """Who is killed, and when: as a stage is entered, or at a share of the unbroken run's time."""

    who: tuple[Who, ...]
    stage: str | None = None
    instant: float | None = None
    """Share of the unbroken run's seconds, 0 to 1."""

    @property
    def kind(self) -> Literal["single", "pair", "instant"]:
        """Which part of the matrix this is of."""
        if self.stage is None:
            return "instant"
        return "single" if len(self.who) == 1 else "pair"

    def __str__(self) -> str:
        """Return it in words."""
        when = f"at {self.stage}" if self.instant is None else f"after {self.instant:.0%} of the run"
        return f"{' and '.join(self.who)} {when}"


def plan(*, kills: int, seed: int, quick: bool, broker: bool) -> list[Case]:
    """Return all cases: every process at every stage, every pair, and `kills` instants drawn from `seed`.

    `quick` takes a sample of the first two. Without `broker` it is not ours to kill.
    """
    here: Sequence[Who] = [who for who in WHO if broker or who != "broker"]
    if quick:
        found = [Case(who, stage) for who, stage in QUICK if set(who) <= set(here)]
    else:
        found = [Case((who,), stage) for stage in STAGES for who in here]
        found += [Case(pair, stage) for stage in STAGES for pair in combinations(here, 2)]
    rng = np.random.default_rng(seed)
    for _ in range(kills):
        who = here[int(rng.integers(len(here)))]
        found.append(Case((who,), instant=round(float(rng.uniform(0.0, 0.98)), 4)))
    return found
