"""What a device may be asked to do: phases and terms, a closed vocabulary.

A coordinator describes, an agent carries out. Because the vocabulary is closed and travels with the
assignment, a new strategy reaches agents already in the field; an agent that does not know a term
refuses it by name.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from foundation.frozen import Frozen
from foundation.parameters import EVERYTHING, Role


class Phase(Frozen):
    """A stretch of local training: some roles move, the others stand still.

    When the roles that stand still include everything below some layer, the trainer computes that
    frozen prefix once per sample and caches it.
    """

    train: frozenset[Role] = EVERYTHING
    epochs: int = Field(1, ge=0, le=1000)
    learning_rate: float = Field(1.5e-3, gt=0, le=10)


class Proximal(Frozen):
    """Add mu/2 * |w - w_sent|^2 to the loss, over the roles that arrived (FedProx, Li et al. 2020)."""

    term: Literal["proximal"] = "proximal"
    mu: float = Field(0.01, ge=0)


class ThresholdPruning(Frozen):
    """Learn one threshold per hidden FFL unit and cut units whose importance falls below it.

    Importance of unit j is |up_j| * |down_j| / c with c its expected value at initialisation, so that
    it is about 1 at the start; unit j is kept while importance > threshold. The formulation and the
    defaults are ours (see docs/algorithms.md); the mechanism follows DST (Liu et al. 2020) and SpaFL
    (Kim et al. 2024).
    """

    term: Literal["threshold_pruning"] = "threshold_pruning"
    target: float = Field(0.9, ge=0, lt=1)
    """Share of FFL units per block that should be gone; the controller steers towards it."""
    floor: int = Field(4, ge=1)
    """Units that every block keeps at least, whatever the thresholds say."""
    threshold_rate: float = Field(0.05, gt=0)
    every: int = Field(4, ge=1)
    """Optimizer steps between two threshold updates; the count goes on across rounds."""
    max_drop: float = Field(0.3, gt=0, le=1)
    """Largest share of a block's kept units that one threshold update may cut."""
    regulariser: float = Field(1.0, ge=0)
    """Weight of sum exp(-threshold); scaled down to 0 as a block nears the target."""
    task_gradient: bool = True
    """Whether the task loss moves the thresholds; off leaves the regulariser alone."""
    active: bool = True
    """False during warm-up: masks that arrived still hold, but no threshold moves and nothing is cut."""


Term: TypeAlias = Annotated[Proximal | ThresholdPruning, Field(discriminator="term")]
TERMS: frozenset[str] = frozenset({"proximal", "threshold_pruning"})

Encoding: TypeAlias = Literal["float32", "float16", "int8"]


class LocalWork(Frozen):
    """Everything an agent is asked to do in one round."""

    phases: tuple[Phase, ...] = (Phase(),)
    terms: tuple[Term, ...] = ()
    send: frozenset[Role] = EVERYTHING
    """Roles that come back; an empty set sends metrics and ledger only."""
    change: frozenset[Role] = frozenset()
    """Roles that come back as sent - trained, the direction of a gradient (everything descends); the
    others come back as values."""
    encoding: Encoding = "float32"
    topk: float = Field(1.0, gt=0, le=1)
    """Share of each array in `change` that is sent: the largest magnitudes, the others as zeros."""
    keep: frozenset[Role] = frozenset()
    """Roles of the trained model that become personal: they stay on the device for the next round."""
    batch_size: int = Field(32, ge=1, le=65536)
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = Field(0.9, ge=0, lt=1)
    """First-moment decay: Adam's beta1, or SGD's momentum."""
    beta2: float = Field(0.99, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient."""
    train: bool = True
    """False asks for an evaluation only."""

    def pruning(self) -> ThresholdPruning | None:
        """Return the pruning term, if there is one."""
        return next((t for t in self.terms if isinstance(t, ThresholdPruning)), None)

    def proximal(self) -> Proximal | None:
        """Return the proximal term, if there is one."""
        return next((t for t in self.terms if isinstance(t, Proximal)), None)
