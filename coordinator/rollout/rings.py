"""Who is in which ring, and what a ring's devices say of a new model: pure, without clock or store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from coordinator.settings import RolloutSettings
from coordinator.store.rollouts import Member
from foundation.artifact import Manifest

BAD = ("refused", "rolled_back")
_SLACK = 1e-9


def rings_of(
    s: RolloutSettings, run: str, agents: Collection[str], able: Collection[str]
) -> list[tuple[str, ...]]:
    """Return the rings of a rollout, none of them empty, each device in one of them.

    `able` are those of `agents` that serve and have the new model: the others are in the last ring. Who
    comes first depends on the run's name and the device's alone, but for canaries that are named.
    """
    order = sorted(set(able) & set(agents), key=lambda agent: _place(run, agent))
    if isinstance(s.canary, int):
        counts = [s.canary]
    else:
        named = [agent for agent in order if agent in s.canary]
        order = named + [agent for agent in order if agent not in s.canary]
        counts = [len(named)]
    counts += [math.ceil(share * len(order) - _SLACK) for share in s.rings]
    rings, done = [], 0
    for count in counts:
        if ring := tuple(order[done:count]):
            rings.append(ring)
            done = count
    rest = tuple(sorted(set(agents) - set(order)))
    if rest:
        rings[-1:] = [(*rings[-1], *rest)] if rings else [rest]
    return rings


def _place(run: str, agent: str) -> bytes:
    return hashlib.sha256(f"{run}/{agent}".encode()).digest()


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the devices that were let go say, together."""

    took: int
    """Devices that tried the new model: it serves, was refused or rolled back."""
    bad: int
    points: float | None
    """Mean change of accuracy in points, on each device's own validation part; `None` where nobody knows."""
    known: int
    """Devices that `points` is of."""

    def breach(self, s: RolloutSettings) -> str | None:
        """Return which threshold is broken, in words; `None` where none is."""
        if self.took and self.bad / self.took > s.errors + _SLACK:
            return (
                f"{self.bad} of {self.took} devices refused the new model or rolled it back;"
                f" {s.errors:.0%} is allowed"
            )
        if self.points is not None and self.points < -s.accuracy - _SLACK:
            return (
                f"the new models are {-self.points:.1f} points below those before them (mean of {self.known}"
                f" devices, each on its own validation part); {s.accuracy:g} is allowed"
            )
        return None


def evidence(members: Sequence[Member], figures: Mapping[str, Manifest]) -> Evidence:
    """Return what members of let-go rings say; `figures` are manifests by SHA-256."""
    tried = [member for member in members if member.state in ("serving", *BAD)]
    changes = [change for member in tried if (change := _points(member, figures)) is not None]
    return Evidence(
        took=len(tried),
        bad=sum(member.state in BAD for member in tried),
        points=math.fsum(changes) / len(changes) if changes else None,
        known=len(changes),
    )


def _points(member: Member, figures: Mapping[str, Manifest]) -> float | None:
    new, old = figures.get(member.model or ""), figures.get(member.before or "")
    if new is None or old is None or new.validation is None or old.validation is None:
        return None
    return 100 * (new.validation - old.validation)


def holds_up(members: Sequence[Member], ring: int, online: Collection[str]) -> str | None:
    """Return what the next ring waits for besides time, in words; `None` where it need not.

    Who is offline is not waited for, unless nobody of the ring serves the model. A ring whose devices are
    all pinned shows nothing, and is passed only if a ring before it did.
    """
    mine = [member for member in members if member.ring == ring]
    pending = [member for member in mine if member.state in ("waiting", "released")]
    here = [member.agent for member in pending if member.agent in online]
    if here:
        return f"{', '.join(here[:3])} to take it"
    if any(member.state == "serving" for member in mine):
        return None
    if pending:
        names = ", ".join(member.agent for member in pending[:3])
        return f"{names}: not here or not serving, and nobody else of the ring has it"
    if any(member.state == "serving" and member.ring < ring for member in members):
        return None
    return "a device to serve it: those of the ring are pinned to another, or did not take it"
