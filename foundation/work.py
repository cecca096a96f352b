"""What a device may be asked to do: phases and terms, a closed vocabulary.

A coordinator describes, an agent carries out. Because the vocabulary is closed and travels with the
assignment, a new strategy reaches agents already in the field; an agent that does not know a term
refuses it by name.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import Field

from foundation.frozen import Frozen
from foundation.parameters import EVERYTHING, Role, role_of

T = TypeVar("T")


class Phase(Frozen):
    """A stretch of local training: some roles move, the others stand still.

    When the roles that stand still include everything below some layer, the trainer computes that
    frozen prefix once per sample and caches it.
    """

    train: frozenset[Role] = EVERYTHING
    epochs: int = Field(1, ge=0, le=1000)
    learning_rate: float = Field(1.5e-3, gt=0, le=10)
    enough: float = Field(0.0, ge=0)
    """Mean training loss of an epoch after which this phase needs no further one; 0 never is enough."""


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
    importance: Literal["norms", "random"] = "norms"
    """`random` is a control: every unit has a drawn importance, the same on all devices, so that as many
    units go at the same time, and which ones is chance."""
    active: bool = True
    """False during warm-up: masks that arrived still hold, but no threshold moves and nothing is cut."""


class ImportancePruning(Frozen):
    """Train, measure how much every FFL unit matters, cut the least important share, and train on.

    After "Adaptive Model Pruning and Personalization for Federated Learning over Wireless Networks" (arXiv
    2309.01816), whose text could not be read; pruning whole units, and measuring after epochs, is our choice.
    """

    term: Literal["importance_pruning"] = "importance_pruning"
    ratio: float = Field(0.5, ge=0, lt=1)
    """Share of the units of every block that is cut."""
    score: Literal["change", "change_gradient", "magnitude"] = "change"
    """What a unit's importance is: |w - w_sent|, |<w, gradient>| of the last step, or |up| * |down|."""
    epochs: int = Field(1, ge=0, le=1000)
    """Epochs in which FFLs move before the importance is measured."""
    floor: int = Field(1, ge=1)
    """Units that every block keeps at least."""


class Distillation(Frozen):
    """Learn from a teacher as well: alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy.

    The teacher's parameters arrive under `teacher/`; its spec is the assignment's. It teaches as it was sent,
    is then trained for `epochs` itself, and its change goes back (MH-pFedHNGD, arXiv 2507.22330).
    """

    term: Literal["distillation"] = "distillation"
    alpha: float = Field(0.2, ge=0, le=1)
    temperature: float = Field(15.0, gt=0)
    epochs: int = Field(1, ge=0, le=1000)


class EmbeddingFit(Frozen):
    """Cold start: find the embedding whose generated parameters suit this device; nothing else moves.

    The hypernetwork arrives under `hypernet/`, the embedding to start from as `embedding`, which is all that
    goes back. The phases of the work follow, from the model that was found.
    """

    term: Literal["embedding_fit"] = "embedding_fit"
    epochs: int = Field(5, ge=1, le=1000)
    learning_rate: float = Field(0.05, gt=0)


class Blend(Frozen):
    """Start from a mixture of what arrived and what this device kept: (1 - g) w_sent + g w_own.

    The gates g, one a role, are the device's own. They begin at `gates` and follow the gradient of the loss
    on the validation part, which nothing else is trained on: one step a round, then the work starts from the
    mixture. Ours; weights for parts of a model are pFedLA's idea (arXiv 2205.03993), learned there above.
    """

    term: Literal["blend"] = "blend"
    gates: dict[Role, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Gate of each role before anything is known; a role without one takes what arrived."""
    rate: float = Field(0.25, ge=0, le=1)
    """Largest step of a gate in a round; 0 leaves them where they are."""
    samples: int = Field(128, ge=1)
    """Validation samples that are asked each round, at most."""


class ThreadLimit(Frozen):
    """Use at most so many threads of arithmetic; a device whose own bound is lower keeps to that.

    The same seed and number of threads give the same bits; another number may round otherwise.
    """

    term: Literal["threads"] = "threads"
    most: int = Field(1, ge=1, le=4096)


Term: TypeAlias = Annotated[
    Proximal | ThresholdPruning | ImportancePruning | Distillation | EmbeddingFit | Blend | ThreadLimit,
    Field(discriminator="term"),
]
TERMS: frozenset[str] = frozenset(
    {
        "proximal",
        "threshold_pruning",
        "importance_pruning",
        "distillation",
        "embedding_fit",
        "blend",
        "threads",
    }
)
ABILITIES: frozenset[str] = TERMS | {"flat_layout", "own_names", "initial_model"}
"""What an agent of this version can be asked for, by the names that its card tells."""

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
    own: tuple[str, ...] = ()
    """Prefixes of names that are personal whatever their role: kept, and never sent."""
    initial: bool = False
    """Nothing came: the initial parameters, which every device can draw, stand for what was sent."""
    layout: Literal["named", "flat"] = "named"
    """`flat`: the model is the device's own, and the coordinator knows its size alone. What arrives as `flat`
    (size,) is its weights in their order, and `flat` as sent - trained is what comes back."""
    offset: bool = True
    """With `flat`: what arrives is added to the initial parameters that the device draws for its model."""
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
        return self._term(ThresholdPruning)

    def proximal(self) -> Proximal | None:
        """Return the proximal term, if there is one."""
        return self._term(Proximal)

    def importance(self) -> ImportancePruning | None:
        """Return the importance pruning term, if there is one."""
        return self._term(ImportancePruning)

    def distillation(self) -> Distillation | None:
        """Return the distillation term, if there is one."""
        return self._term(Distillation)

    def embedding_fit(self) -> EmbeddingFit | None:
        """Return the embedding fit, if there is one."""
        return self._term(EmbeddingFit)

    def blend(self) -> Blend | None:
        """Return the blend, if there is one."""
        return self._term(Blend)

    def thread_limit(self) -> ThreadLimit | None:
        """Return the most threads that are asked for, if that is bounded."""
        return self._term(ThreadLimit)

    def _term(self, kind: type[T]) -> T | None:
        return next((term for term in self.terms if isinstance(term, kind)), None)

    def needs(self) -> frozenset[str]:
        """Return the abilities that an agent must have to do this, among `ABILITIES`."""
        needed: set[str] = {term.term for term in self.terms}
        needed |= {"flat_layout"} if self.layout == "flat" else set()
        needed |= {"initial_model"} if self.initial else set()
        return frozenset(needed | ({"own_names"} if self.own else set()))

    def keeps(self, name: str) -> bool:
        """Whether the array of that name stays on the device for the next round."""
        return role_of(name) in self.keep or name.startswith(self.own)

    def sends(self, name: str, sent: Container[str]) -> bool:
        """Whether the trained array of that name goes back, when the names in `sent` had come."""
        role = role_of(name)
        known = self.initial or role not in self.change or name in sent
        return role in self.send and not name.startswith(self.own) and known
