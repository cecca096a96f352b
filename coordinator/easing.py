"""Less work for a device that cannot afford all of it: fewer threads and local epochs, more units to go."""

from __future__ import annotations

from pydantic import Field

from foundation.frozen import Frozen
from foundation.parameters import Role
from foundation.work import ImportancePruning, LocalWork, Phase, Term, ThreadLimit, ThresholdPruning


class Ease(Frozen):
    """How a device is asked for less; kept with the round, so that a restart asks for the same."""

    epochs: int | None = Field(None, ge=1)
    """Local epochs over all phases, at most; a phase that had any keeps one."""
    gone: float | None = Field(None, ge=0, lt=1)
    """Share of the FFL units that should be gone, at least."""
    threads: int | None = Field(None, ge=1)
    """Threads of arithmetic, at most; the device's own bound stays."""
    reason: str
    """In words."""


def epochs_of(work: LocalWork) -> int:
    """Return the local epochs of all phases together; an evaluation has none."""
    return sum(phase.epochs for phase in work.phases) if work.train else 0


def fewest_epochs(work: LocalWork) -> int:
    """Return how few epochs are left at most easing: one in every phase that had any."""
    return sum(phase.epochs > 0 for phase in work.phases) if work.train else 0


def gone_of(work: LocalWork) -> float | None:
    """Return the share of FFL units that the work wants gone; `None` for work that moves no units."""
    term = work.pruning() or work.importance()
    if term is None or not work.train or (isinstance(term, ThresholdPruning) and not term.active):
        return None
    return term.target if isinstance(term, ThresholdPruning) else term.ratio


def eased(work: LocalWork, ease: Ease) -> LocalWork:
    """Return the work made smaller; the same work and ease give the same result."""
    phases = work.phases if ease.epochs is None else trimmed(work.phases, ease.epochs)
    moving = sum(phase.epochs for phase in phases if Role.FFL in phase.train)
    terms = tuple(_sparser(term, ease.gone, moving) for term in work.terms)
    if ease.threads is not None:
        terms += (ThreadLimit(most=ease.threads),)
    return work.model_copy(update={"phases": phases, "terms": terms})


def trimmed(phases: tuple[Phase, ...], epochs: int) -> tuple[Phase, ...]:
    """Return the phases with at most so many epochs together, taken from the longest, of equals the last.

    A phase that had an epoch keeps one, as what it alone moves would otherwise stand still.
    """
    left = [phase.epochs for phase in phases]
    while sum(left) > epochs and max(left) > 1:
        longest = max(range(len(left)), key=lambda i: (left[i], i))
        left[longest] -= 1
    return tuple(phase.model_copy(update={"epochs": n}) for phase, n in zip(phases, left, strict=True))


def _sparser(term: Term, gone: float | None, moving: int) -> Term:
    """Return a pruning term with a larger share to go; importance is measured while FFLs still move."""
    if isinstance(term, ThresholdPruning) and gone is not None:
        return term.model_copy(update={"target": max(term.target, gone)})
    if isinstance(term, ImportancePruning):
        ratio = term.ratio if gone is None else max(term.ratio, gone)
        return term.model_copy(update={"ratio": ratio, "epochs": min(term.epochs, moving)})
    return term
